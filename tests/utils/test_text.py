"""Numbers as text."""

import pytest

from fa_bench.utils.text import format_count


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1797, "1,797"),
        (999_999, "999,999"),
        (25_700_000, "25.7 million"),
        (999_400_000, "999 million"),
        (999_600_000, "1 billion"),
        (999_600_000_000, "1 trillion"),
    ],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert format_count(number) == text
