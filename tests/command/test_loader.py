"""The loader composes each choice of components only once. Its configs equal Hydra's, and no job sees the config of another job
or command."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from fa_bench.command import loader as module
from fa_bench.command.compose import Composer
from fa_bench.config.job import register_schemas

JOBS = [
    ["seed=1"],
    ["algorithm=dfa", "algorithm.density=0.5", "seed=2"],
    ["seed=2", "algorithm=kp"],
    ["epochs=${seed}"],
    ["experiment=pfa_fig2", "seed=3"],
    ["optimizer@feedback_optimizer=adam", "feedback_optimizer.lr=0.1"],
    ["~seed"],
    ["~algorithm"],
    ["~optimizer.lr=7"],
    ["++note.x=1"],
    ["+seed=3"],
    ["nope=1"],
    ["algorithm=nope"],
    ["+algorithm=kp"],
    ["algorithm={name: fa}"],
    ["seed=1", "seed=2"],
    ["algorithm=kp", "algorithm=fa"],
    ["optimizer@nope=adam"],
    ["foo@bar=1"],
    ["seed=[1"],
    ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "epochs=3"],
    ["hydra.job.config.override_dirname.kv_sep=:", "seed=1"],
    ["hydra.overrides.task=[a]", "seed=3"],
    ["hydra.searchpath=[/tmp]", "seed=1"],
    ["hydra.job.env_copy=[HOME]", "seed=4"],
]


@pytest.fixture
def composer() -> Composer:
    register_schemas()
    return Composer("config", None, [])


def described(loader: Any, job: list[str], mode: RunMode) -> Any:
    try:
        config = loader.load_configuration("config", job, run_mode=mode, from_shell=False)
    except Exception as error:
        return type(error).__name__, str(error)
    return OmegaConf.to_yaml(config), flags(config)


def flags(node: Any) -> Any:
    """The flags and types of a config's containers, nested like the config."""
    data = node._metadata
    children = node.items_ex(resolve=False) if OmegaConf.is_dict(node) else enumerate(node._iter_ex(resolve=False))
    return (
        dict(data.flags or {}),
        data.object_type,
        data.optional,
        [flags(child) for _, child in children if OmegaConf.is_config(child) and not child._is_none()],
    )


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN], ids=["run", "sweep"])
def test_configs_and_errors_match_hydra(composer: Composer, mode: RunMode) -> None:
    hydra = ConfigLoaderImpl(composer.loader.get_search_path())
    for job in [*JOBS, ["seed=1,2", "algorithm=fa,kp"]]:
        expected = described(hydra, job, mode)
        assert described(composer.loader, job, mode) == expected, job
        assert described(composer.loader, job, mode) == expected, job  # composed from the cached config


def test_jobs_with_same_components_are_composed_once(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    compose, composed = ConfigLoaderImpl._compose_config_from_defaults_list, []
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_compose_config_from_defaults_list",
        lambda self, *args, **named: (composed.append(1), compose(self, *args, **named))[1],
    )
    for seed in range(3):
        for rule in ("fa", "kp"):
            composer.compose([f"algorithm={rule}", f"seed={seed}"])
    assert len(composed) == 2


def test_composed_configs_are_independent(composer: Composer) -> None:
    first = composer.compose(["seed=1"])
    first.architecture.widths.append(3)
    first.hydra.job.name = "mine"
    second = composer.compose(["seed=2"])
    assert 3 not in second.architecture.widths and second.hydra.job.name != "mine" and second.seed == 2


def test_next_command_reads_changed_file(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    register_schemas()
    for epochs in (3, 4):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nepochs: {epochs}\n")
        assert Composer("config", str(tmp_path), []).compose(["experiment=mine"]).epochs == epochs


def test_newly_registered_components_invalidate_cached_config(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = composer.compose([]).algorithm
    monkeypatch.setattr(module, "registered_components", lambda: "others")
    compose, composed = ConfigLoaderImpl._compose_config_from_defaults_list, []
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_compose_config_from_defaults_list",
        lambda self, *args, **named: (composed.append(1), compose(self, *args, **named))[1],
    )
    assert composer.compose([]).algorithm == before and composed == [1]


def test_launcher_process_caches_configs_per_command(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_latest", {})
    composer.compose(["seed=1"])
    assert not {"_configs", "_is_group"} & set(composer.loader.__getstate__())  # a launcher pickles it for every job
    text = pickle.dumps(composer.loader)
    first, second, other = pickle.loads(text), pickle.loads(text), pickle.loads(pickle.dumps(Composer("config", None, []).loader))
    first.load_configuration("config", ["seed=2"], run_mode=RunMode.RUN)
    assert len(second._configs) == 1 and not other._configs
