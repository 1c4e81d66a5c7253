"""fa_bench: learning rules without weight transport, compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fa_bench.mechanisms.surgery import attach, attached_rule

__all__ = ["__version__", "attach", "attached_rule"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`attach` and `attached_rule`, imported at their first use: the command line starts without torch."""
    if name in ("attach", "attached_rule"):
        from fa_bench.mechanisms import surgery

        return getattr(surgery, name)
    raise AttributeError(f"module 'fa_bench' has no attribute '{name}'")
