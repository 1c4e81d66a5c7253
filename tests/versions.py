"""What the older of the allowed versions of dependencies cannot do: tests expect an error there, or are skipped.

Each version is named once, here, with what it changed.
"""

import pytest

from fa_bench.mechanisms.compiled import too_old_to_compile

#: Compilation is refused, see `fa_bench.mechanisms.compiled.COMPILING_TORCH`.
needs_compiler = pytest.mark.skipif(too_old_to_compile() != "", reason=too_old_to_compile())
