"""Slow modules, imported at their first use.

The command line reads the options of rules, architectures and datasets from the files that implement them. Those files import
torch through this module, so that ``--help`` and the checks of a command do not wait seconds for torch to be imported.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A placeholder that imports its module when an attribute is first accessed."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        self.__dict__[name] = value
        return value


if TYPE_CHECKING:
    import torch
    import torchvision
    from torch import nn
else:
    torch = LazyModule("torch")
    torchvision = LazyModule("torchvision")
    nn = LazyModule("torch.nn")

__all__ = ["nn", "torch", "torchvision"]
