"""Artificial images, for trying things out and for tests."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from fa_bench.data.base import ArrayDataset, std_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS
from fa_bench.utils.memory_limits import require_memory
from fa_bench.utils.text import format_shape


@DATASETS.register("synthetic")
@dataclasses.dataclass(eq=False)
class Synthetic(ArrayDataset):
    """Artificial images, each the random prototype of its class plus Gaussian noise, meant for trying things out, not for
    results."""

    samples: int = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        2048, "number of training images, including those for validation", minimum=1
    )
    test_samples: int = option(512, "number of test images", minimum=1)
    classes: int = option(10, "number of classes", minimum=2)
    channels: int = option(1, "channels of an image", minimum=1, maximum=4096)
    size: int = option(8, "height and width in pixels", minimum=1)
    noise: float = option(0.2, "standard deviation of the noise, in units of the full range", minimum=0)
    samples_seed: int = dataclasses.field(init=False, default=0)
    data_seed: int = option(0, "seed of the images", minimum=0)
    std: list[float] = std_option(0.25)

    @property
    def subsample(self) -> None:
        """None, because this dataset's option `samples` is the number of generated images."""
        return None

    def shape(self) -> tuple[tuple[int, int, int], int]:
        return (self.channels, self.size, self.size), self.classes

    def arrays(self, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        generator = np.random.default_rng(self.data_seed)
        shape = (self.channels, self.size, self.size)
        # Up to three float64 arrays of all images are in memory at the same time.
        count = max(self.samples, self.test_samples, self.classes)
        require_memory(
            3 * 8 * count * math.prod(shape),
            f"dataset=synthetic: {count} images of {format_shape(shape)} "
            "(dataset.samples, dataset.classes, dataset.channels, dataset.size)",
        )
        prototypes = generator.uniform(0.2, 0.8, (self.classes, *shape))

        def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
            labels = np.arange(count) % self.classes
            images = prototypes[labels] + self.noise * generator.standard_normal((count, *shape))
            return np.round(255 * images.clip(0, 1)).astype(np.uint8), labels

        return *sample(self.samples), *sample(self.test_samples), [str(c) for c in range(self.classes)]
