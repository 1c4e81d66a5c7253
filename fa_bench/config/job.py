"""Jobs: schemas for Hydra, checks of composed configs, and the identity and output directory of a run."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.config.fit import require_fit
from fa_bench.config.scale import SCALES
from fa_bench.errors import ConfigError, FaBenchError, OptionError, describe_error, first_line, names, nearest, truncate
from fa_bench.registry.options import Options, as_plain, defaults, identifying, option, option_fields
from fa_bench.registry.plugins import import_modules
from fa_bench.registry.registries import (
    CALLBACKS,
    GROUPS,
    LOGGERS,
    METRICS,
    OPTIMIZERS,
    PROBES,
    SCHEDULES,
)
from fa_bench.registry.registry import Registry
from fa_bench.registry.specs import component, parse_spec
from fa_bench.utils.shell import expansion_problem

if TYPE_CHECKING:
    from fa_bench.data.base import Dataset
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.models.base import Architecture
    from fa_bench.objectives.base import Objective
    from fa_bench.objectives.scores import Score
    from fa_bench.optim.base import OptimizerOptions

FEEDBACK_OPTIMIZER = "feedback_optimizer"
#: The keys of an experiment that are not part of a run's config: its sweep, its options for rules and its tuning.
GRID, RULES, TUNE = "grid", "rules", "tune"
#: The maximum number of threads. torch crashes when it starts about ten thousand.
MAX_THREADS = 1024
#: A pattern for the allowed devices. The index of a device has at most seven bits in torch.
DEVICE = r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?|1[01][0-9]|12[0-7]))?"


@dataclasses.dataclass(eq=False)
class RunOptions(Options):
    """The top-level keys of a config."""

    seed: int = option(0, "seed for the initial weights, the data order, augmentation and feedback", minimum=0)
    epochs: int = option(20, "passes over the training data", minimum=1)
    batch_size: int = option(64, "samples in a batch", minimum=1)
    drop_last: bool = option(True, "drop the last incomplete batch")
    shuffle: bool = option(True, "shuffle the training samples in every epoch")
    accumulate: int = option(1, "micro-batches that a batch is split into to save memory; their gradients are summed", minimum=1)
    clip_norm: float | None = option(
        None,
        "maximum joint norm of the gradients of weights and learned feedback; if the norm is larger, all are scaled down, so "
        "large gradients of the feedback can make the steps of the weights smaller; null: no clipping",
        above=0,
    )
    device: str = option("auto", "auto (an accelerator if available), cpu, cuda, cuda:1, mps")
    data_dir: str = option("data", "folder of the datasets, or for image_folder the dataset itself")
    output_dir: str = option("outputs", "folder of the run directories")
    resume: bool | None = option(
        None,
        "null: resume if possible, restart if code or data have changed or the run is damaged; "
        "true: refuse to restart; false: always restart",
    )
    checkpoint_epochs: int = option(1, "epochs between checkpoints; there is always one after the last epoch", minimum=1)
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints within an epoch; 0: never", minimum=0)
    on_error: str = option("continue", "whether a sweep continues after a job has failed", choices=["continue", "stop"])
    on_divergence: str = option(
        "stop", "whether a run stops when its loss or a weight becomes infinite or NaN", choices=["stop", "continue"]
    )
    threads: int = option(0, "number of CPU threads (0: PyTorch's default); changes rounding", minimum=0, maximum=MAX_THREADS)
    jobs_per_gpu: int = option(1, "jobs at a time on each CUDA device, for hydra/launcher=joblib without n_jobs", minimum=1)
    sync_batch_norm: bool = option(
        False, "batch normalisation over the samples of all processes that train together (torchrun)", identifying=False
    )
    deterministic: bool = option(False, "refuse nondeterministic operations")
    compile: bool | str = option(
        False,
        "compile the forward and backward passes with torch.compile; auto: enabled where measurements show that it is faster; "
        "changes rounding",
        choices=["auto", True, False],
        identifying=False,
    )
    graphs: bool | str = option(
        "auto",
        "capture compiled steps as CUDA graphs; auto: currently never (not yet measured)",
        choices=["auto", True, False],
        identifying=False,
    )
    precision: str = option(
        "fp32",
        "fp32; tf32 (products on CUDA devices); bf16 (autocast: weights, feedback and metrics stay in single precision)",
        choices=["fp32", "tf32", "bf16"],
        identifying=False,
    )
    channels_last: bool | str = option(
        False,
        "store images and kernels with their channels last; auto: enabled where measurements show that it is faster; changes "
        "rounding",
        choices=["auto", True, False],
        identifying=False,
    )
    probe_every: int | None = option(
        None,
        "steps between measurements of angles; 0: only at the end; null: at least 20 measurements in a run of at least 20 steps, "
        "at most 500 steps apart",
        minimum=0,
    )
    probe_size: int = option(128, "number of samples in the batch on which angles are measured", minimum=1)
    metrics: list[str] | None = option(
        None, "alignment metrics to measure; null: all, including those of plugins", choices=METRICS
    )
    histograms_every: int = option(
        0, "steps between histograms of weights, feedback and gradients for TensorBoard; 0: never", minimum=0
    )
    probes: list[str] = option([], "additional measurements of layers or blocks, without effect on other results", choices=PROBES)
    probes_epochs: int = option(0, "epochs between measurements of `probes`; 0: only at the end", minimum=0)
    callbacks: list[str] = option(
        [],
        "callbacks of plugins to call during training, each as NAME or 'NAME:OPTION=VALUE,...'",
        choices=CALLBACKS,
        with_options=True,
    )
    loggers: list[str] = option(
        ["tensorboard"],
        "loggers of curves, in addition to metrics.jsonl; options as for callbacks",
        choices=LOGGERS,
        with_options=True,
    )
    scale: str = option(
        "full",
        "full, or a shortened run of the same config: short (a tenth of the epochs, at most 10,000 training "
        "samples) or smoke (one epoch of 24 samples)",
        choices=list(SCALES),
    )
    plugins: list[str] = option([], "modules to import first, such as one that registers your own rules")

    def check(self) -> None:
        if not self.output_dir.strip():  # for example, an unset variable
            raise OptionError("output_dir", f"={self.output_dir!r} is empty; name a folder, such as outputs")
        if not re.fullmatch(DEVICE, self.device):
            raise OptionError(
                "device",
                f"={truncate(self.device, 100)} is not one of auto, cpu, cuda, cuda:N, mps"
                f"{nearest(self.device, ['auto', 'cpu', 'cuda', 'mps'])}",
            )
        for key in ("data_dir", "output_dir"):
            if problem := expansion_problem(key, getattr(self, key)):
                raise OptionError(key, problem)
        registries: dict[str, Registry[Any]] = {"callbacks": CALLBACKS, "loggers": LOGGERS}
        for key, registry in registries.items():
            try:
                chosen = [component(registry, spec).name for spec in getattr(self, key)]
            except OptionError as error:
                raise error.with_prefix(key) from None
            if repeated := [name for name, count in Counter(chosen).items() if count > 1]:
                raise OptionError(key, f"lists {repeated[0]} twice")


#: Keys that are not part of a run's identity, except that `data_dir` is part of it if it determines the data. They do not affect
#: results, except that `threads` changes rounding.
VOLATILE = (
    "resume",
    "output_dir",
    "data_dir",
    "plugins",
    "probes",
    "probes_epochs",
    "metrics",
    "loggers",
    "histograms_every",
    "checkpoint_epochs",
    "checkpoint_minutes",
    "on_error",
    "threads",
    "jobs_per_gpu",
)


@dataclasses.dataclass
class Job:
    """The checked config of one run: its top-level options and its components."""

    run: RunOptions
    algorithm: Rule
    architecture: Architecture
    dataset: Dataset
    optimizer: OptimizerOptions
    feedback_optimizer: OptimizerOptions | None
    objective: Objective

    @classmethod
    def from_config(cls, config: DictConfig) -> Job:
        """Check a composed config and create its components.

        Raises:
            ConfigError: for an unknown key or component, with the nearest name, and for components that do not fit together.
            OptionError: for an invalid value; the message names the full key.
        """
        try:
            plain = {
                str(k): OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v
                for k, v in config.items()
                if k not in ("hydra", GRID, RULES, TUNE)
            }
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
        run = RunOptions.from_mapping(plain)
        require_fit(run, components)
        return cls(
            run=run,
            feedback_optimizer=None if feedback is None else _component(FEEDBACK_OPTIMIZER, OPTIMIZERS, feedback),
            **components,
        )

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of the run, with the primary score first."""
        return tuple(self.objective.scores[self.dataset.targets])

    def plain(self) -> dict[str, Any]:
        """The complete config as plain containers."""
        return self._plain(as_plain)

    def _plain(self, convert: Callable[[Options], dict[str, Any]]) -> dict[str, Any]:
        parts = {
            "algorithm": self.algorithm,
            "architecture": self.architecture,
            "dataset": self.dataset,
            "optimizer": self.optimizer,
            FEEDBACK_OPTIMIZER: self.feedback_optimizer,
            "objective": self.objective,
        }
        named = {key: None if part is None else {"name": part.name, **convert(part)} for key, part in parts.items()}
        return {**convert(self.run), **named}

    def identity(self) -> dict[str, Any]:
        """The part of the config that determines the run's results."""
        plain = self._plain(identifying)
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
        """The rule's name and a hash of the identity without the seed."""
        identity = self.identity()
        del identity["seed"]
        return f"{self.algorithm.name}-{_hash(identity)[:8]}"

    @property
    def own_classes(self) -> list[type]:
        """The classes of the run's components, schedules and callbacks that are not part of fa_bench."""
        optimizers = [optimizer for optimizer in (self.optimizer, self.feedback_optimizer) if optimizer is not None]
        components = [
            self.algorithm,
            self.architecture,
            self.dataset,
            self.objective,
            *optimizers,
            *(optimizer.schedule for optimizer in optimizers),
        ]
        callbacks = [CALLBACKS[parse_spec(spec)[0]] for spec in self.run.callbacks]
        classes = dict.fromkeys((*map(type, components), *callbacks))
        return [cls for cls in classes if cls.__module__.partition(".")[0] != "fa_bench"]

    def fresh_algorithm(self) -> Rule:
        """A new rule with this job's options, not attached to a model."""
        return copy.deepcopy(self.algorithm)


def _component(key: str, group: Any, values: Any) -> Any:
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(f"{key}={truncate(str(values), 100)}: choose one of {names(group)}")
    values = dict(values)
    name = values.pop("name")
    try:
        cls = group[name]
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{group.kind}=", f"{key}.name=", 1)) from None
    try:
        return cls.from_mapping(values)
    except OptionError as error:
        raise error.with_prefix(key) from None
    except (FaBenchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the check of a user's class may raise anything
        raise ConfigError(f"{key}={name}: its options cannot be checked ({describe_error(error, locate=True)})") from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def import_plugins(modules: Any) -> None:
    """Import a user's modules, including those in the working directory, and register their components.

    Raises:
        OptionError: if `modules` is not a list of names.
        ConfigError: if a module cannot be imported or registers an unusable component, with the file and the line of the error.
    """
    plugins = RunOptions(plugins=modules).plugins
    import_modules(plugins)
    try:
        register_schemas()
    except ConfigError:
        for module in plugins:
            sys.modules.pop(module, None)  # so that the next command in this process reports the same error
        raise


def conf_dir() -> Path:
    """The folder of the shipped configs, which is inside an installed package or next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "conf", package.parent / "conf") if path.is_dir())


_registered: dict[str, Any] = {}


def register_schemas() -> None:
    """Add every component to its config group, and as ``/_schema/KIND/NAME`` for configs that extend it.

    The function is called for every job of a sweep, so it does nothing if the components have not changed since the last call.

    Raises:
        ConfigError: for a component without usable defaults, which is dropped.
    """
    from hydra.core.config_store import ConfigStore

    # Schedules are part of the defaults of optimizers.
    known = tuple(tuple(registry.items()) for registry in (*GROUPS, SCHEDULES))
    if known == _registered.get("known"):
        return
    _registered["known"] = known
    store = ConfigStore.instance()
    store.store(group="_schema", name="run", node=defaults(RunOptions))
    for kind, name in _registered.pop("choices", ()):  # plugins may have been unloaded
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
                raise ConfigError(
                    f"{group.kind}={name} ({cls.__module__}.{cls.__qualname__}): its options have no usable "
                    f"defaults ({describe_error(error, locate=True)})"
                ) from None
    OmegaConf.register_new_resolver("fa_bench.run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver("by", by, replace=True)


def registered_components() -> Any:
    """The components that `register_schemas` registered last. As long as this value does not change, the schemas do not change
    either."""
    return _registered.get("known")


def by(group: str, table: Mapping[str, Any], otherwise: Any = None, *, _root_: DictConfig) -> Any:
    """The resolver of ``${by:GROUP,TABLE,OTHERWISE}`` in experiments, such as ``${by:algorithm,{kp:0.03,fa:1e-4},0.01}``. It
    returns the table's entry for the component selected from the group, or `otherwise` if the table has no such entry.

    Raises:
        ConfigError: for an unknown group, or a component that does not exist.
    """
    groups = {each.kind: each for each in GROUPS}
    if group not in groups:
        raise ConfigError(f"${{by:{group},...}}: no such group{nearest(group, groups)} (allowed: {names(groups)})")
    for name in table:
        groups[group][str(name)]
    return table.get(OmegaConf.select(_root_, f"{group}.name"), otherwise)


#: The config and the job of the innermost `known_job` block, if any.
_known: tuple[DictConfig | None, Job | None] = None, None


@contextmanager
def known_job(config: DictConfig, job: Job) -> Iterator[None]:
    """Within the block, take the run directory of `config` from `job` instead of checking the config again. The config must not
    change within the block."""
    global _known
    before = _known
    _known = config, job
    try:
        yield
    finally:
        _known = before


def run_dir(*, _root_: DictConfig) -> str:
    """A run's directory below output_dir: ``EXPERIMENT/RULE-HASH/seedSEED``, or ``DATASET-ARCHITECTURE/RULE-HASH/seedSEED`` if
    there is no experiment."""
    experiment = OmegaConf.select(_root_, "hydra.runtime.choices.experiment")
    config, job = _known
    if job is None or config is not _root_:
        job = Job.from_config(_root_)
    collection = experiment if isinstance(experiment, str) else f"{job.dataset.name}-{job.architecture.name}"
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', collection)}/{job.group}/seed{job.run.seed}"
