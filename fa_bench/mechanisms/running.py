"""Determine whether a forward pass that has begun is still running.

If a forward pass raises an ``Exception``, PyTorch still calls the hooks that are registered with ``always_call``. It does not
call them after other exceptions, such as KeyboardInterrupt. Therefore, rules check for themselves whether a pass whose end they
have not seen is still running.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any


class RunningPass:
    """A forward pass of a model; a hook creates this object at the start of the pass.

    Args:
        training: the value of ``mode.training`` before the pass.
        frame: the frame of the function that calls the model's forward method; None for a pass that is not running.

    Attributes:
        training: as given.
    """

    def __init__(self, training: bool, frame: FrameType | None = None) -> None:
        self.training = training
        self._frame, self._thread = frame, threading.get_ident()

    @classmethod
    def begin(cls, training: bool) -> RunningPass:
        """Create the object for the pass whose hook calls this method."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") != _CALLER:
            frame = frame.f_back
        return cls(training, frame)

    def is_running(self) -> bool:
        """Whether the pass is still running; a pass in another thread counts as running, because its state is not known."""
        if self._thread != threading.get_ident():
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def __reduce__(self) -> Any:
        return RunningPass, (self.training,)  # a copy is not running, and frames cannot be copied


#: The module whose function calls the hooks and the model's forward method.
_CALLER = "torch.nn.modules.module"
