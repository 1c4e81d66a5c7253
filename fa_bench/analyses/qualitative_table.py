"""The qualitative comparison of rules in Table 1 of Li and Benna 2024, with measured marks."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.analyses.base import Analysis
from fa_bench.analyses.training import fit, make_job
from fa_bench.errors import OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import ANALYSES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from fa_bench.config.job import Job
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.runs.assembly import Parts

PROPERTIES = (
    "no sign transport",
    "no magnitude transport",
    "no separate feedback phase",
    "no explicit symmetry after training",
    "accurate approximation of BP",
    "BP-level performance",
)

#: Table 1 of Li and Benna 2024 by rule, in the order of PROPERTIES. The paper's ✽ is written "reduced", ✦ "between" and ✛
#: "unclear".
PUBLISHED = {
    "bp": ("no", "no", "yes", "no", "yes", "yes"),
    "fa": ("yes", "yes", "yes", "reduced", "no", "no"),
    "dfa": ("yes", "yes", "yes", "reduced", "no", "no"),
    "usf": ("no", "yes", "unclear", "reduced", "no", "between"),
    "kp": ("yes", "yes", "yes", "no", "yes", "yes"),
    "wm": ("yes", "yes", "no", "no", "yes", "yes"),
    "pfa": ("yes", "yes", "yes", "yes", "yes", "yes"),
}


@ANALYSES.register("qualitative_table")
@dataclasses.dataclass(eq=False)
class QualitativeTable(Analysis):
    """Table 1 of Li and Benna 2024, with each mark measured on trained nets and compared with the published one.

    The paper does not state how its marks were determined, so the procedures are ours. Here, "feedback" means all feedback
    tensors and the effective feedback of all layers, and its changes are maxima over these tensors. The following properties are
    measured on each trained net and averaged over seeds:

    - no sign transport: the signs of all W are inverted between two updates. The mark is "yes" if the fraction of feedback values
      that change sign as a result is at most ``changed``.

    - no magnitude transport: all W are doubled. The mark is "yes" if the relative change of the feedback is at most ``changed``.

    - no separate feedback phase: ``rule.step()``, which performs the mirror steps of a rule that has them, is called between two
      updates, without data, a loss or gradients. The mark is "yes" if the relative change of the feedback is at most ``changed``.

    - no explicit symmetry after training: the direct synapses are the feedback tensors of the same shape as the weight or, for a
      rule without feedback tensors, the effective feedback. The mark is "no" if the mean angle between the direct synapses and W
      is at most ``aligned``, and "reduced" if the angle is larger but below ``apart``. Otherwise, or if the rule has no direct
      synapses, the mark is "yes".

    - accurate approximation of BP: the measure is the mean angle between effective feedback and W over the paths of hidden
      errors. For a path that does not pass through a single W (direct feedback), the measure is the delta angle of the error. The
      mark is "yes" if the mean is at most ``aligned``.

    - BP-level performance: the mark is "yes" if the test accuracy is less than ``gap`` points below that of bp. Otherwise, the
      mark is "between" if the accuracy is above those of fa and dfa, and "no" if it is not.

    PAL, the paper's eighth column, is not implemented. A published "unclear" counts as a disagreement with every mark. Each row
    contains the rule, the property, the measured mark and value, the published mark, and whether the marks agree.
    """

    size: ClassVar[tuple[float, float]] = (13, 4.5)

    rules: list[str] = option(
        list(PUBLISHED), "rules, which must include bp; NAME or NAME:OPTION=VALUE,... (in quotes within a list)"
    )
    architecture: str = option(
        "mlp:widths=[64,64],init=xavier_uniform", "net, NAME:OPTION=VALUE,...; two hidden layers, as in the paper on MNIST"
    )
    dataset: str = option("digits", "dataset, NAME:OPTION=VALUE,...")
    data_dir: str = option("data", "folder of datasets")
    optimizer: str = option(
        "sgd:lr=0.05,momentum=0.9,weight_decay=0.003",
        "optimizer of all rules; the initial values decay by a factor of exp(-steps x lr x weight_decay / (1 - momentum)), "
        "which is about exp(-2) by default",
    )
    epochs: int = option(60, "epochs of training", minimum=1)
    batch_size: int = option(64, "batch size", minimum=1)
    seeds: int = option(2, "seeds, from 0", minimum=1)
    changed: float = option(
        1e-4,
        "largest relative change, or fraction of values, that is ignored; the default exceeds rounding errors (1e-7), but is far "
        "below the effect of weight transport (1) or of a mirror step (0.01)",
        minimum=0,
    )
    aligned: float = option(
        25.0,
        "largest angle in degrees at which feedback and weight count as aligned; the default lies between the angle of pfa, "
        "arctan √0.1 = 17.5, and the angle between uniform weights and their signs, 30",
        minimum=0,
        maximum=90,
    )
    apart: float = option(
        78.0,
        "angle in degrees from which direct synapses count as no more symmetric than those of the brain",
        minimum=0,
        maximum=90,
    )
    gap: float = option(
        1.3,
        "points of test accuracy below bp from which a rule is no longer BP-level; the default is two standard errors of the "
        "difference if two nets disagree on 3 % of 2 x 360 test images",
        minimum=0,
    )
    device: str = option("cpu", "auto (an accelerator if there is one), cpu, cuda, cuda:1, mps")

    def check(self) -> None:
        jobs = [self.job(rule, 0) for rule in self.rules]
        if "bp" not in (known := [job.algorithm.name for job in jobs]):
            raise OptionError("rules", f"={', '.join(known)} must include bp, the reference for the others")

    def job(self, rule: str, seed: int) -> Job:
        """The job that trains one rule with one seed."""
        same = {key: (key, getattr(self, key)) for key in ("architecture", "dataset", "optimizer")}
        return make_job(
            {"algorithm": ("rules", rule), **same},
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            data_dir=self.data_dir,
            device=self.device,
        )

    def table(self) -> pd.DataFrame:
        import pandas as pd
        from tqdm import tqdm

        values: dict[str, dict[str, float]] = {}
        with tqdm(total=len(self.rules) * self.seeds, desc=self.name, unit="run", disable=None, leave=False) as bar:
            for rule in self.rules:
                runs = []
                for seed in range(self.seeds):
                    runs.append(self.measure(self.job(rule, seed)))
                    bar.update()
                values[rule] = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        names = {rule: self.job(rule, 0).algorithm.name for rule in self.rules}
        accuracy = {names[rule]: measured["accuracy"] for rule, measured in values.items()}
        rows: list[dict[str, Any]] = []
        for rule, measured in values.items():
            marks = PUBLISHED.get(names[rule], ("",) * len(PROPERTIES))
            for (mark, value, unit), name, published in zip(self.judge(measured, accuracy), PROPERTIES, marks, strict=True):
                rows.append(
                    {
                        "rule": rule,
                        "property": name,
                        "measured": mark,
                        "value": value,
                        "unit": unit,
                        "published": published,
                        "agrees": mark == published if published else None,
                    }
                )
        return pd.DataFrame(rows)

    def measure(self, job: Job) -> dict[str, float]:
        """Train one net and measure its properties."""
        from fa_bench.runs.assembly import assemble, prepare

        last: dict[str, Any] = {}
        parts = assemble(job, prepare(job))
        angles = fit(job, parts, on_epoch=lambda progress, metrics: last.update(metrics))
        consumer = parts.meter.trace.consumer
        paths = [angles["weight_angle"].get(consumer[layer], angles["delta_angle"].get(layer, math.nan)) for layer in consumer]
        direct = direct_angles(parts)
        return {
            **transport(parts.rule),
            "accuracy": 100 * last["test_accuracy"],
            "path": sum(paths) / len(paths),
            "direct": sum(direct) / len(direct) if direct else math.nan,
        }

    def judge(self, measured: dict[str, float], accuracy: dict[str, float]) -> list[tuple[str, float, str]]:
        """The (mark, value, unit) of each property, according to the thresholds."""
        direct, difference = measured["direct"], measured["accuracy"] - accuracy["bp"]
        symmetry = "no" if direct <= self.aligned else "reduced" if direct < self.apart else "yes"  # NaN: yes
        others = [accuracy[name] for name in ("fa", "dfa") if name in accuracy]
        level = "yes" if difference > -self.gap else "between" if others and measured["accuracy"] > max(others) else "no"
        return [
            *(
                ("no" if measured[key] > self.changed else "yes", measured[key], unit)
                for key, unit in (("sign", "fraction"), ("magnitude", "relative"), ("phase", "relative"))
            ),
            (symmetry, direct, "degrees"),
            ("yes" if measured["path"] <= self.aligned else "no", measured["path"], "degrees"),
            (level, difference, "points"),
        ]

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        axes = figure.subplots()
        axes.axis("off")
        rules = list(dict.fromkeys(table["rule"]))
        cells, colours = [], []
        for name in PROPERTIES:
            part = table[table["property"] == name].set_index("rule").loc[rules]
            differs = [mark != "" and not agrees for mark, agrees in zip(part["published"], part["agrees"], strict=True)]
            measured = [
                f"{mark} ({'none' if math.isnan(value) else f'{value:.3g}'})"
                for mark, value in zip(part["measured"], part["value"], strict=True)
            ]
            cells.append(
                [
                    f"{cell}\npaper: {published}" if differ else cell
                    for cell, published, differ in zip(measured, part["published"], differs, strict=True)
                ]
            )
            colours.append(["#F6D5C3" if differ else "white" for differ in differs])
        from matplotlib.transforms import Bbox

        units = table.drop_duplicates("property").set_index("property")["unit"]
        cell_table = axes.table(
            cells,
            cellColours=colours,
            rowLabels=[f"{name} ({units[name]})" for name in PROPERTIES],
            colLabels=rules,
            cellLoc="center",
            bbox=Bbox.from_bounds(0.24, 0, 0.76, 0.95),
        )
        cell_table.auto_set_font_size(False)
        cell_table.set_fontsize(8)
        agreed = table["agrees"].dropna()
        axes.set_title(
            f"Table 1 of Li and Benna 2024, measured: {int(agreed.sum())} of {len(agreed)} marks agree; shaded ones do not",
            fontsize=10,
        )


def feedback_of(rule: Rule) -> dict[str, Tensor]:
    """Copies of the feedback tensors and of the layers' effective feedback."""
    tensors = {f"{path}.{name}": tensor for path, tensors in rule.feedback.items() for name, tensor in tensors.items()}
    effective = {layer: feedback for layer, (feedback, _) in rule.weight_pairs().items()}
    return {name: tensor.detach().clone() for name, tensor in {**tensors, **effective}.items()}


def transport(rule: Rule) -> dict[str, float]:
    """Measure how much the feedback changes if the weights change between two updates, and in ``rule.step()``.

    All values are maxima over the feedback tensors. ``sign`` is the fraction of values that change sign if all weights are
    negated. ``magnitude`` is the relative change if the weights are doubled, and ``phase`` is the relative change in
    ``rule.step()``. The rule's model is not changed.
    """
    from fa_bench import attached_rule
    from fa_bench.mechanisms.weighted_layers import weighted_layers

    before = {name: tensor for name, tensor in feedback_of(rule).items() if tensor.any()}

    def after(change: Callable[[Rule], Any]) -> dict[str, Tensor]:
        copied = attached_rule(copy.deepcopy(rule.model))
        assert copied is not None
        with torch.no_grad():
            change(copied)
        return feedback_of(copied)

    def scale(copied: Rule, factor: float) -> None:
        for layer in weighted_layers(copied.model).values():
            layer.weight.mul_(factor)

    def difference(now: dict[str, Tensor]) -> float:
        return max((((now[name] - tensor).norm() / tensor.norm()).item() for name, tensor in before.items()), default=0.0)

    negated = after(lambda copied: scale(copied, -1))
    signs = [(negated[name].sign() != tensor.sign())[tensor != 0].float().mean().item() for name, tensor in before.items()]
    return {
        "sign": max(signs, default=0.0),
        "magnitude": difference(after(lambda copied: scale(copied, 2))),
        "phase": difference(after(lambda copied: copied.step())),
    }


def direct_angles(parts: Parts) -> list[float]:
    """The smallest angle in degrees between direct synapses and W, for each hidden activation that has direct synapses."""
    from fa_bench.mechanisms.weighted_layers import weighted_layers
    from fa_bench.metrics.angles import weight_angle

    rule, trace, layers = parts.rule, parts.meter.trace, weighted_layers(parts.rule.model)
    pairs, feedback = rule.weight_pairs(), rule.feedback
    smallest = []
    for layer, (module, _) in rule.error_points(trace).items():
        if (path := trace.consumer.get(layer)) is None:
            continue
        weight = layers[path].weight.detach()
        tensors = list(feedback[module].values()) if feedback.get(module) else [pairs[path][0]] if path in pairs else []
        angles = [weight_angle(tensor, weight) for tensor in tensors if tensor.shape == weight.shape]
        smallest += [min(angles)] if angles else []
    return smallest
