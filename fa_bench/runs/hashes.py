"""Hashes of the code, of weights and other state, and of training batches, by which runs are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.config.job import Job
from fa_bench.errors import DataError
from fa_bench.mechanisms.feedback_tensors import AUXILIARY_PREFIX
from fa_bench.registry.options import as_plain
from fa_bench.runs.user_code import class_parts, source_files
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The number of hexadecimal digits in every hash.
DIGITS = 16
#: The packages that only read runs, so changes to them do not invalidate any run.
READERS = ("report", "analyses")
#: The data hashes that this process has computed. They are kept so that the data of a sweep's finished runs are read only once.
_data_hashes: dict[str, str] = {}
clear_cache = _data_hashes.clear


def code_hash(plugins: Iterable[str] = (), classes: Iterable[type] = ()) -> str:
    """A hash of the code that determines a run's results: this package (without `READERS`), the plugins with the user's modules
    that they import, and the user's own classes.

    Args:
        plugins: names of modules that have been imported.
        classes: components that are not part of this package.
    """
    classes = list(classes)
    modules = dict.fromkeys([*plugins, *(cls.__module__ for cls in classes)])
    digest = hashlib.sha256(_package_hash().encode())
    for file in source_files(modules):
        digest.update(file.read_bytes())
    for part in class_parts(classes):
        digest.update(f"{part}\n".encode(errors="backslashreplace"))
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
    """A hash of nested containers of tensors and plain values, such as a state dict; bitwise identical states have equal
    hashes."""
    digest = hashlib.sha256()
    _update(digest, state)
    return digest.hexdigest()[:DIGITS]


def weights_hash(model: nn.Module) -> str:
    """The `state_hash` of a model's weights, buffers and feedback, without the auxiliary nets of local losses."""
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


def chained(previous: str, *tensors: Tensor) -> str:
    """The hash of a sequence of tensors after `tensors` are appended to it. `previous` is the hash of the sequence before that,
    or empty at the start."""
    digest = hashlib.sha256(previous.encode())
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:DIGITS]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def compare_data(job: Job, result: dict[str, Any], read_hash: Callable[[], str]) -> tuple[bool, str]:
    """Whether a finished run's result is valid for the current data, and a remark for the log (possibly empty).

    A result stays valid if the data cannot be read; the remark then says so.

    Args:
        job: the run.
        result: the content of its result.json.
        read_hash: loads the data and returns their hash; raises DataError if they are missing or broken.
    """
    data = [job.dataset.name, as_plain(job.dataset), str(Path(job.run.data_dir).resolve()), job.run.scale]
    key = json.dumps(data, sort_keys=True)
    try:
        now = _data_hashes[key] = _data_hashes.get(key) or read_hash()
    except DataError as error:
        return True, f"its data could not be compared ({error})"
    if now == result.get("data_hash"):
        return True, ""
    return False, f"was trained on different data (hash {result.get('data_hash')}; now {now})"
