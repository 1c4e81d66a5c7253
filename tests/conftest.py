"""One thread for the small tensors here, where two only wait for each other; no pixels in reports that are not the subject."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def frozen_modules():
    """Leave what has been imported and collected out of later garbage collections: every run makes a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def without_pixels(request, monkeypatch):
    """Figures of sweeps' reports are made, but not rendered, which takes most of the time of a small sweep."""
    if {"report", "tuning"} & {*request.path.parts}:
        return
    from fa_bench.report import figures, plot

    monkeypatch.setattr(figures, "fix_layout", lambda figure: None)
    monkeypatch.setattr(plot, "rendered", lambda figure, form, name: b"")
    monkeypatch.setattr(figures, "inline_svg", lambda figure, name: "<svg></svg>")
