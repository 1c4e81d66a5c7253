"""Checks of the feedback tensors that a rule creates at cuts. The error messages name the cut, what was found and what is
required."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from fa_bench.errors import ComponentError, truncate


def require_shape(what: str, shape: Sequence[Any]) -> None:
    """Require a shape that initialisers can fill; `what` names the tensor in the error message."""
    if len(shape) < 2 or not all(isinstance(size, Integral) for size in shape):
        raise ComponentError(
            f"{what}: {truncate(repr(shape), 100)} is not a shape for initialisers, which need at least two numbers, such as "
            "(classes, math.prod(features[cut]))"
        )


def missing_b(rule: object, cut: str) -> ComponentError:
    """The error for a cut that has no B."""
    return ComponentError(
        f"cut '{cut}' has no feedback tensor 'B', which {type(rule).__qualname__} needs to project errors; create it in the "
        "rule's method make_feedback with self.put(cut, 'B', ...)"
    )


def wrong_rows(cut: str, shape: Sequence[int], wanted: int) -> ComponentError:
    """The error for a cut whose B, of this shape, does not have one row for each column of the error."""
    return ComponentError(
        f"cut '{cut}': its feedback tensor 'B' has the shape {tuple(shape)}; it needs {wanted} rows, one for "
        "each column of the error"
    )
