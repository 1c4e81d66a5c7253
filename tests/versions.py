"""Limitations of the older supported versions of dependencies; the affected tests expect an error or are skipped."""

import PIL
import pytest
import torch

from fa_bench.mechanisms.compiled import too_old_to_compile


def is_older(version: str, *first: int) -> bool:
    """Return True if a version is older than the first version with a feature."""
    return tuple(int(part) for part in version.split(".")[: len(first)]) < first


#: With older versions, compilation is refused; see `fa_bench.mechanisms.compiled.COMPILING_TORCH`.
needs_compiler = pytest.mark.skipif(too_old_to_compile() != "", reason=too_old_to_compile())
#: In older versions, the function with which torch's checkpoints save their inputs has no forward-mode derivative.
CHECKPOINTS_LACK_TANGENTS = is_older(torch.__version__, 2, 12)
#: Older versions read uncompressed TIFFs in YCbCr with four channels, so the data end too early.
YCBCR_IS_CUT_OFF = is_older(PIL.__version__, 13)
