"""Write the mean curves over the seeds of each group of runs, and a table of the groups, for TensorBoard.

TensorBoard lists runs by their directories, but the names of run directories do not say what they contain. Therefore, a folder
`tensorboard` is added to the folder of a sweep. It has a directory for each group, which is named after the group's rule and
settings and contains one event file. The timestamps in the event files are the steps, so the same runs give byte-identical files.
"""

# The classes of protobuf modules are created at import.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.errors import RunDirectoryError
from fa_bench.objectives.scores import as_records
from fa_bench.report.files import report_lock
from fa_bench.report.groups import finished_by_seed, group_labels, group_runs, in_order
from fa_bench.report.numbers import known, mean, std
from fa_bench.report.runs import Run, read_run
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.readers import scalar_keys
from fa_bench.utils.files import atomic, output_errors, resolved, temporary_name, write_text

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

#: The name of the folder with the mean curves, of the file in it that records the groups, and of the event file of a group.
FOLDER, RECORD, EVENTS = "tensorboard", ".fa_bench.json", "events.out.tfevents.0000000000.fa_bench.mean"
#: The maximum number of characters in a directory's name; file systems allow 255 bytes.
_MAX_NAME = 120
#: The characters allowed in the names of directories, which end with the seed or the number of seeds in parentheses.
_CHARACTERS = r"\w.,=+()\[\]@ -"
_GROUP_NAME = re.compile(rf"[{_CHARACTERS}]+\)")

#: {tag: {step: value}}
Curves = dict[str, dict[int, float]]


def write_mean_curves(run_dirs: Iterable[Path], folder: Path) -> list[str]:
    """Write mean curves to the `tensorboard` folder in `folder`. They cover the finished runs in `run_dirs` that log to
    TensorBoard.

    Each file is replaced atomically, and groups that no longer exist are removed. Nothing is written if there is no such run.

    Returns:
        Lines for the user: where the curves are, and which runs are left out because a record is damaged.

    Raises:
        RunDirectoryError: files that fa_bench did not write are in the way, or another process is writing a report.
        OutputError: the folder cannot be written.
    """
    runs, lines = [], []
    for directory in {resolved(path): path for path in run_dirs}.values():
        try:
            run = read_run(directory)
            if run is not None and run.finished and _logs_to_tensorboard(run):
                _ = run.measurements
                runs.append(run)
        except RecordError as error:
            lines.append(f"not in the mean curves: {error}")
    if not runs:
        return lines
    contents = dict(_groups(in_order(runs)))
    with report_lock(folder):
        _write(folder / FOLDER, contents)
    return [*lines, f"mean curves: tensorboard --logdir {folder / FOLDER}"]


def check_mean_curves(folder: Path) -> None:
    """Raise a RunDirectoryError, before training starts, if the mean curves could not be written to this folder."""
    _recorded(folder / FOLDER)


def _logs_to_tensorboard(run: Run) -> bool:
    loggers = run.config.get("loggers")
    return isinstance(loggers, list) and any(str(logger).partition(":")[0] == "tensorboard" for logger in loggers)


# ------------------------------------------------------------------------------------------------ content
def _groups(runs: Sequence[Run]) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each group's directory and the content of its event file."""
    from fa_bench.config.labels import swept_keys

    groups = group_runs(runs)
    labels = group_labels(groups)
    swept = swept_keys(members[0].config for members in groups.values())
    names: set[str] = set()
    for group, members in groups.items():
        by_seed = finished_by_seed(members)
        count = f"mean of {len(by_seed)} seeds" if len(by_seed) > 1 else f"seed {next(iter(by_seed))}"
        label = re.sub(rf"[^{_CHARACTERS}]", "_", labels[group])
        name = f"{label} ({count})"
        if len(name) > _MAX_NAME or name in names:  # part of the group's key makes it unique
            name = f"{label[: _MAX_NAME // 2]} {re.sub(rf'[^{_CHARACTERS}]', '_', group)[-40:]} ({count})"
        names.add(name)
        yield name, _event_file(name, list(by_seed.values()), swept)


def _event_file(name: str, runs: Sequence[Run], swept: Mapping[str, bool]) -> bytes:
    import io

    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    from fa_bench.loggers.events.writer import FILE_VERSION

    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(file_version=FILE_VERSION).SerializeToString())
    for step, summary in _summaries(name, runs, swept):
        writer.write(Event(wall_time=step, step=step, summary=summary).SerializeToString())
    return file.getvalue()


def _summaries(name: str, runs: Sequence[Run], swept: Mapping[str, bool]) -> Iterator[tuple[int, Summary]]:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import custom_scalars

    from fa_bench.loggers.events.hparams import end_of_session, start_of_session
    from fa_bench.loggers.events.writer import chart_groups, chart_layout, final_values

    curves = _statistics([_curves(run) for run in runs])
    config = {key: value for key, value in runs[0].config.items() if key != "seed"} | {"seeds": len(runs)}
    scores, first = runs[0].scores, runs[0].primary.name
    tags = *(f"final/{key}" for key in final_values(scores)[:2]), f"{first}/val", f"{first}/test", "loss/train"
    metrics = [f"{prefix}{tag}" for tag in tags for prefix in ("", "std/")]
    for summary in start_of_session(name, config, {**swept, "seeds": True}, [tag for tag in metrics if tag in curves], 0.0):
        yield 0, summary
    yield 0, custom_scalars(chart_layout(chart_groups(tag for tag in curves if not tag.startswith("std/")), scores))
    for step in sorted({step for points in curves.values() for step in points}):
        yield (
            step,
            Summary(
                value=[Summary.Value(tag=tag, simple_value=points[step]) for tag, points in curves.items() if step in points]
            ),
        )
    last = max((step for points in curves.values() for step in points), default=0)
    yield last, end_of_session("finished", last)


def _curves(run: Run) -> Curves:
    """The curves of a run, with the same tags as in the run's own event file."""
    from fa_bench.runs.record import tag_of

    curves: Curves = {}
    for line in run.metrics:
        for key in scalar_keys({"scores": as_records(run.scores)}):
            for value in known([line.get(key)]):
                curves.setdefault(tag_of(key), {})[line.get("step", line["epoch"])] = value
    for line in run.measurements:
        for metric, layers in (line["angles"] or {}).items():
            for layer, value in (layers or {}).items():
                for number in known([value]):
                    curves.setdefault(f"{metric}/{layer}", {})[line["step"]] = number
    for key in (f"test_{run.primary.name}", f"test_{run.primary.name}_at_best_val"):
        for value in known([run.result.get(key)]):
            curves[f"final/{key}"] = {run.result.get("step") or 0: value}
    return curves


def _statistics(curves: Sequence[Curves]) -> Curves:
    """The means over runs of the curves with each tag, and the sample standard deviations as ``std/TAG``, at the steps that all
    curves with the tag share."""
    tags = list(dict.fromkeys(tag for each in curves for tag in each))
    means: Curves = {}
    for tag in tags:
        present = [each[tag] for each in curves if tag in each]
        for step in sorted(set.intersection(*map(set, present))):
            values = [points[step] for points in present]
            means.setdefault(tag, {})[step] = mean(values)
            if not math.isnan(deviation := std(values)):
                means.setdefault(f"std/{tag}", {})[step] = deviation
    return means


# ------------------------------------------------------------------------------------------------ files
def _recorded(folder: Path) -> set[str]:
    """The names of the groups whose directories fa_bench wrote in `folder`; raises a RunDirectoryError if fa_bench did not write
    the folder."""
    record = folder / RECORD
    problem = RunDirectoryError(f"{folder}: not written by fa_bench, which writes its mean curves there; move it elsewhere")
    if not os.path.lexists(folder):
        return set()
    if folder.is_symlink() or not folder.is_dir():
        raise problem
    if not os.path.lexists(record):
        if any(path.name != temporary_name(RECORD) for path in folder.iterdir()):
            raise problem
        return set()
    try:
        names: Any = json.loads(record.read_bytes()) if record.is_file() and not record.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and _GROUP_NAME.fullmatch(name) for name in names):
        raise RunDirectoryError(f"{record}: not a record of mean curves; move {folder} elsewhere")
    return set(names)


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    earlier = _recorded(folder)
    for name in contents:
        directory, file = folder / name, folder / name / EVENTS
        is_foreign = os.path.lexists(directory) and (name not in earlier or directory.is_symlink() or not directory.is_dir())
        if is_foreign or file.is_symlink():
            raise RunDirectoryError(f"{directory}: not written by fa_bench, which would overwrite it; move it elsewhere")
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        # Directories are recorded before they are created, because unrecorded ones would not be recognised if the process was
        # killed.
        write_text(folder / RECORD, json.dumps(sorted({*earlier, *contents})) + "\n")
        for name, content in contents.items():
            (folder / name).mkdir(exist_ok=True)
            file = folder / name / EVENTS
            if (
                not file.exists() or file.read_bytes() != content
            ):  # a running TensorBoard continues to read the file that it has open
                with atomic(file) as temporary:
                    temporary.write_bytes(content)
        for name in earlier.difference(contents):
            if not (folder / name).is_symlink():
                for file in (EVENTS, temporary_name(EVENTS)):
                    (folder / name / file).unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    (folder / name).rmdir()
        write_text(folder / RECORD, json.dumps(sorted(contents)) + "\n")
