"""From options to a checked job: schemas for Hydra, composition, validation, identity, output directory."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.config.scale import SCALES
from fa_bench.errors import ConfigError, FaBenchError, OptionError, cut, first_line, names, nearest
from fa_bench.registry.options import Options, as_plain, defaults, option, option_fields
from fa_bench.registry.plugins import blame, import_modules
from fa_bench.registry.registries import (
    ALGORITHMS,
    ARCHITECTURES,
    CALLBACKS,
    DATASETS,
    GROUPS,
    LOGGERS,
    METRICS,
    OBJECTIVES,
    OPTIMIZERS,
    PROBES,
)
from fa_bench.utils.shell import unexpanded

if TYPE_CHECKING:
    from fa_bench.data.base import Dataset
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.models.base import Architecture
    from fa_bench.objectives.base import Objective
    from fa_bench.optim.base import OptimizerOptions

FEEDBACK_OPTIMIZER = "feedback_optimizer"
#: The keys under which an experiment lists its sweep, and the options that it gives to rules; not part of a run.
GRID, RULES = "grid", "rules"


#: Most threads: torch crashes while it starts some ten thousand.
MOST_THREADS = 1024
#: Devices; torch counts those of one machine in seven bits.
DEVICE = r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?|1[01][0-9]|12[0-7]))?"


@dataclasses.dataclass(eq=False)
class RunOptions(Options):
    """The top-level keys of a config."""

    seed: int = option(0, "seed of initial weights, data order, augmentation and feedback", minimum=0)
    epochs: int = option(20, "passes over the training data", minimum=1)
    batch_size: int = option(64, "samples in a batch", minimum=1)
    drop_last: bool = option(True, "drop the last incomplete batch")
    shuffle: bool = option(True, "draw a new order of the training images for every epoch; false: as they are stored")
    accumulate: int = option(1, "micro-batches that a batch is split into, which takes less memory; their gradients are summed",
                             minimum=1)
    clip_norm: float | None = option(None, "norm to which larger gradients of weights and learned feedback together are "
                                           "scaled down; null: no clipping", above=0)
    device: str = option("auto", "auto (an accelerator if available), cpu, cuda, cuda:1, mps")
    data_dir: str = option("data", "folder of the datasets; for image_folder the dataset itself")
    output_dir: str = option("outputs", "folder of the run directories")
    resume: bool | None = option(None, "null: resume if possible, restart if code or data have changed or the run is damaged; "
                                       "true: refuse these; false: restart")
    checkpoint_epochs: int = option(1, "epochs between two checkpoints; the last epoch always has one", minimum=1)
    checkpoint_minutes: float = option(10.0, "minutes after which a checkpoint is written within an epoch; 0: never", minimum=0)
    on_error: str = option("continue", "whether a sweep continues after a job has failed",
                           choices=["continue", "stop"])
    on_divergence: str = option("stop", "whether a run ends when its loss or a weight is not finite",
                                choices=["stop", "continue"])
    threads: int = option(0, "number of CPU threads (0: PyTorch's default); changes rounding", minimum=0,
                          maximum=MOST_THREADS)
    deterministic: bool = option(False, "refuse nondeterministic operations")
    probe_every: int = option(500, "steps between two measurements of angles; 0 for none but the last", minimum=0)
    probe_size: int = option(128, "samples in the fixed batch that angles are measured on", minimum=1)
    metrics: list[str] | None = option(None, "alignment metrics to measure; null: all, those of plugins included",
                                       choices=METRICS)
    histograms_every: int = option(0, "steps between two histograms of weights, feedback and gradients for TensorBoard; 0 for "
                                      "none", minimum=0)
    probes: list[str] = option([], "what else is measured of every layer; changes no other number", choices=PROBES)
    probes_epochs: int = option(0, "epochs between two measurements of `probes`; 0 for the end alone", minimum=0)
    callbacks: list[str] = option([], "callbacks of plugins to run during training", choices=CALLBACKS)
    loggers: list[str] = option(["tensorboard"], "where curves go, beside metrics.jsonl", choices=LOGGERS)
    scale: str = option("full", "full, or a trial of the same config: short (a tenth of the epochs, at most 10,000 training "
                                "images) or smoke (one epoch of 24)", choices=list(SCALES))
    plugins: list[str] = option([], "modules to import first, such as one with rules of your own")

    def check(self) -> None:
        if not self.output_dir.strip():  # as of an unset variable: below it is the root
            raise OptionError("output_dir", f"={self.output_dir!r} is empty; name a folder, such as outputs")
        if not re.fullmatch(DEVICE, self.device):
            raise OptionError("device", f"={cut(self.device, 100)} is not one of auto, cpu, cuda, cuda:N, mps"
                                        f"{nearest(self.device, ['auto', 'cpu', 'cuda', 'mps'])}")
        for key in ("data_dir", "output_dir"):
            if problem := unexpanded(key, getattr(self, key)):
                raise OptionError(key, problem)


#: Keys that do not change a run's numbers: not part of its identity.
VOLATILE = ("resume", "output_dir", "data_dir", "plugins", "probes", "probes_epochs", "metrics", "loggers", "histograms_every",
            "checkpoint_epochs", "checkpoint_minutes", "on_error", "threads")


@dataclasses.dataclass
class Job:
    """One run, checked: its top-level options and its components."""

    run: RunOptions
    algorithm: Rule
    architecture: Architecture
    dataset: Dataset
    optimizer: OptimizerOptions
    feedback_optimizer: OptimizerOptions | None
    objective: Objective

    @classmethod
    def from_config(cls, config: DictConfig) -> Job:
        """Check a composed config and build the components' options.

        Raises:
            ConfigError: for an unknown key or component, with the nearest name.
            OptionError: for a bad value; names the full key.
        """
        try:
            plain = {str(k): OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v
                     for k, v in config.items() if k not in ("hydra", GRID, RULES)}
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or 'config'}: {first_line(error)}") from None
        import_plugins(plain.get("plugins", []))
        components = {group.kind: _component(group.kind, group, plain.pop(group.kind, None)) for group in GROUPS}
        feedback = plain.pop(FEEDBACK_OPTIMIZER, None)
        known = [field.name for field in option_fields(RunOptions)]
        for key in plain:
            if key not in known:
                allowed = [*known, *components, FEEDBACK_OPTIMIZER]
                raise ConfigError(f"{key or chr(39) * 2}: unknown key{nearest(key, allowed)} (allowed: {names(allowed)})")
        dataset, objective = components["dataset"], components["objective"]
        if dataset.targets not in objective.targets:
            able = [name for name, cls in OBJECTIVES.items() if dataset.targets in cls.targets]
            raise ConfigError(f"objective={objective.name} takes {names(objective.targets)} as targets, and those of dataset="
                              f"{dataset.name} are {dataset.targets} (objectives that take these: {names(able)})")
        return cls(
            run=RunOptions.from_mapping(plain),
            feedback_optimizer=None if feedback is None else _component(FEEDBACK_OPTIMIZER, OPTIMIZERS, feedback),
            **components,
        )

    def plain(self) -> dict[str, Any]:
        """The resolved config as plain containers, with nothing left out."""
        parts = {
            "algorithm": self.algorithm, "architecture": self.architecture, "dataset": self.dataset,
            "optimizer": self.optimizer, FEEDBACK_OPTIMIZER: self.feedback_optimizer, "objective": self.objective,
        }
        named = {key: None if part is None else {"name": part.name, **as_plain(part)} for key, part in parts.items()}
        return {**as_plain(self.run), **named}

    def identity(self) -> dict[str, Any]:
        """The part of the config that decides the run's numbers."""
        plain = self.plain()
        for key in VOLATILE:
            if key != "data_dir" or not self.dataset.content_is_data_dir:
                del plain[key]
        if self.run.scale == "full":
            del plain["scale"]
        if "data_dir" in plain:
            plain["data_dir"] = str(Path(self.run.data_dir).resolve())
        return plain

    @property
    def config_hash(self) -> str:
        """A hash of the identity."""
        return _hash(self.identity())

    @property
    def group(self) -> str:
        """Name of the runs that differ from this one in the seed alone."""
        identity = self.identity()
        del identity["seed"]
        return f"{self.algorithm.name}-{_hash(identity)[:8]}"

    @property
    def plugin_modules(self) -> list[str]:
        """The modules outside this package that decide the run's numbers: those that `plugins` names, and its components'."""
        optimizers = [optimizer for optimizer in (self.optimizer, self.feedback_optimizer) if optimizer is not None]
        components = [self.algorithm, self.architecture, self.dataset, self.objective, *optimizers,
                      *(optimizer.schedule for optimizer in optimizers)]
        modules = [cls.__module__ for cls in (*map(type, components), *(CALLBACKS[name] for name in self.run.callbacks))]
        return list(dict.fromkeys([*self.run.plugins, *(name for name in modules if name.partition(".")[0] != "fa_bench")]))

    def fresh_algorithm(self) -> Rule:
        """A rule object of this job's options that is in no model."""
        return copy.deepcopy(self.algorithm)


def _component(key: str, group: Any, values: Any) -> Any:
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(f"{key}={cut(str(values), 100)}: choose one of {names(group)}")
    values = dict(values)
    name = values.pop("name")
    try:
        cls = group[name]
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{group.kind}=", f"{key}.name=", 1)) from None
    try:
        return cls.from_mapping(values)
    except OptionError as error:
        raise error.under(key) from None
    except (FaBenchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a user's class, whose check may do anything
        raise ConfigError(f"{key}={name}: its options cannot be checked ({blame(error)})") from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def import_plugins(modules: Any) -> None:
    """Import a user's modules, looked for in the working directory too, and enter what they register.

    Raises:
        OptionError: where `modules` is no list of names.
        ConfigError: for one that cannot be imported, or registers what cannot be used, with the file and the line at fault.
    """
    asked = RunOptions(plugins=modules).plugins
    import_modules(asked)
    try:
        register_schemas()
    except ConfigError:
        for module in asked:
            sys.modules.pop(module, None)  # so that the next command of this process finds the same fault
        raise


def conf_dir() -> Path:
    """The shipped configs: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "conf", package.parent / "conf") if path.is_dir())


_registered: dict[str, Any] = {}


def register_schemas() -> None:
    """Make every registered component a choice of its config group; ``/_schema/KIND/NAME`` is the same for files to build on.

    Nothing happens where the components are those of the last call: every job of a sweep calls this.

    Raises:
        ConfigError: for a component without usable defaults, which is dropped.
    """
    from hydra.core.config_store import ConfigStore

    known = tuple(tuple(group.items()) for group in GROUPS)
    if known == _registered.get("known"):
        return
    _registered["known"] = known
    store = ConfigStore.instance()
    store.store(group="_schema", name="run", node=defaults(RunOptions))
    for kind, name in _registered.pop("choices", ()):  # those of plugins that are no more
        for folder in (store.repo[kind], store.repo["_schema"][kind]):
            folder.pop(f"{name}.yaml", None)
    choices = _registered["choices"] = []
    for group in GROUPS:
        for name, cls in group.items():
            try:
                node = {"name": name, **defaults(cls)}
                for folder in (group.kind, f"_schema/{group.kind}"):
                    store.store(group=folder, name=name, node=node)
                choices.append((group.kind, name))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a user's class
                group.drop(name)
                _registered.pop("known")
                raise ConfigError(f"{group.kind}={name} ({cls.__module__}.{cls.__qualname__}): its options have no usable "
                                  f"defaults ({blame(error)})") from None
    OmegaConf.register_new_resolver("fa_bench.run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver("by", by, replace=True)


def by(group: str, table: Mapping[str, Any], otherwise: Any = None, *, _root_: DictConfig) -> Any:
    """The entry of an experiment's table for the chosen component: ``${by:algorithm,{kp:0.03,fa:1e-4},0.01}``.

    Raises:
        ConfigError: for an unknown group, or a component that does not exist.
    """
    groups = {each.kind: each for each in GROUPS}
    if group not in groups:
        raise ConfigError(f"${{by:{group},...}}: no such group{nearest(group, groups)} (allowed: {names(groups)})")
    for name in table:
        groups[group][str(name)]
    return table.get(OmegaConf.select(_root_, f"{group}.name"), otherwise)


def run_dir(*, _root_: DictConfig) -> str:
    """The directory of a run below output_dir: experiment or dataset and architecture, rule and hash, seed."""
    choices = OmegaConf.select(_root_, "hydra.runtime.choices.experiment")
    job = Job.from_config(_root_)
    collection = choices if isinstance(choices, str) else f"{job.dataset.name}-{job.architecture.name}"
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', collection)}/{job.group}/seed{job.run.seed}"


__all__ = ["ALGORITHMS", "ARCHITECTURES", "DATASETS", "OPTIMIZERS", "Job", "RunOptions", "conf_dir", "run_dir"]
