"""A run continues if standard output or standard error is closed, full, unread, or limited to a small character set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    "-m",
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=1",
    "seed=0,1",
]
FAITHFUL = "import sys; from fa_bench.utils.output import resilient_output\nwith resilient_output() as lost:\n    "


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, check=False)


def python(code: str, folder: Path, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    return shell(f'"$PYTHON" -c "$CODE" {redirection}', folder, CODE=FAITHFUL + code, **variables)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"97.1 +/- 0.2 deg^T x ~ e lambda 2 \u7d50 \udc80"),
        ("utf-8", "97.1 ± 0.2 °ᵀ × … é λ ² 結 \\udc80".encode()),
        ("latin-1", "97.1 ± 0.2 °^T × ~ é lambda ² \\u7d50 \\udc80".encode("latin-1")),
    ],
)
def test_unencodable_characters_are_replaced(tmp_path, encoding, shown):
    for stream in ("stdout", "stderr"):
        said = python(f"print('97.1 ± 0.2 °ᵀ × … é λ ² 結 \\udc80', file=sys.{stream})", tmp_path, PYTHONIOENCODING=encoding)
        assert (said.returncode, getattr(said, stream).strip()) == (0, shown)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_accept_text_without_corrupting_files(tmp_path, redirection):
    code = (
        "file = open('file', 'w'); print('a'); print('b', file=sys.stderr); sys.stdout.flush(); file.write('whole'); "
        "file.close(); "
        "import subprocess; subprocess.run(['sh', '-c', 'echo c; echo d >&2']); open('rc', 'w').write(lost() or 'fine')"
    )
    python(code, tmp_path, redirection)
    assert (tmp_path / "file").read_text() == "whole" and (tmp_path / "rc").read_text() == "fine"


def test_streams_that_a_plugin_closes_stay_open(tmp_path):
    said = python("sys.stdout.close(); sys.stderr.close(); print('a'); print('b', file=sys.stderr)\nprint('c')", tmp_path)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"a\nc\n", b"b\n")


def test_broken_pipe_is_ignored(tmp_path):
    code = "[print('x' * 1000, file=stream) for stream in (sys.stdout, sys.stderr) for _ in range(500)]; "
    code += "open('rc', 'w').write(lost() or 'fine')"
    said = shell('{ "$PYTHON" -c "$CODE" 2>&1; echo $? >code; } | true; cat code', tmp_path, CODE=FAITHFUL + code)
    assert said.stdout == b"0\n" and (tmp_path / "rc").read_text() == "fine"


def test_slow_reader_of_nonblocking_stream_gets_all_output(tmp_path):
    code = "import os; os.set_blocking(1, False); [print('x' * 999) for _ in range(500)]"
    said = shell('"$PYTHON" -c "$CODE" | { sleep 1; wc -c; }', tmp_path, CODE=FAITHFUL + code)
    assert said.stdout.strip() == b"500000" and said.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_device_is_reported_as_lost_output(tmp_path):
    said = python("print('a'); print(lost(), file=sys.stderr); print('b')", tmp_path, ">/dev/full")
    assert said.returncode == 0 and said.stderr == b"No space left on device\n"


def test_captured_streams_are_not_replaced(capsys):
    from fa_bench.utils.output import resilient_output

    before = sys.stdout
    with resilient_output() as lost:
        assert sys.stdout is before and lost() == ""


def finished(folder: Path) -> int:
    return [json.loads(path.read_text())["status"] for path in folder.rglob("result.json")].count("finished")


def test_grid_with_broken_pipe_finishes_and_writes_report(tmp_path):
    command = f'{{ "$PYTHON" -m fa_bench.cli {" ".join(GRID)} 2>&1; echo $? >code; }} | true; cat code'
    assert shell(command, tmp_path).stdout == b"0\n"
    assert finished(tmp_path) == 2 and len(list(tmp_path.rglob("report.md"))) == 1


def test_grid_over_output_dir_writes_report_in_each_directory(tmp_path):
    # The job has ASCII as its output encoding and a matplotlib backend that is not installed, as in a batch job started from a
    # notebook.
    said = shell(
        f'"$PYTHON" -m fa_bench.cli {" ".join(GRID)} output_dir=a,b',
        tmp_path,
        PYTHONIOENCODING="ascii",
        MPLBACKEND="module://nowhere.backend",
    )
    assert said.returncode == 0 and b" +/- " in said.stdout and b"Traceback" not in said.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert not list((tmp_path / "outputs").rglob("report*"))
    for name in "ab":
        (report,) = (tmp_path / name).rglob("report.md")
        assert finished(tmp_path / name) == 2 and (report.parent / "sweep.json").is_file()


@pytest.mark.parametrize(
    "backend", ["nowhere", "module://nowhere.backend", "module://matplotlib_inline.backend_inline", "agg", ""]
)
def test_figure_is_drawn_with_any_backend_and_rcparams(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nlines.linewidth: 9\n")
    code = """
import os
from pathlib import Path
from fa_bench.utils.drawing import default_style
with default_style():
    from fa_bench.report.plot import new_figure, save
    figure = new_figure(2.0)
    figure.subplots().set_title("a")
    save(figure, Path("figure.png"))
import matplotlib
assert matplotlib.rcParams["text.usetex"] and os.environ["MPLBACKEND"] == os.environ["WANTED"]
"""
    said = shell('"$PYTHON" -c "$CODE"', tmp_path, CODE=code, MPLBACKEND=backend, WANTED=backend)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
