"""Before Hydra runs, refuse configs that would make it run arbitrary code, because configs must be plain data.

Hydra instantiates launcher, sweeper and callbacks from the classes that ``_target_`` names, imports the packages in its search
path, and passes its logging sections to `logging.config`, which calls the functions that they name.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Hydra reads every file through the source that is registered for files, and it offers no public way to replace that source.
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fa_bench.command.explain import other_sweeper
from fa_bench.errors import ConfigError, truncate
from fa_bench.utils.yaml_files import read_yaml

SWEEPER = "hydra_plugins.fa_bench_sweeper.FaBenchSweeper"
#: The sections that Hydra instantiates, and the logging sections.
_INSTANTIATED = ("hydra.launcher", "hydra.sweeper", "hydra.callbacks")
_LOGS = ("hydra.job_logging", "hydra.hydra_logging")
#: Matches the only interpolations that are allowed in instantiated and logging sections. Their values, such as names and folders,
#: are plain text in every config.
_TEXT = re.compile(r"\$\{hydra\.(job|sweep|run|runtime)\.(name|id|num|dir|subdir|output_dir|override_dirname)\}")
#: The values allowed for certain logging keys, and the allowed logging values that have a scheme, such as ``ext://``.
_LOG_VALUES = {
    "class": ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    "()": (),
    "filename": ("${hydra.runtime.output_dir}/${hydra.job.name}.log",),
}
_LOG_SCHEMES = ("ext://sys.stdout", "ext://sys.stderr")
#: Maximum number of characters in a value after its interpolations are resolved, and maximum length of a chain of interpolations.
_MOST_TEXT, _MOST_STEPS = 100_000, 100
_REFERENCE = re.compile(r"\$\{\s*(?:oc\.[\w.]+\s*:\s*)?((?:hydra\s*:\s*)?[\w.\[\]@/-]+)")


class _FileResult(ConfigResult):
    """The config that was loaded from one file.

    It is marked as coming from a schema source. Otherwise, Hydra 1.3 would merge the file with the ConfigStore's entry of the
    same path (automatic schema matching).
    """

    is_schema_source = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


class CheckedFiles(FileConfigSource):
    """Hydra's source for config files, modified to read them as plain data of a bounded size."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if provider.startswith("hydra.searchpath") and not os.path.isdir(self.path):
            raise ConfigError(f"hydra.searchpath=[{truncate(path, 200)}]: no such folder")

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
        return _FileResult(provider=self.provider, path=f"{self.scheme()}://{self.path}", config=config, header=header)


class CheckedPackages(ImportlibResourcesConfigSource):
    """Hydra's source for configs in Python packages. Hydra imports these packages, so ``hydra.searchpath`` must not name any."""

    def __init__(self, provider: str, path: str) -> None:
        if provider.startswith("hydra.searchpath"):
            raise ConfigError(
                f"hydra.searchpath=[{truncate(path, 200)}]: packages would be imported, but configs must not run "
                "code; name folders"
            )
        super().__init__(provider, path)

    def load_config(self, config_path: str) -> ConfigResult:
        return copy.deepcopy(self._load(config_path))

    @functools.cache  # noqa: B019 (sources live as long as the process; Hydra's own configs do not change)
    def _load(self, config_path: str) -> ConfigResult:
        return super().load_config(config_path)

    def __deepcopy__(self, memo: Any) -> CheckedPackages:
        return self  # Hydra copies every source for every config; this one is immutable


class SharedStore(StructuredConfigSource):
    """Hydra's source for the ConfigStore, modified to copy only the entries that it loads. Hydra itself would copy the whole
    store for every config."""

    def __deepcopy__(self, memo: Any) -> SharedStore:
        return self


_SOURCES = {CheckedFiles: FileConfigSource, CheckedPackages: ImportlibResourcesConfigSource, SharedStore: StructuredConfigSource}
# Hydra later registers its own sources again, including in launchers' processes, but keeps an existing source of the same name.
for _source, _replaced in _SOURCES.items():
    _source.__name__ = _replaced.__name__


def install() -> None:
    """Register the sources of this module with Hydra in this process."""
    Plugins.instance()  # registers Hydra's own sources first
    SourcesRegistry.instance().types |= {source.scheme(): source for source in _SOURCES}


def check_config(config: DictConfig, plugins: list[str]) -> None:
    """Refuse a composed config that would make Hydra run arbitrary code or run jobs that have not been checked.

    Args:
        config: as composed by Hydra, with the node ``hydra``.
        plugins: the modules named on the command line, the only ones that may be imported.

    Raises:
        ConfigError: for such a config; the message names the key.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    _check_lengths(plain)
    for path, key, value in _walk(plain):
        text, shown = value if isinstance(value, str) else "", truncate(str(value), 80)
        if key == "_target_" and not (path.startswith(_INSTANTIATED) and str(value) in _hydra_classes()):
            raise ConfigError(
                f"{path}={shown}: configs must not name code to run; "
                + (
                    f"allowed are the launchers, sweepers and callbacks of Hydra and its plugins ({', '.join(_hydra_classes())})"
                    if path.startswith("hydra.")
                    else "choose components by name (algorithm=fa) and modules by plugins=[...]"
                )
            )
        if not path.startswith("hydra.") and (match := re.search(r"\$\{(hydra\.[\w.]+)\}", text)):
            raise ConfigError(f"{path}={shown}: only Hydra's own options, such as hydra.run.dir, may refer to {match[1]}")
        if path.startswith(_INSTANTIATED + _LOGS) and "${" in _TEXT.sub("", text):
            raise ConfigError(
                f"{path}={shown}: only Hydra's own names and folders may be interpolated here, since configs must not run code"
            )
        allowed = _LOG_VALUES.get(str(key), _LOG_SCHEMES if "://" in text else None)
        if path.startswith(_LOGS) and allowed is not None and value not in allowed:
            raise ConfigError(
                f"{path}={shown}: logs must not call other code or write other files (allowed: {', '.join(allowed) or 'nothing'})"
            )
    if "experiment" in plain:
        raise ConfigError("experiment: the file must begin with the line '# @package _global_' and set a mapping of keys")
    hydra: Any = plain.get("hydra")
    for path, section in (("hydra", hydra), ("hydra.job", hydra.get("job") if isinstance(hydra, dict) else None)):
        if not isinstance(section, dict):
            raise ConfigError(f"{path}={truncate(str(section), 80)}: not a mapping of options")
    if isinstance(sweeper := hydra.get("sweeper"), dict):
        if sweeper.get("_target_") != SWEEPER:
            raise ConfigError(other_sweeper(str(hydra["runtime"]["choices"].get("hydra/sweeper"))))
        if extra := [key for key in sweeper if key != "_target_"]:
            raise ConfigError(
                f"hydra.sweeper.{extra[0]}: fa-bench's sweeper has no options; list the values on the command line "
                "or in an experiment's `grid`"
            )
    if hydra["job"].get("env_set"):
        raise ConfigError(
            "hydra.job.env_set: not supported; set environment variables in the shell, so that they apply to the whole run"
        )
    if hydra["mode"] is not None:
        raise ConfigError(f"hydra.mode={hydra['mode']}: not supported; pass -m (--multirun) for a sweep")
    if Path(folder := hydra["output_subdir"] or "hydra").name != folder:
        raise ConfigError(f"hydra.output_subdir={folder}: not the name of a folder in the run directory")
    try:
        modules = config.get("plugins") or []
    except OmegaConfBaseException:
        return  # nothing is imported here; the check of the job reports the error
    if OmegaConf.is_list(modules) and (unnamed := [name for name in modules if name not in plugins]):
        raise ConfigError(
            f"plugins=[{unnamed[0]}]: set by a config file, but only the command line may name modules to import; "
            f"add plugins=[{unnamed[0]}] to the command line"
        )


def _check_lengths(plain: Any) -> None:
    """Refuse chains of interpolations that would exhaust the memory when they are resolved."""
    values = {path: value for path, _, value in _walk(plain)}
    lengths: dict[str, int] = {}

    def length(path: str, steps: int) -> int:
        if path in lengths:
            return lengths[path]
        value, total = values[path], 1
        if steps > _MOST_STEPS:
            raise ConfigError(
                f"{path}={truncate(str(value), 80)}: refers to itself, or through a chain of more than {_MOST_STEPS} other values"
            )
        if isinstance(value, (dict, list)):
            total += sum(length(f"{path}.{key}", steps + 1) for key in (value if isinstance(value, dict) else range(len(value))))
        elif isinstance(value, str):
            total += len(value)
            for match in _REFERENCE.finditer(value):
                # ${hydra:job.num} means ${hydra.job.num}; leading dots make the name relative to the parents of this value.
                name = re.sub(r"\s*:\s*", ".", match[1]).replace("[", ".").replace("]", "")
                target = name.lstrip(".")
                if dots := len(name) - len(target):
                    target = ".".join([*path.split(".")[:-dots], target])
                total += length(target, steps + 1) if target in values else 0
        if total > _MOST_TEXT:
            raise ConfigError(f"{path}={truncate(str(value), 80)}: longer than {_MOST_TEXT} characters once resolved")
        lengths[path] = total
        return total

    for path in values:
        length(path, 0)


def _walk(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (full key, last key, value) for every value in nested dicts and lists."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield f"{prefix}{key}", key, item
        yield from _walk(item, f"{prefix}{key}.")


@functools.cache
def _hydra_classes() -> list[str]:
    """The import paths of the launchers, sweepers and callbacks that Hydra and its plugins define."""
    import hydra.experimental.callbacks  # noqa: F401  (defines Hydra's own callbacks)

    classes: list[type] = [*Plugins.instance().discover(Launcher), *Plugins.instance().discover(Sweeper), Callback]
    for cls in classes:  # the list grows during the loop
        classes += cls.__subclasses__() if issubclass(cls, Callback) else ()
    return sorted(
        f"{cls.__module__}.{cls.__qualname__}"
        for cls in classes
        if cls.__module__.partition(".")[0] in ("hydra", "hydra_plugins") and cls is not Callback
    )
