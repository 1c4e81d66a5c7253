"""Composes a command line's jobs ahead of Hydra, so that every one is checked before the first one starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_search_path_impl import SearchPathQuery
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.command.explain import explained, groups_of
from fa_bench.command.guard import check_config, check_overrides, install
from fa_bench.command.overrides import expanded, listed, parse
from fa_bench.command.rehearsal import rehearse
from fa_bench.config.job import GRID, RULES, Job, conf_dir, import_plugins
from fa_bench.config.registries import ALGORITHMS, GROUPS
from fa_bench.config.typed import unexpanded
from fa_bench.errors import ConfigError, FaBenchError, cut, first_line, names, nearest
from fa_bench.files import check_place
from fa_bench.runs.rundir import RunDirectory

#: What Hydra calls the jobs of `fa_bench.cli`.
JOB_NAME = "cli"


class Composer:
    """One command line.

    Args:
        config_name: name of the primary config.
        config_dir: a user's folder of further configs, or None.
        overrides: the command line's overrides.

    Raises:
        ConfigError: for overrides that cannot be parsed, a folder that is not there, or a plugin that cannot be imported.
        OptionError: for plugins that are no list.
    """

    def __init__(self, config_name: str, config_dir: str | None, overrides: list[str]) -> None:
        self.config_name, self.overrides = config_name, overrides
        self.config_dir = None if config_dir is None else _config_dir(config_dir)
        install()
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
        #: What Hydra is given, once for each part of a grid: the number of its first job, and all values spelled out.
        self.sweeps: list[tuple[int, list[str]]] = [(0, overrides)]
        self._multirun = False

    def grid(self, multirun: bool) -> list[list[str]]:
        """The overrides of every job; the first one is composed, so that unknown keys and groups are found.

        Raises:
            ConfigError: for a key, group or value that does not exist, a preset grid run without -m, or several values
                without -m.
        """
        swept = [o for o in self.parsed if o.is_sweep_override()]
        _check_swept(self.parsed)
        if swept and not multirun:
            raise ConfigError(f"{cut(swept[0].input_line or '', 200)} names several values: add -m to run the grid")
        plain = [o.input_line for o in self.parsed if not o.is_sweep_override()]
        with self._hydra():
            config = self._compose(plain)
            for override in swept:
                self._compose([*plain, *expanded([override.input_line])[0]])
        chosen = config.hydra.runtime.choices.get("experiment")
        preset = _read_grid(config, f"experiment={chosen}")
        options = _read_rules(config, f"experiment={chosen}")
        if preset and not multirun:
            keys = dict.fromkeys(key for part in preset for key in part)
            raise ConfigError(f"experiment={chosen} is a grid over {names(keys)}: run it with -m")
        self._multirun = multirun
        parts = self._parts(preset) if preset and multirun else [self.overrides]
        for part in parts:
            _check_swept(map(parse, part))
        if options:
            usual = str(config.hydra.runtime.choices["algorithm"])
            parts = [piece for part in parts for piece in _by_rule(part, usual, options)]
        if not multirun:
            self.sweeps = [(0, parts[0])]
            return [parts[0]]
        jobs_of = [expanded(part) for part in parts]
        firsts = [sum(map(len, jobs_of[:number])) for number in range(len(parts))]
        self.sweeps = list(zip(firsts, parts, strict=True))
        return [job for jobs in jobs_of for job in jobs]

    def _parts(self, preset: list[dict[str, str]]) -> list[list[str]]:
        """The parts of a preset's grid as overrides, where the command line's values take the place of the preset's.

        Of a component that parts differ in, such as the rule, each part takes those of the command line's values that it has;
        a part left without any is dropped, and values that no part has go to the first one.
        """
        given = self.chosen()
        kinds = [group.kind for group in GROUPS if group.kind in given and any(group.kind in part for part in preset)]
        values_of = [{key: listed(f"{key}={value}") for key, value in part.items()} for part in preset]
        parts = []
        for number, (part, own) in enumerate(zip(preset, values_of, strict=True)):
            taken: dict[str, str] = {}
            for kind in kinds:
                elsewhere = {value for other in values_of for value in other.get(kind, ())}
                values = [v for v in given[kind] if v in own.get(kind, ()) or (number == 0 and v not in elsewhere)]
                taken[kind] = f"{kind}={','.join(values)}" if values else ""
            if all(taken.values()):
                added = [f"{key}={value}" for key, value in part.items() if key not in given]
                parts.append([*added, *(taken.get(o.key_or_group, o.input_line) for o in self.parsed)])
        return parts or [self.overrides]

    def compose_once(self) -> None:
        """Compose the command line without a grid's values, so that what Hydra is to show was checked; raises ConfigError."""
        with self._hydra():
            self._compose([o.input_line for o in self.parsed if not o.is_sweep_override()])

    def choices(self) -> dict[str, list[str]]:
        """The groups of components and presets with their choices, those of the user's folder included."""
        with self._hydra():
            return groups_of(GlobalHydra.instance().config_loader())

    def chosen(self) -> dict[str, list[str]]:
        """Key -> the values that the command line gives it."""
        return {o.key_or_group: listed(o.input_line) for o in self.parsed}

    def component(self, kind: str, choice: str) -> dict[str, Any]:
        """The options that a choice of one group stands for, with the component's name; raises ConfigError where it has none."""
        with self._hydra():
            values: Any = self._compose([f"{kind}={choice}"])[kind]
            plain = OmegaConf.to_container(values, resolve=False) if OmegaConf.is_config(values) else values
        if not isinstance(plain, dict) or plain.get("name") not in next(group for group in GROUPS if group.kind == kind):
            raise ConfigError(f"{kind}={choice}: sets up no {kind}; its file needs `defaults: [/_schema/{kind}/NAME@_here_]`")
        return {str(key): value for key, value in plain.items()}

    def check(self, grid: list[list[str]], directories: bool = True) -> list[tuple[Job, Path]]:
        """Every job with its directory; what those hold is looked at unless `directories` is false.

        Raises:
            ConfigError: for an unknown key, where two jobs are the same run, and for what Hydra could not make its parts of.
            OptionError: for a bad value.
            RunDirectoryError: where a directory holds another config's run, or cannot be made.
        """
        jobs: list[tuple[Job, Path]] = []
        seen: dict[Path, list[str]] = {}
        with self._hydra():
            for number, overrides in enumerate(grid):
                config = self._compose(overrides)
                # Hydra numbers the jobs of each part of a grid from 0.
                own = number - max(first for first, _ in self.sweeps if first <= number) if self._multirun else None
                with _as_job(config, own):
                    job = Job.from_config(config)
                if number == 0:  # as Hydra has it before there is a job
                    rehearse(self._compose(overrides), overrides, self._multirun)
                with _as_job(config, own):
                    place = _place(config, self._multirun)
                if place in seen:
                    raise ConfigError(f"two jobs of the grid are one run, {place}: "
                                      f"{' '.join(seen[place])} and {' '.join(overrides)}")
                seen[place] = overrides
                if directories:
                    check_place(place)
                    RunDirectory(place, job).check()
                jobs.append((job, place))
        return jobs

    @contextmanager
    def _hydra(self) -> Iterator[None]:
        # The name is the one that Hydra takes from the module of the command line: `hydra.job.name` may be part of a path.
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=JOB_NAME):
            if self.config_dir:
                # As Hydra's own --config-dir; an override of the search path would escape what lists the groups.
                path = GlobalHydra.instance().config_loader().get_search_path()
                path.prepend("command-line", f"file://{self.config_dir}", SearchPathQuery(provider="schema"))
                GlobalHydra.instance().clear()
                Hydra.create_main_hydra2(JOB_NAME, path)
            yield

    def _compose(self, overrides: list[str]) -> DictConfig:
        try:
            config = compose(self.config_name, overrides=overrides, return_hydra_config=True)
        except FaBenchError:
            raise
        except Exception as error:  # Hydra meets odd overrides with errors of many kinds
            raise explained(self.config_name, overrides, error) from None
        check_config(config, self.plugins)
        return config


def _config_dir(folder: str) -> Path:
    try:
        if (path := Path(folder).resolve()).is_dir():
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise ConfigError(f"--config-dir {cut(folder, 200)}: no such folder")


@contextmanager
def _as_job(config: DictConfig, number: int | None) -> Iterator[None]:
    """Within it a composed config says of itself what it will while Hydra runs it: its number in a grid, ``${hydra:...}``."""
    current = HydraConfig.instance()
    before = current.cfg
    if number is not None:
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.job.num = number
    current.set_config(config)
    try:
        yield
    finally:
        current.cfg = before


def _place(config: DictConfig, multirun: bool) -> Path:
    """The directory that Hydra will give to a job."""
    keys = ("hydra.sweep.dir", "hydra.sweep.subdir") if multirun else ("hydra.run.dir",)
    return Path(*(_folder(config, key) for key in keys))


def _folder(config: DictConfig, key: str) -> str:
    try:
        value = OmegaConf.select(config, key)
    except FaBenchError:
        raise
    except Exception as error:  # an interpolation of any kind
        raise ConfigError(f"{key}: {first_line(error)}") from None
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ConfigError(f"{key}={'null' if value is None else cut(str(value), 100)}: not the name of a folder")
    if not str(value).strip():
        raise ConfigError(f"{key} is empty; name a folder, such as outputs/run")
    if problem := unexpanded(key, str(value)):
        raise ConfigError(f"{key}{problem}")
    return str(value)


def _check_swept(overrides: Iterable[Override]) -> None:
    """Refuse several values of Hydra's own options, which Hydra refuses once a grid has begun; raises ConfigError."""
    for override in overrides:
        if override.is_sweep_override() and override.is_hydra_override():
            raise ConfigError(f"{cut(override.input_line or '', 200)}: Hydra's own options are the same for all of a grid; write "
                              "one value")


def _given(config: DictConfig, key: str, where: str) -> Any:
    """What a preset says under `key`, as plain containers."""
    try:
        value = config.get(key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {key}: {first_line(error)}") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _override(where: str, key: str, value: str) -> str:
    """An override that a preset makes, once it has shown that it can be read; raises ConfigError, naming the preset."""
    try:
        parse(text := f"{key}={value}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return text


def _read_grid(config: DictConfig, where: str) -> list[dict[str, str]]:
    """A preset's grid: a list of parts, each a mapping from keys to the values that a sweep of them would list."""
    grid = _given(config, GRID, where)
    if grid is None:
        return []
    if not isinstance(grid, list) or not all(isinstance(part, dict) and part for part in grid):
        raise ConfigError(f"{where}: {GRID}={cut(str(grid), 200)}: write a list of mappings, such as "
                          "[{algorithm: 'bp,fa', seed: '0,1'}]")
    for part in grid:
        for key, values in part.items():
            _override(f"{where}: {GRID}", key, values)
    return [{str(key): str(values) for key, values in part.items()} for part in grid]


def _read_rules(config: DictConfig, where: str) -> dict[str, dict[str, str]]:
    """What a preset gives to rules: rule -> key of an option -> override."""
    rules = _given(config, RULES, where)
    if rules is None:
        return {}
    if not isinstance(rules, dict) or not all(isinstance(options, dict) for options in rules.values()):
        raise ConfigError(f"{where}: {RULES}={cut(str(rules), 200)}: write a mapping from rules to options, such as "
                          "{fa: {density: 0.5}}")
    for name in rules:
        if name not in ALGORITHMS:
            raise ConfigError(f"{where}: {RULES}.{cut(str(name), 100)}: no such algorithm{nearest(str(name), ALGORITHMS)} "
                              f"(available: {names(ALGORITHMS)})")
    return {str(name): {f"algorithm.{key}": _override(f"{where}: {RULES}.{name}", f"algorithm.{key}", json.dumps(value))
                        for key, value in options.items()} for name, options in rules.items()}


def _by_rule(part: list[str], usual: str, options: dict[str, dict[str, str]]) -> list[list[str]]:
    """A part of a grid, as parts whose rules have the options that the preset gives to them, unless the part itself does.

    Args:
        part: overrides.
        usual: the rule of a part that names none.
        options: rule -> key of an option -> override.
    """
    given = {parse(text).key_or_group: text for text in part}
    rules = listed(given["algorithm"]) if "algorithm" in given else [usual]
    others = [text for text in part if text != given.get("algorithm")]
    plain = [rule for rule in rules if rule not in options]
    parts = []
    for group in ([plain] if plain else []) + [[rule] for rule in rules if rule in options]:
        own = {key: text for rule in group for key, text in options.get(rule, {}).items()}
        added = [text for key, text in own.items() if key not in given]
        parts.append([f"algorithm={','.join(group)}", *added, *others])
    return parts
