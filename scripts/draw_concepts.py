"""Draws the diagrams of docs/concepts.md, which show the path of the error in one network under three kinds of rules.

    python scripts/draw_concepts.py

The script writes docs/diagrams/*.svg. The diagrams have their own background, so that they are readable on light and dark pages.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "diagrams"
TEXT, FORWARD, EXACT, REPLACED, CUT = "#1f2328", "#6e7781", "#0550ae", "#bc4c00", "#cf222e"
#: Horizontal positions of the network's boxes, which are centred at height 0.
INPUT, LAYERS, ACTIVATIONS, OUTPUT, LOGITS, LOSS = 0.0, (1.15, 3.75), (2.45, 5.05), 6.35, 7.65, 8.85
BELOW = -0.75
#: With these settings, the IDs in the files are reproducible, and the text can be selected and searched.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fa_bench", "font.family": "sans-serif", "font.size": 11}


def box(axes: Axes, x: float, y: float, text: str, edge: str = FORWARD, width: float = 0.84, height: float = 0.56) -> None:
    """Draw a box with text, centred at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.1", fc="white", ec=edge, lw=1.3
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center_baseline", color=TEXT)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    label: str = "",
    bend: float = 0.0,
    lift: float = 0.0,
) -> None:
    """Draw an arrow, with its label `lift` above the midpoint."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    if label:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + lift
        axes.text(*middle, label, ha="center", va="center_baseline", color=colour)


def cut(axes: Axes, x: float, y: float) -> None:
    """Draw the mark that shows that no error is propagated along a path."""
    axes.plot([x - 0.09, x + 0.09], [y - 0.13, y + 0.13], color=CUT, lw=2)
    axes.plot([x + 0.03, x + 0.21], [y - 0.13, y + 0.13], color=CUT, lw=2)


def network(axes: Axes) -> None:
    """Draw the network and its forward pass, which are the same in every diagram."""
    places = [INPUT, LAYERS[0], ACTIVATIONS[0], LAYERS[1], ACTIVATIONS[1], OUTPUT, LOGITS, LOSS]
    for x, text in zip(places, ("x", "W₁", "a₁", "W₂", "a₂", "W₃", "z", "loss"), strict=True):
        box(axes, x, 0, text)
    for left, right in itertools.pairwise(places):
        arrow(axes, (left + 0.43, 0), (right - 0.43, 0), FORWARD)


def exact_error_at_logits(axes: Axes) -> None:
    arrow(axes, (LOSS, -0.3), (LOGITS + 0.1, BELOW), EXACT, bend=-0.35)
    axes.text(LOGITS - 0.05, BELOW - 0.02, "δ", ha="center", va="center_baseline", color=EXACT)


def to_weights(axes: Axes, start: float, layer: float) -> None:
    """Draw an arrow from the error at an activation or at the logits to the weights before it; this step is always exact."""
    arrow(axes, (start - 0.16, BELOW), (layer + 0.05, -0.31), EXACT, bend=-0.3)


def edge(axes: Axes) -> None:
    """Draw the errors of an edge rule: each layer propagates the error through its own feedback."""
    exact_error_at_logits(axes)
    to_weights(axes, LOGITS - 0.05, OUTPUT)
    for above, below, name in ((LOGITS - 0.2, ACTIVATIONS[1], "B₃"), (ACTIVATIONS[1] - 0.1, ACTIVATIONS[0], "B₂")):
        arrow(
            axes,
            (above - 0.05, BELOW - 0.12),
            (below + 0.25, BELOW - 0.12),
            REPLACED,
            f"{name} in place of {name.replace('B', 'W')}",
            lift=-0.3,
        )
    for activation, layer, name in ((ACTIVATIONS[1], LAYERS[1], "e₂"), (ACTIVATIONS[0], LAYERS[0], "e₁")):
        axes.text(activation + 0.04, BELOW - 0.1, name, ha="center", va="center_baseline", color=REPLACED)
        to_weights(axes, activation, layer)


def direct(axes: Axes) -> None:
    """Draw the errors of a cut rule: the error at the logits is projected to every activation."""
    exact_error_at_logits(axes)
    to_weights(axes, LOGITS - 0.05, OUTPUT)
    for place, (activation, layer, layer_above, name) in enumerate(
        ((ACTIVATIONS[1], LAYERS[1], OUTPUT, "δ B₂"), (ACTIVATIONS[0], LAYERS[0], LAYERS[1], "δ B₁"))
    ):
        depth = BELOW - 0.55 - 0.55 * place
        axes.plot([LOGITS - 0.05] * 2, [BELOW - 0.2, depth], color=REPLACED, lw=1.5, solid_capstyle="round")
        axes.plot([LOGITS - 0.05, activation], [depth] * 2, color=REPLACED, lw=1.5, solid_capstyle="round")
        arrow(axes, (activation, depth), (activation, -0.31), REPLACED)
        axes.text(activation + 0.5, depth + 0.18, name, ha="center", va="center_baseline", color=REPLACED)
        to_weights(axes, activation + 0.16, layer)
        cut(axes, (activation + layer_above) / 2 - 0.05, 0)


def local(axes: Axes) -> None:
    """Draw the errors of a local rule: every activation has its own classifier and loss."""
    arrow(axes, (LOSS, -0.3), (OUTPUT + 0.05, -0.31), EXACT, bend=-0.35)
    axes.text(LOGITS, BELOW - 0.1, "δ", ha="center", va="center_baseline", color=EXACT)
    for activation, layer, layer_above, name in (
        (ACTIVATIONS[1], LAYERS[1], OUTPUT, "loss 2"),
        (ACTIVATIONS[0], LAYERS[0], LAYERS[1], "loss 1"),
    ):
        box(axes, activation, BELOW - 0.85, name, edge=REPLACED, width=1.2)
        arrow(axes, (activation, BELOW - 0.57), (activation, -0.31), REPLACED)
        to_weights(axes, activation + 0.16, layer)
        cut(axes, (activation + layer_above) / 2 - 0.05, 0)


def figure(kind: str) -> Figure:
    """The diagram of one kind of rule, where `kind` is a key of `KINDS`."""
    draw, bottom, legend = KINDS[kind]
    top = 0.75
    drawing = Figure(figsize=(7.8, 0.78 * (top - bottom)), facecolor="#f6f8fa")
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.7, 9.55), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    network(axes)
    draw(axes)
    entries = [("forward pass", FORWARD), ("exact", EXACT), *legend]
    places = (-0.4, 2.0, 3.5, 6.9)
    for x, (text, colour) in zip(places, entries, strict=False):
        axes.plot([x, x + 0.35], [bottom + 0.3] * 2, color=colour, lw=2.5)
        axes.text(x + 0.47, bottom + 0.3, text, va="center_baseline", color=TEXT, fontsize=10)
    return drawing


#: Name of the file without its extension -> the function that draws the errors, the lower end of the drawing, and the entries of
#: the legend after "forward pass" and "exact".
KINDS = {
    "edge_rule": (edge, -2.0, [("replaced: the feedback B of a layer", REPLACED)]),
    "cut_rule": (direct, -2.75, [("replaced: direct feedback", REPLACED), ("no error passes", CUT)]),
    "local_rule": (local, -2.75, [("replaced: a local loss", REPLACED), ("no error passes", CUT)]),
}


def main() -> int:
    """Write the diagrams."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for kind in KINDS:
            figure(kind).savefig(FOLDER / f"{kind}.svg", metadata={"Date": None, "Creator": None})
    print(f"{len(KINDS)} diagrams in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
