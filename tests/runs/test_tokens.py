"""Tests of runs on tokens and on numbers: scores in every record, resuming within an epoch, micro-batches, and several
outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fa_bench.cli import main
from fa_bench.runs import loop

PLUGIN = '''
import dataclasses
import torch
from torch import nn
import fa_bench


class Net(nn.Module):
    def __init__(self, tokens, outputs):
        super().__init__()
        self.embedding, self.fc1, self.act1, self.fc2 = nn.Embedding(tokens, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, tokens)
        self.several = outputs

    def forward(self, x):
        hidden = self.act1(self.fc1(self.embedding(x)))
        logits = self.fc2(hidden)
        return {"aux": hidden, "logits": logits} if self.several else logits


@fa_bench.register_architecture("token_net")
@dataclasses.dataclass(eq=False)
class TokenNet(fa_bench.Architecture):
    """Predicts each next token from the one before."""

    tasks = (("tokens", "positions"),)
    several: bool = fa_bench.option(False, "return several outputs")

    def make(self, input_shape, classes):
        return Net(classes, self.several)
'''
TEXT = [
    "plugins=[token_nets]",
    "dataset=text",
    "dataset.path=a.txt",
    "dataset.context=8",
    "architecture=token_net",
    "objective=token_cross_entropy",
    "optimizer=adam",
    "batch_size=8",
    "epochs=2",
    "threads=1",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("token_nets.py").write_text(PLUGIN)
    Path("a.txt").write_text("the cat sat on the mat. " * 60)


def lines(run: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in Path(run, "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_language_model_learns_and_records_scores(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TEXT, f"algorithm={rule}", "epochs=6", "optimizer.lr=0.02", "hydra.run.dir=run"]) == 0
    result, last = json.loads(Path("run/result.json").read_text()), lines("run")[-1]
    assert last["val_perplexity"] < lines("run")[0]["val_perplexity"] / 1.5 and "test_accuracy" in last
    assert last["val_perplexity"] == pytest.approx(np.exp(last["val_loss"])) == pytest.approx(2 ** last["val_bits_per_character"])
    best = min(lines("run"), key=lambda line: line["val_perplexity"])
    assert result["best_epoch"] == best["epoch"] and result["test_perplexity_at_best_val"] == best["test_perplexity"]
    assert result["test_perplexity"] == last["test_perplexity"] and result["scores"][0]["name"] == "perplexity"
    assert "finished: test perplexity" in capsys.readouterr().out
    tags = set(EventAccumulator("run").Reload().Tags()["scalars"])
    assert {"perplexity/val", "bits_per_token/train", "final/test_perplexity"} <= tags and "accuracy_at/val" not in tags


def test_resume_within_epoch_matches_uninterrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*TEXT, "algorithm=fa", "hydra.run.dir=whole"]) == 0
    step = loop.Trainer.train_step
    steps = len(range(lines("whole")[0]["step"]))

    def stopped(self: Any, *arguments: Any) -> None:
        if self.progress.step == steps + 2:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "train_step", stopped)
    main([*TEXT, "algorithm=fa", "hydra.run.dir=run", "checkpoint_minutes=1e-9"])
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    assert len(lines("run")) == 1 and main([*TEXT, "algorithm=fa", "hydra.run.dir=run", "resume=true"]) == 0
    assert lines("run") == lines("whole")
    results = [json.loads(Path(run, "result.json").read_text()) for run in ("run", "whole")]
    assert [results[0][key] == results[1][key] for key in ("weights_hash", "batches_hash", "test_perplexity")] == [True] * 3


def test_micro_batches_are_weighted_by_unmasked_targets() -> None:
    """Most targets of every second sample are masked, but training with micro-batches of one sample equals that with whole
    batches."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (64, 4))
    y = (x + 1) % 7
    y[::2, 1:] = -100
    np.savez("my.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    command = [
        "plugins=[token_nets]",
        "dataset=npz",
        "dataset.path=my.npz",
        "dataset.validation=0",
        "architecture=token_net",
        "objective=token_cross_entropy",
        "algorithm=bp",
        "epochs=2",
        "batch_size=8",
        "shuffle=false",
        "threads=1",
    ]
    for count in (1, 8):
        assert main([*command, f"accumulate={count}", f"hydra.run.dir=run{count}"]) == 0
    for whole, parts in zip(lines("run1"), lines("run8"), strict=True):
        for key in ("train_loss", "test_loss", "train_bits_per_token", "test_accuracy"):
            assert whole[key] == pytest.approx(parts[key], rel=1e-4)  # sums of float32 in a different order


def test_objective_output_selects_trained_output(capsys: pytest.CaptureFixture[str]) -> None:
    several = [*TEXT, "architecture.several=true"]
    for rule in ("bp", "fa"):
        assert main([*several, f"algorithm={rule}", "hydra.run.dir=run"]) == 2
        said = capsys.readouterr().err
        assert "objective.output=null: architecture=token_net returns several outputs (aux" in said and not Path("run").exists()
    assert main([*several, "algorithm=fa", "objective.output=logit", "hydra.run.dir=run"]) == 2
    assert "did you mean 'logits'" in capsys.readouterr().err
    for rule, options in (("fa", []), ("dfa", ["algorithm.cuts=[act1]", "algorithm.allow_uncovered=true"])):
        chosen = [f"algorithm={rule}", *options]
        assert main([*TEXT, *chosen, f"hydra.run.dir=one_{rule}"]) == 0
        assert main([*several, *chosen, "objective.output=logits", f"hydra.run.dir={rule}"]) == 0
        assert lines(rule) == lines(f"one_{rule}")


def test_conflicting_rule_and_objective_outputs_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TEXT, "algorithm=dfa", "algorithm.output=aux", "objective.output=logits", "hydra.run.dir=run"]) == 2
    assert "algorithm.output=aux conflicts with objective.output=logits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["dataset=text", "objective=token_cross_entropy", "architecture=mlp"],
            "architecture=mlp does not support dataset=text, whose inputs are tokens and whose targets are positions",
        ),
        (["dataset=tabular", "architecture=conv2", "objective=mse"], "architecture=conv2 does not support dataset=tabular"),
        (["dataset=text", "architecture=mlp"], "allowed objectives: token_cross_entropy"),
        (["dataset=tabular"], "objective=cross_entropy requires classes as targets"),
    ],
)
def test_incompatible_components_are_rejected(overrides: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides, "hydra.run.dir=run"]) == 2
    said = capsys.readouterr().err
    assert problem in said and len(said.splitlines()) <= 2 and not Path("run").exists()


def test_regression_is_scored_by_r2(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dataset=tabular", "objective=mse", "architecture.widths=[8]", "epochs=3", "threads=1", "algorithm=fa"]
    assert main([*command, "hydra.run.dir=run"]) == 0
    last, result = lines("run")[-1], json.loads(Path("run/result.json").read_text())
    assert result["test_r2"] == last["test_r2"] < 1 and last["test_rmse"] > 0 and "test_accuracy" not in result
    assert main(["--dry-run", *command, "hydra.run.dir=other"]) == 0
    said = capsys.readouterr().out
    assert "318 training, 35 validation, 89 test" in said and "samples" in said and "images" not in said.split("training\n")[-1]
    assert main([*command, "scale=smoke", "hydra.run.dir=smoke"]) == 0
    assert torch.isfinite(torch.tensor(lines("smoke")[0]["test_loss"]))


def test_class_probes_are_rejected_for_regression(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dataset=tabular", "objective=mse", "architecture.widths=[8]", "epochs=1", "threads=1", "hydra.run.dir=run"]
    assert main([*command, "probes=[readout]"]) == 2
    assert "probes=[readout]: the probe needs one class per sample" in capsys.readouterr().err
    assert main([*command, "probes=[depth_utility,gradient_norm]"]) == 0
    assert json.loads(Path("run/result.json").read_text())["probes"]["depth_utility"].keys() == {"act1"}


def test_bits_per_character_need_characters(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.arange(160).reshape(20, 8) % 7
    np.savez("tokens.npz", x_train=tokens, y_train=tokens, x_test=tokens, y_test=tokens)
    arrays = [*TEXT[:1], "dataset=npz", "dataset.path=tokens.npz", *TEXT[4:], "hydra.run.dir=run"]
    assert main([*arrays, "objective.score=bits_per_character"]) == 2
    assert "objective.score=bits_per_character: the tokens of this dataset have no characters; use bits_per_token" in (
        capsys.readouterr().err
    )
    assert not Path("run").exists()
    assert main([*arrays, "objective.score=bits_per_token"]) == 0
    assert json.loads(Path("run/result.json").read_text())["scores"][0]["name"] == "bits_per_token"


def arrays(x: np.ndarray, y: np.ndarray, test_y: np.ndarray | None = None) -> None:
    np.savez("my.npz", x_train=x, y_train=y, x_test=x, y_test=y if test_y is None else test_y)


@pytest.mark.parametrize(
    ("of", "overrides", "problem"),
    [
        (np.full((20, 3), -100), [], "training targets are all -100, which do not count"),
        (np.full((20, 3), -5), [], "sequence 0 has -5 at position 0.*objective.ignore_index=-100"),
        (np.full(20, 1.5), ["objective=mse"], "training targets are all 1.5, so there is nothing to learn"),
        (np.linspace(0, 2, 20), ["objective=sigmoid_ce"], "objective=sigmoid_ce requires numbers from 0 to 1; use objective=mse"),
        (
            np.linspace(0, 2, 20),
            ["objective=mse", "algorithm=drtp"],
            "drtp computes its errors from class labels.*error_sign=true",
        ),
        (np.linspace(0, 2, 20), ["objective=mse", "algorithm=local_error"], "local_error computes its errors from class labels"),
    ],
)
def test_unusable_targets_are_rejected(
    of: np.ndarray, overrides: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.arange(60).reshape(20, 3)
    arrays(x % 7 if of.ndim > 1 else x / 60.0, of)
    net = (
        ["plugins=[token_nets]", "architecture=token_net", "objective=token_cross_entropy"]
        if of.ndim > 1
        else ["architecture.widths=[4]"]
    )
    assert main(["dataset=npz", "dataset.path=my.npz", "epochs=1", "threads=1", "batch_size=4", *net, *overrides]) == 2
    output = capsys.readouterr()
    assert re.search(problem, output.err + output.out)
    assert "epoch 1" not in output.out


def test_drtp_and_sigmoid_objective_accept_compatible_targets() -> None:
    x = np.arange(60).reshape(20, 3)
    arrays(x / 60.0, np.linspace(0, 1, 20))
    net = ["dataset=npz", "dataset.path=my.npz", "epochs=1", "threads=1", "batch_size=4", "architecture.widths=[4]"]
    assert main([*net, "objective=sigmoid_ce"]) == 0
    assert main([*net, "objective=mse", "algorithm=drtp", "algorithm.error_sign=true"]) == 0
