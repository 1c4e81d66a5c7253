"""The TensorBoard curves of a run are stored in one file, and are the same whether or not the run was interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.config.job import Job, register_schemas
from fa_bench.loggers.events import writer as events
from fa_bench.loggers.events.files import NEW_EVENTS, record_events, recorded_events
from fa_bench.loggers.events.hparams import HYPERPARAMETERS
from fa_bench.loggers.events.writer import EventFile
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.runs import checkpoint, loop
from fa_bench.utils.files import METRICS

MLP = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "batch_size=16",
    "probe_size=8",
    "architecture.widths=[8,6]",
]
FINAL = {"test_accuracy": 0.5, "test_accuracy_at_best_val": None, "seconds": 1.0}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def job() -> Job:
    register_schemas()
    composer = Composer("config", None, ["algorithm=fa"])
    return composer.check(composer.expand(multirun=False))[0][0]


def event_files(folder: Path | str) -> list[Path]:
    inside = [Path(folder)] if Path(folder).is_file() else Path(folder).rglob("*")
    return sorted(path for path in inside if "tfevents" in path.name or path.name.endswith(".tmp"))


def read(folder: Path | str) -> Iterator[Event]:
    """Read the records of all files in order, without support for purging."""
    for path in event_files(folder):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def curves(folder: Path | str) -> dict[str, list[tuple[int, Any]]]:
    """The curves as {tag: [(step, value)]}; the value of a histogram consists of its limits and counts."""
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for event in read(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag].append((event.step, value.simple_value))
            elif value.HasField("histo"):
                found[value.tag].append((event.step, (tuple(value.histo.bucket_limit), tuple(value.histo.bucket))))
    for tag, points in found.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), (tag, steps)
    return dict(found)


def steps(folder: Path | str, tag: str) -> list[int]:
    return [step for step, _ in curves(folder)[tag]]


def contents(folder: Path | str, tag: str) -> list[bytes]:
    return [value.metadata.plugin_data.content for event in read(folder) for value in event.summary.value if value.tag == tag]


def charts(folder: Path | str) -> dict[str, list[str]]:
    """The charts of the last layout as {chart: patterns}."""
    found = [
        value.tensor.string_val[0]
        for event in read(folder)
        for value in event.summary.value
        if value.tag == "custom_scalars__config__"
    ]
    layout = Layout.FromString(found[-1])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def put(recorded: EventFile, *at: int) -> None:
    for step in at:
        recorded.scalars({"loss/train": 1 / (step + 1), "weight_angle/fc1": 90.0 - step}, step)


# ------------------------------------------------------------------------------------------------ going on
class Stopped(KeyboardInterrupt):
    """An interruption by the user."""


def torn(file: Path) -> None:
    """Truncate the file, as if the process had been killed in the middle of a record."""
    os.truncate(file, file.stat().st_size - 7)


def beyond(file: Path) -> None:
    """Add another event file, with records of steps after the checkpoint, including final numbers, followed by invalid data."""
    with another_file(file.parent) as writer:
        for step in (9, 10, 40):
            writer.add_scalar("loss/train", 99.0, step)
            writer.add_scalar("final/seconds", 99.0, step)
    with event_files(file.parent)[-1].open("ab") as stream:
        stream.write(b"\x07garbage" * 9)


@contextmanager
def another_file(folder: Path, **options: Any) -> Iterator[SummaryWriter]:
    """Yield the writer of a later event file in a run's directory; at the end, record the file as the run's own."""
    with SummaryWriter(str(folder), filename_suffix=".later", **options) as writer:
        yield writer
    (written,) = folder.glob("*.later")
    last = max(int(path.name.split(".")[3]) for path in folder.glob("events.out.*"))
    own = f"events.out.tfevents.{last + 1:010d}.host.1.0"
    written.rename(folder / own)
    record_events(folder, [*recorded_events(folder), own])


def test_curves_after_two_interruptions_match_uninterrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*MLP, "algorithm=kp", "epochs=4", "probe_every=3", "histograms_every=5"]
    assert main([*command, "hydra.run.dir=whole"]) == 0
    whole = curves("whole")
    assert steps("whole", "loss/train") == [4, 8, 12, 16] and steps("whole", "weight_angle/fc2") == [0, 3, 6, 9, 12, 15, 16]
    assert steps("whole", "weight/fc2") == [0, 5, 10, 15]

    evaluate = loop.evaluate
    for last, call in ((8, 6), (12, 4)):  # two calls per epoch, so the third epoch and, once resumed, the fourth
        calls: list[int] = []

        def interrupted(*arguments: Any, calls: list[int] = calls, call: int = call) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise Stopped
            return evaluate(*arguments)

        monkeypatch.setattr(loop, "evaluate", interrupted)
        assert main([*command, "hydra.run.dir=parts", "resume=true"]) == 130
        assert steps("parts", "loss/train")[-1] == last < steps("parts", "weight_angle/fc2")[-1]
        torn(event_files("parts")[0])
        if last == 8:
            beyond(event_files("parts")[0])
    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert main([*command, "hydra.run.dir=parts", "resume=true"]) == 0

    parts = curves("parts")
    for each in (whole, parts):
        assert each.pop("final/seconds")[0][0] == 16
    assert parts == whole and len(event_files("parts")) == 1


def test_kill_during_rewrite_loses_no_events(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed before and after the first call of fsync, replace and truncate, in turn."""
    first = EventFile(tmp_path, job, 0)
    put(first, *range(9))
    (tmp_path / NEW_EVENTS).write_bytes(b"left by another process")
    kept = {tag: points[:7] for tag, points in curves(first.path).items()}
    walls = [event.wall_time for event in read(first.path) if event.summary.value and 0 < event.step <= 6]

    class Killed(BaseException):
        pass

    def killing(real: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if after:
                real(*arguments)
            raise Killed

        return call

    for name in ("fsync", "replace", "truncate"):
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(events.os, name, killing(getattr(os, name), after))
                with pytest.raises(Killed):
                    EventFile(tmp_path, job, 6)
            EventFile(tmp_path, job, 6).close()
            assert curves(tmp_path) == kept, (name, after)
            assert [event.wall_time for event in read(tmp_path) if event.summary.value and event.step > 0] == walls
            assert len(event_files(tmp_path)) == 1
    first.close()


def test_purge_steps_of_older_files_are_respected(job: Job, tmp_path: Path) -> None:
    """With purge_step=4, SummaryWriter begins its file with an event that makes readers discard the steps from 4 on in the
    earlier file."""
    first = EventFile(tmp_path, job, 0)
    put(first, *range(9))
    first.close()
    with another_file(tmp_path, purge_step=4) as writer:
        writer.add_scalar("loss/train", 0.25, 5)
    EventFile(tmp_path, job, 7).close()
    assert curves(tmp_path) == {
        "loss/train": [(step, pytest.approx(1 / (step + 1))) for step in range(4)] + [(5, 0.25)],
        "weight_angle/fc1": [(step, 90 - step) for step in range(4)],
    }


def test_repeated_steps_are_recorded_once(job: Job, tmp_path: Path) -> None:
    first = EventFile(tmp_path, job, 0)
    put(first, 0, 2, 4)
    first.close()
    again = EventFile(tmp_path, job, 4)
    put(again, 4, 6)
    again.close()
    assert steps(tmp_path, "loss/train") == steps(tmp_path, "weight_angle/fc1") == [0, 2, 4, 6]


@pytest.mark.parametrize("accumulator", [EventAccumulator, PluginAccumulator])
def test_running_tensorboard_shows_no_duplicate_points(accumulator: Any, job: Job, tmp_path: Path) -> None:
    """TensorBoard's readers keep working while files are created and removed."""
    watching = accumulator(str(tmp_path))

    def shown() -> list[int]:
        watching.Reload()
        return [point.step for point in (watching.Scalars if accumulator is EventAccumulator else watching.Tensors)("loss/train")]

    first = EventFile(tmp_path, job, 0)
    put(first, *range(8))
    assert shown() == list(range(8))  # recorded data are visible without a flush
    second = EventFile(tmp_path, job, 4)
    assert shown() == [0, 1, 2, 3, 4]
    put(second, 5, 6, 9)
    assert shown() == [0, 1, 2, 3, 4, 5, 6, 9]
    third = EventFile(tmp_path, job, 6)
    put(third, 7)
    assert shown() == [0, 1, 2, 3, 4, 5, 6, 7]
    third.finish("finished", FINAL, 7)
    assert shown() == [0, 1, 2, 3, 4, 5, 6, 7] and len(event_files(tmp_path)) == 1
    for each in (first, second):
        each.close()


def test_emptied_files_are_deleted_after_delay(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EventFile(tmp_path, job, 0).close()
    monkeypatch.setattr(events, "_PATIENCE", 0.0)
    recorded = EventFile(tmp_path, job, 1)
    assert len(event_files(tmp_path)) == 2
    recorded.flush()
    assert event_files(tmp_path) == [recorded.path]
    recorded.close()


def test_file_names_stay_ordered_if_clock_goes_back(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for now in (2_000_000_000.0, 2_000_000_000.0, 1_000_000_000.0):
        monkeypatch.setattr(events.time, "time", lambda now=now: now)
        recorded = EventFile(tmp_path, job, 1)
        names.append(recorded.path.name)
        recorded.close()
    assert names == sorted(names) and len(set(names)) == 3


def test_events_are_synced_before_checkpoint_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real, save = os.fsync, checkpoint.save

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def saved(path: Path, before: Path, config_hash: str, data_hash: str, progress: Any, *rest: Any) -> None:
        assert steps("run", "loss/train")[-1] == progress.step
        assert synced[-1] == str(event_files("run")[0].absolute())
        save(path, before, config_hash, data_hash, progress, *rest)

    monkeypatch.setattr(events.os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "save", saved)
    assert main([*MLP, "epochs=2", "hydra.run.dir=run"]) == 0


# ------------------------------------------------------------------------------------------------ what is shown
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_layout_groups_all_layers_by_metric(rule: str) -> None:
    command = [*MLP, f"algorithm={rule}", "epochs=1", "probe_every=3", "histograms_every=2", "hydra.run.dir=run", "resume=true"]
    assert main(command) == 0
    angles = json.loads(Path("run", METRICS).read_text().splitlines()[-1])["angles"]
    tags = {metric: {f"{metric}/{layer}" for layer in layers} for metric, layers in angles.items() if layers}
    for what in ("loss", "accuracy"):
        tags[what] = {f"{what}/{split}" for split in ("train", "val", "test")}
    recorded = [tag for tag, points in curves("run").items() if isinstance(points[0][1], float)]
    shown = {
        frozenset(tag for tag in recorded if any(re.match(pattern, tag) for pattern in patterns))
        for patterns in charts("run").values()
    }
    assert shown == set(map(frozenset, tags.values())) and len(charts("run")) == len(tags)
    assert {"weight_angle", "delta_angle", "norm_ratio"} <= set(tags) and len(tags["delta_angle"]) == 3
    before = charts("run")
    Path("run/result.json").unlink()
    assert main(command) == 0
    assert charts("run") == before and len(contents("run", "custom_scalars__config__")) == 1


def test_all_rules_share_one_hparams_table(job: Job, tmp_path: Path) -> None:
    experiments, types = set(), set()
    for each in (dataclasses.replace(job, algorithm=rule()) for _, rule in ALGORITHMS.items()):
        (tmp_path / each.algorithm.name).mkdir()
        recorded = EventFile(tmp_path / each.algorithm.name, each, 0)
        (start,) = contents(recorded.path.parent, metadata.SESSION_START_INFO_TAG)  # read while the run is in progress
        (experiment,) = contents(recorded.path.parent, metadata.EXPERIMENT_TAG)
        recorded.close()
        values = metadata.parse_session_start_info_plugin_data(start).hparams
        assert values["algorithm"].string_value == each.algorithm.name
        assert values["optimizer.lr"].number_value == each.optimizer.lr
        types.add(tuple(sorted((key, value.WhichOneof("kind")) for key, value in values.items())))
        experiments.add(experiment)
    assert len(types) == len(experiments) == 1
    table = metadata.parse_experiment_plugin_data(experiments.pop())
    assert {info.name for info in table.hparam_infos} == {key for key, _ in types.pop()} == set(HYPERPARAMETERS)


def test_hparams_table_has_all_keys_varied_in_sweep(tmp_path: Path) -> None:
    """TensorBoard takes the table's columns from one of the runs, so all runs must have the same columns."""
    assert (
        main(
            [
                "-m",
                *MLP,
                "epochs=1",
                "algorithm=fa,pfa",
                "optimizer.lr=0.1,0.2",
                "architecture.batch_norm=true,false",
                "output_dir=o",
            ]
        )
        == 0
    )
    columns: set[str] = set()
    names: list[str] = []
    for directory in Path("o").glob("*/*/seed*"):
        (experiment,) = contents(directory, metadata.EXPERIMENT_TAG)
        (start,) = contents(directory, metadata.SESSION_START_INFO_TAG)
        session = metadata.parse_session_start_info_plugin_data(start)
        infos = metadata.parse_experiment_plugin_data(experiment).hparam_infos
        shown = {info.name for info in infos if info.differs}
        assert shown == {"algorithm", "architecture", "architecture.batch_norm", "dataset", "optimizer.lr", "seed"}
        assert {info.name for info in infos} == {*HYPERPARAMETERS, "architecture.batch_norm"} == set(session.hparams)
        columns.add(repr(sorted((info.name, info.type) for info in infos)))
        names.append(session.group_name)
        assert directory.parent.name in session.group_name
        rule, rate, normalised = (session.hparams[key] for key in ("algorithm", "optimizer.lr", "architecture.batch_norm"))
        assert session.group_name.startswith(f"{rule.string_value} ") and f"lr={rate.number_value} " in session.group_name
        assert f"batch_norm={normalised.string_value} " in session.group_name and " seed 0 (" in session.group_name
    assert len(columns) == 1 and len(set(names)) == 8


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("finished", [api_pb2.STATUS_SUCCESS]),
        ("stopped", [api_pb2.STATUS_SUCCESS]),
        ("diverged", [api_pb2.STATUS_FAILURE]),
        ("failed", [api_pb2.STATUS_FAILURE]),
        ("interrupted", []),
    ],
)
def test_run_status_and_final_scalars(status: str, shown: list[int], job: Job, tmp_path: Path) -> None:
    recorded = EventFile(tmp_path, job, 0)
    put(recorded, 1)
    recorded.finish(status, FINAL, 1)

    def ends() -> list[int]:
        found = contents(tmp_path, metadata.SESSION_END_INFO_TAG)
        return [metadata.parse_session_end_info_plugin_data(end).status for end in found]

    final = {"final/test_accuracy": [(1, 0.5)], "final/seconds": [(1, 1.0)]} if status in ("finished", "stopped") else {}
    assert ends() == shown
    assert {tag: points for tag, points in curves(tmp_path).items() if tag.startswith("final/")} == final
    again = EventFile(tmp_path, job, 1)
    assert ends() == [] and set(curves(tmp_path)) == {"loss/train", "weight_angle/fc1"}
    again.finish("finished", FINAL, 1)
    assert ends() == [api_pb2.STATUS_SUCCESS] and len(contents(tmp_path, metadata.SESSION_START_INFO_TAG)) == 1


# ------------------------------------------------------------------------------------------------ histograms
@pytest.mark.parametrize("rule", ["brsf", "pfa", "dkp"])
def test_histograms_are_optional_and_do_not_affect_results(rule: str) -> None:
    command = [*MLP, f"algorithm={rule}", "epochs=2", "probe_every=3"]
    assert main([*command, "hydra.run.dir=plain"]) == 0
    assert main([*command, "histograms_every=3", "hydra.run.dir=with"]) == 0
    plain, asked = (torch.load(f"{name}/checkpoints/last.pt", weights_only=True) for name in ("plain", "with"))
    assert plain["config_hash"] == asked["config_hash"] and plain["model"].keys() == asked["model"].keys()
    for key, tensor in plain["model"].items():
        assert torch.equal(tensor, asked["model"][key]), key
    without, found = curves("plain"), curves("with")
    distributions = {tag for tag in found if tag.split("/")[0] in ("weight", "feedback", "gradient")}
    assert set(found) - set(without) == distributions
    wanted = {"brsf": {"feedback/fc2/M"}, "pfa": {"feedback/fc2/B", "feedback/fc2/R"}, "dkp": {"feedback/act1/B"}}[rule]
    assert distributions > wanted | {f"{kind}/{layer}" for kind in ("weight", "gradient") for layer in ("fc1", "fc2", "fc3")}
    for tag in distributions:
        assert [step for step, _ in found[tag]] == [0, 3, 6], tag
    assert sum(found["weight/fc2"][0][1][1]) == 8 * 6
    for tag in set(without) - {"final/seconds"}:
        assert found[tag] == without[tag]


def test_histograms_of_nonfinite_bool_and_bfloat16_tensors(job: Job, tmp_path: Path) -> None:
    recorded = EventFile(tmp_path, job, 0)
    recorded.histograms(
        {
            "weight/some": torch.tensor([1.0, math.nan, math.inf, 2.0]),
            "weight/none": torch.tensor([math.nan]),
            "weight/zeros": torch.zeros(3),
            "feedback/mask": torch.tensor([True, False]),
            "weight/half": torch.ones(2, dtype=torch.bfloat16),
        },
        3,
    )
    recorded.close()
    assert {tag: sum(points[0][1][1]) for tag, points in curves(tmp_path).items()} == {
        "weight/some": 2,
        "weight/zeros": 3,
        "feedback/mask": 2,
        "weight/half": 2,
    }
