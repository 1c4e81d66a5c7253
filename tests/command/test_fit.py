"""A sweep with parts that do not fit together is refused before it starts; the check ignores other errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fa_bench.cli import main
from fa_bench.command import fit
from fa_bench.config.job import Job
from fa_bench.errors import CoverageError
from fa_bench.registry.registries import ALGORITHMS, DATASETS
from fa_bench.runs.assembly import assemble, prepare

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]
NETS = {
    "no hidden layer": {"name": "mlp", "widths": []},
    "one block": {"name": "mlp", "widths": [8]},
    "two blocks": {"name": "mlp", "widths": [8, 6]},
    "convolutions": {"name": "conv2", "channels": 4, "hidden": 8},
}


def test_sweep_with_unfit_rule_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *SMALL, "algorithm=bp,dgl"]) == 2
    assert "'dgl' needs at least two modules" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", list(ALGORITHMS))
def test_fit_check_agrees_with_run(rule: str, net: str) -> None:
    job = Job.from_config(
        OmegaConf.create(
            {
                "algorithm": {"name": rule, **({"initial_steps": 0} if rule == "wm" else {})},
                "architecture": NETS[net],
                "dataset": {"name": "synthetic", "samples": 40, "test_samples": 8},
                "optimizer": {"name": "sgd"},
                "objective": {"name": "cross_entropy"},
                "batch_size": 8,
            }
        )
    )

    def refused(check: object) -> str:
        try:
            check()  # type: ignore[operator]
        except CoverageError as error:
            return str(error)
        return ""

    state = torch.get_rng_state()
    early = refused(lambda: fit.check_fit([job]))
    assert torch.equal(torch.get_rng_state(), state)
    assert early == refused(lambda: assemble(job, prepare(job)))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["algorithm=bp,drtp", "dataset=tabular", "objective=mse"], "algorithm=drtp computes its errors from class labels"),
        (["algorithm=bp,local_error", "dataset=tabular", "objective=mse"], "algorithm=local_error computes its errors"),
        (["algorithm=bp,dfc", "compile=true"], "compile=true is not possible with algorithm=dfc"),
        (["architecture=mlp,dkp_alexnet"], "architecture: 8x8 images are too small for pool1 of this AlexNet"),
    ],
)
def test_sweep_with_incompatible_components_does_not_start(
    overrides: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole sweep is refused, including the first job, which could run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,b,y\n" + "".join(f"{n},{n % 7},{n / 3}\n" for n in range(60)))
    table = ["dataset.table=table.csv", "dataset.target=y", "dataset.task=regression"] if "objective=mse" in overrides else []
    assert main(["-m", "epochs=1", *overrides, *table]) == 2
    assert problem in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_fit_check_ignores_unrelated_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.from_config(
        OmegaConf.create(
            {
                "algorithm": {"name": "fa"},
                "architecture": {"name": "mlp"},
                "dataset": {"name": "digits"},
                "optimizer": {"name": "sgd"},
                "objective": {"name": "cross_entropy"},
            }
        )
    )

    def fail(*_: object) -> None:
        raise RuntimeError("a user's class")

    monkeypatch.setattr(type(job.architecture), "build", fail)
    fit.check_fit([job])


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_declared_shape_matches_data(name: str, tmp_path: Path) -> None:
    splits = DATASETS[name]().load(tmp_path, torch.device("cpu"))
    assert DATASETS[name]().shape() == (splits.input_shape, len(splits.classes))
