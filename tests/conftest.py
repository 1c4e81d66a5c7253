"""Tests run on one thread, which is faster for small tensors, and most of them do not render the figures of reports."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def frozen_modules():
    """Exclude all objects that exist before a module's tests from later garbage collections, because every run performs a full
    collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for processes that tests start
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def without_pixels(request, monkeypatch):
    """Create the figures of sweep reports without rendering them, which would take most of the time of a small sweep. The tests
    of reports and of tuning do render them."""
    if {"report", "tuning"} & {*request.path.parts}:
        return
    from fa_bench.report import figures, plot

    monkeypatch.setattr(figures, "fix_layout", lambda figure: None)
    monkeypatch.setattr(plot, "rendered", lambda figure, form, name: b"")
    monkeypatch.setattr(figures, "inline_svg", lambda figure, name: "<svg></svg>")
