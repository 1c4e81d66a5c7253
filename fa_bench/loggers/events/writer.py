"""What a run shows in TensorBoard: one event file in its directory that any reader reads as one curve a tag.

A run that goes on from a checkpoint does not leave the readers to purge what an interrupted try wrote behind it. Its old event
files are read, what holds is written into a new file that takes their place, and training appends to that.
"""

# The classes of protobuf modules are created at import.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram

from fa_bench.config.job import Job
from fa_bench.loggers.events.files import NEW_EVENTS, record_events, recorded_events
from fa_bench.metrics.alignment.base import declared
from fa_bench.utils.files import writing

#: Hyper-parameters of the HPARAMS tab: one set for all rules, so that their runs share a table.
HYPERPARAMETERS: dict[str, Callable[[Job], str | float]] = {
    "algorithm": lambda job: job.algorithm.name,
    "architecture": lambda job: job.architecture.name,
    "dataset": lambda job: job.dataset.name,
    "optimizer": lambda job: job.optimizer.name,
    "lr": lambda job: job.optimizer.lr,
    "weight_decay": lambda job: job.optimizer.weight_decay,
    "batch_size": lambda job: job.run.batch_size,
    "epochs": lambda job: job.run.epochs,
    "seed": lambda job: job.run.seed,
}
#: Those of them whose columns the table shows unasked.
_SHOWN = ("algorithm", "architecture", "dataset", "lr", "seed")
#: Numbers of a finished run, which have no curve, or whose curve goes on.
FINAL = ("test_accuracy", "test_accuracy_at_best_val", "seconds")
#: What the table shows beside the hyper-parameters: curves while a run goes on, then its final numbers.
_METRICS = ("accuracy/val", "accuracy/test", "loss/train", *(f"final/{key}" for key in FINAL))
#: A run's status in TensorBoard's words. One that was interrupted or killed has no end and is shown as unknown: of two ends
#: a watching TensorBoard would keep the first.
_STATUS = {"finished": api_pb2.STATUS_SUCCESS, "diverged": api_pb2.STATUS_FAILURE, "failed": api_pb2.STATUS_FAILURE}
#: How long a watching TensorBoard is given to leave an emptied file, in seconds; it looks every five by default.
_PATIENCE = 60
#: The groups of curves that are not by layer, and those without a chart.
_TRAINING, _NO_CHART = ("accuracy", "loss"), ("final",)
_BINS = 64


class Events:
    """The event file of one run.

    Args:
        directory: the run's directory, which exists.
        job: the run.
        step: where it goes on; what was written about later steps is dropped. With 0 it begins, and all is dropped.
    """

    def __init__(self, directory: Path, job: Job, step: int) -> None:
        old = [path for name in recorded_events(directory) if (path := directory / name).exists()]
        kept = _kept(old, step) if step else {}
        self._last: dict[str, int] = {}
        for at, tag in kept:
            self._last[tag] = max(at, self._last.get(tag, at))
        self._groups = _groups(tag for (_, tag), (_, value) in kept.items() if value.HasField("simple_value"))
        began = min((wall for wall, _ in kept.values()), default=time.time())
        self.path = directory / _name(old)
        temporary = directory / NEW_EVENTS
        # Before it is there: a file that a kill left without a record would be nobody's.
        record_events(directory, [*(path.name for path in old), self.path.name])
        with writing(self.path):
            try:
                with temporary.open("wb") as file:
                    writer = RecordWriter(file)
                    for event in itertools.chain(_head(job, began, self._groups), _events(kept)):
                        writer.write(event.SerializeToString())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_directory(directory)
            # Emptied now and removed later: TensorBoard's reader in Python never gets past a file that vanishes
            # while it has it open.
            self._emptied, self._since = old, time.monotonic()
            for path in old:
                if path.stat().st_nlink == 1:  # else somebody keeps it under another name
                    os.truncate(path, 0)
            # Without a buffer of its own: what a full disk refuses is not tried again behind our back.
            self._file = self.path.open("ab", buffering=0)
        self._writer = RecordWriter(self._file)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, in the order given. A tag that has this step, or a later one, is left out."""
        new = self._new(values, step)
        groups = dict.fromkeys([*self._groups, *_groups(new)])
        if len(groups) > len(self._groups):
            self._groups = list(groups)
            self._write(custom_scalars(_layout(groups)), step)
        self._write(Summary(value=[Summary.Value(tag=tag, simple_value=values[tag]) for tag in new]), step)

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Record the distributions of tensors at a step, of their finite elements. A tag that has this step is left out."""
        for tag in self._new(tensors, step):
            numbers = tensors[tag].detach().flatten().double().cpu().numpy()
            numbers = numbers[np.isfinite(numbers)]
            if numbers.size:
                self._write(histogram(tag, numbers, bins=_BINS), step)

    def _new(self, values: Iterable[str], step: int) -> list[str]:
        """The tags that have no such step yet: a step that is run again after a checkpoint gives the same numbers again."""
        new = [tag for tag in values if step > self._last.get(tag, -1)]
        self._last.update(dict.fromkeys(new, step))
        return new

    def _write(self, summary: Summary, step: int) -> None:
        if summary.value:
            with writing(self.path):  # to the operating system: a kill loses nothing, and a watching TensorBoard sees it
                self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def flush(self) -> None:
        """Return once all that was recorded is on the disk; to be called before a checkpoint is written."""
        with writing(self.path):
            os.fsync(self._file.fileno())
            if self._emptied and time.monotonic() - self._since > _PATIENCE:
                self._remove_emptied()

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        """Record how the run ended, and close the file.

        Args:
            status: finished, diverged, interrupted or failed.
            numbers: those of `FINAL`, written for a finished run alone: any other may go on, and would have them twice.
            step: the last step.
        """
        if status == "finished":
            self.scalars({f"final/{key}": value for key in FINAL if (value := numbers[key]) is not None}, step)
        if status in _STATUS:
            end = plugin_data_pb2.SessionEndInfo(status=_STATUS[status], end_time_secs=time.time())
            self._write(_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end), step)
        self.flush()
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
        self._remove_emptied()

    def _remove_emptied(self) -> None:
        for path in self._emptied:
            path.unlink(missing_ok=True)
        if self._emptied:
            gone = {path.name for path in self._emptied}
            record_events(self.path.parent, [name for name in recorded_events(self.path.parent) if name not in gone])
        self._emptied = []


Kept = dict[tuple[int, str], tuple[float, Any]]


def _kept(paths: Iterable[Path], step: int) -> Kept:
    """{(step, tag): (wall time, value)} of what holds up to `step`, in the order of the steps."""
    found: Kept = {}
    for event in itertools.chain.from_iterable(map(_read, paths)):
        if event.session_log.status == SessionLog.START:
            # As readers take it: this file has anew what was there of this step and later ones.
            found = {key: value for key, value in found.items() if key[0] < event.step}
        if event.step <= step:
            found.update(((event.step, value.tag), (event.wall_time, value)) for value in event.summary.value if _lasting(value))
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def _read(path: Path) -> Iterator[Event]:
    """The events of a file up to the first damaged record, which is where a kill has torn it."""
    for record in RawEventFileLoader(str(path)).Load():
        try:
            yield Event.FromString(record)
        except DecodeError:
            continue


def is_of(path: Path, job: Job) -> bool:
    """Whether an event file says at its beginning that it is of this run, by the values of `HYPERPARAMETERS`."""
    for event in itertools.islice(_read(path), 8):
        for value in event.summary.value:
            if value.tag == metadata.SESSION_START_INFO_TAG:
                content = value.metadata.plugin_data.content
                said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
                return {key: item.string_value or item.number_value for key, item in said.items()} == {
                    key: read(job) for key, read in HYPERPARAMETERS.items()}
    return False


def _lasting(value: Any) -> bool:
    """Whether a value belongs to a curve: not to the end of an earlier try, nor to a file's head."""
    return not value.tag.startswith("final/") and (value.HasField("simple_value") or value.HasField("histo"))


def _head(job: Job, began: float, groups: list[str]) -> Iterator[Event]:
    """What a file begins with; a start at step 0 makes a TensorBoard that read earlier files forget them."""
    yield Event(wall_time=began, file_version="brain.Event:2")
    yield Event(wall_time=began, session_log=SessionLog(status=SessionLog.START))
    values = {key: read(job) for key, read in HYPERPARAMETERS.items()}
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=began)
    infos = []
    for key, value in values.items():
        if isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
        kind = api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64
        infos.append(api_pb2.HParamInfo(name=key, type=kind, differs=key in _SHOWN))
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in _METRICS]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    yield Event(wall_time=began, summary=_hparams(metadata.EXPERIMENT_TAG, experiment=experiment))
    yield Event(wall_time=began, summary=_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start))
    if groups:
        yield Event(wall_time=began, summary=custom_scalars(_layout(groups)))


def _hparams(tag: str, **content: Any) -> Summary:
    plugin = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=plugin, tensor=metadata.NULL_TENSOR)])


def _events(kept: Kept) -> Iterator[Event]:
    """Events of what is kept, with those values in one that were recorded at once."""
    for (step, wall), group in itertools.groupby(kept.items(), key=lambda item: (item[0][0], item[1][0])):
        yield Event(wall_time=wall, step=step, summary=Summary(value=[value for _, (_, value) in group]))


def _groups(tags: Iterable[str]) -> list[str]:
    """The groups of curves that have a chart, such as "loss" for loss/train."""
    groups = dict.fromkeys(tag.partition("/")[0] for tag in tags if "/" in tag)
    return [group for group in groups if group not in _NO_CHART]


def _layout(groups: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The custom layout: a chart of every layer for each metric, and one of train, validation and test for each curve.

    Charts choose by pattern: TensorBoard puts the layouts of all runs together, and lists of layers would give a chart of the
    same name for every rule and architecture.
    """
    layout: dict[str, dict[str, list[Any]]] = {"training": {}, "layers": {}}
    for group in groups:
        metric = declared([group])[group]
        title = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
        layout["training" if group in _TRAINING else "layers"][title] = ["Multiline", [f"^{re.escape(group)}/"]]
    return {category: charts for category, charts in layout.items() if charts}


def _name(old: Iterable[Path]) -> str:
    """A name behind the old ones: a watching TensorBoard goes on from name to name in their order."""
    times = [int(found[1]) for path in old if (found := re.search(r"tfevents\.(\d+)", path.name))]
    return f"events.out.tfevents.{max([int(time.time()), *(at + 1 for at in times)]):010d}.{socket.gethostname()}.{os.getpid()}.0"


def _sync_directory(directory: Path) -> None:
    """Make renaming last; where directories cannot be opened there is nothing to do."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
