"""A command with random overrides either trains briefly or gives a short message, and it writes only to the expected folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fa_bench.cli import main
from fa_bench.config.job import FEEDBACK_OPTIMIZER, RunOptions
from fa_bench.errors import FaBenchError
from fa_bench.registry.options import Options, option_fields
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES, DATASETS, OPTIMIZERS
from fa_bench.utils.files import RESULT

#: The number of random examples. If it is 0, 30 examples with a fixed seed are run; FA_BENCH_EXAMPLES=5000 searches longer with
#: new seeds.
EXAMPLES = int(os.environ.get("FA_BENCH_EXAMPLES", "0"))

NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "1e308",
    "-1e308",
    "1e-320",
    "nan",
    "inf",
    "-inf",
    "1000000000",
    "1" + "0" * 30,
    "-1" + "0" * 30,
    "1" + "0" * 400,
    "0x10",
    "1_0",
]
TEXTS = [
    "''",
    '""',
    "abc",
    "ünï",
    "日本",
    "'a b'",
    "x" * 300,
    ".",
    "..",
    "~",
    "'*'",
    "[fc*]",
    "[act1]",
    "%s",
    "'{}'",
    "null",
    "true",
    "None",
]
NESTED = ["[]", "[1]", "[0]", "[a]", "[null]", "[1,2,3]", "[[1],[2]]", "{}", "{a:1}", "{a:{b:[1]}}", "[1000000000]", "{1:2}"]
FILLED = [
    "${seed}",
    "${foo}",
    "${oc.env:FA_BENCH_NO}",
    "${by:algorithm,{fa:1},2}",
    "${by:x,1}",
    "${oc.create:{a:1}}",
    "???",
    "${.x}",
]
TORN = [
    "${",
    "}",
    "'",
    '"',
    "[1",
    "{a:",
    "a b",
    "\\",
    "a=b",
    "=",
    "",
    "a,b",
    "1,2",
    "range(3)",
    "choice(1,2)",
    "glob(*)",
    "\n",
    "\x7f",
]
KNOWN = ["fa", "kp", "adam", "mlp", "smoke", "cosine", "step", "uniform_one", "pytorch", "../x", "/etc/passwd", "/dev/null"]

HYDRA = [
    "hydra",
    "hydra.run",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job",
    "hydra.job.name",
    "hydra.job.num",
    "hydra.job.id",
    "hydra.job.chdir",
    "hydra.job.env_set",
    "hydra.job.env_set.A",
    "hydra.job_logging",
    "hydra.job_logging.root",
    "hydra.hydra_logging",
    "hydra.hydra_logging.version",
    "hydra.launcher",
    "hydra.launcher._target_",
    "hydra.sweeper",
    "hydra.sweeper.params",
    "hydra.sweeper.max_batch_size",
    "hydra.callbacks",
    "hydra.callbacks.x",
    "hydra.mode",
    "hydra.verbose",
    "hydra.searchpath",
    "hydra.output_subdir",
    "hydra.overrides.task",
    "hydra.runtime.output_dir",
    "hydra.runtime.choices",
    "hydra/launcher",
    "hydra/sweeper",
    "hydra/job_logging",
    "hydra/callbacks",
    "hydra.help",
    "hydra.env",
]
ODD = [
    "x",
    "seed.x",
    "algorithm",
    "architecture",
    "dataset",
    "optimizer",
    "experiment",
    "grid",
    "algorithm@x",
    "../x",
    "/x",
    "_schema/run",
    f"optimizer@{FEEDBACK_OPTIMIZER}",
    FEEDBACK_OPTIMIZER,
    f"{FEEDBACK_OPTIMIZER}.lr",
    "_paper",
    "algorithm.name",
    "",
    ".",
    "a.",
    ".a",
]


def keys(options: Options, prefix: str) -> Iterator[str]:
    for field in option_fields(type(options)):
        yield f"{prefix}{field.name}"
        if isinstance(value := getattr(options, field.name), Options):
            yield from keys(value, f"{prefix}{field.name}.")


#: Options that are left out of the random overrides, because they can make a run slow or depend on files and devices that the
#: test does not control.
LONG = (
    "scale",
    "device",
    "algorithm.initial_steps",
    "algorithm.mirror_steps",
    "algorithm.mirror_batch",
    "architecture.hidden",
    "probe_every",
    "plugins",
    "data_dir",
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    rule, optimizer = draw(st.sampled_from(sorted(ALGORITHMS))), draw(st.sampled_from(sorted(OPTIMIZERS)))
    words = [
        f"algorithm={rule}",
        f"optimizer={optimizer}",
        "dataset=synthetic",
        "dataset.samples=48",
        "dataset.test_samples=16",
        "dataset.size=4",
        "architecture.widths=[6]",
        "scale=smoke",
    ]
    known = [
        key
        for key in (
            *keys(RunOptions(), ""),
            *keys(ALGORITHMS[rule](), "algorithm."),
            *keys(OPTIMIZERS[optimizer](), "optimizer."),
            *keys(DATASETS["synthetic"](), "dataset."),
            *keys(ARCHITECTURES["mlp"](), "architecture."),
        )
        if key not in LONG
    ]
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(draw(st.sampled_from([known, known, known, HYDRA, ODD]))))
        value = draw(st.sampled_from(draw(st.sampled_from([NUMBERS, NUMBERS, TEXTS, NESTED, FILLED, TORN, KNOWN]))))
        mark = draw(st.sampled_from(["", "", "", "", "", "+", "++", "~"]))
        words.append(f"{mark}{key}={value}")
    return [*(["-m"] if draw(st.integers(0, 5)) == 0 else []), *words]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made) if hasattr(contextlib, "chdir") else _inside(made):
        yield Path(made)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@settings(
    max_examples=EXAMPLES or 30,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(command_lines())
def test_random_overrides_train_or_give_short_error(home: Path, words: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=home) as made, _inside(made):
        err, out = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = main(words)
        said = err.getvalue().strip().splitlines()
        assert "Traceback" not in err.getvalue() + out.getvalue()
        if code == 2:
            assert 1 <= len(said) <= 3 and len(err.getvalue()) < 3000, (words, said)
        else:
            assert code in (0, 1), (words, code, said)
            results = [json.loads(path.read_text()) for path in Path(made).rglob(RESULT)]
            statuses = {result["status"] for result in results}
            # A sweep continues if one of its jobs cannot run, and its report says so.
            unfit = {result["error"]["type"] for result in results if result["status"] == "failed"} if "-m" in words else set()
            assert statuses <= {"finished", "diverged", *({"failed"} if unfit else ())}, (words, said)
            assert all(any(kind == cls.__name__ for cls in _below(FaBenchError)) for kind in unfit), (words, unfit, said)
        if not any(word.lstrip("+~").startswith(("output_dir", "hydra.")) for word in words):
            assert {path.name for path in Path(made).iterdir()} <= {"outputs"}, words


def _below(cls: type) -> Iterator[type]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _below(sub)
