"""A fast variant of Hydra's config loader for the jobs of one command, most of which choose the same components."""

from __future__ import annotations

import io
import os
import pickle
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from fa_bench.command.overrides import parse_override
from fa_bench.config.job import registered_components

#: Maximum number of configs that a loader keeps in memory; each config takes about 20 kB.
_MOST_CONFIGS = 512
_SEARCH_PATH = "hydra.searchpath"


class JobLoader(ConfigLoaderImpl):
    """A config loader that composes one config for all jobs with the same components and sets the other options in copies of that
    config.

    Hydra itself composes every job from some twenty files and schemas, which takes most of the time needed to check a sweep. This
    loader reads the files only once for each choice of components. Create a new loader for each command, so that changed files
    are read again. The resulting configs are the same as Hydra's.
    """

    def __init__(self, config_search_path: Any) -> None:
        super().__init__(config_search_path)
        self._token = uuid.uuid4().hex
        self._forget()

    def _forget(self) -> None:
        #: The composed configs, by primary config, overrides and registered components.
        self._configs: dict[Any, _Kept] = {}
        #: Records which keys are config groups, by primary config, search path and key.
        self._is_group: dict[tuple[Any, ...], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A launcher pickles the loader for every job, so the caches are left out.
        return {key: value for key, value in self.__dict__.items() if key not in ("_configs", "_is_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        if _latest.get("token") != self._token:
            self._forget()
            _latest.update(token=self._token, configs=self._configs, is_group=self._is_group)
        self._configs, self._is_group = _latest["configs"], _latest["is_group"]

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        try:
            parsed = [parse_override(text) for text in overrides]
        except HydraException:  # Hydra's own error has a longer message
            return super()._load_configuration_impl(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        self.ensure_main_config_source_available()
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        search_path = tuple(override.input_line for override in parsed if override.get_key_element() == _SEARCH_PATH)
        single = [override for override in parsed if not override.is_sweep_override()]
        shared, values = [], []
        for override in single:
            is_shared = override.is_hydra_override() or self._chooses(override, config_name, search_path)
            (shared if is_shared else values).append(override)
        config = self._compose(config_name, [override.input_line or "" for override in shared], run_mode)
        self._apply_overrides_to_config(values, config)
        tasks = [override for override in parsed if not override.is_hydra_override()]
        shared_tasks = sum(not override.is_hydra_override() for override in shared)
        recorded = config.hydra.overrides.task
        config.hydra.overrides.task = [*recorded[: len(recorded) - shared_tasks], *(override.input_line for override in tasks)]
        config.hydra.runtime.cwd = os.getcwd()
        form = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            overrides=tasks, kv_sep=form.kv_sep, item_sep=form.item_sep, exclude_keys=form.exclude_keys
        )
        return config

    def _chooses(self, override: Override, config_name: str | None, search_path: Sequence[Any]) -> bool:
        """Whether an override chooses a config from a group, such as a component or an experiment."""
        if isinstance(override.value(), dict):
            return False
        key = (config_name, *search_path, override.key_or_group)
        if key not in self._is_group:
            _, repository = self._parse_overrides_and_create_caching_repo(config_name, list(search_path))
            self._is_group[key] = repository.group_exists(override.key_or_group)
        return self._is_group[key]

    def _compose(self, config_name: str | None, overrides: list[str], run_mode: RunMode) -> DictConfig:
        """A new config with the components and the Hydra options that `overrides` select."""
        # The registered components may have changed since the last call, because checking a job imports its plugins.
        key = (config_name, tuple(overrides), registered_components())
        if (stored := self._configs.get(key)) is None:
            try:
                config = super()._load_configuration_impl(config_name, overrides, RunMode.RUN, from_shell=False)
            except Exception:
                if run_mode is RunMode.RUN:
                    raise
                # The jobs of the sweep choose the components that have no default, so the config is composed without these
                # components.
                return super()._load_configuration_impl(config_name, overrides, run_mode, from_shell=False)
            if len(self._configs) >= _MOST_CONFIGS:
                del self._configs[next(iter(self._configs))]
            stored = self._configs[key] = _Kept(config)
        return stored.copy()


class _Kept:
    """A config that is copied with pickle, which is several times faster than `copy.deepcopy`."""

    def __init__(self, config: DictConfig) -> None:
        # Hydra imports the modules of its plugins twice, and pickle refuses the classes of the first import.
        classes: list[type] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, type) or getattr(sys.modules.get(obj.__module__), obj.__qualname__, None) is obj:
                    return None
                classes.append(obj)
                return len(classes) - 1

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: int) -> type:
                return classes[pid]

        file = io.BytesIO()
        Pickler(file, pickle.HIGHEST_PROTOCOL).dump(config)
        self._content, self._unpickler = file.getvalue(), Unpickler

    def copy(self) -> DictConfig:
        return self._unpickler(io.BytesIO(self._content)).load()


#: The caches of the loader that was unpickled last. A launcher's process unpickles the same loader for each of its jobs, so these
#: jobs share the loader's caches.
_latest: dict[str, Any] = {}
