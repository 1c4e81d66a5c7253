"""The effect of shortcuts on activation sharing, measured by the angles between the weight changes of asap and of
backpropagation."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.analyses.base import Analysis
from fa_bench.analyses.training import fit, make_job
from fa_bench.errors import OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS, ANALYSES
from fa_bench.registry.specs import component
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from fa_bench.config.job import Job
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.runs.assembly import Parts
    from fa_bench.runs.loop import Progress


@ANALYSES.register("shortcut_effect")
@dataclasses.dataclass(eq=False)
class ShortcutEffect(Analysis):
    """Measures the shortcut effect (appendix E of Woo et al. 2021, eqs 43-47).

    The input of layer l + 3 is h_{l+2} = φ(W_{l+2} h_{l+1} + b_{l+2}), plus h_l if there is a shortcut. Backpropagation therefore
    changes the layer's weight by δ φ(...), plus δ h_l if there is a shortcut. ASAP shares h_l and changes the weight by δ h_l in
    either case; with a shortcut, this is part of backpropagation's change. The paper illustrates this effect with a sketch; this
    analysis measures it. A net with shortcuts and a net without them are trained with ASAP. Between epochs, the gradients of ASAP
    and of backpropagation are computed for the same batch and weights, and two angles between them are measured in each layer:

    - ``whole``: the angle of ASAP's gradient as in training, where δ is propagated through B.

    - ``sharing``: the angle of the gradient that ASAP would compute from backpropagation's δ (option ``transport``, also in fully
      connected layers), as in eqs 44, 46 and 47.

    The effect occurs in layers that take the sum at the end of a block as input, such as the first convolution of the next block,
    but not in layers inside a block. The column ``shares`` marks layers whose shared activation is not their own input; for other
    layers, sharing has no effect. Layers that ASAP does not train (the stem) have no row. Each row contains the net, the seed,
    the epoch, the layer, the two angles in degrees, and the test accuracy in % after that epoch.
    """

    size: ClassVar[tuple[float, float]] = (13, 4.5)

    with_shortcuts: str = option("resnet20:width=8,blocks=2", "net with shortcuts, NAME:OPTION=VALUE,...")
    without_shortcuts: str = option("resnet20:width=8,blocks=2,shortcuts=false", "net without shortcuts, NAME:OPTION=VALUE,...")
    rule: str = option("asap", "rule with shared activations and the option transport, NAME:OPTION=VALUE,...")
    dataset: str = option("digits", "dataset, NAME:OPTION=VALUE,...")
    data_dir: str = option("data", "folder of datasets")
    optimizer: str = option("sgd:lr=0.03,momentum=0.9,weight_decay=0.0005", "optimizer, NAME:OPTION=VALUE,...")
    epochs: int = option(6, "epochs of training", minimum=1)
    every: int = option(3, "epochs between two measurements, in addition to those before and after training", minimum=1)
    batch_size: int = option(64, "batch size of training", minimum=1)
    probe_size: int = option(128, "batch size for measuring the angles", minimum=2)
    seeds: int = option(2, "seeds, from 0", minimum=1)
    device: str = option("auto", "auto (an accelerator if there is one), cpu, cuda, cuda:1, mps")

    def check(self) -> None:
        self.job("with_shortcuts", 0)
        self.job("without_shortcuts", 0)
        if not hasattr(component(ALGORITHMS, self.rule), "transport"):
            raise OptionError("rule", f"={self.rule} has no option transport (asap has one)")

    def job(self, net: str, seed: int) -> Job:
        """The job that trains one net; `net` is the name of the option that specifies the net."""
        keys = {"algorithm": "rule", "architecture": net, "dataset": "dataset", "optimizer": "optimizer"}
        return make_job(
            {group: (key, getattr(self, key)) for group, key in keys.items()},
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            probe_size=self.probe_size,
            data_dir=self.data_dir,
            device=self.device,
        )

    def table(self) -> pd.DataFrame:
        import pandas as pd
        from tqdm import tqdm

        rows: list[dict[str, Any]] = []
        with tqdm(total=2 * self.seeds * self.epochs, desc=self.name, unit="epoch", disable=None, leave=False) as bar:
            for seed in range(self.seeds):
                for net in ("with_shortcuts", "without_shortcuts"):
                    rows += self._train(net, seed, bar)
        return pd.DataFrame(rows)

    def _train(self, net: str, seed: int, bar: Any) -> list[dict[str, Any]]:
        """Train one net and measure the angles between epochs."""
        from fa_bench.runs.assembly import assemble, prepare

        job = self.job(net, seed)
        parts = assemble(job, prepare(job))
        rows: list[dict[str, Any]] = []

        def measure(epoch: int, accuracy: float) -> None:
            for layer, angles in gradient_angles(parts).items():
                rows.append({"net": net, "seed": seed, "epoch": epoch, "layer": layer, **angles, "test_accuracy": 100 * accuracy})

        def on_epoch(progress: Progress, metrics: dict[str, Any]) -> None:
            bar.update()
            if progress.epoch % self.every == 0 or progress.epoch == self.epochs:
                measure(progress.epoch, metrics["test_accuracy"])

        measure(0, math.nan)
        fit(job, parts, on_epoch)
        return rows

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """The means over the seeds after the last epoch, with one row per layer and one column per net and angle."""
        last = table[(table["epoch"] == table["epoch"].max()) & table["shares"]]
        wide = last.pivot_table(index="layer", columns="net", values=["sharing", "whole"], sort=False)
        wide.columns = [f"{angle}_{net}" for angle, net in wide.columns]
        return wide.round(1).reset_index()

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        panels = figure.subplots(1, 2, sharey=True)
        epochs = sorted(table["epoch"].unique())
        layers = list(dict.fromkeys(table.loc[table["shares"], "layer"]))
        for axes, angle in zip(panels, ("sharing", "whole"), strict=True):
            for colour, net in zip(COLOURS[1:], ("with_shortcuts", "without_shortcuts"), strict=False):
                for epoch, style in ((epochs[0], ":"), (epochs[-1], "-")):
                    part = table[(table["net"] == net) & (table["epoch"] == epoch)].groupby("layer")[angle]
                    means, spreads = part.mean().reindex(layers), part.std(ddof=0).reindex(layers)
                    axes.errorbar(
                        range(len(layers)),
                        means,
                        spreads,
                        ls=style,
                        marker="o",
                        ms=3,
                        capsize=2,
                        color=colour,
                        label=f"{net.replace('_', ' ')}, epoch {epoch}",
                    )
            axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
            axes.axhline(90, color="0.6", lw=1, ls=(0, (1, 3)))
        panels[0].set(title="Sharing only (backpropagation's δ)", ylabel="angle to backpropagation's weight change (degrees)")
        panels[1].set(title="Whole rule (δ through B)")
        panels[0].legend(frameon=False, fontsize=8)


def gradient_angles(parts: Parts) -> dict[str, dict[str, Any]]:
    """The angles between the weight gradients of the rule and of backpropagation on the meter's fixed batch, by layer.

    The angles are in degrees. ``whole`` is the angle for the unmodified rule, and ``sharing`` is the angle for the rule with the
    option ``transport``. ``shares`` indicates whether sharing changes the layer's gradient at all. The model is not changed.
    """
    from fa_bench import attached_rule
    from fa_bench.mechanisms.edge.pathways import FixedFeedback
    from fa_bench.mechanisms.edge.sharing import SharingRule
    from fa_bench.mechanisms.weighted_layers import weighted_layers
    from fa_bench.metrics.angles import weight_angle

    rule, x, y = parts.rule, parts.meter.x, parts.meter.y
    assert isinstance(rule, SharingRule)
    whole, true = gradients(rule, x, y), gradients(rule, x, y, exact=True)
    # A copy of the plain model with the same sharing, in which errors are propagated through the weights.
    copied = attached_rule(copy.deepcopy(rule.model))
    assert copied is not None
    plain = copied.detach()
    fixed = [path for path, layer in weighted_layers(rule.model).items() if type(layer.pathway) is FixedFeedback]
    transport = dataclasses.replace(rule, transport=True, exclude=[*rule.exclude, *fixed])
    transport.attach(plain, seed=rule.seed, sample_input=x[:2])
    sharing = gradients(transport, x, y)
    angles: dict[str, dict[str, Any]] = {}
    for layer in parts.meter.trace.order:
        if layer in whole and layer in sharing:
            angle = weight_angle(sharing[layer], true[layer])
            angles[layer] = {"sharing": angle, "whole": weight_angle(whole[layer], true[layer]), "shares": angle > ROUNDING}
    return angles


#: If the angle in degrees between two single-precision gradients is smaller than this, it is only rounding error.
ROUNDING = 0.1


def gradients(rule: Rule, x: Tensor, y: Tensor, exact: bool = False) -> dict[str, Tensor]:
    """The weight gradient of each layer for one batch, computed by the rule or by backpropagation, without side effects."""
    from contextlib import nullcontext

    from fa_bench.mechanisms.weighted_layers import weighted_layers
    from fa_bench.metrics.meter import measurement_mode

    with measurement_mode(rule), rule.exact() if exact else nullcontext(), torch.enable_grad():
        logits = rule.model(x)
        rule.backward(torch.nn.functional.cross_entropy(logits, y), logits, y)
        layers = weighted_layers(rule.model)
        return {path: layer.weight.grad.detach().clone() for path, layer in layers.items() if layer.weight.grad is not None}
