"""Compares the time of one epoch of the MLP in fa_bench's training loop with that of a bare loop over float tensors.

    python scripts/bench_epoch.py --data-dir FOLDER [--samples 60000] [--rounds 5] [--threads 2] [--probe-every 500]

Without --data-dir, random images of MNIST's shape are used; the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import fa_bench
from fa_bench.config.job import RunOptions
from fa_bench.data.base import ResidentSplit, Splits
from fa_bench.metrics.meter import AlignmentMeter
from fa_bench.models.mlp import MLP
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.registries import DATASETS
from fa_bench.runs.callbacks import Alignment
from fa_bench.runs.divergence import Divergence
from fa_bench.runs.loop import Trainer

BATCH = 64


def load(data_dir: str | None, samples: int) -> ResidentSplit:
    """The first `samples` training images of MNIST; random images if `data_dir` is None."""
    if data_dir is not None:
        split = DATASETS["mnist"](validation=0.0).load(Path(data_dir), torch.device("cpu")).train
        assert isinstance(split, ResidentSplit)
        return split.subset(torch.arange(samples))
    images = torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8)
    return ResidentSplit(images, torch.randint(0, 10, (samples,)), [0.1307], [0.3081], False, torch.device("cpu"))


def bare(split: ResidentSplit) -> float:
    """The duration in seconds of an epoch in a loop that only trains on slices of shuffled float tensors."""
    x, y = next(split.batches(len(split)))
    model = MLP().build((1, 28, 28), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    start = time.perf_counter()
    order = torch.randperm(len(y))
    for i in range(len(y) // BATCH):
        chosen = order[i * BATCH : (i + 1) * BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return time.perf_counter() - start


def ours(split: ResidentSplit, probe_every: int) -> float:
    """The duration in seconds of an epoch in fa_bench's loop, without evaluation.

    Alignment is measured at the start, every `probe_every` steps, and at the end. If `probe_every` is 0, it is measured only at
    the end.
    """
    model = MLP().build((1, 28, 28), 10)
    rule = fa_bench.attach(model, "bp")
    x, y = next(split.batches(128))
    splits = Splits(split, None, split.subset(torch.arange(1)), [str(c) for c in range(10)], (1, 28, 28), "")
    trainer = Trainer(
        rule,
        Optimizers(SGD(lr=0.01), rule, 1),
        splits,
        RunOptions(batch_size=BATCH, epochs=1),
        [Divergence(), Alignment(AlignmentMeter(rule, x, y), probe_every)],
    )
    start = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - start


def main() -> None:
    """Print the durations and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=60000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe-every", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    split = load(arguments.data_dir, arguments.samples)
    pairs = []
    for _ in range(arguments.rounds):
        pairs.append((bare(split), ours(split, 0), ours(split, arguments.probe_every)))
        print("bare {:.2f} s, loop {:.2f} s, loop with measurements {:.2f} s".format(*pairs[-1]), flush=True)
    for label, column in (("loop / bare", 1), (f"loop with measurements every {arguments.probe_every} steps / bare", 2)):
        print(f"{label}: {statistics.median(pair[column] / pair[0] for pair in pairs):.3f} (median of {arguments.rounds})")


if __name__ == "__main__":
    main()
