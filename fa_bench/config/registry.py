"""Names of components: a table that lists what there is when a name is missed."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from fa_bench.config.options import Options
from fa_bench.errors import ConfigError, names, nearest

T = TypeVar("T", bound=Options)


class Registry(Mapping[str, "type[T]"], Generic[T]):
    """The components of one config group, found by importing one package.

    Args:
        kind: the config group, for example ``algorithm``.
        package: the package whose modules hold the components, or the one module; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self._package = kind, package
        self._entries: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters a component under `name`.

        Raises:
            ConfigError: where another class has the name already.
        """
        def enter(cls: type[T]) -> type[T]:
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.kind} '{name}' is registered twice: {known.__module__} and {cls.__module__}")
            cls.name = name
            self._entries[name] = cls
            return cls
        return enter

    def __getitem__(self, name: str) -> type[T]:
        """The component called `name`; raises ConfigError with the nearest name where there is none."""
        self._load()
        if name not in self._entries:
            raise ConfigError(f"{self.kind}={name}: no such {self.kind}{nearest(name, self._entries)} "
                              f"(available: {names(sorted(self._entries))})")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{self._package}."):
                importlib.import_module(module.name)
