"""The qualitative comparison of rules, measured."""

from __future__ import annotations

import copy
import dataclasses
import math
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
    from fa_bench.runs.train import Parts

PROPERTIES = ("no sign transport", "no magnitude transport", "no separate feedback phase", "no explicit symmetry after training",
              "accurate approximation of BP", "BP-level performance")

#: Table 1 of Li and Benna 2024 by rule, in the order of PROPERTIES. Its ✽ is "reduced", its ✦ "between", its ✛ "unclear".
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
    """Table 1 of Li and Benna 2024 from runs: each mark is measured on trained nets and set beside the published one.

    The paper gives marks and no procedure; the procedures are choices made here. What carries the error is every feedback tensor
    and every layer's effective feedback. On each trained net, seed by seed, and averaged over seeds:

    - no sign transport: change the sign of all W between two updates; the fraction of numbers in what carries the error whose
      sign changes with it is at most ``changed``.
    - no magnitude transport: double all W; the relative change of what carries the error is at most ``changed``.
    - no separate feedback phase: take the rule's own step between two updates (``rule.step()``, where mirror steps are), without
      data, loss or gradient; the relative change of what carries the error is at most ``changed``.
    - no explicit symmetry after training: direct synapses are the feedback tensors with a number for each weight, in the weight's
      layout; where the rule has no tensors, what carries the error is the direct synapse. Their mean angle to W: up to
      ``aligned`` no, below ``apart`` reduced, from there on, or where a rule has no direct synapses, yes.
    - accurate approximation of BP: mean angle of each hidden error's path, effective feedback to W; where a path does not go
      through one W (direct feedback), the delta angle of the error itself. Up to ``aligned`` yes.
    - BP-level performance: test accuracy less than ``gap`` points below that of bp is yes; else above those of fa and dfa is
      between, and the rest is no.

    PAL, the paper's eighth column, is not built and left out. A published "unclear" disagrees with every mark, and is reported.
    Rows: rule, property, measured mark and value, published mark, and whether they agree.
    """

    size: ClassVar[tuple[float, float]] = (13, 4.5)

    rules: list[str] = option(list(PUBLISHED), "rules, NAME or NAME:OPTION=VALUE,... (in quotes within a list); bp among them")
    architecture: str = option("mlp:widths=[64,64],init=xavier_uniform", "net, NAME:OPTION=VALUE,...; two hidden layers, "
                               "as the paper's on MNIST")
    dataset: str = option("digits", "dataset, NAME:OPTION=VALUE,...")
    data_dir: str = option("data", "folder of the datasets")
    optimizer: str = option("sgd:lr=0.05,momentum=0.9,weight_decay=0.003", "optimizer of every rule; its decay must have time to "
                            "remove initial values: steps x lr x decay / (1 - momentum) of 2 leaves exp(-2) of them")
    epochs: int = option(60, "epochs of training", minimum=1)
    batch_size: int = option(64, "samples in a batch", minimum=1)
    seeds: int = option(2, "seeds, from 0", minimum=1)
    changed: float = option(1e-4, "relative change, or fraction of numbers, up to which nothing was carried over: above rounding "
                            "(1e-7) and far below what a transport (1) or a mirror step (0.01) does", minimum=0)
    aligned: float = option(25.0, "degrees up to which two weights count as aligned: between pfa's arctan √0.1 = 17.5 and the 30 "
                            "of the sign of uniform weights", minimum=0, maximum=90)
    apart: float = option(78.0, "degrees from which direct synapses count as no more symmetric than the brain's", minimum=0,
                          maximum=90)
    gap: float = option(1.3, "points of test accuracy below bp that still count as its level: two standard errors of the "
                        "difference where two nets disagree on 3 % of 2 x 360 test images", minimum=0)
    device: str = option("cpu", "auto (an accelerator where there is one), cpu, cuda, cuda:1, mps")

    def check(self) -> None:
        jobs = [self.job(rule, 0) for rule in self.rules]
        if "bp" not in (known := [job.algorithm.name for job in jobs]):
            raise OptionError("rules", f"={', '.join(known)} lacks bp, which the others are compared with")

    def job(self, rule: str, seed: int) -> Job:
        """The run of one rule."""
        same = {key: (key, getattr(self, key)) for key in ("architecture", "dataset", "optimizer")}
        return make_job({"algorithm": ("rules", rule), **same}, seed=seed, epochs=self.epochs, batch_size=self.batch_size,
                        data_dir=self.data_dir, device=self.device)

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
        accuracy = {names[rule]: found["accuracy"] for rule, found in values.items()}
        rows: list[dict[str, Any]] = []
        for rule, found in values.items():
            published = PUBLISHED.get(names[rule], ("",) * len(PROPERTIES))
            for (mark, value, unit), name, given in zip(self.judge(found, accuracy), PROPERTIES, published, strict=True):
                rows.append({"rule": rule, "property": name, "measured": mark, "value": value, "unit": unit, "published": given,
                             "agrees": mark == given if given else None})
        return pd.DataFrame(rows)

    def measure(self, job: Job) -> dict[str, float]:
        """What is measured of one run, trained here."""
        from fa_bench.runs.train import assemble, prepare

        last: dict[str, Any] = {}
        parts = assemble(job, prepare(job))
        angles = fit(job, parts, on_epoch=lambda progress, metrics: last.update(metrics))
        consumer = parts.meter.trace.consumer
        paths = [angles["weight_angle"].get(consumer[layer], angles["delta_angle"].get(layer, math.nan)) for layer in consumer]
        direct = direct_angles(parts)
        return {**transport(parts.rule), "accuracy": 100 * last["test_accuracy"], "path": sum(paths) / len(paths),
                "direct": sum(direct) / len(direct) if direct else math.nan}

    def judge(self, found: dict[str, float], accuracy: dict[str, float]) -> list[tuple[str, float, str]]:
        """(mark, value, unit) of each property, by the thresholds."""
        def unless(value: float) -> str:
            return "no" if value > self.changed else "yes"

        direct, ahead = found["direct"], found["accuracy"] - accuracy["bp"]
        symmetry = "no" if direct <= self.aligned else "reduced" if direct < self.apart else "yes"  # void is neither: yes
        others = [accuracy[name] for name in ("fa", "dfa") if name in accuracy]
        level = "yes" if ahead > -self.gap else "between" if others and found["accuracy"] > max(others) else "no"
        return [
            (unless(found["sign"]), found["sign"], "fraction"),
            (unless(found["magnitude"]), found["magnitude"], "relative"),
            (unless(found["phase"]), found["phase"], "relative"),
            (symmetry, direct, "degrees"),
            ("yes" if found["path"] <= self.aligned else "no", found["path"], "degrees"),
            (level, ahead, "points"),
        ]

    def draw(self, figure: Figure, table: pd.DataFrame) -> None:
        axes = figure.subplots()
        axes.axis("off")
        rules = list(dict.fromkeys(table["rule"]))
        cells, colours = [], []
        for name in PROPERTIES:
            part = table[table["property"] == name].set_index("rule").loc[rules]
            apart = [bool(published) and not agrees for published, agrees in zip(part["published"], part["agrees"], strict=True)]
            shown = [f"{mark} ({'none' if math.isnan(value) else f'{value:.3g}'})"
                     for mark, value in zip(part["measured"], part["value"], strict=True)]
            cells.append([f"{cell}\npaper: {given}" if differs else cell
                          for cell, given, differs in zip(shown, part["published"], apart, strict=True)])
            colours.append(["#F6D5C3" if differs else "white" for differs in apart])
        units = table.drop_duplicates("property").set_index("property")["unit"]
        drawn = axes.table(cells, cellColours=colours, rowLabels=[f"{name} ({units[name]})" for name in PROPERTIES],
                           colLabels=rules, cellLoc="center", bbox=(0.24, 0, 0.76, 0.95))  # pyright: ignore[reportArgumentType]
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
        agreed = table["agrees"].dropna()
        axes.set_title(f"Table 1 of Li and Benna 2024, measured: {int(agreed.sum())} of {len(agreed)} marks agree; "
                       "shaded ones do not", fontsize=10)


def carrying(rule: Rule) -> dict[str, Tensor]:
    """Copies of all that carries the error: the feedback tensors and the layers' effective feedback."""
    tensors = {f"{place}.{name}": tensor for place, held in rule.feedback.items() for name, tensor in held.items()}
    return {name: tensor.detach().clone() for name, tensor in
            {**tensors, **{layer: feedback for layer, (feedback, _) in rule.weight_pairs().items()}}.items()}


def transport(rule: Rule) -> dict[str, float]:
    """What of the weights gets into what carries the error between two updates, and what the rule's own step does to it.

    ``sign``: largest fraction of numbers whose sign follows a change of sign of all weights; ``magnitude``: largest relative
    change when they are doubled; ``phase``: when the rule takes its step. The rule's model is left as it is.
    """
    from fa_bench import attached_rule
    from fa_bench.mechanisms.weighted_layers import weighted_layers

    before = {name: tensor for name, tensor in carrying(rule).items() if tensor.any()}

    def after(change: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(rule.model)
        copied = attached_rule(model)
        assert copied is not None
        with torch.no_grad():
            change(model, copied)
        return carrying(copied)

    def scaled(factor: float) -> dict[str, Tensor]:
        return after(lambda model, copied: [layer.weight.mul_(factor) for layer in weighted_layers(model).values()])

    def difference(now: dict[str, Tensor]) -> float:
        return max((((now[name] - tensor).norm() / tensor.norm()).item() for name, tensor in before.items()), default=0.0)

    flipped = scaled(-1)
    signs = [(flipped[name].sign() != tensor.sign())[tensor != 0].float().mean().item() for name, tensor in before.items()]
    return {"sign": max(signs, default=0.0), "magnitude": difference(scaled(2)),
            "phase": difference(after(lambda model, copied: copied.step()))}


def direct_angles(parts: Parts) -> list[float]:
    """Angles in degrees between the direct synapses and W, one for each hidden activation that has such synapses."""
    from fa_bench.mechanisms.weighted_layers import weighted_layers
    from fa_bench.metrics.angles import weight_angle

    rule, trace, layers = parts.rule, parts.meter.trace, weighted_layers(parts.rule.model)
    pairs, held = rule.weight_pairs(), rule.feedback
    found = []
    for layer, (place, _) in rule.error_points(trace).items():
        if (path := trace.consumer.get(layer)) is None:
            continue
        weight = layers[path].weight.detach()
        tensors = list(held[place].values()) if held.get(place) else [pairs[path][0]] if path in pairs else []
        angles = [weight_angle(tensor, weight) for tensor in tensors if tensor.shape == weight.shape]
        found += [min(angles)] if angles else []
    return found
