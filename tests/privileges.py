"""Runs commands without root's privileges."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest


def privileges_dropped(command: list[str], room: Path, place: Path, mode: int) -> subprocess.CompletedProcess[str]:
    """Run a command in `room` while `place` has the given file mode. If the test runs as root, the command runs without root's
    right to override file modes."""
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    before = stat.S_IMODE(place.stat().st_mode)
    place.chmod(mode)
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=room,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
    finally:
        place.chmod(before)
