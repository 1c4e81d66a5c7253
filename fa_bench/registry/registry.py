"""Names of components: a table that lists what there is when a name is missed."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from fa_bench.errors import ConfigError, cut, names, nearest
from fa_bench.registry.options import Options
from fa_bench.registry.plugins import import_installed

T = TypeVar("T", bound=Options)
#: A class that is registered: the decorator returns it as it is, with its own type.
C = TypeVar("C", bound="type[Options]")


class Registry(Mapping[str, "type[T]"], Generic[T]):
    """The components of one config group, found by importing one package and the installed plugins.

    Args:
        kind: the config group, for example ``algorithm``.
        package: the package whose modules hold the components, or the one module; imported at the first look-up.
        base: the class that every component derives from, as ``module:Class``; imported when the first one is registered.
    """

    def __init__(self, kind: str, package: str, base: str) -> None:
        self.kind, self._package, self._base = kind, package, base
        self._entries: dict[str, Any] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that enters a component under `name`.

        Raises:
            ConfigError: for what is not a class of this kind's components, a name that cannot be written on the command line, or
                one that another class has already.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"a component of kind {self.kind} cannot be registered as {cut(repr(name), 100)}: write "
                              "register('NAME') with a name of letters, digits, _ and -")

        def enter(cls: C) -> C:
            module, _, base = self._base.partition(":")
            if not isinstance(cls, type) or not issubclass(cls, getattr(importlib.import_module(module), base)):
                raise ConfigError(f"{self.kind} '{name}' cannot be registered: {cut(repr(cls), 100)} is not a subclass of "
                                  f"{module}.{base}")
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.kind} '{name}' is registered twice: {known.__module__} and {cls.__module__}")
            cls.name = name
            self._entries[name] = cls
            return cls
        return enter

    def drop(self, name: str) -> None:
        """Take a component out."""
        del self._entries[name]

    def __getitem__(self, name: str) -> type[T]:
        """The component called `name`; raises ConfigError with the nearest name where there is none."""
        if name not in self:
            raise ConfigError(f"{self.kind}={cut(str(name), 100)}: no such {self.kind}{nearest(name, self._entries)} "
                              f"(available: {names(sorted(self._entries))})")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name in self._entries  # a config may ask for a list, which no table can look up

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
        import_installed()
