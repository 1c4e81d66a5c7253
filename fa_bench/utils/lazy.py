"""Slow modules, imported at their first use.

Rules, architectures and datasets declare their options in the file that implements them, and the command line reads
those options for ``--help`` and for checking. It should not wait seconds for torch to do so: files that declare
options take torch from here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """Stands for a module and imports it when the first attribute is asked for."""

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
