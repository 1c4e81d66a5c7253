"""Configs are data: what would run code of a config's choice is refused before Hydra runs.

Hydra makes launcher, sweeper and callbacks of the classes that ``_target_`` names, imports the packages of its search path, and
hands its log settings to `logging.config`, which calls what they name. A config that came from somewhere could so run anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Hydra reads every file through the source that is registered for files, and offers no public way to put another one there.
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.errors import ConfigError, truncate
from fa_bench.utils.yaml_files import read_yaml

SWEEPER = "hydra_plugins.fa_bench_sweeper.FaBenchSweeper"
#: The sections of which Hydra makes objects, and those of its logs.
_MADE, _LOGS = ("hydra.launcher", "hydra.sweeper", "hydra.callbacks"), ("hydra.job_logging", "hydra.hydra_logging")
#: What may be filled in within them: names and folders, which are text whatever a config says.
_TEXT = re.compile(r"\$\{hydra\.(job|sweep|run|runtime)\.(name|id|num|dir|subdir|output_dir|override_dirname)\}")
_LOG_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


class _FileResult(ConfigResult):
    """A file's config, with nothing filled in from a component of the same name.

    Hydra 1.3 would merge a file with the ConfigStore's entry of its path (automatic schema matching, which Hydra 1.4 lacks).
    """

    is_schema_source = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


class CheckedFiles(FileConfigSource):
    """Hydra's source of config files, which reads them as plain data of a bounded size."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path)).resolve()
        if not path.exists():
            raise ConfigLoadError(f"Config not found : {path}")
        config = read_yaml(path)
        with path.open(encoding="utf-8") as file:
            try:
                header = ConfigSource._get_header_dict(file.read(512))
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from None
        if OmegaConf.is_dict(config):
            try:
                check_search_path(OmegaConf.select(config, "hydra.searchpath"), str(path))
            except ConfigError:
                raise
            except Exception as error:  # an interpolation of any kind
                raise ConfigError(f"{path}: hydra.searchpath: {str(error).splitlines()[0]}") from None
            # Here already, for such a key may not fit the schema of what it stands in, and Hydra would say but that.
            for key, last, value in _walk(OmegaConf.to_container(config, resolve=False), ""):
                if str(last) == "_target_" and str(value) not in _made_by_hydra():
                    raise ConfigError(f"{path}: {_unwanted(key, value)}")
        return _FileResult(provider=self.provider, path=f"{self.scheme()}://{self.path}", config=config, header=header)


# So that Hydra's own registration of its source, in this process and in a launcher's, changes nothing.
CheckedFiles.__name__ = FileConfigSource.__name__


def install() -> None:
    """Let Hydra read every config file through `CheckedFiles`, from here on in this process."""
    Plugins.instance()  # registers Hydra's own sources first
    SourcesRegistry.instance().types["file"] = CheckedFiles


def check_search_path(folders: Any, source: str) -> None:
    """Refuse a search path with anything but folders: Hydra imports the packages in it.

    Raises:
        ConfigError: naming `source`, or what is wrong.
    """
    if folders is None:
        return
    if isinstance(folders, str) or not (isinstance(folders, list) or OmegaConf.is_list(folders)):
        raise ConfigError(f"{source}: hydra.searchpath={folders} is not a list of folders")
    for folder in folders:
        scheme, found, _ = str(folder).partition("://")
        if found and scheme != "file":
            raise ConfigError(f"{source}: hydra.searchpath={folder}: only folders (file://...) may be searched, for a config "
                              "must not run code")
        place = str(folder).removeprefix("file://")
        if not Path(place).is_dir():
            raise ConfigError(f"{source}: hydra.searchpath={folder}: no such folder")


def check_overrides(overrides: list[Override]) -> None:
    """Refuse what a command line must not say, before anything is composed.

    Raises:
        ConfigError: naming the override.
    """
    for override in overrides:
        if override.get_key_element().lstrip("+~") == "hydra.searchpath" and not override.is_delete():
            check_search_path(override.value(), "command line")


def check_config(config: DictConfig, plugins: list[str]) -> None:
    """Refuse a composed config that would make Hydra run code, or other jobs than those that were checked.

    Args:
        config: as Hydra's compose returns it, with the node ``hydra``.
        plugins: the modules that the command line names, which alone are imported.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    _check_references(plain)
    for path, key, value in _walk(plain, ""):
        if str(key) == "_target_":
            _check_target(path, value)
        elif isinstance(value, str) and (own := re.search(r"\$\{(hydra\.[\w.]+)\}", value)) and not path.startswith("hydra."):
            raise ConfigError(f"{path}={truncate(str(value), 80)}: only Hydra's own options, such as hydra.run.dir, may "
                              f"refer to {own[1]}")
        elif path.startswith(_MADE + _LOGS):
            if isinstance(value, str) and "${" in _TEXT.sub("", value):
                raise ConfigError(f"{path}={value}: nothing is filled in here but Hydra's own names and folders, for a config "
                                  "must not run code")
            if path.startswith(_LOGS):
                _check_log(path, str(key), value)
    if isinstance(plain, dict) and "experiment" in plain:
        raise ConfigError("experiment: the file must begin with the line '# @package _global_' and set a mapping of keys")
    hydra: Any = plain.get("hydra") if isinstance(plain, dict) else None
    sweeper = hydra.get("sweeper") if isinstance(hydra, dict) else None
    if isinstance(sweeper, dict) and sweeper.get("_target_") in _made_by_hydra() - {SWEEPER}:
        raise ConfigError(f"hydra/sweeper={hydra['runtime']['choices'].get('hydra/sweeper')}: only fa-bench's own sweeper checks "
                          "every job before the first one starts (allowed: fa_bench)")
    if isinstance(sweeper, dict) and (extra := [key for key in sweeper if key != "_target_"]):
        raise ConfigError(f"hydra.sweeper.{extra[0]}: fa-bench's sweeper has no options; list the values on the command line, or "
                          "in an experiment's `grid`")
    for path, section in (("hydra", hydra), ("hydra.job", hydra.get("job") if isinstance(hydra, dict) else None)):
        if not isinstance(section, dict):
            raise ConfigError(f"{path}={section}: not a group of options")
    _check_unset(hydra, "job.env_set", "set environment variables in the shell, where they hold for all of the run")
    if hydra["mode"] is not None:
        raise ConfigError(f"hydra.mode={hydra['mode']}: not possible here; pass -m (--multirun) for a sweep")
    if Path(folder := hydra["output_subdir"] or "hydra").name != folder:
        raise ConfigError(f"hydra.output_subdir={folder} is not the name of a folder in the run's directory")
    try:
        named = config.get("plugins") or []
    except OmegaConfBaseException:
        return  # nothing is imported: the job's check says what is wrong
    if OmegaConf.is_list(named) and (unasked := [name for name in named if name not in plugins]):
        raise ConfigError(f"plugins=[{unasked[0]}] stands in a config file: modules are imported only where the command line "
                          f"names them; add plugins=[{unasked[0]}] to it")


#: Most characters of a value, and most steps from one to the next, once what it refers to is put in.
_MOST_TEXT, _MOST_STEPS = 100_000, 100
_REFERENCE = re.compile(r"\$\{\s*(?:oc\.[\w.]+\s*:\s*)?((?:hydra\s*:\s*)?[\w.\[\]@/-]+)")


def _check_references(plain: Any) -> None:
    """Refuse values that refer to values that refer to values ... until they fill the memory."""
    values = {full: value for full, _, value in _walk(plain, "")}
    known: dict[str, int] = {}

    def size(path: str, steps: int) -> int:
        if path in known:
            return known[path]
        if steps > _MOST_STEPS:
            raise ConfigError(f"{path}={truncate(str(values[path]), 80)}: refers to itself, or through more than "
                              f"{_MOST_STEPS} others")
        value = values[path]
        total = 1
        if isinstance(value, (dict, list)):
            total += sum(size(f"{path}.{key}", steps + 1) for key in (value if isinstance(value, dict) else range(len(value))))
        elif isinstance(value, str):
            total += len(value)
            for match in _REFERENCE.finditer(value):
                # ${hydra:job.num} is ${hydra.job.num}
                name = re.sub(r"\s*:\s*", ".", match[1]).replace("[", ".").replace("]", "")
                rest = name.lstrip(".")
                if dots := len(name) - len(rest):
                    rest = ".".join([*path.split(".")[:-dots], rest])
                total += size(rest, steps + 1) if rest in values else 0
        if total > _MOST_TEXT:
            raise ConfigError(f"{path}={truncate(str(value), 80)}: longer than {_MOST_TEXT} characters once all is filled in")
        known[path] = total
        return total

    for path in values:
        size(path, 0)


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(full key, last key, value) of everything below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        full = f"{path}.{key}" if path else str(key)
        yield full, key, item
        yield from _walk(item, full)


def _check_target(path: str, value: Any) -> None:
    if not path.startswith(_MADE) or str(value) not in _made_by_hydra():
        raise ConfigError(_unwanted(path, value))


def _unwanted(path: str, value: Any) -> str:
    if f".{path}".find(".hydra.") < 0 and not path.startswith("_target_"):
        return (f"{path}={truncate(str(value), 80)}: a config must not name code to run; components are chosen by name, "
                "such as algorithm=fa, and modules by plugins=[...]")
    return (f"{path}={truncate(str(value), 80)}: only launchers, sweepers and callbacks of Hydra and its plugins can be made "
            f"(allowed: {', '.join(sorted(_made_by_hydra()))})")


@functools.cache
def _made_by_hydra() -> frozenset[str]:
    """The classes that Hydra and its plugins define, as a config names them."""
    import hydra.experimental.callbacks  # noqa: F401  (defines Hydra's own)

    def below(base: type) -> Iterator[type]:
        for cls in base.__subclasses__():
            yield cls
            yield from below(cls)

    found = [*Plugins.instance().discover(Launcher), *Plugins.instance().discover(Sweeper), *below(Callback)]
    return frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in found
                     if cls.__module__.partition(".")[0] in ("hydra", "hydra_plugins"))


def _check_log(path: str, key: str, value: Any) -> None:
    allowed = {"class": _LOG_CLASSES, "()": ()}.get(key)
    if allowed is not None and value not in allowed:
        raise ConfigError(f"{path}={value}: a log must not call code of a config's choice"
                          f"{f' (allowed: {chr(44).join(allowed)})' if allowed else ''}")
    if isinstance(value, str) and "://" in value and value not in _STREAMS:
        raise ConfigError(f"{path}={value}: a log must not call code of a config's choice (allowed: {', '.join(_STREAMS)})")
    if key == "filename" and value != "${hydra.runtime.output_dir}/${hydra.job.name}.log":
        raise ConfigError(f"{path}={value}: Hydra's log lies in the run's directory; leave its name as it is")


def _check_unset(hydra: dict[Any, Any], path: str, instead: str) -> None:
    section, key = path.split(".")
    values = hydra.get(section) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"hydra.{section}={truncate(str(values), 80)}: not a group of options")
    if value := values.get(key):
        raise ConfigError(f"hydra.{path}={value}: not possible here; {instead}")
