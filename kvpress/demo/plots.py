"""The demo's two pictures, drawn with matplotlib's objects only (no pyplot, no global state)."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox, BboxBase, ScaledTranslation, Transform, TransformedBbox

from kvpress.demo.results import Record, Summary

# Okabe and Ito's colours, without the yellow that is too pale for a line: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"
PANELS_PER_ROW = 4


def draw_heat_map(path: Path, records: Sequence[Record], title: str) -> None:
    """One panel per variant: accuracy by depth (rows) and length (columns); a cell that was not run stays grey."""
    variants = list(dict.fromkeys(record.variant for record in records))
    lengths = sorted({record.length for record in records})
    depths = sorted({record.depth for record in records})
    columns = min(PANELS_PER_ROW, len(variants))
    rows = math.ceil(len(variants) / columns)
    wide = max(1.9, 0.55 * len(lengths) + 0.7)
    figure = Figure(figsize=(columns * wide + 1.6, rows * (0.34 * len(depths) + 0.95) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = colormaps["cividis"].with_extremes(bad="0.85")
    for panel, variant in zip(panels.flat, variants, strict=False):
        cells = [
            [[r.found for r in records if (r.variant, r.length, r.depth) == (variant, n, d)] for n in lengths]
            for d in depths
        ]
        shares = [[sum(found) / len(found) if found else math.nan for found in row] for row in cells]
        image = panel.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(cells):
            for x, found in enumerate(row):
                dark = bool(found) and sum(found) / len(found) < 0.5
                text = f"{sum(found)}/{len(found)}" if found else "–"
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        panel.set_title(variant, fontsize=10)
        panel.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.tick_params(length=0)
        for x in range(1, len(lengths)):
            panel.axvline(x - 0.5, color="white", linewidth=1.5)
        for y in range(1, len(depths)):
            panel.axhline(y - 0.5, color="white", linewidth=1.5)
    for panel in panels.flat[len(variants) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(variants) - columns) : len(variants)]:
        panel.tick_params(labelbottom=True)
    figure.supxlabel("prompt length (tokens)", fontsize=10)
    figure.supylabel("depth of the needle in the text", fontsize=10)
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=panels, ticks=[0, 0.5, 1], shrink=min(0.8, 1.6 / rows), aspect=30)
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.set_label("needles found")
    figure.savefig(path, dpi=150)


def draw_memory_accuracy(path: Path, summaries: Sequence[Summary], title: str) -> None:
    """Accuracy with its 95 % interval over the measured share of full attention's cache, a point per variant.

    Points that fall together are drawn side by side and have one label, which names them from left to right.
    """
    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, 1.1 * max(1.0, *(summary.share_of_full for summary in summaries)))
    axes.set_ylim(-0.05, 1.09)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("cache held, measured bytes as a share of unpatched transformers (equal ones drawn side by side)")
    axes.set_ylabel("needles found, with 95 % Wilson interval")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)

    policies = list(dict.fromkeys(summary.policy for summary in summaries))
    labels = []
    for together in _groups(summaries):
        intervals = []
        for summary in together:
            beside = [other for other in summaries if _is_beside(other, summary)]
            shift = (beside.index(summary) - (len(beside) - 1) / 2) * min(9.0, 36 / len(beside))
            place = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            accuracy, style = _accuracy(summary), policies.index(summary.policy)
            axes.errorbar(
                summary.share_of_full,
                accuracy,
                [[accuracy - summary.low], [summary.high - accuracy]],
                fmt=MARKERS[style % len(MARKERS)],
                color=COLOURS[style % len(COLOURS)],
                capsize=3,
                elinewidth=1.2,
                transform=place,
            )
            ends = [(summary.share_of_full, summary.low), (summary.share_of_full, summary.high)]
            intervals.append((place, Bbox(ends)))
        place = intervals[0][0]
        text = axes.annotate(
            "\n".join(summary.variant for summary in together),
            (together[0].share_of_full, _accuracy(together[0])),
            (0, 0),
            place,
            "offset points",
            {"arrowstyle": "-", "color": "0.4", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3},
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
        text.set_in_layout(False)  # or moving it would move the axes
        labels.append((text, place, [TransformedBbox(ends, at) for at, ends in intervals]))
    figure.draw_without_rendering()  # from here on it is known where things are
    _spread_labels(axes, labels)
    figure.savefig(path, dpi=150)


def _accuracy(summary: Summary) -> float:
    return summary.found / summary.prompts


def _is_beside(one: Summary, other: Summary) -> bool:
    """Whether two points would hide each other's intervals."""
    return abs(one.share_of_full - other.share_of_full) < 0.012


def _groups(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """Those whose points fall together, in the order of the first of each."""
    groups: list[list[Summary]] = []
    for summary in summaries:
        for group in groups:
            if _is_beside(group[0], summary) and _accuracy(group[0]) == _accuracy(summary):
                group.append(summary)
                break
        else:
            groups.append([summary])
    return groups


def _spread_labels(axes: Axes, labels: Sequence[tuple[Annotation, Transform, Sequence[BboxBase]]]) -> None:
    """Move every label to a free place near its point, rather with no interval between the two.

    Args:
        labels: each with the transform that its first point is drawn with, and the boxes of its points' intervals.
    """
    offsets = [(dx, dy) for dx in range(-240, 241, 8) for dy in range(-240, 241, 8) if abs(dx) > 8]
    offsets.sort(key=lambda offset: math.hypot(*offset))
    intervals = [Bbox.union(boxes).padded(6) for _, _, boxes in labels]
    taken = list(intervals)
    for (text, place, _), own in zip(labels, intervals, strict=True):
        point = Bbox([place.transform(text.xy)] * 2)
        best, least = (0, 0), math.inf
        right, left = _move(text, 16, 0), _move(text, -16, 0)  # measured once: a text's size takes long to find
        scale = axes.figure.dpi / 72
        for offset in offsets:
            if math.hypot(*offset) >= least:
                break
            dx, dy = offset
            box = (
                right.translated((dx - 16) * scale, dy * scale)
                if dx > 0
                else left.translated((dx + 16) * scale, dy * scale)
            )
            inside = all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            if inside and not any(box.overlaps(other) for other in taken):
                between = Bbox.union([box, point])
                crossed = sum(between.overlaps(other) for other in intervals if other is not own)
                if (cost := math.hypot(*offset) + 16 * crossed) < least:
                    best, least = offset, cost
        taken.append(_move(text, *best))


def _move(text: Annotation, dx: float, dy: float) -> Bbox:
    """Put the label dx, dy points from its point; the box of its words."""
    text.set_position((dx, dy))
    text.set_horizontalalignment("left" if dx > 0 else "right")
    return Text.get_window_extent(text)  # an annotation's own would hold the line to the point too
