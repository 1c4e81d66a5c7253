"""Registries that look up components by name. The error for an unknown name lists the available components."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from fa_bench.errors import ConfigError, names, nearest, truncate
from fa_bench.registry.options import Options
from fa_bench.registry.plugins import import_installed

T = TypeVar("T", bound=Options)
#: The type of the class that the decorator receives and returns.
C = TypeVar("C", bound="type[Options]")


class Registry(Mapping[str, "type[T]"], Generic[T]):
    """The components of one kind, which are loaded by importing a package and the installed plugins.

    Args:
        kind: the kind, such as ``algorithm`` or ``schedule``, for messages.
        package: the package (or module) that contains the components; imported at the first lookup.
        base: the base class of the components, as ``module:Class``; imported when the first component is registered.
    """

    def __init__(self, kind: str, package: str, base: str) -> None:
        self.kind, self._package, self._base = kind, package, base
        self._entries: dict[str, Any] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that registers a component as `name`.

        Raises:
            ConfigError: if the class has the wrong base class, or if the name is invalid on the command line or already in use.

        Examples:
            >>> import dataclasses, fa_bench
            >>> @fa_bench.register_schedule("halved")
            ... @dataclasses.dataclass(eq=False)
            ... class Halved(fa_bench.Schedule):
            ...     '''Half the learning rate.'''
            ...
            ...     def rate(self, lr, done, total):
            ...         return lr / 2
            >>> Halved.name
            'halved'
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"a component of kind {self.kind} cannot be registered as {truncate(repr(name), 100)}: write "
                "register('NAME') with a name of letters, digits, _ and -"
            )

        def register_class(cls: C) -> C:
            module, _, base = self._base.partition(":")
            if not isinstance(cls, type) or not issubclass(cls, getattr(importlib.import_module(module), base)):
                raise ConfigError(
                    f"{self.kind} '{name}' cannot be registered: {truncate(repr(cls), 100)} is not a subclass of {module}.{base}"
                )
            known = self._entries.get(name)
            if known is not None and not _is_same(known, cls):
                raise ConfigError(f"{self.kind} '{name}' is registered twice: {known.__module__} and {cls.__module__}")
            cls.name = name
            self._entries[name] = cls
            return cls

        return register_class

    def drop(self, name: str) -> None:
        """Remove a component."""
        del self._entries[name]

    def __getitem__(self, name: str) -> type[T]:
        """The component called `name`. If no component has this name, a ConfigError suggests the nearest one."""
        if name not in self:
            raise ConfigError(
                f"{self.kind}={truncate(str(name), 100)}: no such {self.kind}{nearest(name, self._entries)} "
                f"(available: {names(sorted(self._entries))})"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name in self._entries  # a config may contain a list here, which is not hashable

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


def _is_same(known: type, cls: type) -> bool:
    """Whether a class is a new version of a registered class, which happens if its file is executed again, for example as a
    plugin after it was started as a script."""
    files = [getattr(sys.modules.get(each.__module__), "__file__", None) for each in (known, cls)]
    is_same_file = files[0] is not None and files[0] == files[1]
    return known.__qualname__ == cls.__qualname__ and (known.__module__ == cls.__module__ or is_same_file)
