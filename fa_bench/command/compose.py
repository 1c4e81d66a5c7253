"""Compose the jobs of a command line so that all of them are checked before the first one starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.command.explain import explain, list_groups
from fa_bench.command.guard import check_config, install
from fa_bench.command.loader import JobLoader
from fa_bench.command.overrides import expand, key_of, parse, values_of
from fa_bench.config.job import GRID, RULES, Job, conf_dir, import_plugins, known_job
from fa_bench.errors import ConfigError, FaBenchError, first_line, names, nearest, truncate
from fa_bench.registry.registries import ALGORITHMS, GROUPS
from fa_bench.runs.rundir import RunDirectory
from fa_bench.utils.files import check_writable, refuse_root
from fa_bench.utils.shell import expansion_problem, hydra_quote

#: The name that Hydra gives to jobs of `fa_bench.cli`. Paths in a config may refer to it as ``${hydra.job.name}``.
JOB_NAME = "cli"


class Composer:
    """Composes the configs of one command line.

    Args:
        config_name: name of the primary config.
        config_dir: a user's folder of additional configs, or None.
        overrides: the overrides of the command line.
        loader: Hydra's config loader, if Hydra is running already.

    Attributes:
        config: the config of the last job that was checked; None before the first check.
        parsed: the parsed overrides.
        plugins: the modules named on the command line; a config file must not name others.

    Raises:
        ConfigError: for overrides that cannot be parsed, a folder that does not exist, or a plugin that cannot be imported.
        OptionError: if `plugins` is not a list.
    """

    config: DictConfig | None = None

    def __init__(
        self, config_name: str, config_dir: str | None, overrides: list[str], loader: ConfigLoader | None = None
    ) -> None:
        self.config_name, self.overrides = config_name, overrides
        if config_dir is not None and not os.path.isdir(config_dir):
            raise ConfigError(f"--config-dir {truncate(config_dir, 200)}: no such folder")
        self.config_dir = None if config_dir is None else Path(config_dir).resolve()
        install()
        self.loader = loader or _loader(self.config_dir)
        self.parsed = _parse_all(overrides)
        self.plugins: list[str] = []
        for override in self.parsed:
            if override.key_or_group == "plugins" and not override.is_delete():
                for value in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
                    self.plugins += value if isinstance(value, list) else []
                if not override.is_sweep_override():
                    import_plugins(override.value())
        self._multirun, self._instead = False, ""

    def expand(self, multirun: bool, config: DictConfig | None = None, instead: str = "pass -m (--multirun)") -> list[list[str]]:
        """The overrides of every job.

        Args:
            multirun: whether this is a sweep.
            config: the result of `compose` for the whole command line, if available.
            instead: what the user should do with a sweep if `multirun` is False, for the message.

        Raises:
            ConfigError: for configs that cannot be composed, and for a sweep without -m.
        """
        self._multirun, self._instead = multirun, instead
        swept = [override for override in self.parsed if override.is_sweep_override()]
        if swept and not multirun:
            raise ConfigError(f"{truncate(swept[0].input_line or '', 200)} is a sweep; {instead}")
        if config is None:
            config = self.compose(self.overrides, RunMode.MULTIRUN)
        if not any(override.key_or_group == "experiment" for override in swept):
            return self._jobs(self.overrides, config)
        others = [override.input_line or "" for override in self.parsed if override.key_or_group != "experiment"]
        lines = [[*others, f"experiment={name}"] for name in self.chosen()["experiment"]]
        return [job for line in lines for job in self._jobs(line, self.compose(line, RunMode.MULTIRUN))]

    def _jobs(self, overrides: list[str], config: DictConfig) -> list[list[str]]:
        """The overrides of every job, for a command line that selects at most one experiment. `config` must be composed from
        those overrides that are not sweeps."""
        where = f"experiment={config.hydra.runtime.choices.get('experiment')}"
        grid, rule_options = _read_grid(config, where), _read_rules(config, where)
        if grid and not self._multirun:
            keys = dict.fromkeys(key for part in grid for key in part)
            raise ConfigError(f"{where} sweeps {names(keys)}; {self._instead}")
        default_rule = str(config.hydra.runtime.choices.get("algorithm"))
        jobs = []
        for part in self._parts(grid, overrides) if grid else [overrides]:
            parsed = _parse_all(part)
            given = {override.key_or_group for override in parsed}
            for job in expand(parsed):
                rule = next((text.partition("=")[2] for text in job if text.startswith("algorithm=")), default_rule)
                jobs.append([*job, *(text for key, text in rule_options.get(rule, {}).items() if key not in given)])
        return jobs

    def _parts(self, grid: list[dict[str, str]], overrides: list[str]) -> list[list[str]]:
        """The parts of an experiment's sweep as overrides. Values on the command line replace those of the experiment.

        If the command line sets a group that parts of the sweep also set, such as the algorithm, each part keeps only those of
        the command line's values that it lists itself. Values that no part lists go to the first part. A part that is left
        without a value is dropped.
        """
        given = self.chosen()
        kinds = [group.kind for group in GROUPS if group.kind in given and any(group.kind in part for part in grid)]
        listed = [{kind: values_of(parse(f"{kind}={part[kind]}")) for kind in kinds if kind in part} for part in grid]
        parts = []
        for number, part in enumerate(grid):
            selected: dict[str, str] = {}
            for kind in kinds:
                anywhere = {value for values in listed for value in values.get(kind, ())}
                values = [v for v in given[kind] if v in listed[number].get(kind, ()) or (number == 0 and v not in anywhere)]
                selected[kind] = f"{kind}={','.join(values)}" if values else ""
            if all(selected.values()):
                added = [f"{key}={value}" for key, value in part.items() if key not in given]
                parts.append([*added, *(selected.get(key_of(parse(text)), text) for text in overrides)])
        return parts or [overrides]

    def choices(self) -> dict[str, list[str]]:
        """The groups of components and experiments with their choices, including those in the user's folder."""
        return list_groups(self.loader)

    def chosen(self) -> dict[str, list[str]]:
        """The values given on the command line, by key."""
        return {key_of(override): values_of(override) for override in self.parsed}

    def component(self, kind: str, choice: str) -> dict[str, Any]:
        """The options of one choice in a group, including the component's name. Raises ConfigError if the choice does not name a
        component, or if a value cannot be interpolated."""
        values: Any = self.compose([f"{kind}={choice}"])[kind]
        try:
            plain = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
        except OmegaConfBaseException as error:
            raise ConfigError(f"{kind}={choice}: {error.full_key or kind}: {first_line(error)}") from None
        if not isinstance(plain, dict) or plain.get("name") not in next(group for group in GROUPS if group.kind == kind):
            raise ConfigError(
                f"{kind}={choice}: the file names no {kind}; it needs `defaults: [NAME]`, where NAME is one of "
                f"{names(next(group for group in GROUPS if group.kind == kind))}"
            )
        return {str(key): value for key, value in plain.items()}

    def check(self, jobs: list[list[str]], directories: bool = True) -> list[tuple[Job, Path]]:
        """Check every job.

        Args:
            jobs: the overrides of each job.
            directories: whether to check that the run directories can be written and contain only files of these runs.

        Returns:
            Every job with its run directory.

        Raises:
            ConfigError: for an unknown key, and if two jobs are the same run.
            OptionError: for an invalid value.
            RunDirectoryError: if a directory cannot be written, belongs to a run with another config, or contains foreign files.
        """
        checked: dict[Path, Job] = {}
        for number, overrides in enumerate(jobs):
            config = self.compose(overrides)
            if self._multirun:
                config.hydra.job.num = number
            with _as_hydra_config(config):
                job = Job.from_config(config)
                with known_job(config, job):
                    folders = _hydra_folders(config, self._multirun)
            run_dir = Path(*folders.values())
            if run_dir in checked:
                first = jobs[list(checked).index(run_dir)]
                raise ConfigError(
                    f"two jobs of the sweep are the same run, {run_dir}: {' '.join(first)} and {' '.join(overrides)}"
                )
            checked[run_dir] = job
            for key, folder in {"output_dir": job.run.output_dir, **folders}.items():
                refuse_root(Path(folder), key)
            if directories:
                check_writable(run_dir)
                RunDirectory(run_dir, job).check()
            self.config = config
        return [(job, run_dir) for run_dir, job in checked.items()]

    def compose(self, overrides: list[str] | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
        """The config of one job. With `RunMode.MULTIRUN`, the result is the config of a sweep, composed from those overrides that
        are not sweeps.

        If `overrides` is None, all overrides of the command line are used.
        """
        overrides = self.overrides if overrides is None else overrides
        try:
            config = self.loader.load_configuration(self.config_name, overrides, run_mode=mode, from_shell=False)
        except FaBenchError:
            raise
        except Exception as error:  # Hydra raises many kinds of errors
            raise explain(self.loader, self.config_name, overrides, error, self.chosen()) from None
        check_config(config, self.plugins)
        record: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(map(str, [*record["hydra"], *record["task"]])) != sorted(overrides):
            raise ConfigError("hydra.overrides: Hydra's own record of the command line must not be changed")
        if self.config is not None:  # ${now:...} must be the same in all jobs, as in Hydra
            OmegaConf.copy_cache(from_config=self.config, to_config=config)
        return config


def _loader(folder: Path | None) -> ConfigLoader:
    """A config loader for the shipped configs and those in a user's folder."""
    setup_globals()
    version.setbase("1.3")
    JobRuntime.instance().set("name", JOB_NAME)
    search_path = create_config_search_path(str(conf_dir()))
    if folder is not None:  # as for Hydra's --config-dir; with hydra.searchpath, the folder's groups would not be listed
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return JobLoader(search_path)


@contextmanager
def _as_hydra_config(config: DictConfig) -> Iterator[None]:
    """Within the block, resolve ``${hydra:...}`` in this config as Hydra does when it runs a job with the config."""
    current: Any = HydraConfig.instance()
    before = current.cfg
    current.cfg = config  # not with set_config, which copies it and makes it read-only
    try:
        yield
    finally:
        current.cfg = before


def _hydra_folders(config: DictConfig, multirun: bool) -> dict[str, str]:
    """The parts of the directory that Hydra will use for a job, by key."""
    keys = ("hydra.sweep.dir", "hydra.sweep.subdir") if multirun else ("hydra.run.dir",)
    return {key: folder_of(config, key) for key in keys}


def folder_of(config: DictConfig, key: str) -> str:
    """The folder name under `key`. Raises ConfigError if there is no such name, or if a shell would have to expand it."""
    try:
        value = OmegaConf.select(config, key)
    except FaBenchError:
        raise
    except Exception as error:  # an interpolation may raise any type of error
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


def _parse_all(overrides: list[str]) -> list[Override]:
    """Parse overrides. Raises ConfigError for an override that cannot be parsed, and for a sweep over Hydra's own options.

    An override that lists several components is also refused, because Hydra would merge the configs of these components.
    """
    parsed = [parse(text) for text in overrides]
    kinds = [group.kind for group in GROUPS]
    for override in parsed:
        value = override.value()
        if isinstance(value, list) and override.key_or_group in kinds and len(value) != 1:
            raise ConfigError(
                f"{truncate(override.input_line or '', 200)}: a run has one {override.key_or_group}; for a sweep "
                f"write -m {override.key_or_group}={','.join(map(str, value)) or 'NAME,NAME'}"
            )
        if override.is_sweep_override() and override.is_hydra_override():
            raise ConfigError(
                f"{truncate(override.input_line or '', 200)}: Hydra's own options are the same for all jobs of a "
                "sweep; pass one value"
            )
    return parsed


def _read(config: DictConfig, key: str, where: str) -> Any:
    """The value of `key` in an experiment, as plain containers."""
    try:
        value = config.get(key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {key}: {first_line(error)}") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _override(where: str, key: str, value: str) -> str:
    """An experiment's setting as an override. Raises ConfigError, naming the experiment, if the override cannot be parsed."""
    try:
        parse(text := f"{key}={value}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return text


def _read_grid(config: DictConfig, where: str) -> list[dict[str, str]]:
    """The parts of an experiment's sweep. Each part maps keys to values as they would be typed on the command line."""
    grid = _read(config, GRID, where)
    if grid is None:
        return []
    if not isinstance(grid, list) or not all(isinstance(part, dict) and part for part in grid):
        raise ConfigError(
            f"{where}: {GRID}={truncate(str(grid), 200)}: must be a list of mappings, such as "
            "[{algorithm: 'bp,fa', seed: '0,1'}]"
        )
    for part in grid:
        for key, values in part.items():
            _override(f"{where}: {GRID}", key, _typed(values))
    return [{str(key): _typed(values) for key, values in part.items()} for part in grid]


def _typed(values: Any) -> str:
    """The values of a key in a grid as they would be typed on the command line."""
    return "null" if values is None else str(values)


def _quoted(value: Any) -> str:
    """A value of an experiment as Hydra parses it, with quotes around every string."""
    if isinstance(value, str):
        return hydra_quote(value, always=True)
    return f"[{','.join(map(_quoted, value))}]" if isinstance(value, list) else json.dumps(value, default=str)


def _read_rules(config: DictConfig, where: str) -> dict[str, dict[str, str]]:
    """The overrides that an experiment sets for individual rules, by rule and key."""
    rules = _read(config, RULES, where)
    if rules is None:
        return {}
    if not isinstance(rules, dict) or not all(isinstance(options, dict) for options in rules.values()):
        raise ConfigError(
            f"{where}: {RULES}={truncate(str(rules), 200)}: must map rules to options, such as {{fa: {{density: 0.5}}}}"
        )
    for name in rules:
        if name not in ALGORITHMS:
            raise ConfigError(
                f"{where}: {RULES}.{truncate(str(name), 100)}: no such algorithm{nearest(str(name), ALGORITHMS)} "
                f"(available: {names(ALGORITHMS)})"
            )
    return {
        str(name): {
            f"algorithm.{key}": _override(f"{where}: {RULES}.{name}", f"algorithm.{key}", _quoted(value))
            for key, value in options.items()
        }
        for name, options in rules.items()
    }
