"""Hashes by which runs are compared: of code, of weights and other state, of the batches that trained."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.feedback_tensors import AUXILIARY_PREFIX
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Hexadecimal digits of every hash that is shown.
DIGITS = 16
#: Parts of the package that read runs and train none: changing them makes no run stale.
READERS = ("report", "analyses")


def code_hash(plugins: Iterable[str] = ()) -> str:
    """A hash of the sources that decide a run's numbers: this package's, and those of the plugins, which are imported."""
    files = [Path(path) for path in (getattr(sys.modules.get(name), "__file__", None) for name in plugins) if path]
    digest = hashlib.sha256(_package_hash().encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:DIGITS]


@lru_cache(maxsize=1)
def _package_hash() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] not in READERS:
            digest.update(f"{relative.as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def state_hash(state: Any) -> str:
    """A hash of nested containers of tensors and plain values, such as a state dict; equal for equal bits."""
    digest = hashlib.sha256()
    _update(digest, state)
    return digest.hexdigest()[:DIGITS]


def weights_hash(model: nn.Module) -> str:
    """A hash of a model's state: weights, buffers and feedback, without the nets that local losses add; see `state_hash`."""
    return state_hash({key: tensor for key, tensor in model.state_dict().items() if AUXILIARY_PREFIX not in key})


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest.update(b",")
            _update(digest, item)
    else:
        digest.update(repr(value).encode())


def chained(before: str, *tensors: Tensor) -> str:
    """The hash of a sequence that grew by these tensors; `before` is that of the sequence so far, empty at first."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:DIGITS]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
