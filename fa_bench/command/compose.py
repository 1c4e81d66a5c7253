"""Composes a command line's jobs ahead of Hydra, so that every one is checked before the first one starts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_search_path_impl import SearchPathQuery
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fa_bench.command.guard import check_config, check_overrides, install
from fa_bench.config.job import GRID, RULES, Job, conf_dir, first_line, import_plugins
from fa_bench.config.registries import ALGORITHMS, GROUPS
from fa_bench.errors import ConfigError, FaBenchError, names, nearest
from fa_bench.files import check_place
from fa_bench.runs.rundir import RunDirectory

#: Most jobs of a grid, and most characters of an override: far above what anybody runs.
MOST_JOBS, MOST_TEXT = 10_000, 20_000


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
        self.config_dir = None if config_dir is None else Path(config_dir).resolve()
        if self.config_dir and not self.config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        install()
        self.parsed = [_parse(text) for text in overrides]
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
        if swept and not multirun:
            raise ConfigError(f"{swept[0].input_line} names several values: add -m to run the grid")
        plain = [o.input_line for o in self.parsed if not o.is_sweep_override()]
        with self._hydra():
            config = self._compose(plain)
            for override in swept:
                self._compose([*plain, *_expanded([override.input_line])[0]])
        chosen = config.hydra.runtime.choices.get("experiment")
        preset = _read_grid(config.get(GRID), f"experiment={chosen}")
        options = _read_rules(config.get(RULES), f"experiment={chosen}")
        if preset and not multirun:
            keys = dict.fromkeys(key for part in preset for key in part)
            raise ConfigError(f"experiment={chosen} is a grid over {names(keys)}: run it with -m")
        self._multirun = multirun
        parts = self._parts(preset) if preset and multirun else [self.overrides]
        if options:
            usual = str(config.hydra.runtime.choices["algorithm"])
            parts = [piece for part in parts for piece in _by_rule(part, usual, options)]
        if not multirun:
            self.sweeps = [(0, parts[0])]
            return [parts[0]]
        expanded = [_expanded(part) for part in parts]
        firsts = [sum(map(len, expanded[:number])) for number in range(len(parts))]
        self.sweeps = list(zip(firsts, parts, strict=True))
        return [job for jobs in expanded for job in jobs]

    def _parts(self, preset: list[dict[str, str]]) -> list[list[str]]:
        """The parts of a preset's grid as overrides, where the command line's values take the place of the preset's.

        Of a component that parts differ in, such as the rule, each part takes those of the command line's values that it has;
        a part left without any is dropped, and values that no part has go to the first one.
        """
        given = self.chosen()
        kinds = [group.kind for group in GROUPS if group.kind in given and any(group.kind in part for part in preset)]
        listed = [{key: _listed(f"{key}={value}") for key, value in part.items()} for part in preset]
        parts = []
        for number, (part, own) in enumerate(zip(preset, listed, strict=True)):
            taken: dict[str, str] = {}
            for kind in kinds:
                elsewhere = {value for other in listed for value in other.get(kind, ())}
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
            return _groups(GlobalHydra.instance().config_loader())

    def chosen(self) -> dict[str, list[str]]:
        """Key -> the values that the command line gives it."""
        return {o.key_or_group: _listed(o.input_line) for o in self.parsed}

    def component(self, kind: str, choice: str) -> dict[str, Any]:
        """The options that a choice of one group stands for, with the component's name."""
        with self._hydra():
            config = self._compose([f"{kind}={choice}"])
            return OmegaConf.to_container(config[kind], resolve=False)  # type: ignore[return-value]

    def check(self, grid: list[list[str]], directories: bool = True) -> list[tuple[Job, Path]]:
        """Every job with its directory; what those hold is looked at unless `directories` is false.

        Raises:
            ConfigError: for an unknown key, and where two jobs are the same run.
            OptionError: for a bad value.
            RunDirectoryError: where a directory holds another config's run, or cannot be made.
        """
        jobs: list[tuple[Job, Path]] = []
        seen: dict[Path, list[str]] = {}
        with self._hydra():
            for number, overrides in enumerate(grid):
                config = self._compose(overrides)
                job, place = Job.from_config(config), self._place(config, number, self._multirun)
                if place in seen:
                    raise ConfigError(f"two jobs of the grid are one run, {place}: "
                                      f"{' '.join(seen[place])} and {' '.join(overrides)}")
                seen[place] = overrides
                if directories:
                    check_place(place)
                    RunDirectory(place, job).check()
                jobs.append((job, place))
        return jobs

    @staticmethod
    def _place(config: DictConfig, number: int, grid: bool) -> Path:
        key = "hydra.sweep.dir" if grid else "hydra.run.dir"
        if not str(OmegaConf.select(config, key) or "").strip():
            raise ConfigError(f"{key} is empty; name a folder, such as outputs/run")
        if not grid:
            return Path(str(OmegaConf.select(config, "hydra.run.dir")))
        OmegaConf.set_readonly(config, False)
        OmegaConf.set_struct(config, False)
        config.hydra.job.num = number
        return Path(str(OmegaConf.select(config, "hydra.sweep.dir"))) / str(OmegaConf.select(config, "hydra.sweep.subdir"))

    @contextmanager
    def _hydra(self) -> Iterator[None]:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="fa_bench"):
            if self.config_dir:
                # As Hydra's own --config-dir; an override of the search path would escape what lists the groups.
                path = GlobalHydra.instance().config_loader().get_search_path()
                path.prepend("command-line", f"file://{self.config_dir}", SearchPathQuery(provider="schema"))
                GlobalHydra.instance().clear()
                Hydra.create_main_hydra2("fa_bench", path)
            yield

    def _compose(self, overrides: list[str]) -> DictConfig:
        try:
            config = compose(self.config_name, overrides=overrides, return_hydra_config=True)
        except FaBenchError:
            raise
        except Exception as error:  # Hydra meets odd overrides with errors of many kinds
            raise self._explain(overrides, error) from None
        check_config(config, self.plugins)
        return config

    def _explain(self, overrides: list[str], error: Exception) -> ConfigError:
        """One line that names the override at fault, what is allowed and the nearest name."""
        if isinstance(error, RecursionError):
            return ConfigError("nested too deeply, or a config whose `defaults` lead back to itself")
        loader = GlobalHydra.instance().config_loader()
        try:
            base = compose(self.config_name, return_hydra_config=True)
        except Exception:
            return ConfigError(_said(error))
        groups = _groups(loader)
        for override in (_parse(text) for text in overrides):
            key = override.key_or_group
            if key in groups and not override.is_delete():
                options = groups[key]
                wanted = override.value()
                for name in wanted if isinstance(wanted, list) else [wanted]:
                    if str(name) not in options:
                        return ConfigError(f"{key}={name}: no such {key}{nearest(str(name), options)} "
                                           f"(available: {names(options)})")
        # Keys are looked up in the config that the chosen groups make.
        chosen = [o.input_line for o in map(_parse, overrides) if o.key_or_group in groups]
        try:
            base = compose(self.config_name, overrides=chosen, return_hydra_config=True)
        except Exception:
            return ConfigError(_said(error))
        for override in (_parse(text) for text in overrides):
            key = override.key_or_group
            if key not in groups and not override.is_add():
                node: Any = base
                parts = key.split(".")
                for depth, part in enumerate(parts):
                    if not isinstance(node, DictConfig) or part not in node:
                        allowed = sorted(str(k) for k in node if k != "hydra") if isinstance(node, DictConfig) else []
                        allowed += [group for group in groups if depth == 0 and group not in allowed]
                        where = ".".join(parts[:depth])
                        hint = nearest(part, allowed)
                        return ConfigError(f"{key}: unknown key{f' {part} in {where}' if where else ''}{hint} "
                                           f"(allowed: {names(allowed)})")
                    node = node._get_node(part)
        return ConfigError(_said(error))


def _said(error: Exception) -> str:
    """An error's first line, with the next one where that is but a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if len(lines) > 1 and lines[0].endswith(":") else 1]) or type(error).__name__


def _read_grid(value: Any, where: str) -> list[dict[str, str]]:
    """A preset's grid: a list of parts, each a mapping from keys to the values that a sweep of them would list."""
    grid = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if grid is None:
        return []
    if not isinstance(grid, list) or not all(isinstance(part, dict) and part for part in grid):
        raise ConfigError(f"{where}: {GRID}={grid}: write a list of mappings, such as [{{algorithm: 'bp,fa', seed: '0,1'}}]")
    return [{str(key): str(values) for key, values in part.items()} for part in grid]


def _read_rules(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """What a preset gives to rules: rule -> option -> value."""
    rules = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if rules is None:
        return {}
    if not isinstance(rules, dict) or not all(isinstance(options, dict) for options in rules.values()):
        raise ConfigError(f"{where}: {RULES}={rules}: write a mapping from rules to options, such as {{fa: {{density: 0.5}}}}")
    for name in rules:
        if name not in ALGORITHMS:
            raise ConfigError(f"{where}: {RULES}.{name}: no such algorithm{nearest(str(name), ALGORITHMS)} "
                              f"(available: {names(ALGORITHMS)})")
    return {str(name): {str(key): value for key, value in options.items()} for name, options in rules.items()}


def _by_rule(part: list[str], usual: str, options: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A part of a grid, as parts whose rules have the options that the preset gives to them, unless the part itself does.

    Args:
        part: overrides.
        usual: the rule of a part that names none.
        options: rule -> option -> value.
    """
    given = {_parse(text).key_or_group: text for text in part}
    rules = _listed(given["algorithm"]) if "algorithm" in given else [usual]
    others = [text for text in part if text != given.get("algorithm")]
    plain = [rule for rule in rules if rule not in options]
    parts = []
    for group in ([plain] if plain else []) + [[rule] for rule in rules if rule in options]:
        own = {f"algorithm.{key}": value for rule in group for key, value in options.get(rule, {}).items()}
        added = [f"{key}={json.dumps(value)}" for key, value in own.items() if key not in given]
        parts.append([f"algorithm={','.join(group)}", *added, *others])
    return parts


def _listed(text: str) -> list[str]:
    """The values of one override, as text."""
    override = _parse(text)
    return [str(value) for value in (override.sweep_iterator() if override.is_sweep_override() else [override.value()])]


def _groups(loader: ConfigLoader) -> dict[str, list[str]]:
    """The groups of components and presets, with their options."""
    listed = [group for group in loader.list_groups("") if not group.startswith(("_", "hydra"))]
    return {group: loader.get_group_options(group) for group in listed}


def _parse(text: str) -> Override:
    shown = text if len(text) <= 100 else f"{text[:97]}..."
    if len(text) > MOST_TEXT:
        raise ConfigError(f"cannot read '{shown}': longer than {MOST_TEXT} characters")
    try:
        override = OverridesParser.create().parse_override(text)
    except RecursionError:
        raise ConfigError(f"cannot read '{shown}': nested too deeply") from None
    except (HydraException, ValueError) as error:
        raise ConfigError(f"cannot read '{shown}': write key=value ({first_line(error)})") from None
    if (values := _count(override)) > MOST_JOBS:
        raise ConfigError(f"{shown}: more than {MOST_JOBS} values")
    if values == 0:
        raise ConfigError(f"{shown}: no values")
    return override


def _count(override: Override) -> float:
    """How many values an override stands for, told without making them."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = value.start or 0, value.stop or 0, value.step
        if not all(map(math.isfinite, (start, stop, step))) or step == 0:
            return math.inf
        return max(0.0, math.ceil((stop - start) / step))
    if isinstance(value, (IntervalSweep, Glob)):
        raise ConfigError(f"{override.input_line}: name the values, or write range(start,stop,step)")
    return len(value.list) if isinstance(value, ChoiceSweep) else 1


def _expanded(overrides: list[str]) -> list[list[str]]:
    """The jobs that overrides with several values stand for."""
    parsed = [_parse(text) for text in overrides]
    if (jobs := math.prod(map(_count, parsed))) > MOST_JOBS:
        raise ConfigError(f"{' '.join(o.input_line or '' for o in parsed if o.is_sweep_override())}: a grid of {jobs:.0f} jobs "
                          f"(allowed: up to {MOST_JOBS})")
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
