"""Layer probes are measured, recorded and reported in runs, and do not affect the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fa_bench.cli import main
from fa_bench.registry.registries import PROBES
from fa_bench.report import figures
from fa_bench.runs import loop
from fa_bench.runs.record import Recorder

TINY = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=2",
    "probe_size=8",
    "architecture.widths=[8,8]",
    "architecture.batch_norm=true",
]
ALL = "probes=[readout,gradient_norm,depth_utility,stream_growth,stability,effective_rank,projection_angle]"


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


def result_in(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


@pytest.mark.parametrize("rule", ["brsf", "wm", "pfa", "asap", "ldfa", "activation_alignment"])
def test_probes_do_not_change_training_bitwise(rule: str, in_empty_folder: None) -> None:
    command = [*TINY, f"algorithm={rule}"]
    assert main([*command, "hydra.run.dir=without"]) == 0
    assert main([*command, ALL, "probes_epochs=1", "hydra.run.dir=with"]) == 0
    one, two = (torch.load(f"{name}/checkpoints/last.pt", weights_only=True) for name in ("without", "with"))
    assert one["config_hash"] == two["config_hash"]
    for key in ("model", "rule", "optimizers"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert str(one["random"]) == str(two["random"])
    assert result_in("without")["test_accuracy"] == result_in("with")["test_accuracy"]
    assert result_in("without")["probes"] == {} != result_in("with")["probes"]


def test_probes_of_a_run_are_recorded(in_empty_folder: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*TINY, ALL, "probes_epochs=1", "hydra.run.dir=run"]) == 0
    found = result_in("run")["probes"]
    assert list(found) == [
        "readout",
        "gradient_norm",
        "gradient_norm_update",
        "gradient_norm_floor",
        "depth_utility",
        "stream_growth",
        "stability",
        "effective_rank",
        "effective_rank_bp",
        "effective_rank_stable",
        "projection_angle",
    ]
    assert list(found["readout"]) == ["input", "fc1", "fc2", "fc3"] and list(found["depth_utility"]) == ["act1", "act2"]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[1]["probes"] == found and lines[0]["probes"] != found
    events = EventAccumulator("run").Reload()
    assert {"probe/readout/input", "probe/gradient_norm_floor/fc1", "probe/depth_utility/act2"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("probe/readout/fc1")][:2] == [4, 8]


def test_resuming_finished_run_measures_missing_probes(in_empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*TINY, "hydra.run.dir=run"]) == 0 and result_in("run")["probes"] == {}
    assert main([*TINY, ALL, "hydra.run.dir=whole"]) == 0
    before = result_in("run")["test_accuracy"], Path("run/metrics.jsonl").read_text()
    monkeypatch.setattr(loop.Trainer, "_epoch", None)  # no epoch is trained again
    assert main([*TINY, ALL, "hydra.run.dir=run", "resume=true"]) == 0
    assert (result_in("run")["test_accuracy"], Path("run/metrics.jsonl").read_text()) == before
    assert result_in("run")["probes"] == result_in("whole")["probes"] and result_in("run")["status"] == "finished"
    monkeypatch.setattr(Recorder, "measure_probes", None)
    assert main([*TINY, "probes=[readout]", "hydra.run.dir=run", "resume=true"]) == 0  # readout has already been measured


def test_restarted_run_does_not_measure_checkpoint_model(in_empty_folder: None) -> None:
    """The checkpoint contains the model at the end of the run. The checkpoint is loaded before the missing records are noticed,
    but must not be used."""
    command = [*TINY, ALL, "probes_epochs=1", "hydra.run.dir=run"]

    def probes() -> list[dict]:
        return [json.loads(line)["probes"] for line in Path("run/metrics.jsonl").read_text().splitlines()]

    assert main(command) == 0
    whole = probes()
    assert whole[0] != whole[1]
    Path("run/metrics.jsonl").unlink()
    assert main(command) == 0 and probes() == whole


def test_diverged_run_has_no_probes(in_empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "measure_probes", None)
    for divergence in ("stop", "continue"):
        command = [*TINY, ALL, "optimizer.lr=1e20", f"on_divergence={divergence}", f"hydra.run.dir={divergence}"]
        assert main(command) == 1
        assert result_in(divergence)["status"] == "diverged" and result_in(divergence)["probes"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["probes=[reedout]"],
            "probes=reedout is not one of depth_utility, effective_rank, energy, gauss_newton_angle, "
            "gradient_norm, projection_angle, readout, stability, stream_growth; did you mean 'readout'?",
        ),
        (
            ["probes=readout"],
            "probes='readout' is not a list (of depth_utility, effective_rank, energy, gauss_newton_angle, "
            "gradient_norm, projection_angle, readout, stability, stream_growth); did you mean "
            "probes=[readout]?",
        ),
        (
            ["probes=[depth_utility]", "architecture=torchvision", "architecture.model=squeezenet1_0", "dataset.size=32"],
            "probes=[depth_utility]: SqueezeNet declares no blocks that could be left untrained; name the modules that end them "
            "in model.blocks, as architecture=mlp, conv2 and the residual nets do",
        ),
    ],
)
def test_invalid_probes_are_rejected_before_training(
    words: list[str], said: str, in_empty_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY[:6], *words, "hydra.run.dir=run"]) == 2
    assert capsys.readouterr().err == f"fa-bench: {said}\n" and not Path("run").exists()


def test_plugin_can_register_probe(in_empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_probes.py").write_text(
        "from fa_bench.metrics.probes.base import Probe\n"
        "from fa_bench.registry.registries import PROBES\n"
        "@PROBES.register('largest')\n"
        "class Largest(Probe):\n"
        "    'Largest weight.'\n"
        "    def measure(self, subject):\n"
        "        return {self.name: {'fc1': subject.model.fc1.weight.max().item()}}\n"
    )
    monkeypatch.syspath_prepend(".")
    try:
        assert main([*TINY, "plugins=[my_probes]", "probes=[largest]", "hydra.run.dir=run"]) == 0
    finally:
        PROBES._entries.pop("largest", None)
    assert result_in("run")["probes"]["largest"]["fc1"] > 0


def test_report_averages_probes_over_seeds(in_empty_folder: None) -> None:
    from fa_bench.report import write_report
    from tests.report.by_hand import write_run

    for seed, value in ((0, 0.5), (1, 0.75)):
        probes = {"readout": {"input": 0.25, "fc1": value}, "depth_utility": {"act1": value / 2}}
        write_run(Path("runs"), "fa", seed, 0.9, probes=probes)
    write_run(Path("runs"), "bp", 0, 0.9)
    write_report(sorted(Path("runs").iterdir()), Path("out"))
    section = Path("out/report.md").read_text().split("## Probes")[1].split("##")[0]
    assert [line for line in section.splitlines() if line.startswith("| fa")] == [
        "| fa | input | 0.25 | - |",
        "| fa | fc1 | 0.625 | - |",
        "| fa | act1 | - | 0.3125 |",
    ]
    assert "| rule | layer | readout | depth_utility |" in section and "| bp" not in section
    rows = Path("out/report_layers.csv").read_text().splitlines()
    assert [row.split(",")[6:10] for row in rows if ",readout," in row] == [
        ["input", "readout", "2", "0.25"],
        ["fc1", "readout", "2", "0.625"],
    ]
