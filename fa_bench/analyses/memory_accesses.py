"""External memory accesses of backpropagation and asap (Fig. 11 of Woo et al. 2021)."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from fa_bench.analyses.base import Analysis
from fa_bench.errors import CoverageError, OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import ANALYSES, ARCHITECTURES
from fa_bench.rules.asap import ASAP
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fa_bench.metrics.memory_traffic import Memory


@ANALYSES.register("memory_accesses")
@dataclasses.dataclass(eq=False)
class MemoryAccesses(Analysis):
    """External memory accesses of one training step (eqs 48 and 49, Fig. 11 of Woo et al. 2021).

    There is one row per architecture, rule and batch size b. Each row contains the number of parameters P, the number of
    activations A stored per sample, the reads 2P + A b, the writes P + A b, their total 3P + 2 A b, and the ratio of this total
    to that of backpropagation. The paper does not state its batch size. In a net with few layers, asap may store the same
    activations for two values of k; the larger value then has no row. A net in which asap has nothing to share has no row for
    asap. The counts do not depend on how a shared activation is resized.
    """

    architectures: list[str] = option(
        ["asap_alexnet", "resnet18", "resnet34"], "NAME or NAME:OPTION=VALUE,..., in quotes within the list if it has commas"
    )
    k: list[int] = option([2, 4], "numbers of layers that share an activation in asap", minimum=2)
    batch: list[int] = option([1, 128], "batch sizes", minimum=1)
    input_shape: list[int] = option([3, 32, 32], "channels, height and width of an image", minimum=1)
    classes: int = option(10, "number of classes", minimum=2)
    strict: bool = option(False, "also count what the paper omits: the feedback B, and one bit per output of a ReLU")

    def check(self) -> None:
        if len(self.input_shape) != 3:
            raise OptionError("input_shape", f"={self.input_shape} is not [channels, height, width]")
        for key in ("architectures", "k", "batch"):
            if not getattr(self, key):
                raise OptionError(key, "=[] is empty; list at least one value")

    def table(self) -> pd.DataFrame:
        import pandas as pd

        rows = []
        for spec, counts in {spec: self._counts(spec) for spec in self.architectures}.items():
            for batch in self.batch:
                basis = sum(counts["bp"].accesses(batch, self.strict))
                for rule, memory in counts.items():
                    reads, writes = memory.accesses(batch, self.strict)
                    rows.append(
                        {
                            "architecture": spec,
                            "rule": rule,
                            "batch": batch,
                            "parameters": memory.parameters,
                            "activations": memory.activations,
                            "reads": reads,
                            "writes": writes,
                            "total": reads + writes,
                            "ratio": (reads + writes) / basis,
                        }
                    )
        return pd.DataFrame(rows)

    def _counts(self, spec: str) -> dict[str, Memory]:
        from fa_bench.metrics.memory_traffic import memories
        from fa_bench.registry.specs import component

        architecture = component(ARCHITECTURES, spec)
        shape = (self.input_shape[0], self.input_shape[1], self.input_shape[2])
        with torch.device("meta"):
            model = architecture.build(shape, self.classes)
        counts = {"bp": memories(model, shape)[0]}
        for k in sorted(set(self.k)):
            with contextlib.suppress(CoverageError):
                memory = memories(model, shape, ASAP(k=k))[1]
                if memory is not None and memory not in counts.values():
                    counts[f"asap k={k}"] = memory
        return counts

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        rules, batches = list(dict.fromkeys(table["rule"])), list(dict.fromkeys(table["batch"]))
        names = list(dict.fromkeys(table["architecture"]))
        width = 0.8 / len(rules)
        for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            for number, rule in enumerate(rules):
                rows = table[(table["rule"] == rule) & (table["batch"] == batch)]
                positions = [names.index(name) + (number - (len(rules) - 1) / 2) * width for name in rows["architecture"]]
                colour = COLOURS[number % len(COLOURS)]
                reads, writes = rows["reads"] / 1e6, rows["writes"] / 1e6
                axes.bar(positions, reads, width * 0.95, color=colour, label=f"{rule}, reads")
                axes.bar(positions, writes, width * 0.95, bottom=reads, color=colour, alpha=0.5, label=f"{rule}, writes")
                if rule != "bp":
                    for position, total, ratio in zip(positions, reads + writes, rows["ratio"], strict=True):
                        axes.annotate(f"{ratio:.2f}", (position, total), ha="center", va="bottom", fontsize=8)
            axes.set_xticks(range(len(names)), [name.replace(":", "\n") for name in names])
            axes.set_title(f"batch of {batch}" + (", strict count" if self.strict else ""))
            axes.set_ylabel("memory accesses per step (millions)")
        figure.axes[-1].legend(fontsize=8)
