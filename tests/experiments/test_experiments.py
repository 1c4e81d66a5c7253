"""Tests of experiments: the jobs of a sweep, tables of settings by component, and runs at a smaller scale."""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.config.job import Job, conf_dir, register_schemas
from fa_bench.config.labels import duration, flatten, sweep_summary
from fa_bench.config.scale import SCALES, scaled
from fa_bench.errors import ConfigError
from fa_bench.mechanisms.weighted_layers import weighted_layers
from fa_bench.registry.options import option_fields
from fa_bench.report.published import published
from fa_bench.rules.fa import FA
from fa_bench.runs.train import run

from ..data.files import write_cifar, write_imagenet, write_mnist, write_svhn, write_tiny_imagenet

TINY = """
  - override /dataset: synthetic
dataset: {samples: 200, test_samples: 40}
architecture: {widths: [4]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    register_schemas()
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    return tmp_path


def preset(folder: Path, text: str) -> str:
    (folder / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults:{TINY}{text}")
    return f"--config-dir={folder / 'own'}"


def jobs(folder: Path, *overrides: str) -> list[Job]:
    composer = Composer("config", str(folder / "own"), ["experiment=mine", *overrides])
    return [job for job, _ in composer.check(composer.expand(multirun=True))]


def test_grid_parts_have_separate_keys(folder: Path) -> None:
    preset(folder, "grid: [{algorithm: 'bp,kp', seed: '0,1'}, {algorithm: fa, algorithm.density: '0.5,0.1'}]")
    found = [(job.algorithm.name, getattr(job.algorithm, "density", None), job.run.seed) for job in jobs(folder)]
    assert found == [("bp", None, 0), ("bp", None, 1), ("kp", None, 0), ("kp", None, 1), ("fa", 0.5, 0), ("fa", 0.1, 0)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm=fa"], [("fa", 0), ("fa", 0)]),
        (["algorithm=fa", "algorithm.density=0.2"], [("fa", 0)]),
        (["algorithm=kp,fa", "seed=3"], [("kp", 3), ("fa", 3), ("fa", 3)]),
        (["algorithm=usf"], [("usf", 0), ("usf", 1)]),
        (["seed=7"], [("bp", 7), ("kp", 7), ("fa", 7), ("fa", 7)]),
    ],
)
def test_overrides_select_grid_parts(folder: Path, overrides: list[str], expected: list[tuple[str, int]]) -> None:
    preset(folder, "grid: [{algorithm: 'bp,kp', seed: '0,1'}, {algorithm: fa, algorithm.density: '0.5,0.1'}]")
    assert [(job.algorithm.name, job.run.seed) for job in jobs(folder, *overrides)] == expected


def test_feedback_optimizer_does_not_select_grid_parts(folder: Path) -> None:
    preset(folder, "grid: [{algorithm: bp}, {algorithm: kp, optimizer: adam}]")
    found = jobs(folder, "optimizer@feedback_optimizer=adamw")
    assert [(job.algorithm.name, job.optimizer.name) for job in found] == [("bp", "sgd"), ("kp", "adam")]
    assert [job.feedback_optimizer and job.feedback_optimizer.name for job in found] == ["adamw", "adamw"]


def test_null_in_grid(folder: Path) -> None:
    preset(folder, "grid: [{clip_norm: null}, {clip_norm: 1}]")
    assert [job.run.clip_norm for job in jobs(folder)] == [None, 1.0]


def test_grid_runs_all_parts_with_consecutive_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = preset(folder, "epochs: 2\ngrid: [{algorithm: 'bp,kp'}, {algorithm: fa, algorithm.density: '1.0,0.5'}]")
    assert main(["-m", "experiment=mine", where]) == 0
    out = capsys.readouterr().out
    assert "4 jobs (8 epochs); output: outputs/mine\n  algorithm: bp, kp, fa\n" in out
    assert "  algorithm.density: 1.0, 0.5\n" in out and "  epochs: 2\n" in out and "scale" not in out
    assert [out.count(f"[{number}/4]") > 0 for number in range(1, 6)] == [True] * 4 + [False]
    assert "[1/4] bp seed 0: " in out and " remaining" in out
    assert len(list(Path("outputs/mine").glob("*/seed0/result.json"))) == 4


@pytest.mark.parametrize("grid", ["{algorithm: bp}", "[bp, fa]", "[{}]", "3"])
def test_invalid_grid_is_rejected(folder: Path, grid: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = preset(folder, f"grid: {grid}")
    assert main(["-m", "experiment=mine", where]) == 2
    assert "experiment=mine: grid=" in capsys.readouterr().err


def test_settings_by_component(folder: Path) -> None:
    preset(
        folder,
        """
optimizer:
  lr: ${by:algorithm,{kp:0.3,fa:${by:dataset,{synthetic:0.02,mnist:0.01}}},0.1}
feedback_optimizer: ${by:algorithm,{kp:{name:adam,lr:0.5}},null}
grid: [{algorithm: 'bp,kp,fa'}]
""",
    )
    found = jobs(folder)
    assert [job.optimizer.lr for job in found] == [0.1, 0.3, 0.02]
    assert [job.feedback_optimizer and job.feedback_optimizer.lr for job in found] == [None, 0.5, None]
    assert [job.optimizer.lr for job in jobs(folder, "optimizer.lr=0.7")] == [0.7] * 3


@pytest.mark.parametrize(("table", "message"), [("${by:algoritm,{kp:1}}", "algorithm"), ("${by:algorithm,{pka:1}}", "pfa")])
def test_settings_table_with_unknown_name_is_rejected(
    folder: Path, table: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = preset(folder, f"optimizer: {{lr: '{table}'}}\n")
    assert main(["experiment=mine", where]) == 2
    assert message in capsys.readouterr().err


def test_scale_shortens_same_config(folder: Path) -> None:
    preset(folder, "epochs: 200\noptimizer: {schedule: {name: multistep, milestones: [100, 150]}}\n")
    (job,) = jobs(folder, "scale=short")
    small = scaled(job)
    assert small.run.epochs == 20 and small.optimizer.schedule.milestones == [10, 15]
    assert scaled(jobs(folder)[0]).run.epochs == 200
    assert job.config_hash != jobs(folder)[0].config_hash
    assert main(["experiment=mine", f"--config-dir={folder / 'own'}", "scale=smoke"]) == 0
    result = json.loads(next(Path("outputs").rglob("result.json")).read_text())
    smoke = SCALES["smoke"]
    assert smoke is not None and result["epochs"] == 1
    assert result["step"] == round(0.9 * smoke.train) // smoke.batch_size


def test_full_scale_is_not_in_identity(folder: Path) -> None:
    preset(folder, "")
    assert "scale" not in jobs(folder)[0].identity()


def options_of_rules(found: list[Job]) -> list[tuple[str, float, int]]:
    return [(job.algorithm.name, getattr(job.algorithm, "density", 1.0), job.run.seed) for job in found]


RULES = "rules: {fa: {density: 0.5}, usf: {density: 0.25}}\n"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [("bp", 1.0, 0), ("bp", 1.0, 1), ("fa", 0.5, 0), ("fa", 0.5, 1), ("dfa", 1.0, 0), ("dfa", 1.0, 1)]),
        (["algorithm=fa"], [("fa", 0.5, 0), ("fa", 0.5, 1)]),
        (["algorithm=usf,kp", "seed=3"], [("usf", 0.25, 3), ("kp", 1.0, 3)]),
        (["algorithm=fa", "algorithm.density=0.1,0.2", "seed=0"], [("fa", 0.1, 0), ("fa", 0.2, 0)]),
    ],
)
def test_preset_rules_set_options_per_rule(folder: Path, overrides: list[str], expected: list[tuple[str, float, int]]) -> None:
    preset(folder, RULES + "grid: [{algorithm: 'bp,fa,dfa', seed: '0,1'}]")
    assert options_of_rules(jobs(folder, *overrides)) == expected


def test_preset_rules_without_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = preset(folder, RULES)
    assert main(["experiment=mine", place, "--cfg", "job"]) == 0
    assert "  density: 0.5\n" in capsys.readouterr().out
    assert options_of_rules(jobs(folder)) == [("fa", 0.5, 0)]  # the rule of the default config
    assert main(["experiment=mine", place, "scale=smoke"]) == 0
    [config] = Path("outputs").rglob("config.yaml")
    assert OmegaConf.load(config)["algorithm"]["density"] == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{pfa_0: {density: 0.5}}", r"experiment=mine: rules\.pfa_0: no such algorithm; did you mean 'pfa_o'"),
        ("[fa]", r"experiment=mine: rules=\['fa'\]: must map"),
        ("{fa: {densty: 0.5}}", r"algorithm\.densty: unknown key densty in algorithm; did you mean 'density'"),
    ],
)
def test_invalid_preset_rules_are_rejected(folder: Path, text: str, said: str) -> None:
    preset(folder, f"rules: {text}\ngrid: [{{algorithm: 'bp,fa'}}]")
    with pytest.raises(ConfigError, match=said):
        jobs(folder)


def test_cfg_reports_unknown_rule_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=mine", preset(folder, "rules: {fa: {densty: 0.5}}"), "--cfg", "job"]) == 2
    assert "algorithm.densty: unknown key densty in algorithm; did you mean 'density'" in capsys.readouterr().err


def test_preset_rules_keep_text_unchanged(folder: Path) -> None:
    patterns = ["a\\b", "é*", "'", '"', "x\\", "null", "1", "a,b"]
    preset(folder, f"rules: {{fa: {{include: {json.dumps(patterns)}}}}}")
    [job] = jobs(folder)
    assert isinstance(job.algorithm, FA) and job.algorithm.include == patterns


def test_help_describes_own_experiments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own" / "experiment" / "sub").mkdir()
    for name in ("quickstart", "sub/other"):
        (folder / "own" / "experiment" / f"{name}.yaml").write_text("# @package _global_\n# Text of my own.\nepochs: 1\n")
        assert main(["--help", f"experiment={name}", "--config-dir", str(folder / "own")]) == 0
        assert capsys.readouterr().out == f"experiment={name}:\n  Text of my own.\n"


def test_help_resolves_values_of_own_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own" / "optimizer").mkdir()
    for value, code, said in (
        ("${by:algorithm,{fa: 0.3}}", 0, "optimizer.lr=0.3\n"),
        ("high", 2, "optimizer.lr='high' is not a number"),
        ("${nope}", 2, "optimizer=mine: optimizer.lr: "),
    ):
        (folder / "own" / "optimizer" / "mine.yaml").write_text(f'defaults: [sgd]\nlr: "{value}"\n')
        assert main(["--help", "optimizer=mine", "--config-dir", str(folder / "own")]) == code
        assert said in "".join(capsys.readouterr())


def test_help_on_feedback_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "optimizer@feedback_optimizer=adam"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("optimizer@feedback_optimizer=adam: ") and "  feedback_optimizer.lr=0.001\n" in out


def test_scale_shortens_pretraining_phase(folder: Path) -> None:
    preset(folder, "")
    steps = [
        getattr(scaled(jobs(folder, "algorithm=wm", scale)[0]).algorithm, "initial_steps", None)
        for scale in ("scale=full", "scale=short", "scale=smoke")
    ]
    assert steps == [469, 47, 0]


def test_scale_shortens_step_size(folder: Path) -> None:
    preset(folder, "optimizer: {schedule: {name: step, step_size: 30}}\n")
    assert scaled(jobs(folder, "scale=short")[0]).optimizer.schedule.step_size == 3


def test_scale_only_reduces_settings(folder: Path) -> None:
    """At least one epoch remains, sizes that are already small do not change, and the feedback schedule is scaled, too."""
    preset(folder, "epochs: 200\nbatch_size: 6\nprobe_size: 3\n")
    words = [
        "algorithm=kp",
        "optimizer.schedule.name=step",
        "optimizer.schedule.step_size=14",
        "optimizer@feedback_optimizer=sgd",
        "feedback_optimizer.schedule.name=multistep",
        "feedback_optimizer.schedule.milestones=[4,26,150]",
    ]
    small, tiny = (scaled(jobs(folder, *words, f"scale={scale}")[0]) for scale in ("short", "smoke"))
    for job, step, milestones in ((small, 1, [1, 3, 15]), (tiny, 1, [1, 1, 1])):
        assert job.feedback_optimizer is not None
        assert job.optimizer.schedule.step_size == step
        assert job.feedback_optimizer.schedule.milestones == milestones
        assert (job.run.batch_size, job.run.probe_size) == (6, 3), "small sizes have changed"
    assert (small.run.epochs, tiny.run.epochs) == (20, 1)
    assert [scale and scale.train for scale in SCALES.values()] == [None, 10_000, 24], "update the help of the option scale"
    large = scaled(jobs(folder, "batch_size=50", "probe_size=50", "scale=smoke")[0])
    assert (large.run.batch_size, large.run.probe_size) == (8, 4) and large.feedback_optimizer is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (14, "14 s"), (99.7, "2 min"), (180, "3 min"), (7500, "2 h 05 min")]
)
def test_duration_format(seconds: float, text: str) -> None:
    assert duration(seconds) == text


#: Options that make an architecture small, if the architecture has them.
SHRUNK = {"width": 4, "hidden": 8, "channels": 4, "widths": [8]}


def small(job: Job) -> Job:
    """Return the same job with a small net, batches of six images and at most two validation images."""
    fields = {field.name for field in option_fields(type(job.architecture))}
    values = {
        key: [8] * len(getattr(job.architecture, key)) if key == "widths" else value
        for key, value in SHRUNK.items()
        if key in fields
    }
    if "blocks" in fields:
        before = job.architecture.blocks
        values["blocks"] = [1] * len(before) if isinstance(before, list) else 1
    data = {"validation": min(job.dataset.validation, 2)} | ({"workers": 0} if hasattr(job.dataset, "workers") else {})
    rule = {"initial_steps": 1} if hasattr(job.algorithm, "initial_steps") else {}
    # With batches of eight instead of six, the last batch of the nine svhn images would have one image.
    return dataclasses.replace(
        job,
        run=dataclasses.replace(job.run, batch_size=6),
        architecture=dataclasses.replace(job.architecture, **values),
        dataset=dataclasses.replace(job.dataset, **data),
        algorithm=dataclasses.replace(job.algorithm, **rule),
    )


def cover(jobs: list[Job]) -> list[Job]:
    """The first jobs that together contain every rule, every pair of architecture and dataset, and every optimizer that occurs in
    the jobs."""
    chosen, seen = [], set()
    for job in jobs:
        marks = {job.algorithm.name, (job.architecture.name, job.dataset.name), job.optimizer.name}
        if not marks <= seen:
            chosen.append(job)
            seen |= marks
    return chosen


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small copy, in the right format, of every dataset that experiments read from `data_dir`."""
    root = tmp_path / "datasets"
    for folder in ("MNIST", "FashionMNIST"):
        write_mnist(root, folder)
    for name in ("cifar10", "cifar100"):
        write_cifar(root, monkeypatch, name)
    write_svhn(root, monkeypatch)
    write_tiny_imagenet(root)
    write_imagenet(root)
    return root


def assert_published_are_answered(name: str, composed: list[Job]) -> None:
    """Check that the sweep has a job for every published number of the experiment. If a published number belongs to certain
    layers, check that the job's net has them."""
    for entry in published():
        # No experiment has runs of ASAP with k = 4, for which the paper shows curves.
        if name not in entry.experiments or entry.where.get("algorithm.k") == 4:
            continue
        found = []
        for job in composed:
            config = flatten(job.plain())
            run = SimpleNamespace(experiment=name, config=config, result={key: config[key] for key in ("algorithm", *GROUP_KEYS)})
            found += [job] if entry.matches(run) else []  # type: ignore[arg-type]
        assert found, entry
        if entry.layer:
            with torch.device("meta"):
                layers = weighted_layers(found[0].architecture.build((3, 224, 224), 10))
            assert any(fnmatchcase(layer, entry.layer) for layer in layers), entry


GROUP_KEYS = ("architecture", "dataset", "optimizer")
PRESETS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("asap_")])
def test_asap_presets_use_initial_weights_of_published_code(name: str) -> None:
    """Fully connected layers have Kaiming's initialisation for all rules, except in asap_fig6, whose rule, Forward Alignment, has
    no public code."""
    register_schemas()
    composer = Composer("config", None, [f"experiment={name}"])
    for job in [job for job, _ in composer.check(composer.expand(multirun=True))]:
        own = name == "asap_fig6"
        assert job.architecture.linear_init == (None if own else "kaiming_uniform")
        assert job.architecture.init == ("kaiming_uniform" if own and job.architecture.activation == "identity" else "pytorch")
        if job.algorithm.name == "kp":
            assert (job.algorithm.b_init, job.algorithm.linear_b_init) == ("pytorch", "kaiming_uniform")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_describes_sweep_and_trains_at_smoke_scale(
    name: str, folder: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composer = Composer("config", None, [f"experiment={name}", "scale=smoke", "seed=0", f"data_dir={data_dir}", "probe_size=4"])
    composed = [job for job, _ in composer.check(composer.expand(multirun=True))]
    summary = sweep_summary(composed, Path("here"))
    assert summary.startswith(f"{len(composed)} jobs ({len(composed)} epochs); output: here\n  algorithm: ")
    assert_published_are_answered(name, composed)
    for number, job in enumerate(cover(composed)):
        result = run(small(job), Path(f"run{number}"), title=name)
        assert result["status"] == "finished" and result["step"] >= 1


def test_preset_runs_as_single_command(folder: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "experiment=asap_fig6", "scale=smoke", "seed=0", f"data_dir={data_dir}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Running 4 jobs (4 epochs); output: outputs/asap_fig6\n  algorithm: bp, forward_alignment\n")
    assert "report: outputs/asap_fig6/report.md" in out
