"""``--dry-run`` describes a run and what it needs, and writes nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import fa_bench
from fa_bench.cli import main
from fa_bench.command.dry_run import describe
from fa_bench.config.job import Job
from fa_bench.data.fetch import downloads_refused, fetching, unpack_zip
from fa_bench.errors import DataError
from fa_bench.metrics.cost import at_batch, multiplications, step_costs
from fa_bench.models.conv2 import Conv2
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.report import figures
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import CONFIG, METRICS, RESULT
from fa_bench.utils.text import format_bytes, format_count

TINY = [
    "dataset=synthetic",
    "dataset.samples=80",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=2",
    "probe_size=8",
    "architecture.widths=[8,6]",
    "device=cpu",
]
RESNET = [*TINY[:-2], "architecture=resnet20", "architecture.width=4", "architecture.blocks=1", "dataset.channels=3"]
CONFIGURED = (
    "{algorithm: {name: fa}, architecture: {name: mlp}, dataset: {name: digits}, optimizer: {name: sgd}, "
    "objective: {name: cross_entropy}, epochs: 9}"
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


def tree() -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = tree()
    capsys.readouterr()
    assert main(["--dry-run", *words]) == 0
    assert tree() == before
    return capsys.readouterr().out


def row(text: str, *cells: str) -> str:
    """Return the rest of the line that begins with these cells, with each run of spaces replaced by one space."""
    found = re.search(r"^ +" + r" +".join(map(re.escape, cells)) + r" +(.*)$", text, re.M)
    assert found is not None, (cells, text)
    return " ".join(found.group(1).split())


def test_edge_rule_description(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*TINY, "algorithm=fa", "algorithm.freeze_stem=true"], capsys)
    config = yaml.safe_load(text.split("config\n")[1].split("\nmodel\n")[0])
    assert config["algorithm"]["name"] == "fa" and config["architecture"]["widths"] == [8, 6]
    assert "fa covers 3 layers, every weight\n" in text
    assert row(text, "fc1", "Linear") == "8x64 frozen passes through fixed B"
    assert row(text, "fc2", "Linear", "6x8") == "passes through fixed B"
    assert "\n  no error is sent back from fc1, because no earlier layer learns" in text
    assert row(text, "fc2", "B") == "6x8 192 B fixed"
    parameters = 8 * 65 + 6 * 9 + 10 * 7
    assert row(text, "parameters") == f"{parameters}, {parameters - 8 * 65} of them trained"
    assert row(text, "weights") == format_bytes(4 * parameters)
    assert row(text, "feedback").startswith("2.48 kB, 0 B of it learned") and 4 * (8 * 64 + 6 * 8 + 10 * 6) == 2480
    assert row(text, "optimizer state") == f"{format_bytes(4 * (parameters - 8 * 65))} (sgd)"
    # With backpropagation, all layers have a forward pass and a gradient, and fc2 and fc3 propagate the error. With the rule,
    # whose first layer is frozen, only fc3 propagates the error, and only fc2 and fc3 have a gradient.
    forward, errors, gradients = 8 * 64 + 6 * 8 + 10 * 6, 6 * 8 + 10 * 6, 6 * 8 + 10 * 6
    own, whole = 16 * (forward + 10 * 6 + gradients), 16 * (forward + errors + forward)
    counted = f"{format_count(own)} per step, {own / whole:.2f} times backpropagation's {format_count(whole)} (batch of 16)"
    assert row(text, "multiplications") == counted
    assert row(text, "steps") == "4 per epoch, 8 in 2 epochs"
    assert row(text, "images") == "72 training, 8 validation, 16 test; 1x8x8, 10 classes"
    assert re.search(r"^output\n  outputs/synthetic-mlp/fa-\w{8}/seed0: empty$", text, re.M)


def test_cut_rule_description(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*TINY, "algorithm=dfa"], capsys)
    assert row(text, "fc1", "Linear", "8x64") == "comes from the cut at act1"
    assert row(text, "fc3", "Linear", "10x6") == "is the true one (output layer)"
    assert "no error is sent back" not in text
    assert row(text, "act2", "B") == "10x6 240 B fixed"
    own = 16 * (8 * 64 + 6 * 8 + 10 * 6) * 2 + 16 * 10 * (8 + 6)
    assert row(text, "multiplications").startswith(f"{format_count(own)} per step")
    assert row(text, "memory accesses").endswith("for backpropagation; not defined for dfa")


def test_learned_feedback_with_separate_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*TINY, "algorithm=kp", "optimizer@feedback_optimizer=adam"], capsys)
    assert row(text, "fc2", "Linear", "6x8") == "passes through learned B" and row(text, "fc2", "B").endswith("learned")
    weights, feedback = 8 * 64 + 6 * 8 + 10 * 6, 4 * (8 * 64 + 6 * 8 + 10 * 6)
    assert row(text, "feedback").startswith(f"{format_bytes(feedback)}, {format_bytes(feedback)} of it learned")
    # The optimizer state consists of one momentum for each parameter, two moments for each entry of B, and one step count for
    # each tensor of B.
    state = 4 * (weights + 24) + 2 * feedback + 3 * 4
    assert row(text, "optimizer state") == f"{format_bytes(state)} (sgd; feedback: adam)"
    assert "unused" in said([*TINY, "algorithm=fa", "optimizer@feedback_optimizer=adam"], capsys)


def test_asap_on_resnet20(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*RESNET, "algorithm=asap"], capsys)
    assert row(text, "conv1", "Conv2d").startswith("4x3x3x3 frozen")
    assert row(text, "stages.layer1.0.conv2", "Conv2d", "4x4x3x3").endswith("shares the input of stages.layer1.0.conv1")
    assert row(text, "and 7 BatchNorm2d with") == "120 parameters"
    ratio = re.fullmatch(r"\S+ per step, (0\.\d\d) times backpropagation's \S+", row(text, "memory accesses"))
    assert ratio is not None and float(ratio.group(1)) < 0.9


def test_feedback_computed_from_weight_uses_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*TINY, "algorithm=usf"], capsys)
    assert row(text, "fc2", "B", "6x8") == "- computed from the weight when needed" and row(text, "feedback").startswith("0 B")


def test_scale_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    text = said([*TINY, "scale=smoke", "algorithm=wm"], capsys)
    assert row(text, "steps") == "2 per epoch, 2 in 1 epoch" and "(batch of 8)" in row(text, "multiplications")
    smaller = "epochs=1, batch_size=8, probe_size=4, algorithm.initial_steps=0"
    assert row(text, "scale=smoke") == f"trains with {smaller}; all numbers above are for this shortened run"
    assert "B, which learns W from noise" in row(text, "fc2", "Linear")


def test_dry_run_skips_pretraining_phase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run skips the mirror steps before training, because hundreds of them in every layer would take too long."""
    calls = []
    mirror = ALGORITHMS["wm"]._mirror  # type: ignore[attr-defined]
    monkeypatch.setattr(ALGORITHMS["wm"], "_mirror", lambda rule, steps: (calls.append(steps), mirror(rule, steps)))
    said([*TINY, "algorithm=wm"], capsys)
    assert calls == [1] * 4  # one for the first step, and one for each of the counted steps


def test_grid_description(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", *TINY, "algorithm=fa,kp", "optimizer.lr=0.1,0.2", "seed=0,1"]
    text = said(words, capsys)
    assert "\n8 jobs (16 epochs); output: outputs/synthetic-mlp\n" in text and "\n  8 of 8: empty\n" in text
    titles = re.findall(r"^(.*)\n=====", text, re.M)
    assert titles == [f"{rule} lr={lr}" for rule in ("fa", "kp") for lr in (0.1, 0.2)]
    assert text.count("\nconfig\n") == 1 and text.count("\ncost\n") == 4


def test_large_grid_shows_only_first_config(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["-m", *TINY, "algorithm=fa", "optimizer.lr=0.1,0.2,0.3,0.4,0.5,0.6,0.7", "seed=0,1"], capsys)
    assert text.count("\ncost\n") == 1 and "\n6 more configs;" in text


def test_existing_run_directories_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "hydra.run.dir=run"]) == 0
    assert re.search(r"\n  run: finished: test accuracy \d+\.\d\d%$", said([*TINY, "hydra.run.dir=run"], capsys).rstrip())
    other = said([*TINY, "hydra.run.dir=run", "optimizer.lr=0.3"], capsys)
    assert "\n  run: cannot be used (belongs to a run with another config" in other
    assert "optimizer.lr=0.05 there, 0.3 here" in other


def test_describe_run_directory_states() -> None:
    job, place = Job.from_config(OmegaConf.create(yaml.safe_load(CONFIGURED))), Path("run")
    assert describe(place, job) == "empty"
    RunDirectory(place, job).start(resume=False)
    assert describe(place, job) == "unfinished: without a result after 0 of 9 epochs"
    (place / METRICS).write_text('{"epoch": 1}\n{"epoch": 2}\n')
    result = {"status": "interrupted", "label": "fa", "group": "fa", "algorithm": "fa", "seed": 0}
    (place / RESULT).write_text(json.dumps(result))
    assert describe(place, job) == "unfinished: interrupted after 2 of 9 epochs"
    (place / RESULT).write_text(json.dumps(result | {"status": "finished"}))
    assert describe(place, job) == "finished"
    (place / RESULT).write_text("{")
    assert describe(place, job).startswith("unfinished: run/result.json: unreadable")
    (place / CONFIG).unlink()
    assert describe(place, job).startswith("cannot be used (contains metrics.jsonl")


def test_grid_counts_existing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    text = said(["-m", *TINY, "seed=0,1"], capsys)
    assert "\n  1 of 2: finished\n  1 of 2: empty\n" in text and re.search(r"/seed0: finished: test accuracy", text)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["dataset=mnist"], ["dataset=mnist: missing train-images-idx3-ubyte", "data/MNIST/raw", "data_dir"]),
        (["dataset=tiny_imagenet"], ["dataset=tiny_imagenet", "data/tiny-imagenet-200"]),
        (["dataset=image_folder", "data_dir=none"], ["data_dir=none", "train/"]),
        (["algorithm=faa"], ["algorithm=faa", "'fa'"]),
        (["algorithm=bp,fa"], ["-m"]),
        (["device=cuda:77"], ["device=cuda:77"]),
        (["algorithm=dfa", "algorithm.cuts=[act9]"], ["act9"]),
        (["-m", "algorithm=fa,dfa", "architecture.widths=[]"], ["cut"]),
        (["--cfg", "job"], ["--dry-run and --cfg", "together"]),
    ],
)
def test_broken_input_gives_single_line_error(words: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and all(part in err for part in named)
    assert not list(Path().iterdir())


def test_no_bytecode_is_written_for_plugins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("plain_plugin.py").write_text("x = 1\n")
    said([*TINY, "plugins=[plain_plugin]"], capsys)
    assert sys.modules.pop("plain_plugin").x == 1 and not sys.dont_write_bytecode


def test_dry_run_neither_downloads_nor_unpacks(tmp_path: Path) -> None:
    with downloads_refused():
        with pytest.raises(DataError, match="downloads nothing"), fetching(tmp_path / "data", "mnist", "files"):
            raise AssertionError("not reached")
        with pytest.raises(DataError, match="not unpacked yet"):
            unpack_zip(tmp_path / "a.zip", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_help_lists_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "fa-bench --dry-run" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the counter
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.startswith("as")])
def test_predicted_multiplications_match_counted_ones(name: str) -> None:
    """The predicted number of multiplications for a batch of 9 equals the number that the rule performs, and the predicted
    reference equals the number for backpropagation in the plain model."""
    options = {"wm": {"initial_steps": 0}, "f3": {"samples": 9}}.get(name, {})
    x, y = torch.randn(9, 1, 8, 8), torch.arange(9) % 3

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return Conv2(channels=3, hidden=5).build((1, 8, 8), 3)

    model, plain = build(), build()
    rule = fa_bench.attach(model, name, seed=0, sample_input=x[:2], **options)

    def step() -> None:
        logits = model(x)
        rule.backward(torch.nn.functional.cross_entropy(logits, y), logits, y, indices=torch.arange(9))
        rule.step()

    own, exact = (cost.multiplications for cost in step_costs(rule, (1, 8, 8), 3, 9))
    assert own == multiplications(step)
    assert exact == multiplications(lambda: torch.nn.functional.cross_entropy(plain(x), y).backward())


def test_quadratic_extrapolation_is_exact() -> None:
    assert at_batch([7 + 5 * n + 3 * n * n for n in (2, 3, 4)], 100) == 7 + 500 + 30_000


def test_format_bytes_and_counts() -> None:
    assert [format_bytes(size) for size in (0, 999, 1000, 131_072, 999_999, 2.68e6, 1e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "131 kB",
        "1 MB",
        "2.68 MB",
        "1 GB",
    ]
    assert [format_count(number) for number in (0, 1797, 25_673_728, 3e9)] == ["0", "1,797", "25.7 million", "3 billion"]
