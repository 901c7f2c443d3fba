"""The report's pictures, as Vega-Lite specifications.

Colours are CSS variables, so that a picture follows the page's theme. Every picture has a parameter `lit`: the policy that stands
out, none if empty.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import vl_convert

from kvpress.evals.store import StoreError, write_whole
from kvpress.evals.templates import chart
from kvpress.models import cache_folder

Chart = dict[str, Any]
VERSION = "6.1"  # of Vega-Lite
COLOURS = 6  # of policies in one picture: --c0 to --c5 in report.css
LINE = 14.5  # pixels between names


@dataclass(frozen=True)
class Mark:
    """A policy at one budget in a scatter plot.

    Attributes:
        policy: marks of the same one are joined.
        label: policy and parameters.
        kind: of the policy.
        x, y, low, high: cost, score, and the score's interval.
        score, cost: both in words.
        front: no other is cheaper and as good, or better and as cheap.
        whole: it has all the samples that others have; else it is hollow.
        runs: ids of its runs.
    """

    policy: str
    label: str
    kind: str
    x: float
    y: float
    low: float
    high: float
    score: str
    cost: str
    front: bool
    whole: bool
    runs: Sequence[str]


def scatter(marks: Sequence[Mark], x_title: str, y_title: str, percent: bool) -> dict[str, Chart]:
    """Score over cost, a picture for every few policies of a kind: these in colour with their names, the others grey behind.

    Full attention is in all of them, and all have the same axes.

    Returns:
        title -> picture.
    """
    kinds: dict[str, dict[str, None]] = {}
    for mark in marks:
        kinds.setdefault(mark.kind, {})[mark.policy] = None
    exact = list(kinds.pop("exact", {}))
    policies = [policy for names in kinds.values() for policy in names]
    if len(policies) <= COLOURS:
        return {"": _panel(marks, [*exact, *policies], x_title, y_title, percent)}
    parts = {}
    for kind, names in kinds.items():
        pieces = -(-len(names) // COLOURS)
        for i in range(pieces):
            title = kind if pieces == 1 else f"{kind}, {i + 1} of {pieces}"
            parts[title] = _panel(marks, [*exact, *list(names)[i::pieces]], x_title, y_title, percent)
    return parts


def _panel(marks: Sequence[Mark], shown: Sequence[str], x_title: str, y_title: str, percent: bool) -> Chart:
    """One picture, with the policies of `shown` in colour and named on its right, beside their rightmost points."""
    own = {policy: [mark for mark in marks if mark.policy == policy] for policy in shown}
    exact = [policy for policy in shown if own[policy][0].kind == "exact"]
    colours = {policy: f"var(--c{i})" for i, policy in enumerate(policy for policy in shown if policy not in exact)}
    colours |= dict.fromkeys(exact, "var(--text)")
    right = max(mark.x for mark in marks) * 1.05 or 1.0
    low, high = min(mark.low for mark in marks), max(mark.high for mark in marks)
    edge = 0.04 * (high - low) or 0.5
    low, high, height = low - edge, high + edge, max(240.0, LINE * len(shown))
    last = {policy: max(points, key=lambda mark: (mark.x, mark.y)) for policy, points in own.items()}
    scale = height / (high - low)
    places = apart([(mark.y - low) * scale for mark in last.values()], LINE, height)
    labels = [
        {"policy": policy, "name": mark.label.removesuffix("()") if len(own[policy]) == 1 else policy, "x": mark.x, "y": mark.y,
         "place": low + place / scale, "color": colours[policy]}
        for (policy, mark), place in zip(last.items(), places, strict=True)
    ]  # fmt: skip
    front = sorted((mark.x, mark.y) for mark in marks if mark.front)
    front += [(right, y) for _, y in front[-1:]]
    panel = chart(
        "scatter.yaml",
        x_title=x_title,
        y_title=y_title,
        percent=percent,
        right=right,
        low=low,
        high=high,
        height=height,
    )
    rows = [vars(mark) | {"own": mark.policy in own, "color": colours.get(mark.policy, "")} for mark in marks]
    data = {"front": [{"x": x, "y": y} for x, y in front], "labels": labels}
    return panel | {"data": {"values": rows}, "datasets": data}


def heat_map(
    cells: Mapping[tuple[str, str], tuple[float, int, Sequence[str]]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    policy: str,
) -> Chart:
    """Mean score by depth (rows) and length (columns); a cell without samples stays empty.

    Args:
        cells: (row, column) -> mean, samples, ids of the runs.
        label, policy: as in `Mark`.
    """
    data = [
        {"depth": depth, "length": length, "mean": mean, "shown": f"{mean * 100:.0f}", "samples": samples, "label": label,
         "policy": policy, "runs": runs}
        for (depth, length), (mean, samples, runs) in cells.items()
    ]  # fmt: skip
    return chart("heat_map.yaml", rows=rows, columns=columns) | {"data": {"values": data}}


def head_grid(values: Mapping[int, Sequence[float]], figure: str) -> Chart:
    """A share of each head of each layer, layers down and heads across.

    Args:
        values: layer -> the share of each head.
        figure: what it is.
    """
    data = [
        {"layer": layer, "head": head, "value": rounded(value), "shown": f"{value * 100:.0f}"}
        for layer, heads in values.items()
        for head, value in enumerate(heads)
    ]
    return chart("head_grid.yaml", figure=figure, heads=max(map(len, values.values()))) | {"data": {"values": data}}


def head_map(
    maps: Sequence[Sequence[Sequence[float]]],
    y_title: str,
    rows: int,
    columns: int,
    cell: tuple[int, int],
    tall: int,
) -> Chart:
    """What rows read, and beside it where their attention is; a cell in which there is neither stays empty.

    Args:
        maps: of each row of cells each cell's share of pairs that are read; the same of attention, and of attention in them.
        y_title: what the rows are.
        rows, columns: how many there are.
        cell: rows and columns of a cell.
        tall: pixels.
    """
    data = [
        {"x": j * cell[1], "y1": i * cell[0], "kept": rounded(read), "mass": rounded(given), "held": rounded(part)}
        for i, line in enumerate(zip(*maps, strict=True))
        for j, (read, given, part) in enumerate(zip(*line, strict=True))
        if read or given
    ]
    whole = chart(
        "head_map.yaml", y_title=y_title, rows=rows, columns=columns, height=cell[0], width=cell[1], tall=tall
    )
    return whole | {"data": {"values": data}}


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def apart(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Places in [0, top] with at least `gap` between any two, in the order of what is wanted, and close to it.

    There has to be room: `gap * len(wanted) <= top`.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for below, i in zip([None, *order], order, strict=False):
        places[i] = max(places[i], gap / 2 if below is None else places[below] + gap)
    for above, i in zip([None, *order[::-1]], order[::-1], strict=False):
        places[i] = min(places[i], top - gap / 2 if above is None else places[above] - gap)
    return places


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as a script without imports; made once, as it takes some seconds, and kept in the cache."""
    path = cache_folder() / f"vega-lite-{VERSION}-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    script = vl_convert.javascript_bundle(None, vl_version=VERSION)  # type: ignore[arg-type]  # their stub knows no None
    with suppress(OSError, StoreError):  # it is made anew each time where nothing can be written
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, script)
    return script
