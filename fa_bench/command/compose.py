"""Composes a command line's jobs, so that every one is checked before the first one starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.command.explain import explained, groups_of
from fa_bench.command.guard import check_config, check_overrides, install
from fa_bench.command.overrides import expanded, listed, parse
from fa_bench.config.job import GRID, RULES, Job, conf_dir, import_plugins
from fa_bench.errors import ConfigError, FaBenchError, first_line, names, nearest, truncate
from fa_bench.registry.registries import ALGORITHMS, GROUPS
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import check_writable
from fa_bench.utils.shell import expansion_problem

#: What Hydra calls the jobs of `fa_bench.cli`; `hydra.job.name` may be part of a path.
JOB_NAME = "cli"


class Composer:
    """One command line.

    Args:
        config_name: name of the primary config.
        config_dir: a user's folder of further configs, or None.
        overrides: the command line's overrides.
        loader: what Hydra composes with, where it runs already.

    Attributes:
        config: the config of the job that was checked last; None before.

    Raises:
        ConfigError: for overrides that cannot be parsed, a folder that does not exist, or a plugin that cannot be imported.
        OptionError: for plugins that are not a list.
    """

    config: DictConfig | None = None

    def __init__(
        self, config_name: str, config_dir: str | None, overrides: list[str], loader: ConfigLoader | None = None
    ) -> None:
        self.config_name, self.overrides = config_name, overrides
        self.config_dir = None if config_dir is None else _config_dir(config_dir)
        install()
        self.loader = loader or _loader(self.config_dir)
        self.parsed = [parse(text) for text in overrides]
        check_overrides(self.parsed)
        #: The modules that the command line names: a config file must not name any.
        self.plugins: list[str] = []
        for override in self.parsed:
            if override.key_or_group == "plugins" and not override.is_delete():
                for value in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
                    self.plugins += value if isinstance(value, list) else []
                if not override.is_sweep_override():
                    import_plugins(override.value())
        self._multirun = False

    def expand(self, multirun: bool, config: DictConfig | None = None) -> list[list[str]]:
        """The overrides of every job.

        Args:
            multirun: whether it is a sweep.
            config: what `compose` gave for the whole command line, where it was called before.

        Raises:
            ConfigError: for what cannot be composed, and for an experiment with a sweep, or several values, without -m.
        """
        self._multirun = multirun
        swept = [override for override in self.parsed if override.is_sweep_override()]
        check_swept(self.parsed)
        if swept and not multirun:
            raise ConfigError(f"{truncate(swept[0].input_line or '', 200)} is a sweep; pass -m (--multirun)")
        if config is None:
            config = self.compose(self.overrides, RunMode.MULTIRUN)
        if not any(override.key_or_group == "experiment" for override in swept):
            return self._jobs(self.overrides, config)
        others = [override.input_line or "" for override in self.parsed if override.key_or_group != "experiment"]
        lines = [[*others, f"experiment={name}"] for name in self.chosen()["experiment"]]
        return [job for line in lines for job in self._jobs(line, self.compose(line, RunMode.MULTIRUN))]

    def _jobs(self, overrides: list[str], config: DictConfig) -> list[list[str]]:
        """The jobs of one experiment, or of none; `config` is what its overrides make where they name one value."""
        where = f"experiment={config.hydra.runtime.choices.get('experiment')}"
        grid, options = _read_grid(config, where), _read_rules(config, where)
        if grid and not self._multirun:
            keys = dict.fromkeys(key for part in grid for key in part)
            raise ConfigError(f"{where} sweeps {names(keys)}; pass -m (--multirun)")
        usual = str(config.hydra.runtime.choices.get("algorithm"))
        jobs = []
        for part in self._parts(grid, overrides) if grid else [overrides]:
            parsed = [parse(text) for text in part]
            check_swept(parsed)
            given = {override.key_or_group for override in parsed}
            for job in expanded(part):
                rule = next((text.partition("=")[2] for text in job if text.startswith("algorithm=")), usual)
                jobs.append([*job, *(text for key, text in options.get(rule, {}).items() if key not in given)])
        return jobs

    def _parts(self, grid: list[dict[str, str]], overrides: list[str]) -> list[list[str]]:
        """The parts of an experiment's sweep as overrides, where the command line's values replace the experiment's.

        Of a component that parts differ in, such as the rule, each part takes those of the command line's values that it has;
        a part left without any is dropped, and values that no part has go to the first one.
        """
        given = self.chosen()
        kinds = [group.kind for group in GROUPS if group.kind in given and any(group.kind in part for part in grid)]
        values_of = [{key: listed(f"{key}={value}") for key, value in part.items()} for part in grid]
        parts = []
        for number, (part, own) in enumerate(zip(grid, values_of, strict=True)):
            taken: dict[str, str] = {}
            for kind in kinds:
                elsewhere = {value for other in values_of for value in other.get(kind, ())}
                values = [v for v in given[kind] if v in own.get(kind, ()) or (number == 0 and v not in elsewhere)]
                taken[kind] = f"{kind}={','.join(values)}" if values else ""
            if all(taken.values()):
                added = [f"{key}={value}" for key, value in part.items() if key not in given]
                parts.append([*added, *(taken.get(parse(text).key_or_group, text) for text in overrides)])
        return parts or [overrides]

    def choices(self) -> dict[str, list[str]]:
        """The groups of components and experiments with their choices, those of the user's folder included."""
        return groups_of(self.loader)

    def chosen(self) -> dict[str, list[str]]:
        """Key -> the values that the command line gives it."""
        return {o.key_or_group: listed(o.input_line or "") for o in self.parsed}

    def component(self, kind: str, choice: str) -> dict[str, Any]:
        """The options that a choice of one group stands for, with the component's name; raises ConfigError where it has none."""
        values: Any = self.compose([f"{kind}={choice}"])[kind]
        plain = OmegaConf.to_container(values, resolve=False) if OmegaConf.is_config(values) else values
        if not isinstance(plain, dict) or plain.get("name") not in next(group for group in GROUPS if group.kind == kind):
            raise ConfigError(f"{kind}={choice}: sets up no {kind}; its file needs `defaults: [NAME]`, a registered {kind}")
        return {str(key): value for key, value in plain.items()}

    def check(self, jobs: list[list[str]], directories: bool = True) -> list[tuple[Job, Path]]:
        """Every job with its directory; what those hold is looked at unless `directories` is false.

        Raises:
            ConfigError: for an unknown key, and where two jobs are the same run.
            OptionError: for a bad value.
            RunDirectoryError: where a directory holds another config's run, or cannot be made.
        """
        checked: dict[Path, Job] = {}
        for number, overrides in enumerate(jobs):
            config = self.compose(overrides)
            if self._multirun:
                config.hydra.job.num = number
            with _as_hydra(config):
                job, place = Job.from_config(config), _place(config, self._multirun)
            if place in checked:
                first = jobs[list(checked).index(place)]
                raise ConfigError(f"two jobs of the sweep are one run, {place}: {' '.join(first)} and {' '.join(overrides)}")
            checked[place] = job
            if directories:
                check_writable(place)
                RunDirectory(place, job).check()
            self.config = config
        return [(job, place) for place, job in checked.items()]

    def compose(self, overrides: list[str] | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
        """The config of one job, or in `RunMode.MULTIRUN` what the overrides with one value make; of the whole command line
        where none are given."""
        overrides = self.overrides if overrides is None else overrides
        try:
            config = self.loader.load_configuration(self.config_name, overrides, run_mode=mode, from_shell=False)
        except FaBenchError:
            raise
        except Exception as error:  # Hydra meets odd overrides with errors of many kinds
            raise explained(self.loader, self.config_name, overrides, error) from None
        check_config(config, self.plugins)
        record: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(map(str, [*record["hydra"], *record["task"]])) != sorted(overrides):
            raise ConfigError("hydra.overrides: Hydra's own record of the command line; leave it as it is")
        if self.config is not None:  # ${now:...} is one time for all jobs, as it is for Hydra's own
            OmegaConf.copy_cache(from_config=self.config, to_config=config)
        return config


class _Folder(SearchPathPlugin):
    """Puts a user's folder of configs where Hydra's --config-dir has it: an override of the search path lists no groups."""

    path: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.path is not None:
            search_path.append("command-line", f"file://{self.path}")


def _loader(folder: Path | None) -> ConfigLoader:
    """What composes configs of the shipped folder, and of a user's."""
    Plugins.instance().register(_Folder)
    _Folder.path = folder
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=JOB_NAME):
            return GlobalHydra.instance().config_loader()
    finally:
        _Folder.path = None


def _config_dir(folder: str) -> Path:
    try:
        if (path := Path(folder).resolve()).is_dir():
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise ConfigError(f"--config-dir {truncate(folder, 200)}: no such folder")


@contextmanager
def _as_hydra(config: DictConfig) -> Iterator[None]:
    """Within it ``${hydra:...}`` means this config, as it does while Hydra runs it."""
    current = HydraConfig.instance()
    before = current.cfg
    current.set_config(config)
    try:
        yield
    finally:
        current.cfg = before
        OmegaConf.set_readonly(config.hydra, False)  # Hydra's own config is never written to


def _place(config: DictConfig, multirun: bool) -> Path:
    """The directory that Hydra will give to a job."""
    keys = ("hydra.sweep.dir", "hydra.sweep.subdir") if multirun else ("hydra.run.dir",)
    return Path(*(folder_of(config, key) for key in keys))


def folder_of(config: DictConfig, key: str) -> str:
    try:
        value = OmegaConf.select(config, key)
    except FaBenchError:
        raise
    except Exception as error:  # an interpolation of any kind
        text: Any = OmegaConf.to_container(config, resolve=False)
        for part in key.split("."):
            text = text.get(part)
        raise ConfigError(f"{key}={truncate(str(text), 100)}: {first_line(error)}") from None
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ConfigError(f"{key}={'null' if value is None else truncate(str(value), 100)}: not the name of a folder")
    if not str(value).strip():
        raise ConfigError(f"{key} is empty; name a folder, such as outputs/run")
    if problem := expansion_problem(key, str(value)):
        raise ConfigError(f"{key}{problem}")
    return str(value)


def check_swept(overrides: Iterable[Override]) -> None:
    """Refuse several values of Hydra's own options, which Hydra refuses once a sweep has begun; raises ConfigError."""
    for override in overrides:
        if override.is_sweep_override() and override.is_hydra_override():
            raise ConfigError(f"{truncate(override.input_line or '', 200)}: Hydra's own options are the same for all jobs of a "
                              "sweep; write one value")


def _given(config: DictConfig, key: str, where: str) -> Any:
    """What an experiment says under `key`, as plain containers."""
    try:
        value = config.get(key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {key}: {first_line(error)}") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _override(where: str, key: str, value: str) -> str:
    """An override that an experiment makes, once it can be read; raises ConfigError, naming the experiment."""
    try:
        parse(text := f"{key}={value}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return text


def _read_grid(config: DictConfig, where: str) -> list[dict[str, str]]:
    """An experiment's sweep: a list of parts, each a mapping from keys to the values that a sweep of them would list."""
    grid = _given(config, GRID, where)
    if grid is None:
        return []
    if not isinstance(grid, list) or not all(isinstance(part, dict) and part for part in grid):
        raise ConfigError(f"{where}: {GRID}={truncate(str(grid), 200)}: write a list of mappings, such as "
                          "[{algorithm: 'bp,fa', seed: '0,1'}]")
    for part in grid:
        for key, values in part.items():
            _override(f"{where}: {GRID}", key, values)
    return [{str(key): str(values) for key, values in part.items()} for part in grid]


def _read_rules(config: DictConfig, where: str) -> dict[str, dict[str, str]]:
    """What an experiment gives to rules: rule -> key of an option -> override."""
    rules = _given(config, RULES, where)
    if rules is None:
        return {}
    if not isinstance(rules, dict) or not all(isinstance(options, dict) for options in rules.values()):
        raise ConfigError(f"{where}: {RULES}={truncate(str(rules), 200)}: write a mapping from rules to options, such as "
                          "{fa: {density: 0.5}}")
    for name in rules:
        if name not in ALGORITHMS:
            raise ConfigError(f"{where}: {RULES}.{truncate(str(name), 100)}: no such algorithm{nearest(str(name), ALGORITHMS)} "
                              f"(available: {names(ALGORITHMS)})")
    return {str(name): {f"algorithm.{key}": _override(f"{where}: {RULES}.{name}", f"algorithm.{key}", json.dumps(value))
                        for key, value in options.items()} for name, options in rules.items()}
