"""A study refuses invalid input before it trains. Many of the errors say what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fa_bench.config.job import register_schemas
from fa_bench.errors import FaBenchError, RunDirectoryError
from fa_bench.tuning.cli import main
from fa_bench.tuning.folder import STUDY, check_folder
from fa_bench.tuning.plan import make_plan
from fa_bench.tuning.store import JOURNAL, stored_studies

SMALL = ("algorithm=bp,fa", "dataset=synthetic", "dataset.samples=100", "architecture.widths=[4]", "epochs=1")


@pytest.fixture(autouse=True)
def schemas() -> None:
    register_schemas()


def refusal(tmp_path: Path, *overrides: str) -> str:
    given = {text.partition("=")[0] for text in overrides}
    common = [text for text in SMALL if text.partition("=")[0] not in given]
    with pytest.raises(FaBenchError) as caught:
        make_plan([*common, f"output_dir={tmp_path}", *overrides], None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds=interval(0,3)", "seeds=interval(0,3): seeds is an option of the study"),
        ("seeds=", "seeds=: write seeds, such as seeds=3"),
        ("seeds=range(0,1000000000)", "more than 10000 values"),
        ("tune_seeds=true", "tune_seeds=true: write seeds"),
        ("tune_seeds=[5,5]", "tune_seeds=[5,5]: lists 5 twice"),
        ("name=-x", "does not begin with '-'"),
        ("algorithm=[bp,fa]", "write algorithm=bp,fa"),
        ("tune.budget=5", "write budget=VALUE"),
        ("optimizer.lr=choice()", "write a list such as 0.1,0.2"),
        ("optimizer.lr=tag(log,0.1,1)", "tag(log,interval(LOW,HIGH))"),
        ("optimizer.lr=range(0,1000000000)", "more than 10000 values"),
        ("optimizer.lrr=interval(0.1,1)", "did you mean 'optimizer.lr'?"),
        ("batch_size=interval(16,64.5)", "write int(interval(16,64)) for whole numbers"),
        ("dataset.validation=0", "hold out samples with dataset.validation=0.1"),
        ("dataset.validation=0.1,0.2", "dataset.validation cannot be searched"),
        ("device=cpu,cuda", "device cannot be searched"),
    ],
)
def test_invalid_override_error_gives_hint(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal(tmp_path, override)
    assert expected in message
    assert len(message.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["study", "dry run"])
@pytest.mark.parametrize(
    ("size", "overrides", "expected"),
    [
        (12, ["algorithm=bp,dgl", "architecture=mlp", "architecture.widths=[4]"], "'dgl' needs at least two modules"),
        (2, ["algorithm=bp", "architecture=conv2", "architecture.padding=0"], "architecture"),
    ],
    ids=["rule", "architecture"],
)
def test_components_unfit_for_image_folder_are_refused_before_trials(
    size: int, overrides: list[str], expected: str, dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 4), ("test", 1)):
        for label in ("cat", "dog"):
            (folder := tmp_path / "data" / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (size, size), (40 * number, 0, 0)).save(folder / f"{number}.png")
    data = ["dataset=image_folder", f"data_dir={tmp_path / 'data'}", "dataset.validation=2"]
    assert main([*dry, *overrides, *data, "epochs=1", f"output_dir={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.count("\n") <= 2 and "Tuning" not in captured.out
    assert not list(tmp_path.rglob("result.json"))


def test_dry_run_requires_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "algorithm=bp", "dataset=mnist", f"data_dir={tmp_path}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "mnist" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_suggested_integer_range_is_valid(tmp_path: Path) -> None:
    plan = make_plan([*SMALL, f"output_dir={tmp_path}", "batch_size=int(interval(16,64))"], None)
    assert plan.rules[0].space["batch_size"].text == "int(interval(16,64))"


def test_changed_tune_seeds_error_suggests_original_seeds(tmp_path: Path) -> None:
    (tmp_path / STUDY).write_text(json.dumps({"study": {"tune_seeds": [3]}}))
    with pytest.raises(RunDirectoryError, match=r"tune_seeds=\[3\] there, \[5\] here.*pass tune_seeds=\[3\]"):
        check_folder(tmp_path, {"tune_seeds": [5]})
    check_folder(tmp_path, {"tune_seeds": [3]})


def test_journal_ending_with_invalid_json_is_rejected(tmp_path: Path) -> None:
    plan = make_plan([*SMALL, f"output_dir={tmp_path}"], None)
    plan.directory.mkdir()
    stored_studies(plan)
    with open(plan.directory / JOURNAL, "ab") as file:
        file.write(b"garbage{\n")
    with pytest.raises(RunDirectoryError, match=f"{JOURNAL}: damaged"):
        stored_studies(plan)
