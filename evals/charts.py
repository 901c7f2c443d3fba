"""The report's pictures as SVG text. Colours come from the page's style, so that they follow its theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    "diamond": [(0, -5.6), (5.6, 0), (0, 5.6), (-5.6, 0)],
    "triangle": [(0, -5.4), (5.2, 4), (-5.2, 4)],
    "upside-down": [(0, 5.4), (5.2, -4), (-5.2, -4)],
}
SHAPES = ("circle", *CORNERS)
CHAR = 8.3  # width of a label's letter where it is largest, on a phone


@dataclass(frozen=True)
class Mark:
    """One policy in a scatter plot.

    Attributes:
        x, y, low, high: cost, score, and the score's interval.
        label: shown beside it if it is on the front.
        tip: what a pointer shows.
        policy: marks of the same one are joined.
        kind: index of its shape and colour.
        front: no other is cheaper and as good, or better and as cheap.
        hollow: it lacks samples that others have.
        runs: ids of its runs.
    """

    x: float
    y: float
    low: float
    high: float
    label: str
    tip: str
    policy: str
    kind: int
    front: bool
    hollow: bool
    runs: Sequence[str]


def scatter(marks: Sequence[Mark], x_title: str, y_title: str, percent: bool) -> str:
    """Score over cost: front joined and labelled, everything else with its name under the pointer."""
    x_ticks = ticks(max(mark.x for mark in marks) * 1.06)
    y_ticks = ticks(max(mark.high for mark in marks))
    x_max, y_max = max(mark.x for mark in marks) * 1.06 or 1.0, max(mark.high for mark in marks) * 1.03 or 1.0

    def across(x: float) -> float:
        return LEFT + x / x_max * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        name = f"{y:.0%}" if percent else f"{y:g}"
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{down(y) + 4:.1f}" text-anchor="end">{name}</text>')
    for x in x_ticks:
        parts.append(
            f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:g}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_title)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    by_policy: dict[str, list[Mark]] = {}
    for mark in sorted(marks, key=lambda mark: mark.x):
        by_policy.setdefault(mark.policy, []).append(mark)
    for policy, own in by_policy.items():
        line = " ".join(f"{across(mark.x):.1f},{down(mark.y):.1f}" for mark in own)
        parts.append(f'<polyline class="same k{own[0].kind}" data-policy="{escape(policy)}" points="{line}"/>')
    front = sorted((mark for mark in marks if mark.front), key=lambda mark: mark.x)
    if front:  # as a step: what lies right of and below it is beaten
        steps = f"M{across(front[0].x):.1f} {down(front[0].y):.1f}"
        steps += "".join(f"H{across(mark.x):.1f}V{down(mark.y):.1f}" for mark in front[1:]) + f"H{WIDTH - RIGHT}"
        parts.append(f'<path class="front" d="{steps}"/>')
    places = [(across(mark.x), down(mark.y)) for mark in marks]
    for mark, (x, y) in zip(marks, places, strict=True):
        classes = f"mark k{mark.kind}{' on-front' if mark.front else ''}{' hollow' if mark.hollow else ''}"
        parts.append(
            f'<a class="{classes}" href="#runs" data-runs="{" ".join(mark.runs)}" data-policy="{escape(mark.policy)}">'
            f"<title>{escape(mark.tip)}</title>"
            f'<line class="interval" x1="{x:.1f}" x2="{x:.1f}" y1="{down(mark.low):.1f}" y2="{down(mark.high):.1f}"/>'
            f"{shape(SHAPES[mark.kind], x, y)}</a>"
        )
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for mark in front:
        x, y, anchor = _free_place(across(mark.x), down(mark.y), CHAR * len(mark.label), taken)
        parts.append(
            f'<text class="name" data-policy="{escape(mark.policy)}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(mark.label)}</text>"
        )
    title = f"{y_title} over {x_title}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def heat_map(
    cells: Mapping[tuple[int, int], tuple[float, int, Sequence[str]]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> str:
    """Mean score by depth (rows) and length (columns); a cell without samples stays empty.

    Args:
        cells: (row, column) -> mean, samples, ids of the runs.
    """
    wide, high, left, top = 46, 24, 40, 4
    width, height = left + wide * len(columns) + 4, top + high * len(rows) + 18
    parts = []
    for i, name in enumerate(rows):
        y = top + high * i + high / 2 + 4
        parts.append(f'<text class="tick" x="{left - 5}" y="{y}" text-anchor="end">{escape(name)}</text>')
    for j, name in enumerate(columns):
        x = left + wide * (j + 0.5)
        parts.append(f'<text class="tick" x="{x}" y="{height - 4}" text-anchor="middle">{escape(name)}</text>')
    for (i, j), (mean, samples, runs) in sorted(cells.items()):
        x, y = left + wide * j, top + high * i
        tip = f"{title}, depth {rows[i]}, length {columns[j]}: {mean:.1%} over {samples}"
        parts.append(
            f'<a href="#runs" data-runs="{" ".join(runs)}"><title>{escape(tip)}</title>'
            f'<rect class="empty" x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{high - 2}"/>'
            f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{high - 2}" fill-opacity="{mean:.3f}"/>'
            f'<text class="{"value strong" if mean > 0.55 else "value"}" x="{x + wide / 2}" y="{y + high / 2 + 4}" '
            f'text-anchor="middle">{mean * 100:.0f}</text></a>'
        )
    style = f"max-width:{1.25 * width:.0f}px"
    return f'<svg viewBox="0 0 {width} {height}" style="{style}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def shape(name: str, x: float, y: float) -> str:
    """A mark of about ten units, centred."""
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in CORNERS[name])}"/>'


def ticks(top: float) -> list[float]:
    """Four to eight round numbers from 0 to `top` or just below it."""
    if top <= 0:
        return [0.0, 1.0]
    step = 10.0 ** (len(f"{top:.0f}") + 1) if top >= 1 else 1.0
    while top / step < 4:
        for divisor in (2, 2.5, 2):
            step /= divisor
            if top / step >= 4:
                break
    return [round(i * step, 10) for i in range(int(top / step) + 1)]


def _free_place(
    x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str]:
    """Where a label of this width near a mark covers the least; it is taken from then on."""
    best = None
    for dy in (-9, 17, 4, -21, 29, -33):
        for dx, anchor in ((8, "start"), (-8, "end"), (0, "middle")):
            if dx == 0 and dy == 4:
                continue  # on the mark itself
            left = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + dy - 13, left + width, y + dy + 4)
            outside = max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, -box[1])
            covered = sum(_overlap(box, other) for other in taken)
            cost = 50 * outside + covered + abs(dy) + abs(dx)
            if best is None or cost < best[0]:
                best = cost, x + dx, y + dy, anchor, box
    assert best is not None
    taken.append(best[4])
    return best[1], best[2], best[3]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
