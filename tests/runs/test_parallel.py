"""Runs of several processes equal those of one process; unsupported cases are refused, and all processes end together.

The two processes communicate through gloo and run one command after another, because starting them is slow.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fa_bench.cli import main
from fa_bench.metrics.evaluation import evaluate
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.runs import parallel
from fa_bench.runs.assembly import assemble, prepare
from fa_bench.runs.batch_norm import synchronise
from fa_bench.runs.callbacks import StopOnSignal
from fa_bench.utils.files import ANGLES, METRICS, RESULT

from .test_stopping import job_of

ROOT = Path(__file__).resolve().parents[2]
#: There are 50 samples in batches of 9, which two processes split into 5 and 4, and a last batch of 5, split into 3 and 2.
COMMON = ["batch_size=9", "drop_last=false", "probe_size=8", "probe_every=3", "loggers=[]", "epochs=1", "threads=1"]
DATA = [*COMMON, "dataset=synthetic", "dataset.validation=0", "dataset.samples=50", "dataset.test_samples=21"]
MLP = [*DATA, "architecture.widths=[8,8]"]
RESNET = [
    *DATA,
    "dataset.channels=3",
    "dataset.size=8",
    "architecture=resnet20",
    "architecture.width=4",
    "architecture.blocks=1",
    "algorithm=kp",
]
#: Options that avoid values that depend on the whole batch or, for wm, a long phase before training.
OPTIONS = {
    "predsim": ["algorithm.loss=pred"],
    "dgl": ["algorithm.auxiliary_net=linear"],
    "wm": ["algorithm.initial_steps=3"],
    "fdfa": ["algorithm.b_lr_scale=0", "algorithm.b_init=pytorch"],
    "forward_gradient": ["algorithm.form=weight"],
    "grape": ["algorithm.b_lr_scale=0", "algorithm.anchor_period=3"],
}
STOP = """
import dataclasses
from fa_bench.callbacks.base import Callback
from fa_bench.registry.registries import CALLBACKS
@CALLBACKS.register("mystop")
@dataclasses.dataclass(eq=False)
class MyStop(Callback):
    def on_epoch_end(self, trainer, metrics):
        if trainer.world.size == 1 or trainer.world.rank == 1:
            trainer.stop("enough")
"""
#: Rules in which each process has its own noise, or in which a difference of losses is divided by 2e-3, which multiplies rounding
#: errors by 500.
NOISY = ("node_perturbation", "weight_perturbation", "np_feedback", "forward_forward", "ddtp_linear", "ldrl", "dfc")
CASES: dict[str, list[str]] = {
    **{rule: [*MLP, f"algorithm={rule}", *OPTIONS.get(rule, [])] for rule in ALGORITHMS if rule not in NOISY},
    "micro-batches": [*MLP, "algorithm=brsf", "accumulate=2", "clip_norm=0.1", "checkpoint_minutes=1e-9"],
    "labels": [*MLP, "algorithm=drtp", "accumulate=2"],
    "delayed": [*MLP, "algorithm=f3", "accumulate=2", "epochs=3"],
    "augmented": [
        *COMMON,
        "architecture.widths=[8,8]",
        "dataset=image_folder",
        "data_dir=images",
        "dataset.size=8",
        "dataset.validation=0.3",
        "batch_size=5",
    ],
    "tokens": [
        *COMMON,
        "dataset=text",
        "dataset.path=text.txt",
        "dataset.context=8",
        "architecture=decoder",
        "architecture.depth=1",
        "architecture.width=8",
        "architecture.heads=2",
        "architecture.dropout=0",
        "algorithm=dfa",
        "objective=token_cross_entropy",
        "objective.ignore_index=5",
        "batch_size=6",
        "accumulate=2",
    ],
    "resnet20": [*RESNET, "sync_batch_norm=true"],
    "feedback optimizer": [*MLP, "algorithm=dkp", "optimizer@feedback_optimizer=adam", "probes=[gradient_norm]"],
}
#: Rules whose state must survive a resume: brsf samples new magnitudes in every pass, and f3 uses errors of the previous epoch.
RESUMED = ("brsf", "f3")
REFUSED = {
    ("batch_size=1",): "batch_size=1 makes batches of 1 for 2 processes, each of which needs a sample; use 2 or more",
    ("accumulate=5",): "accumulate=5 splits batches of 9 into micro-batches of 1 for 2 processes, each of which needs a sample; "
    "use 4 at most",
    ("batch_size=7",): "drop_last=false leaves a last batch of 1",
    ("device=mps",): "device=mps",
    ("optimizer.lr=-1",): "optimizer.lr=-1",
}


def command(name: str, folder: str) -> list[str]:
    return [*CASES[name], f"hydra.run.dir={folder}/{name.replace(' ', '-')}"]


def process(number: int, store: str, commands: list[tuple[list[str], int | None]], results: Any) -> None:
    """Run commands as one of two processes; the second process gets a signal after the step that a command names."""
    torch.set_num_threads(1)
    shared = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=shared, rank=number, world_size=2)
    on_step = StopOnSignal.on_step_end
    gc.freeze()  # every run collects garbage, which takes less time without older objects
    for index, (words, step) in enumerate(commands):

        def stopping(callback: Any, trainer: Any, step: Any = step) -> None:
            if number == 1 and trainer.progress.step == step:
                signal.raise_signal(signal.SIGTERM)
            on_step(callback, trainer)

        StopOnSignal.on_step_end = stopping  # type: ignore[method-assign]
        dist.barrier()
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            parallel._world = parallel.Processes(number, 2, number, dist.PrefixStore(str(index), shared))
            try:
                code = main(words)
            except BaseException as error:
                code, _ = -1, print(f"{type(error).__name__}: {error}", file=errors)
        results.put((index, number, code, output.getvalue(), errors.getvalue()))
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(folder: Path, commands: list[tuple[list[str], int | None]]) -> list[dict[int, tuple[int, str, str]]]:
    """Run the commands in two processes, and return each process's exit code, standard output and standard error for every
    command."""
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=process, args=(number, str(folder / "store"), commands, results), daemon=True)
        for number in range(2)
    ]
    for each in processes:
        each.start()
    found: list[dict[int, tuple[int, str, str]]] = [{} for _ in commands]
    try:
        for _ in range(2 * len(commands)):
            index, number, *rest = results.get(timeout=120)
            found[index][number] = tuple(rest)
    finally:
        for each in processes:
            each.join(20)
            if each.is_alive():
                each.kill()
    return found


def write_inputs(folder: Path) -> None:
    from PIL import Image

    (folder / "mystop.py").write_text(STOP)
    (folder / "text.txt").write_text("how much wood would a woodchuck chuck if a woodchuck could chuck wood? " * 6)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 5)):
        for name in ("a", "b"):
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / "images" / part / name / f"{number}.png")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that contains the runs of two processes, in its subfolder 'two', and the outputs of the commands."""
    folder = tmp_path_factory.mktemp("parallel")
    write_inputs(folder)
    resumed = {rule: [*MLP, "epochs=3", f"algorithm={rule}", f"hydra.run.dir=resumed-{rule}"] for rule in RESUMED}
    commands: dict[str, tuple[list[str], int | None]] = {name: (command(name, "two"), None) for name in CASES}
    commands["statistics"] = ([*RESNET, "hydra.run.dir=two/statistics"], None)
    commands["stop"] = ([*MLP, "epochs=3", "plugins=[mystop]", "callbacks=[mystop]", "hydra.run.dir=two/stop"], None)
    commands["diverged"] = ([*MLP, "optimizer.lr=1e30", "hydra.run.dir=two/diverged"], None)
    commands |= {f"resumed {rule}": (words, 11) for rule, words in resumed.items()}
    commands |= {" ".join(words): ([*MLP, *words, "hydra.run.dir=two/refused"], None) for words in REFUSED}
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", str(ROOT))
        os.chdir(folder)
        try:
            # One process begins the runs that two processes resume.
            assert [stopped_after(8, words) for words in resumed.values()] == [143] * len(resumed)
            found = in_two_processes(folder, list(commands.values()))
        finally:
            os.chdir(before)
    return folder, dict(zip(commands, found, strict=True))


def stopped_after(step: int, words: list[str]) -> int:
    on_step = StopOnSignal.on_step_end
    with pytest.MonkeyPatch.context() as patch:

        def stopping(callback: Any, trainer: Any) -> None:
            if trainer.progress.step == step:
                signal.raise_signal(signal.SIGTERM)
            on_step(callback, trainer)

        patch.setattr(StopOnSignal, "on_step_end", stopping)
        return main(words)


@pytest.fixture
def inside(outcome: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(outcome[0])
    monkeypatch.syspath_prepend(str(outcome[0]))
    return outcome[1]


def result_in(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, RESULT).read_text())


def difference(one: str, two: str) -> float:
    """The largest difference between tensors of the two runs' last checkpoints, relative to the tensor's norm."""
    first, second = (torch.load(Path(folder, "checkpoints", "last.pt"), weights_only=True) for folder in (one, two))
    assert first.keys() == second.keys() and first["progress"].keys() == second["progress"].keys()
    largest = 0.0
    for part in ("model", "rule"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            if isinstance(tensor, torch.Tensor):
                assert tensor.is_floating_point() or torch.equal(tensor, second[part][name])
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                largest = max(largest, float((tensor - second[part][name]).norm() / tensor.norm().clamp_min(1e-6)))
    return largest


@pytest.mark.parametrize("name", CASES)
def test_two_processes_match_one(name: str, inside: Any) -> None:
    """The gradients are summed in a different order in float32, which changes them by about 1e-7 per step; the tolerance also
    allows for the growth of these differences."""
    of_case = inside[name]
    assert [of_case[number][0] for number in range(2)] == [0, 0], of_case
    assert main(command(name, "one")) == 0
    folders = [command(name, folder)[-1].partition("=")[2] for folder in ("one", "two")]
    assert difference(*folders) < 1e-5
    one, two = map(result_in, folders)
    for key in ("batches_hash", "data_hash", "initial_weights_hash", "step", "config_hash", "status", "feedback_layers"):
        assert one[key] == two[key], key
    assert (one["world_size"], two["world_size"]) == (1, 2)
    lines = [json.loads(Path(folder, METRICS).read_text().splitlines()[-1]) for folder in folders]
    for key in ("train_loss", "test_loss"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-4)
    accuracies = [{key: line[key] for key in line if key.endswith("accuracy")} for line in lines]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)  # at most one of 21 samples
    measured = [[json.loads(line)["step"] for line in Path(folder, ANGLES).read_text().splitlines()] for folder in folders]
    assert measured[0] == measured[1] and len(measured[0]) > 1
    assert of_case[1][2] == "" and "2 processes share each batch" in Path(folders[1], "run.log").read_text()


@pytest.mark.parametrize("momentum", [None, 0.1, 0.4])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_synchronised_batch_norm_matches_torch_in_one_process(
    momentum: float | None, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    for kind, shape in ((nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 4)), (nn.BatchNorm2d, (2, 3, 4, 2))):
        plain: Any = kind(3, momentum=momentum, **options)
        own = synchronise(copy.deepcopy(plain))
        for seed in range(3):
            x = 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            found = []
            for module in (plain, own):
                leaf = x.clone().requires_grad_()
                output = module(leaf)
                output.pow(3).sum().backward()
                found.append([output.detach(), leaf.grad, *(one.grad for one in module.parameters())])
            # The module computes its statistics in double precision, and torch in float32.
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(own.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_differences_from_single_process_are_noted() -> None:
    """Dropout is noted unless its rate is zero, and so is batch normalisation unless it is synchronised. The rules' own notes are
    added."""
    notes = parallel.Processes(1, 2, 1, None).notes
    share = "2 processes share each batch"
    assert notes(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2)), False, ("batches",)) == [share]
    for module in (nn.Dropout(0.5), nn.MultiheadAttention(2, 1, dropout=0.1), nn.LSTM(2, 2, 2, dropout=0.2)):
        first, dropout = notes(nn.Sequential(module), False, ())
        assert first == share and dropout.startswith("dropout differs from process to process")
    assert notes(nn.BatchNorm1d(2), True, ("on data-parallel ranks",)) == [share, "on data-parallel ranks"]
    assert "sync_batch_norm=true" in notes(nn.BatchNorm1d(2), False, ())[1]


def test_random_numbers_differ_between_processes_and_steps() -> None:
    """Process 0 keeps torch's generator, because its state is in the checkpoints."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = {}
        for rank in (0, 1, 2):
            for seed, step in ((0, 0), (0, 1), (1, 0)):
                parallel.Processes(rank, 3, rank, None).begin_step(seed, step)
                drawn[rank, seed, step] = torch.initial_seed()
    assert {drawn.pop((0, seed, step)) for seed, step in ((0, 0), (0, 1), (1, 0))} == {7}
    assert len(drawn) == len({*drawn.values(), 7}) - 1 == 6


def test_unsynchronised_batch_norm_differs_and_is_noted(inside: Any) -> None:
    assert [inside["statistics"][number][0] for number in range(2)] == [0, 0]
    log = Path("two/statistics/run.log").read_text()
    assert log.count("batch normalisation uses the statistics of each process's own samples") == 1
    assert "batch normalisation uses" not in Path("two/resnet20/run.log").read_text()
    assert main([*RESNET, "hydra.run.dir=one/statistics"]) == 0 and difference("one/statistics", "two/statistics") > 1e-3
    # Two processes with sync_batch_norm equal one process without it.
    assert difference("one/statistics", "two/resnet20") < 1e-5


def test_all_processes_evaluate_with_saved_statistics(inside: Any) -> None:
    """All processes evaluate with the statistics of process 0, although each one trained with its own."""
    job = job_of(RESNET)
    parts = assemble(job, prepare(job))
    state = torch.load("two/statistics/checkpoints/last.pt", weights_only=True)
    parts.rule.model.load_state_dict(state["model"])
    found = evaluate(parts.rule.model, job.objective, parts.splits.test, 64)
    last = json.loads(Path("two/statistics", METRICS).read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_callback_stop_in_one_process_stops_all(inside: Any) -> None:
    assert [inside["stop"][number][0] for number in range(2)] == [0, 0], inside["stop"]
    result = result_in("two/stop")
    assert (result["status"], result["epoch"], result["error"]["callback"]) == ("stopped", 1, "mystop")


def test_all_processes_diverge_together(inside: Any) -> None:
    assert inside["diverged"][0][0] == 1 and not inside["diverged"][1][2], inside["diverged"]
    assert main([*MLP, "optimizer.lr=1e30", "hydra.run.dir=one/diverged"]) == 1
    one, two = result_in("one/diverged"), result_in("two/diverged")
    assert two["status"] == "diverged" and one["error"] == two["error"]


@pytest.mark.parametrize("rule", RESUMED)
def test_resume_with_different_process_counts_matches_uninterrupted_run(rule: str, inside: Any) -> None:
    """The run is stopped within the second epoch. After a resume, a signal that only the second process gets stops the run within
    the same epoch again."""
    folder, of_both = f"resumed-{rule}", inside[f"resumed {rule}"]
    assert [of_both[number][0] for number in range(2)] == [143, 143], of_both
    assert "resuming after epoch 1, batch 2" in of_both[0][1]
    assert "Checkpoint saved; rerun the same command to resume" in of_both[0][2] and not of_both[1][2]
    words = [*MLP, "epochs=3", f"algorithm={rule}"]
    assert result_in(folder)["step"] == 11
    assert main([*words, f"hydra.run.dir={folder}", "resume=true"]) == 0
    assert main([*words, f"hydra.run.dir=whole-{rule}"]) == 0
    assert difference(f"whole-{rule}", folder) < 1e-5
    whole, resumed = (
        [json.loads(line)["train_loss"] for line in Path(folder, METRICS).read_text().splitlines()]
        for folder in (f"whole-{rule}", folder)
    )
    assert len(whole) == 3 and resumed == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_options_are_refused_before_training(words: tuple[str, ...], inside: Any) -> None:
    found = inside[" ".join(words)]
    assert [found[number][0] for number in range(2)] == [2, 2], found
    lines = (found[0][2] + found[1][2]).splitlines()
    assert len(lines) == 1 and REFUSED[words] in lines[0], lines
    folder = Path("two/refused")
    assert not folder.exists() or not list(folder.iterdir())  # Hydra creates it in each process, and may leave it empty


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], ["-m", "experiment=quickstart"]])
def test_sweeps_are_refused(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in zip(parallel._VARIABLES, ("0", "2", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(parallel, "_joined", parallel.World)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2 and not list(tmp_path.iterdir())


def workers_of(pid: int) -> dict[int, int]:
    """The ids of the processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                variables = dict(text.partition("=")[::2] for text in (folder / "environ").read_text().split("\0"))
                found[int(variables["RANK"])] = int(folder.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("kill", "fa-bench: lost another process of this run. Checkpoint saved; rerun the same command to resume"),
        ("terminate", "fa-bench: Interrupted. Checkpoint saved; rerun the same command to resume"),
    ],
)
def test_torchrun_shuts_down_cleanly_and_resumes(kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*MLP, "epochs=100000", "hydra.run.dir=run"]
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fa_bench", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 120
            while not Path("run/checkpoints/last.pt").exists() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            workers = workers_of(process.pid)
            if kind == "kill":
                os.kill(workers[1], signal.SIGKILL)
            else:
                process.terminate()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    # torchrun adds its own lines to the output.
    assert [line for line in errors.splitlines() if line.startswith("fa-bench")] == [says], errors
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0], errors
    result = result_in("run")
    assert (result["status"], result["world_size"]) == ("interrupted", 2)
    assert not Path("run/.lock").exists() and not any(map(alive, workers.values()))
    # The run is then resumed by a single process and stopped by another signal.
    assert stopped_after(result["step"] + 20, [*words, "resume=true"]) == 143
    assert re.search(r"resuming after epoch \d+", Path("run/run.log").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
