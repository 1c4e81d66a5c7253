"""What rules with auxiliary nets say where a batch is too small for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: What torch says where batch normalisation has one value to normalise.
TOO_FEW = "Expected more than 1 value per channel"


@contextmanager
def normalising(rule: str, what: str, cut: str, instead: str) -> Iterator[None]:
    """Within it, torch's complaint about batch normalisation of one value names the auxiliary net; its text stays at the end.

    Args:
        rule: the rule's name.
        what: what the rule calls its net.
        cut: where the net is.
        instead: what to do.

    Raises:
        ValueError: with the rule, the net and what to do.
    """
    try:
        yield
    except ValueError as error:
        if TOO_FEW not in str(error):
            raise
        raise ValueError(f"rule '{rule}': the {what} at '{cut}' has batch normalisation, which needs two samples or more in a "
                         f"batch; {instead} ({error})") from error
