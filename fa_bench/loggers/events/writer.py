"""Writes a run's curves for TensorBoard to one event file in the run's directory, so that every reader finds each point exactly
once.

torch's SummaryWriter cannot provide the guarantees of docs/reliability.md. SummaryWriter writes from a background thread, so a
full disk is not reported, and points that a checkpoint counts as written may be lost if the process is killed. With
SummaryWriter, a resumed run would also add a second file, and each reader would have to discard the steps after the checkpoint.
With `EventFile`, a resumed run copies the valid events of its old files to a new file, which replaces the old ones, and appends
new events to it.
"""

# Protobuf modules create their classes at import.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram

from fa_bench.config.job import Job
from fa_bench.config.labels import flatten, label
from fa_bench.loggers.events.files import NEW_EVENTS, record_events, recorded_events
from fa_bench.loggers.events.hparams import STATUS, end_of_session, start_of_session
from fa_bench.metrics.alignment.base import declared
from fa_bench.objectives.scores import Score
from fa_bench.utils.files import output_errors

#: The file version, which is the content of a file's first event.
FILE_VERSION = "brain.Event:2"
#: Seconds after which a running TensorBoard, which reloads every five seconds by default, has finished reading an emptied file.
_PATIENCE = 60
_BINS = 64


def final_values(scores: Sequence[Score]) -> tuple[str, ...]:
    """The keys under which a result stores the final values of a run, which are not points of a curve. The keys depend on the
    primary score."""
    return f"test_{scores[0].name}", f"test_{scores[0].name}_at_best_val", "seconds"


def table_metrics(scores: Sequence[Score]) -> tuple[str, ...]:
    """The tags of the metric columns in the HParams table, which show the latest values of curves and the final values."""
    first = scores[0].name
    return f"{first}/val", f"{first}/test", "loss/train", *(f"final/{key}" for key in final_values(scores))


class EventFile:
    """The event file of one run.

    Args:
        directory: the run's directory, which exists.
        job: the run.
        step: the step that the run resumes from; events of later steps are dropped. With 0, all events are dropped.
        swept: the keys in which the runs of the sweep differ, see `fa_bench.config.labels.swept_keys`.
    """

    def __init__(self, directory: Path, job: Job, step: int, swept: Mapping[str, bool] = MappingProxyType({})) -> None:
        self._scores = job.scores
        old = [path for name in recorded_events(directory) if (path := directory / name).exists()]
        points = _read_points(old, step) if step else {}
        #: The last step of every tag. The points are sorted by step, so the last point of a tag determines its value here.
        self._last = {tag: at for at, tag in points}
        self._groups = chart_groups(tag for (_, tag), (_, value) in points.items() if value.HasField("simple_value"))
        start = min((wall for wall, _ in points.values()), default=time.time())
        self.path = directory / _name(old)
        temporary = directory / NEW_EVENTS
        # The name is recorded before the file exists, because after a kill, an unrecorded file would not be recognised as this
        # run's.
        record_events(directory, [*(path.name for path in old), self.path.name])
        with output_errors(self.path):
            try:
                with temporary.open("wb") as file:
                    writer = RecordWriter(file)
                    for event in itertools.chain(_head(job, swept, start, self._groups), _events(points)):
                        writer.write(event.SerializeToString())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_directory(directory)
            # The old files are emptied now and removed later, because TensorBoard's Python reader never gets past a file that is
            # removed while it is open.
            self._emptied, self._since = old, time.monotonic()
            for path in old:
                if path.stat().st_nlink == 1:  # otherwise a user has linked it elsewhere
                    os.truncate(path, 0)
            # The file is unbuffered, because a buffer would retry a write that failed on a full disk.
            self._file = self.path.open("ab", buffering=0)
        self._writer = RecordWriter(self._file)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, in the order given. Tags that already have a value at this step or a later one are
        skipped."""
        new = self._new(values, step)
        groups = dict.fromkeys([*self._groups, *chart_groups(new)])
        if len(groups) > len(self._groups):
            self._groups = list(groups)
            self._write(custom_scalars(chart_layout(groups, self._scores)), step)
        self._write(Summary(value=[Summary.Value(tag=tag, simple_value=values[tag]) for tag in new]), step)

    def histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Record the distributions of the finite elements of tensors at a step; tags are skipped as in `scalars`."""
        for tag in self._new(tensors, step):
            numbers = tensors[tag].detach().flatten().double().cpu().numpy()
            numbers = numbers[np.isfinite(numbers)]
            if numbers.size:
                self._write(histogram(tag, numbers, bins=_BINS), step)

    def _new(self, values: Iterable[str], step: int) -> list[str]:
        """The tags that do not have a value at this step or a later one yet. Steps that repeat after a resume have the same
        values and are skipped."""
        new = [tag for tag in values if step > self._last.get(tag, -1)]
        self._last.update(dict.fromkeys(new, step))
        return new

    def _write(self, summary: Summary, step: int) -> None:
        if summary.value:
            with output_errors(self.path):  # unbuffered: a kill loses nothing, and TensorBoard sees the event at once
                self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def flush(self) -> None:
        """Write everything recorded to disk. This method must be called before a checkpoint is written."""
        with output_errors(self.path):
            os.fsync(self._file.fileno())
            if self._emptied and time.monotonic() - self._since > _PATIENCE:
                self._remove_emptied()

    def finish(self, status: str, numbers: Mapping[str, float | None], step: int) -> None:
        """Record how the run ended, and close the file.

        Args:
            status: finished, stopped, diverged, interrupted or failed.
            numbers: the `final_values`. They are written only for a run that has finished or was stopped by a callback, because a
                run that is resumed would write them again.
            step: the last step.
        """
        if status in ("finished", "stopped"):
            self.scalars(
                {f"final/{key}": value for key in final_values(self._scores) if (value := numbers[key]) is not None}, step
            )
        if status in STATUS:
            self._write(end_of_session(status, time.time()), step)
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
            removed = {path.name for path in self._emptied}
            record_events(self.path.parent, [name for name in recorded_events(self.path.parent) if name not in removed])
        self._emptied = []


#: {(step, tag): (wall time, value)}
Points = dict[tuple[int, str], tuple[float, Any]]


def _read_points(paths: Iterable[Path], step: int) -> Points:
    """The points of curves and the histograms up to `step`, sorted by step."""
    points: Points = {}
    for event in itertools.chain.from_iterable(map(_read, paths)):
        if event.session_log.status == SessionLog.START:
            # By TensorBoard's convention, a session start discards all previously written events at its step or later.
            points = {key: point for key, point in points.items() if key[0] < event.step}
        if event.step <= step:
            points.update(
                ((event.step, value.tag), (event.wall_time, value)) for value in event.summary.value if _is_point(value)
            )
    return dict(sorted(points.items(), key=lambda item: item[0][0]))


def _read(path: Path) -> Iterator[Event]:
    """The events of a file up to the first damaged record, such as a record that was left incomplete when the process was
    killed."""
    for record in RawEventFileLoader(str(path)).Load():
        try:
            yield Event.FromString(record)
        except DecodeError:
            continue


def _is_point(value: Any) -> bool:
    """Whether a value belongs to a curve or histogram, and not to a file's header or the final values of an earlier attempt."""
    return not value.tag.startswith("final/") and (value.HasField("simple_value") or value.HasField("histo"))


def _head(job: Job, swept: Mapping[str, bool], start: float, groups: list[str]) -> Iterator[Event]:
    """The first events of a file. The session start at step 0 makes a running TensorBoard discard the events of earlier files."""
    config = flatten(job.plain())
    # The name includes the group, because runs of other sweeps may have the same label.
    name = f"{label(job.algorithm.name, config, [key for key in swept if key != 'algorithm'])} seed {job.run.seed} ({job.group})"
    yield Event(wall_time=start, file_version=FILE_VERSION)
    yield Event(wall_time=start, session_log=SessionLog(status=SessionLog.START))
    for summary in start_of_session(name, config, swept, table_metrics(job.scores), start):
        yield Event(wall_time=start, summary=summary)
    if groups:
        yield Event(wall_time=start, summary=custom_scalars(chart_layout(groups, job.scores)))


def _events(points: Points) -> Iterator[Event]:
    """One event for each group of points that share a step and a time."""
    for (step, wall), group in itertools.groupby(points.items(), key=lambda item: (item[0][0], item[1][0])):
        yield Event(wall_time=wall, step=step, summary=Summary(value=[value for _, (_, value) in group]))


def chart_groups(tags: Iterable[str]) -> list[str]:
    """The groups of curves that have a chart, such as "loss" for loss/train."""
    return list(dict.fromkeys(tag.partition("/")[0] for tag in tags if "/" in tag and not tag.startswith("final/")))


def chart_layout(groups: Iterable[str], scores: Sequence[Score]) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars, with a chart of all layers for each metric, and a chart of all splits for the
    loss and for each score.

    Charts select tags by a pattern because TensorBoard merges the layouts of all runs. If charts listed their layers instead,
    there would be another chart of the same name for every rule and architecture.
    """
    layout: dict[str, dict[str, list[Any]]] = {"training": {}, "layers": {}}
    titles = {"loss": "loss", **{score.name: score.title for score in scores}}
    for group in groups:
        metric = declared([group])[group]
        title = titles.get(group) or (f"{metric.title} ({metric.unit})" if metric.unit else metric.title)
        layout["training" if group in titles else "layers"][title] = ["Multiline", [f"^{re.escape(group)}/"]]
    return {category: charts for category, charts in layout.items() if charts}


def _name(old: Iterable[Path]) -> str:
    """A name that sorts after those of the old files, because a running TensorBoard reads files in the order of their names."""
    times = [int(match[1]) for path in old if (match := re.search(r"tfevents\.(\d+)", path.name))]
    return f"events.out.tfevents.{max([int(time.time()), *(at + 1 for at in times)]):010d}.{socket.gethostname()}.{os.getpid()}.0"


def _sync_directory(directory: Path) -> None:
    """Make a rename in a directory durable on systems that can open directories."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
