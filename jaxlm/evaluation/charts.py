"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxlm.evaluation.loss import LossByPosition

# Above this, in nats over the best curve, a model has fallen apart: how far is of no interest.
ROOM = 2.5
# Characters of the legend that fit side by side; a line and its gap take about eight.
WIDTH = 130


def draw_loss_by_position(
    curves: Mapping[str, LossByPosition], context_length: int, path: str | Path
) -> None:
    """One curve an encoding: loss over position, with a line where training contexts end.

    Args:
        curves: by label.
        context_length: of training.
        path: of the PNG; an SVG of the same name is written beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, curve in curves.items():
        ends = [*curve.start[1:], curve.length]
        middles = [(a + b) / 2 for a, b in zip(curve.start, ends, strict=True)]
        axes.plot(middles, curve.loss, marker="o", markersize=3, label=label)
    axes.axvline(context_length, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained to {context_length}",
        (context_length, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
    )
    lowest = min(min(c.loss) for c in curves.values())
    highest = max(max(c.loss) for c in curves.values())
    axes.set_ylim(lowest - 0.1, min(highest, lowest + ROOM) + 0.1)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("Loss by position, beyond the training length")
    axes.grid(alpha=0.3)
    widest = max(map(len, curves))
    figure.legend(loc="outside lower center", ncols=max(1, min(4, WIDTH // (widest + 8))))
    for suffix in (".png", ".svg"):
        figure.savefig(Path(path).with_suffix(suffix), dpi=120)
