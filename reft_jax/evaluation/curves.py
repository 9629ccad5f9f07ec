"""Draws the training curves of a run as one picture of small panels, one quantity each.

Every y axis starts at 0, or lower if a value is negative, and both panels of dev accuracy have the same scale, so that
a small change looks small.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reft_jax.evaluation.intervals import Z95
from reft_jax.store import write_whole
from reft_jax.types import InputError

if TYPE_CHECKING:  # matplotlib takes a second, and a run draws at its end
    from matplotlib.axes import Axes

INK, GRID = "#3b3b3b", "#e4e4e4"
SFT_COLOR, REFT_COLOR = "#2f6db3", "#c4561c"
ROUND = [1, 2, 5, 10]  # steps between ticks
MANY = 40  # more points than this are drawn faint, under their moving average
FEW = 10  # so many points of a noisy quantity are drawn faint too, with an interval


class Panel(NamedTuple):
    """One panel. `scale` turns the logged number into the shown one (fractions into percent); `best` marks the maximum.

    key: the name of the number in metrics.jsonl. noisy: a mean over few samples, so its interval is drawn.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    best: bool = False
    noisy: bool = False


SFT_PANELS = (
    Panel("loss", "SFT: training loss", "nats per target token"),
    Panel("dev_top1", "SFT: dev accuracy", "% of questions, greedy", 100, best=True),
)
REFT_PANELS = (
    Panel("reward", "ReFT: mean reward", "reward per sample", noisy=True),
    Panel("no_answer", "ReFT: samples without an answer", "% of samples", 100),
    Panel("kl", "ReFT: divergence from the reference", "nats per row"),
    Panel("response_length", "ReFT: response length", "tokens"),
    Panel("dev_top1", "ReFT: dev accuracy", "% of questions, greedy", 100, best=True),
)


def plot_curves(workdir: Path, sft_metrics: Sequence[dict], reft_metrics: Sequence[dict], path: Path) -> None:
    """Draws the metrics of both stages into a PNG file at `path`; the name of `workdir` becomes the title.

    sft_metrics, reft_metrics: the lines of their metrics.jsonl. SFT lines need `epoch` (may be fractional), ReFT lines
    `step`. A quantity that no line has gets no panel; a line without it, or with null, gets no point. ReFT's panel
    shows the best dev accuracy of SFT as a line. Raises InputError if there is nothing to draw, SaveError if the file
    cannot be written.
    """
    from matplotlib.figure import Figure

    panels = [(panel, *series(sft_metrics, "epoch", panel), "epoch", SFT_COLOR) for panel in SFT_PANELS]
    panels += [(panel, *series(reft_metrics, "step", panel), "iteration", REFT_COLOR) for panel in REFT_PANELS]
    panels = [entry for entry in panels if entry[1].size]
    highest: dict[str, float] = {}
    for panel, _, y, *_ in panels:
        highest[panel.key] = max(y.max(), highest.get(panel.key, 0.0))
    if not panels:
        raise InputError(f"{workdir}: no metrics to draw yet; run sft or reft there first")
    columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * rows + 0.4), layout="constrained", dpi=120)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(workdir.name, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    for place, entry in enumerate(panels, start=1):
        panel, _, y, _, color = entry
        axes = figure.add_subplot(rows, columns, place)
        _draw(axes, *entry)
        axes.set_ylim(1.12 * min(0.0, y.min()), 1.12 * highest[panel.key] or 1.0)
        best_sft = series(sft_metrics, "epoch", SFT_PANELS[1])[1].max(initial=-1.0)
        if color == REFT_COLOR and panel.best and best_sft >= 0:
            axes.axhline(best_sft, color=SFT_COLOR, linewidth=1.2, linestyle="--", label=f"best SFT {best_sft:.1f} %")
            axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    write_whole(path, picture.getvalue())


def series(metrics: Sequence[dict], x_key: str, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """The points (x, y) of one panel, float64[n] each, with x ascending. Lines with the same x are averaged."""
    points = [(line.get(x_key), line.get(panel.key)) for line in metrics]
    points = [point for point in points if None not in point]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    distinct, group = np.unique(x, return_inverse=True)
    return distinct, panel.scale * np.bincount(group, weights=y) / np.bincount(group)


def moving_average(y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages over `window` (odd) points around each point, near the ends over those that exist, and half of the 95 %
    interval of each: 1.96 standard errors of the points in the window. float64[n] each.

    The interval takes the points for independent, and for a window of few points it is a little too narrow.
    """
    half = window // 2

    def sums(y: np.ndarray) -> np.ndarray:
        return np.convolve(y, np.ones(window))[half : half + y.size]

    count = sums(np.ones_like(y))
    mean = sums(y) / count
    variance = np.maximum(sums(y**2) / count - mean**2, 0.0)
    return mean, Z95 * np.sqrt(variance / np.maximum(count - 1, 1))


def _draw(axes: Axes, panel: Panel, x: np.ndarray, y: np.ndarray, x_label: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(panel.unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlim(0, 1.03 * x.max() or 1.0)
    if x.size > MANY or (panel.noisy and x.size >= FEW):
        window = max(5 if panel.noisy else 1, 2 * (x.size // 30) + 1)
        mean, half = moving_average(y, window)
        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
        label = f"mean of {window} points"
        if panel.noisy:
            axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
            label += ", 95 % interval"
        axes.plot(x, mean, color=color, linewidth=1.8, label=label)
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")
    else:
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=3.5, clip_on=False)
    if panel.best:
        at = int(np.argmax(y))
        axes.plot(x[at], y[at], marker="o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
        axes.set_title(f"best {y[at]:.1f} % ({x_label} {x[at]:g})", loc="right", fontsize=8.5, color=INK)
