"""Options of a config take effect: changing one option changes a run's results, beginning with the option's own stage."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_bench.command.compose import Composer
from fa_bench.config.job import VOLATILE, Job, RunOptions, import_plugins
from fa_bench.registry.options import Options, option_fields
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES, DATASETS, OPTIMIZERS
from fa_bench.runs.train import run
from tests.data.files import write_cifar

#: There are 40 training images and 4 for validation. After two batches of 16, 8 images remain. Schedules are tested over three
#: epochs.
BASE = (
    "dataset=synthetic",
    "dataset.samples=44",
    "dataset.validation=4",
    "dataset.test_samples=10",
    "dataset.size=3",
    "dataset.classes=3",
    "batch_size=16",
    "epochs=3",
    "probe_size=4",
    "architecture.widths=[5]",
)
#: The stages of a run in order. An option changes its own stage, but none of the stages before it.
DATA, MODEL, BATCHES, TRAINED, RECORD = "data_hash", "initial_weights_hash", "batches_hash", "trained", "record"
STAGES = (DATA, MODEL, BATCHES, TRAINED, RECORD)


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect() -> Iterator[None]:
    """Exclude older objects from the garbage collection at the end of each run, which would otherwise take most of a small run's
    time."""
    gc.freeze()
    yield
    gc.unfreeze()
    numbers.cache_clear()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def composed(*overrides: str) -> Job:
    import_plugins([])
    ((job, _),) = Composer("config", None, []).check([list(overrides)], directories=False)
    return job


@cache
def numbers(*overrides: str) -> dict[str, Any]:
    """Run with these overrides on one thread, and return what each stage produced: hashes, and the recorded results."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(composed(*BASE, "threads=1", *overrides), Path(folder, "run"))
    assert result["status"] == "finished", result["error"]
    recorded = ("step", "angles", "test_accuracy", "probes")
    return {
        **{stage: result[stage] for stage in STAGES[:3]},
        RECORD: str([result[key] for key in recorded]),
        TRAINED: result["weights_hash"] + result["feedback_hash"],
        "feedback": result["feedback_hash"],
    }


def assert_changes(stage: str, base: tuple[str, ...], change: tuple[str, ...]) -> None:
    before, after = numbers(*base), numbers(*base, *change)
    earlier = STAGES[: STAGES.index(stage)]
    assert {name: after[name] for name in earlier} == {name: before[name] for name in earlier}
    assert after[stage] != before[stage], f"{change} changes nothing"


def keys(options: type[Options], prefix: str = "") -> set[str]:
    """The names of a component's options, including nested ones such as schedule.gamma."""
    found = set()
    for field in option_fields(options):
        value = getattr(options(), field.name)
        if isinstance(value, Options):
            found |= {f"{prefix}{field.name}.{key}" for key in value.schema()}
        else:
            found |= {prefix + field.name}
    return found


# --- top level, data and model ------------------------------------------------------------------------------------------------

TOP = {
    "seed": (MODEL, (), "1"),
    "epochs": (BATCHES, (), "2"),
    "batch_size": (BATCHES, (), "8"),
    "drop_last": (TRAINED, (), "false"),
    "shuffle": (BATCHES, (), "false"),
    "clip_norm": (TRAINED, (), "0.01"),
    "accumulate": (TRAINED, (), "2"),  # changes only the rounding
    "probe_size": (RECORD, (), "3"),
    "scale": (BATCHES, (), "smoke"),
    "precision": (TRAINED, (), "bf16"),
}
#: Options that are not expected to change the results, except by rounding or by how often results are recorded; other tests cover
#: these options.
NOT_NUMBERS = {
    "callbacks",
    "device",
    "on_divergence",
    "deterministic",
    "probe_every",
    "compile",
    "graphs",
    "channels_last",
    "sync_batch_norm",
}

DATASET = {
    "samples": (DATA, "46"),
    "test_samples": (DATA, "11"),
    "classes": (DATA, "4"),
    "channels": (DATA, "2"),
    "size": (DATA, "4"),
    "noise": (DATA, "0.3"),
    "data_seed": (DATA, "1"),
    "validation": (BATCHES, "8"),
    "validation_seed": (BATCHES, "1"),
    "mean": (BATCHES, "[0.4]"),
    "std": (BATCHES, "[0.5]"),
}
ARCHITECTURE = {
    "widths": (MODEL, "[6]"),
    "activation": (TRAINED, "tanh"),
    "batch_norm": (MODEL, "true"),
    "output_norm": (MODEL, "true"),
    "init": (MODEL, "xavier_uniform"),
    "linear_init": (MODEL, "xavier_uniform"),
    "output_init": (MODEL, "zeros"),
}


def test_tables_cover_every_option() -> None:
    """If the run, synthetic, mlp or an optimizer gets a new option, this test fails until the option is added to a table in this
    file."""
    assert set(TOP) | NOT_NUMBERS | set(VOLATILE) == keys(RunOptions)
    assert set(DATASET) == keys(DATASETS["synthetic"]) and set(ARCHITECTURE) == keys(ARCHITECTURES["mlp"])
    for name in OPTIMIZERS:
        own = {key for key, (of, *_) in OPTIMIZER.items() if of in ("any", name.removesuffix("w"))}
        assert own | (set(MUON) if name == "muon" else set()) == keys(OPTIMIZERS[name])


@pytest.mark.parametrize("key", TOP)
def test_top_level_option_changes_results(key: str) -> None:
    stage, base, value = TOP[key]
    assert_changes(stage, base, (f"{key}={value}",))


def test_seed_determines_weights_order_and_feedback() -> None:
    """The B of fa is fixed, so its hash at the end of the run is the hash of the sampled B."""
    before, after = numbers("algorithm=fa"), numbers("algorithm=fa", "seed=1")
    assert before[DATA] == after[DATA]
    assert [part for part in (MODEL, BATCHES, "feedback") if before[part] == after[part]] == []


def test_epochs_and_batch_options_determine_step_count() -> None:
    """With the batch size of BASE, an epoch has two full batches and, with drop_last=false, a third one of 8 samples."""
    for changes, steps in (((), 6), (("drop_last=false",), 9), (("epochs=2",), 4), (("batch_size=8",), 15)):
        assert numbers(*changes)[RECORD].startswith(f"[{steps},")


@pytest.mark.parametrize("key", DATASET)
def test_dataset_option_changes_results(key: str) -> None:
    stage, value = DATASET[key]
    assert_changes(stage, (), (f"dataset.{key}={value}",))


@pytest.mark.parametrize("key", ARCHITECTURE)
def test_architecture_option_changes_results(key: str) -> None:
    stage, value = ARCHITECTURE[key]
    assert_changes(stage, (), (f"architecture.{key}={value}",))


def test_mean_std_and_augmentation_options_change_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are normalised channel by channel. Augmentation, for datasets that have it, applies only in training."""
    write_cifar(tmp_path / "data", monkeypatch)

    def batch(*overrides: str, part: str = "train", seed: int | None = None) -> torch.Tensor:
        job = composed("dataset=cifar10", "dataset.validation=0", *overrides)
        splits = job.dataset.load(tmp_path / "data", torch.device("cpu"))
        return next(getattr(splits, part).batches(4, seed=seed))[0]

    plain = batch("dataset.mean=[0]", "dataset.std=[1]")
    assert plain.min() >= 0 and 0.9 < plain.max() <= 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.25, 2.0]))
    got = batch("dataset.mean=[0.1,0.2,0.3]", "dataset.std=[0.5,0.25,2.0]")
    torch.testing.assert_close(got, (plain - mean) / std, rtol=1e-5, atol=1e-6)  # float32 with operations in a different order
    changed = [batch(f"dataset.{option}", seed=1) for option in ("augment=false", "augment=true", "crop=resized")]
    assert not any(torch.equal(one, other) for one, other in combinations(changed, 2))
    assert torch.equal(batch("dataset.augment=false", part="test"), batch("dataset.augment=true", part="test"))
    assert batch("dataset.size=20").shape[2:] == (20, 20)


# --- optimizers ---------------------------------------------------------------------------------------------------------------

#: Maps a key to an optimizer that has it ("any" if all have it), the other settings that it needs, and a value.
OPTIMIZER: dict[str, tuple[str, tuple[str, ...], str]] = {
    "lr": ("any", (), "0.02"),
    "weight_decay": ("any", (), "0.1"),
    "first_epoch_weight_decay": ("any", (), "0.3"),
    "schedule.name": ("any", (), "cosine"),
    "schedule.gamma": ("any", ("schedule.name=step", "schedule.step_size=1"), "0.5"),
    "schedule.step_size": ("any", ("schedule.name=step", "schedule.step_size=1"), "2"),
    "schedule.milestones": ("any", ("schedule.name=multistep", "schedule.milestones=[1]"), "[2]"),
    "schedule.min_lr": ("any", ("schedule.name=cosine",), "0.005"),
    "schedule.per": ("any", ("schedule.name=cosine",), "step"),
    "schedule.warmup": ("any", (), "1"),
    "schedule.rise": ("any", ("schedule.name=one_cycle",), "0.6"),
    "schedule.start": ("any", ("schedule.name=one_cycle",), "5"),
    "schedule.end": ("any", ("schedule.name=one_cycle",), "2"),
    "schedule.flat": ("any", ("schedule.name=linear",), "0.5"),
    "momentum": ("sgd", (), "0.5"),
    "nesterov": ("sgd", (), "true"),
    "beta1": ("adam", (), "0.5"),
    "beta2": ("adam", (), "0.9"),
    "eps": ("adam", (), "0.01"),
}
#: Maps each option of muon, except those that all optimizers have, to a value.
MUON = {
    "momentum": "0.5",
    "nesterov": "false",
    "beta1": "0.5",
    "beta2": "0.9",
    "eps": "0.01",
    "ns_steps": "2",
    "adjust_lr": "match_rms_adamw",
    "layers": "hidden",
    "exclude": "[fc2]",
    "adam_lr": "0.1",
}
#: adamw inherits adam's options and differs only in the weight decay, so only weight_decay is tested for adamw.
CASES = [
    (name, key)
    for name in ("sgd", "adam", "adamw")
    for key, (of, *_) in OPTIMIZER.items()
    if of in ("any", name) and (name != "adamw" or key == "weight_decay")
]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_optimizer_option_changes_results(name: str, key: str) -> None:
    _, needed, value = OPTIMIZER[key]
    base = ("algorithm=fa", f"optimizer={name}", "optimizer.lr=0.01", *(f"optimizer.{word}" for word in needed))
    assert_changes(TRAINED, base, (f"optimizer.{key}={value}",))


@pytest.mark.parametrize("key", [*MUON, "weight_decay", "lr"])
def test_muon_option_changes_results(key: str) -> None:
    base = (*HIDDEN, "algorithm=fa", "optimizer=muon")
    assert_changes(TRAINED, base, (f"optimizer.{key}={MUON.get(key, '0.1')}",))


@pytest.mark.parametrize(("name", "key"), CASES)
def test_feedback_optimizer_option_changes_results(name: str, key: str) -> None:
    _, needed, value = OPTIMIZER[key]
    base = (
        "algorithm=kp",
        f"optimizer@feedback_optimizer={name}",
        "feedback_optimizer.lr=0.01",
        *(f"feedback_optimizer.{word}" for word in needed),
    )
    assert_changes(TRAINED, base, (f"feedback_optimizer.{key}={value}",))


def test_optimizers_differ_and_equal_feedback_optimizer_matches() -> None:
    """Different optimizers with equal settings give different results. A feedback optimizer with the same settings as the
    weights' optimizer gives the same results as no feedback optimizer."""
    same = ("algorithm=kp", "optimizer.lr=0.01", "optimizer.weight_decay=0.2")
    assert len({numbers(*same, f"optimizer={name}")[TRAINED] for name in ("sgd", "adam", "adamw", "muon")}) == 4
    own = (*same, "optimizer@feedback_optimizer=sgd", "feedback_optimizer.lr=0.01", "feedback_optimizer.weight_decay=0.2")
    assert numbers(*own)[TRAINED] == numbers(*same)[TRAINED]


# --- rules --------------------------------------------------------------------------------------------------------------------

#: The net in which the rules are trained has two hidden layers.
HIDDEN = ("architecture.widths=[6,5]",)
#: Options that several rules share, with a value for each option.
EDGE = {"include": "['fc1','fc2']", "exclude": "['fc3']", "plain_last": "true"}
CUT = {"cuts": "['act2']", "freeze_stem": "true"}
#: Maps a rule to its options, with a value for each option.
RULES: dict[str, dict[str, str]] = {
    "fa": {**EDGE, "b_init": "pytorch", "density": "0.5", "freeze_stem": "true"},
    "kp": {**EDGE, "b_init": "pytorch", "b_lr_scale": "0.5", "freeze_stem": "true"},
    "usf": {"scale": "none", "density": "0.5"},
    "brsf": {"m_init": "pytorch", "density": "0.5"},
    "frsf": {"m_init": "pytorch", "density": "0.5"},
    "pfa": {"ratio": "2", "r_init": "pytorch", "density": "0.5"},
    "pfa_o": {"ratio": "2", "r_init": "pytorch"},
    "symmetric_alignment": {"alpha": "0.1", "beta": "0.1", "b_lr_scale": "2", "update_forward": "true", "b_init": "pytorch"},
    "activation_alignment": {"alpha": "0.1", "beta": "0.1", "signal": "noise"},
    "regularized_mirror": {"alpha": "0.1", "beta": "0.1", "signal": "noise", "noise_batch": "4"},
    "information_alignment": {"alpha": "0.1", "beta": "0.1", "gamma": "0.1", "signal": "noise"},
    "ldfa": {"rank": "2", "b_rate": "0", "r_init": "pytorch"},
    "dfa": {"b_init": "pytorch", "density": "0.5", "form": "shared", "freeze_stem": "true", "error_at": "act2"},
    "dkp": {"error_at": "act2", "b_init": "pytorch", "density": "0.5", "b_lr_scale": "0.5"},
    "local_error": {"m_init": "pytorch", "separate": "true"},
    "predsim": {"beta": "0.5", "loss": "pred", "decoder_init": "pytorch", "decoder_bias": "false", **CUT, "freeze_stem": "true"},
    "bp_deepsup": {"weight": "0.5", "decoder_init": "pytorch", "cuts": "['act2']"},
    "dgl": {"auxiliary_net": "linear"},
    "fdfa": {"b_init": "pytorch", "b_lr_scale": "0.5", "tangents": "difference"},
    "f3": {"information": "delayed_error", "first_epoch": "zero", "b_init": "trinomial", "density": "0.5", **CUT},
    "grape": {"b_init": "pytorch", "b_lr_scale": "0.5", "anchor_period": "2", "tangents": "difference"},
    "forward_gradient": {"form": "weight", "tangents": "difference"},
    "epc": {"steps": "3", "rate": "0.5", "momentum": "0.5", **CUT},
    "pc": {"steps": "3", "rate": "0.5", "momentum": "0.5", **CUT},
    "dfc": {
        "alpha": "0.1",
        "target_stepsize": "0.5",
        "learning_rule": "voltage_difference",
        "feedback_weights": "jacobian",
        "b_init": "pytorch",
        "b_lr_scale": "0.5",
        "sigma": "0.5",
        "alpha_fb": "0.1",
        **CUT,
    },
    "wm": {"initial_steps": "2", "mirror_steps": "2", "mirror_rate": "0.1", "mirror_batch": "8"},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, options in RULES.items() for key in options])
def test_rule_option_changes_results(name: str, key: str) -> None:
    beside = {"cuts": "allow_uncovered=true", "b_rate": "rank=2", "noise_batch": "signal=noise"}
    needed = (f"algorithm.{beside[key]}",) if key in beside else ()
    assert_changes(TRAINED, (*HIDDEN, f"algorithm={name}", *needed), (f"algorithm.{key}={RULES[name][key]}",))


def test_default_values_of_new_options_are_not_in_identity() -> None:
    """Options that were added to a rule later are omitted from the identity if they have their default values, so the config hash
    equals that of older runs."""
    job, other = composed("algorithm=dfa"), composed("algorithm=dfa", "algorithm.within=block")
    assert not {"within", "error_at", "positions"} & job.identity()["algorithm"].keys()
    assert job.plain()["algorithm"]["within"] == "layer" and other.identity()["algorithm"]["within"] == "block"
    assert job.config_hash != other.config_hash and job.identity()["algorithm"]["form"] == "neuron"


def test_results_record_weight_transport(tmp_path: Path) -> None:
    words = (*BASE, *HIDDEN, "threads=1", "epochs=1")
    for number, (option, where) in enumerate({"algorithm.error_at=act2": ["after 'act2'"], "algorithm.form=neuron": []}.items()):
        assert run(composed(*words, "algorithm=dfa", option), tmp_path / str(number))["weight_transport"] == where


def test_all_rules_give_different_results() -> None:
    """No two rules give the same results, except that bp_fc equals bp if all layers are fully connected."""
    chosen = {name: (*HIDDEN, f"algorithm={name}") for name in sorted(ALGORITHMS) if name != "bp_fc"}
    chosen |= {name: (*chosen[name], "algorithm.linear=share", "algorithm.match=random") for name in ("asap", "asfp", "asfp_lc")}
    chosen["ldfa"] = (*chosen["ldfa"], "algorithm.rank=2")
    chosen["wm"] = (*chosen["wm"], "algorithm.initial_steps=3", "algorithm.mirror_batch=8")
    found = {name: numbers(*words)[TRAINED] for name, words in chosen.items()}
    assert len(set(found.values())) == len(found)
