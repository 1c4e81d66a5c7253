"""Trains on MNIST and CIFAR-10 for as long as the time allows."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fa_bench.registry.registries import ALGORITHMS

from .jobs import RunFailed, train
from .page import Section
from .parts import Context

#: The six rules in Fig. 2 of Li and Benna 2024 and the floor, frozen. They are trained first.
FIGURE = ["bp", "frozen", "fa", "dfa", "usf", "pfa", "pfa_o"]
CIFAR_NETS, CIFAR_RULES = ("resnet20", "resnet18"), ("bp", "fa", "kp", "dfa")


def figure2(context: Context, section: Section) -> None:
    """Add a row for each rule on MNIST, with as many epochs as the time allows, up to 40."""
    if not (context.data_dir / "MNIST").is_dir():
        section.notes.append(f"Skipped: {context.data_dir} contains no folder MNIST.")
        return
    rules = FIGURE + [name for name in ALGORITHMS if name not in FIGURE]
    section.columns = ["rule", "epochs", "test accuracy (%)", "training loss", "seconds of training", "peak memory (MB)"]
    try:
        train(context, *_figure2(context, "fa", 1))  # not timed, because it includes the initialisation of the device
        start = time.time()
        train(context, *_figure2(context, "fa", 1))
        usual = time.time() - start
    except RunFailed as error:
        section.add("fa", 1, str(error), passed=False)
        return
    # The factor 1.5 is needed because some rules take several times as long as fa.
    epochs = max(1, min(40, int(context.left() / (1.5 * usual * len(rules)))))
    section.notes = [
        f"The protocol of experiment=pfa_fig2 (784-512-512-10, SGD, batches of 64) with **{epochs} epochs instead of 40** and "
        f"one seed instead of five, to train all rules in the time available. The learning rate drops after about one half and "
        f"three quarters of the epochs. The first rules are {', '.join(FIGURE)}: the floor (frozen) and the rules of the paper's "
        "figure. The other rules use the same settings, which were not tuned for them. This table does not reproduce the figure."
    ]
    slowest = usual * epochs
    for rule in rules:
        if not context.fits(slowest):
            section.missing.append(rule)
            continue
        start = time.time()
        try:
            result = train(context, *_figure2(context, rule, epochs))
        except RunFailed as error:
            section.add(rule, epochs, str(error), *[""] * 3, passed=False)
        else:
            section.add(rule, epochs, *_outcome(result))
        slowest = max(slowest, time.time() - start)


def _outcome(result: dict[str, Any]) -> list[str]:
    """The test accuracy, training loss, training time and peak memory of a run."""
    return [
        f"{100 * result['test_accuracy']:.2f}",
        f"{result['train_loss']:.4f}",
        f"{result['seconds']:.1f}",
        f"{(result['peak_memory_bytes'] or 0) / 1e6:.0f}",
    ]


def _figure2(context: Context, rule: str, epochs: int) -> list[str]:
    milestones = sorted({max(1, round(epochs * part)) for part in (0.5, 0.75)})
    return [
        "experiment=pfa_fig2",
        f"algorithm={rule}",
        "seed=0",
        f"epochs={epochs}",
        "threads=1",
        f"optimizer.schedule.milestones={milestones}",
        f"data_dir={context.data_dir}",
    ]


def cifar(context: Context, section: Section) -> None:
    """Add a row for each net and rule with one epoch of training.

    As long as the time allows, double the number of epochs and add a row for each net and rule again.
    """
    section.columns = ["net", "rule", "epochs", "test accuracy (%)", "training loss", "seconds of training", "peak memory (MB)"]
    try:
        label, data = cifar_data(context)
    except FileNotFoundError as error:
        section.notes.append(f"Skipped: {error}")
        return
    section.notes = [
        f"{label}; SGD with momentum 0.9, learning rate 0.05, batches of 128, no validation split, seed 0. The number of "
        f"epochs is limited by the time available, so training has not converged."
    ]
    epochs, expected = 1, 15.0
    while True:
        runs = [(net, rule) for net in CIFAR_NETS for rule in CIFAR_RULES]
        if epochs > 1 and not context.fits(expected * len(runs)):
            return
        spent = []
        for net, rule in runs:
            if not context.fits(expected):
                section.missing.append(f"{net} {rule}, {epochs} epochs")
                continue
            start = time.time()
            try:
                result = train(
                    context,
                    *data,
                    f"architecture={net}",
                    f"algorithm={rule}",
                    f"epochs={epochs}",
                    "seed=0",
                    "batch_size=128",
                    "threads=1",
                )
            except RunFailed as error:
                section.add(net, rule, epochs, str(error), *[""] * 3, passed=False)
            else:
                section.add(net, rule, epochs, *_outcome(result))
            spent.append(time.time() - start)
            expected = max(expected, 1.1 * spent[-1])
        if section.missing or not spent:
            return
        epochs, expected = 2 * epochs, 2.2 * sum(spent) / len(spent)


def cifar_data(context: Context) -> tuple[str, list[str]]:
    """A description of the data, and the overrides that select them.

    Raises:
        FileNotFoundError: if the folder has no CIFAR-10 data.
    """
    folder = context.data_dir
    if (folder / "cifar-10-batches-py").is_dir():
        return "CIFAR-10", ["dataset=cifar10", f"data_dir={folder}", "dataset.validation=0"]
    archive = next(iter(sorted(folder.glob("cifar10_jpeg.tar*"))), None)
    images = folder
    if archive is not None:
        images = context.scratch / "cifar10_jpeg"
        with tarfile.open(archive) as file:
            file.extractall(images, filter="data")
    if not (images / "train").is_dir() or not (images / "test").is_dir():
        raise FileNotFoundError(f"{folder} contains neither cifar-10-batches-py nor cifar10_jpeg.tar.xz nor train/ and test/.")
    path = context.scratch / "cifar10.npz"
    np.savez(path, **arrays(images))  # type: ignore[arg-type]
    label = "CIFAR-10 (JPEG): JPEG files, whose pixels differ from those of CIFAR-10; no augmentation"
    return label, ["dataset=npz", f"dataset.path={path}", "dataset.validation=0"]


def arrays(images: Path) -> dict[str, np.ndarray]:
    """The images of train/ and test/ as 8-bit arrays (n, 3, H, W), and their classes in the order of the folder names."""
    from PIL import Image

    result: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        pixels, labels = [], []
        for number, folder in enumerate(sorted(path for path in (images / part).iterdir() if path.is_dir())):
            for path in sorted(folder.iterdir()):
                with Image.open(path) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
                labels.append(number)
        result |= {f"x_{part}": np.stack(pixels).transpose(0, 3, 1, 2).copy(), f"y_{part}": np.array(labels)}
    return result
