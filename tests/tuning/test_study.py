"""Tests of studies from the command line: results, resuming after a kill at any time, extension, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.trial import TrialState

import fa_bench
from fa_bench import cli as fa_bench_cli
from fa_bench.errors import RunDirectoryError
from fa_bench.report import figures
from fa_bench.report.files import register
from fa_bench.report.runs import find_runs, read_run
from fa_bench.runs import train
from fa_bench.tuning import final, plan, search, tune
from fa_bench.tuning.cli import main
from fa_bench.tuning.folder import check_folder
from fa_bench.tuning.store import RuleStudy

from .small import STUDY, files, stored_trials


class Killed(KeyboardInterrupt):
    """Ends a study without a checkpoint, as if the process had been killed."""


@pytest.fixture(autouse=True, scope="module")
def what_other_tests_cover_is_left_out() -> Iterator[None]:
    """Skip the figures of the final runs' report and the checks before the first trial. They take seconds, and other tests cover
    them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(final, "check_final", lambda plan: None)
        patch.setattr(plan, "check_fit", lambda jobs: None)
        patch.setattr(
            figures,
            "write_figures",
            lambda runs, folder, name, *others, **named: [figures.Picture("", [register(folder / f"{name}.png")], "")],
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of an uninterrupted study, whose results are in outputs/study."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(STUDY) == 0
        yield folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, which the test may change; the current directory is the one that contains `outputs`."""
    shutil.copytree(finished / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "study"


@pytest.fixture
def only_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """End studies before their final runs."""
    nothing = tune.TuneResult(pd.DataFrame(), pd.DataFrame(), Path(), "", 0)
    monkeypatch.setattr(tune, "_finish", lambda plan, studies: nothing)


def results(folder: Path) -> dict[str, list[Any]]:
    """The values, the score and the state of every stored trial."""
    return {
        rule: [(trial.params, trial.value, trial.state) for trial in of_rule] for rule, of_rule in stored_trials(folder).items()
    }


# ------------------------------------------------------------------------------------------------ results
def test_rules_share_trials_and_start_with_defaults(finished: Path) -> None:
    trials = stored_trials(finished / "outputs" / "study")
    assert {name: [trial.state for trial in of_rule] for name, of_rule in trials.items()} == dict.fromkeys(
        ("bp", "frozen"), [TrialState.COMPLETE] * 3
    )
    for of_rule in trials.values():
        assert of_rule[0].params == {"optimizer.lr": 0.05, "optimizer.weight_decay": 0}
        assert len({str(trial.params) for trial in of_rule}) == 3
        assert [set(trial.distributions) for trial in of_rule] == [{"optimizer.lr", "optimizer.weight_decay"}] * 3
    assert [trial.params for trial in trials["bp"]] == [trial.params for trial in trials["frozen"]]  # random values are shared


def test_tables_match_runs(finished: Path) -> None:
    study = finished / "outputs" / "study"
    table, trials = pd.read_csv(study / "tune.csv").set_index("rule"), pd.read_csv(study / "trials.csv")
    of_trials = [run for directory in find_runs([study / "trials"]) if (run := read_run(directory))]
    assert {run.result["seed"] for run in of_trials} == {2} and len(of_trials) == 6
    for run in of_trials:
        values = run.config["optimizer.lr"], run.config["optimizer.weight_decay"]
        row = trials[(trials["rule"] == run.result["algorithm"]) & (abs(trials["optimizer.lr"] / values[0] - 1) < 1e-8)].iloc[0]
        assert row["val_accuracy"] == pytest.approx(100 * run.result["val_accuracy"], rel=1e-8)
        assert row["optimizer.weight_decay"] == values[1] and row["state"] == "done" and row["epochs"] == 2
    final = [run for directory in find_runs([study / "tuned"]) if (run := read_run(directory))]
    for rule, row in table.iterrows():
        of_rule = trials[trials["rule"] == rule]
        best = of_rule.loc[of_rule["val_accuracy"].idxmax()]  # the first of equal ones
        assert (row["best_trial"], row["val_accuracy"]) == (best["trial"], best["val_accuracy"])
        runs = {run.result["seed"]: run for run in final if run.result["algorithm"] == rule}
        assert sorted(runs) == [0, 1] and row["n"] == 2 and row["trials"] == row["done"] == 3
        assert row["test_accuracy"] == pytest.approx(50 * sum(run.result["test_accuracy"] for run in runs.values()))
        assert all(run.config["optimizer.lr"] == pytest.approx(best["optimizer.lr"], rel=1e-8) for run in runs.values())
    difference = table.loc["frozen", "test_accuracy"] - table.loc["bp", "test_accuracy"]
    assert table.loc["frozen", "bp_difference"] == pytest.approx(difference)
    text = (study / "tune.md").read_text()
    assert "3 trials of 2 epochs with seed 2" in text and "`optimizer.lr=tag(log,interval(0.001,1.0))`" in text
    assert ("no trial was better than the default config" in text) == any(table["best_trial"] == 0)


def test_experiment_reproduces_final_runs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {directory: (directory / "result.json").read_bytes() for directory in find_runs([copy / "tuned"])}
    assert len(before) == 4
    assert fa_bench_cli.main(["-m", "--config-dir", "outputs/study", "experiment=tuned"]) == 0
    assert "of these: 4 finished" in capsys.readouterr().out
    shutil.rmtree(copy / "tuned")
    assert fa_bench_cli.main(["-m", "--config-dir", "outputs/study", "experiment=tuned"]) == 0
    hashes = ("config_hash", "weights_hash", "group", "seed")
    assert {directory: [json.loads(result)[key] for key in hashes] for directory, result in before.items()} == {
        directory: [json.loads((directory / "result.json").read_bytes())[key] for key in hashes]
        for directory in find_runs([copy / "tuned"])
    }


# ------------------------------------------------------------------------------------------------ kills
def _after_ask(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def install(patch: pytest.MonkeyPatch) -> None:
        run_trial, count = search.run_trial, [0]

        def killed(trial: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                raise Killed
            return run_trial(trial)

        patch.setattr(search, "run_trial", killed)

    return install


def _before_tell(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def install(patch: pytest.MonkeyPatch) -> None:
        tell, count = RuleStudy.tell, [0]

        def killed(self: RuleStudy, *arguments: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                raise Killed
            return tell(self, *arguments)

        patch.setattr(RuleStudy, "tell", killed)

    return install


def _in_run(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A patch that kills the process in training, after the first of the two epochs of the run with this number."""

    def install(patch: pytest.MonkeyPatch) -> None:
        end, count = train.Checkpoints.on_epoch_end, [0]

        def killed(self: Any, *arguments: Any) -> None:
            end(self, *arguments)
            count[0] += 1
            if count[0] == 2 * number - 1:
                raise Killed

        patch.setattr(train.Checkpoints, "on_epoch_end", killed)

    return install


def _writing_tables(patch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    patch.setattr(tune, "_write", killed)


#: One of six trials is finished at the first kill, and four are finished at the second and third, both of which interrupt the
#: fifth trial.
KILLS = {
    "after ask": _after_ask(2),
    "in training": _in_run(4),
    "before tell": _before_tell(1),
    "in a final run": _in_run(3),
    "before the tables": _writing_tables,
}


def test_killed_study_matches_uninterrupted_one(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same study is killed at each of the critical moments in turn."""
    monkeypatch.chdir(tmp_path)
    for moment, install in KILLS.items():
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            assert main(STUDY) == 130, moment
        assert not Path("outputs/study/tune.csv").exists(), moment
    journal = Path("outputs/study/study.journal")
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')  # as if the disk had been full
    assert main(STUDY) == 0
    there, here = files(finished / "outputs" / "study"), files(Path("outputs/study"))
    assert [name for name in there if there[name] != here[name]] == []
    assert {name: [trial.params for trial in of_rule] for name, of_rule in stored_trials(Path("outputs/study")).items()} == {
        name: [trial.params for trial in of_rule] for name, of_rule in stored_trials(finished / "outputs" / "study").items()
    }


def test_finished_study_does_not_train(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Trainer, "fit", lambda self: pytest.fail("trained"))
    before = files(copy)
    assert main(STUDY) == 0 and files(copy) == before


@pytest.mark.usefixtures("only_trials")
def test_larger_budget_extends_study_like_fresh_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = [word if word != "budget=3" else "budget=4" for word in STUDY]
    assert main(larger) == 0
    assert "of the trials, 6 are finished" in capsys.readouterr().out
    assert main([*larger, "output_dir=other"]) == 0
    assert results(copy) == results(Path("other/study")) and len(results(copy)["bp"]) == 4
    assert main(STUDY) == 2
    assert "budget=3: outputs/study has 4 finished trials of bp; pass budget=4 or more" in capsys.readouterr().err


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of all runs in a folder."""
    return sorted(folder.rglob("*.pt"))


@pytest.mark.usefixtures("only_trials")
@pytest.mark.parametrize("jobs", [1, 2])
def test_keep_checkpoints_option_for_trials(jobs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*STUDY, "budget=1", f"jobs={jobs}"]) == 0
    assert checkpoints(Path("outputs/study/trials")) == []
    assert not list(Path("outputs/study/trials").rglob("checkpoints"))  # no empty folders
    assert main([*STUDY, "budget=1", f"jobs={jobs}", "keep_checkpoints=true", "name=kept"]) == 0
    assert [path.name for path in checkpoints(Path("outputs/kept/trials"))] == ["last.pt", "previous.pt"] * 2


def test_final_runs_keep_their_checkpoints(finished: Path) -> None:
    folder = finished / "outputs" / "study"
    assert len(checkpoints(folder / "tuned")) == 8  # two for each of two rules with two seeds
    assert checkpoints(folder / "trials") == []


@pytest.mark.usefixtures("only_trials")
def test_two_jobs_give_same_trials_as_one(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*STUDY, "jobs=2"]) == 0
    assert results(Path("outputs/study")) == results(finished / "outputs" / "study")


@pytest.mark.usefixtures("only_trials")
@pytest.mark.parametrize("seeds", [1, 2])
def test_pruned_trials_count_and_killed_study_prunes_identically(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Successive halving records in each trial which rungs it reached, also in runs that were finished before the kill."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in STUDY if not word.startswith(("algorithm", "budget", "epochs"))]
    words = [*words, "algorithm=bp", "budget=6", "epochs=4", "pruner=successive_halving", f"tune_seeds={seeds}"]
    assert main(words) == 0
    states = [trial.state for trial in stored_trials(Path("outputs/study"))["bp"]]
    assert len(states) == 6 and TrialState.PRUNED in states and states[0] == TrialState.COMPLETE
    first = states.index(TrialState.PRUNED)
    for install in (_in_run(3), _before_tell(1), _before_tell(first + 1), _in_run(1)):
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            assert main([*words, "output_dir=other"]) == 130
    assert main([*words, "output_dir=other"]) == 0
    assert results(Path("other/study")) == results(Path("outputs/study"))
    there, here = (stored_trials(Path(folder, "study"))["bp"] for folder in ("outputs", "other"))
    assert [trial.intermediate_values for trial in there] == [trial.intermediate_values for trial in here]
    assert [trial.system_attrs for trial in there] == [trial.system_attrs for trial in here]
    assert len(there[first].intermediate_values) < 4


# ------------------------------------------------------------------------------------------------ failures
def test_diverged_and_failed_trials_are_counted_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, count = train.run, [0]

    def fails_once(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("a broken machine")
        return run(*arguments, **named)

    monkeypatch.setattr(train, "run", fails_once)
    words = [word for word in STUDY if not word.startswith("algorithm")]
    result = fa_bench.tune(*words, "optimizer.lr=1e29,1e30", algorithm="bp", study_seed=1)
    assert result.table.loc[0, ["trials", "done", "diverged", "failed"]].tolist() == [3, 1, 1, 1]
    assert result.trials["state"].tolist() == ["done", "failed", "diverged"]
    values = [trial.value for trial in stored_trials(result.directory)["bp"]]
    assert values[0] and values[1:] == [0, 0]
    text = (result.directory / "tune.md").read_text()
    assert "bp trial 1: failed seed 2: RuntimeError: a broken machine" in text and "not finite in epoch 1" in text
    assert "no trial was better than the default config" in text and result.table.loc[0, "best_trial"] == 0


def test_directory_of_other_study_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copy)
    assert main([word if word != "epochs=2" else "epochs=1" for word in STUDY]) == 2
    assert "belongs to another study (bp: epochs=2 there, 1 here); choose another name=NAME" in capsys.readouterr().err
    assert files(copy) == before


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (
            ["rules", "bp", "space", "optimizer.lr"],
            "interval(0.1,1.0)",
            "bp: optimizer.lr=tag(log,interval(0.001,1.0)) there, interval(0.1,1.0) here",
        ),
        (["rules", "bp", "space", "optimizer.momentum"], "0,0.5", "bp: optimizer.momentum=none there, 0,0.5 here"),
        (["rules", "frozen"], None, "frozen: "),
        (["rules", "kp"], {"space": {}}, "of bp, frozen, to which kp cannot be added"),
        (["sampler"], "random", "sampler=tpe there, random here"),
        (["study_seed"], 3, "study_seed=0 there, 3 here"),
        (["tune_seeds"], [2, 3], "tune_seeds=[2] there, [2,3] here"),
        (["code"], "0", "code="),
        (["data"], "0", "data="),
    ],
)
def test_differing_key_is_reported(finished: Path, path: list[str], value: Any, problem: str) -> None:
    folder = finished / "outputs" / "study"
    described = here = json.loads((folder / "tune.json").read_text())["study"]
    check_folder(folder, described)
    for part in path[:-1]:
        here = here[part]
    here.pop(path[-1], None)
    here |= {} if value is None else {path[-1]: value}
    with pytest.raises(RunDirectoryError, match=re.escape(f"belongs to another study ({problem}")):
        check_folder(folder, described)


def test_foreign_files_are_rejected(copy: Path) -> None:
    described = json.loads((copy / "tune.json").read_text())["study"]
    (copy / "report.md").write_text("as fa-bench-report writes it")
    check_folder(copy, described)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"contains 'notes.txt', which no study wrote"):
        check_folder(copy, described)
    (copy / "notes.txt").rename(copy.parent / "notes.txt")
    (copy / "tune.md").unlink()
    (copy / "tune.md").symlink_to(copy.parent / "notes.txt")
    with pytest.raises(RunDirectoryError, match=r"tune.md: not a file that a study wrote"):
        check_folder(copy, described)
    (copy / "tune.md").unlink()
    check_folder(copy, described)
    (copy / "tune.json").unlink()
    with pytest.raises(RunDirectoryError, match="which no study wrote"):
        check_folder(copy, described)
    (copy / "tune.json").write_text("[]")
    with pytest.raises(RunDirectoryError, match="not the description of a study"):
        check_folder(copy, described)


def test_changed_trials_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = copy / "study.journal"
    text = journal.read_text()
    assert text.count("0.05") >= 2
    journal.write_text(text.replace("0.05", "0.06"))
    assert main(STUDY) == 2
    assert "trial 0 of bp has different values than this study proposes" in capsys.readouterr().err
    journal.write_text("no JSON\n")
    assert main(STUDY) == 2
    assert "study.journal: damaged, or not written by a study (JSONDecodeError" in capsys.readouterr().err
