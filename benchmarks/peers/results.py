"""What the rows say: medians and ratios, a table, the goals, a picture."""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contestants import BY_NAME, OBSERVED, PLAIN, Contestant

Row = dict[str, Any]
Setting = tuple[str, str, int, int]  # model, dtype, context, batch

FIELDS = (
    "run", "round", "model", "dtype", "context", "batch", "new_tokens", "share", "contestant", "transformers",
    "prompt_s", "ms_per_token", "peak_mib", "cache_mib", "kept", "needles_found", "needles_asked", "failed",
)  # fmt: skip
METRICS = {
    "prompt_s": "prompt, s",
    "ms_per_token": "token, ms",
    "peak_mib": "peak over the model, MiB",
    "cache_mib": "cache, MiB",
}
COLORS = {"transformers": "#8c8c8c", "nvidia": "#5b9a2f", "ours": "#2b6cb0"}
PER_PEER = (("ms_per_token", 0.8, "time per token"), ("prompt_s", 0.9, "prompt"), ("peak_mib", 0.8, "peak memory"))
SAME_KEPT = 0.01  # two that keep the same differ by less than this share (each rounds its own way)


def append(path: Path, row: Row) -> None:
    """Add one row to a CSV file, which is made with its heading if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers; an empty cell is None.

    Raises:
        ValueError: a contestant that is not known, or a cell that is no number; the message names the line.
    """
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, raw in enumerate(csv.DictReader(file), start=2):
            if raw["contestant"] not in BY_NAME:
                raise ValueError(f"{path}, line {line}: unknown contestant {raw['contestant']!r}")
            row: Row = dict(raw)
            try:
                for name in ("round", "context", "batch", "new_tokens"):
                    row[name] = int(raw[name])
                for name in ("share", "kept", "needles_found", "needles_asked", *METRICS):
                    row[name] = float(raw[name]) if raw[name] else None
            except ValueError as error:
                raise ValueError(f"{path}, line {line}, {name}: {error}") from error
            rows.append(row)
    return rows


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Those that the rows hold, in their order."""
    return list(dict.fromkeys((row["model"], row["dtype"], row["context"], row["batch"]) for row in rows))


def of_setting(rows: Iterable[Row], setting: Setting) -> list[Row]:
    """The rows of one setting."""
    return [row for row in rows if (row["model"], row["dtype"], row["context"], row["batch"]) == setting]


def values(rows: Iterable[Row], name: str, metric: str) -> dict[tuple[str, int], float]:
    """One contestant's figures of one setting, by run and round."""
    return {
        (row["run"], row["round"]): row[metric] for row in rows if row["contestant"] == name and row[metric] is not None
    }


def ratio(rows: list[Row], metric: str, name: str, other: str) -> float | None:
    """Median over the rounds that both ran of `name`'s figure over `other`'s in that round; None without such a round."""
    mine, theirs = values(rows, name, metric), values(rows, other, metric)
    shares = [mine[at] / theirs[at] for at in mine if theirs.get(at)]
    return statistics.median(shares) if shares else None


def contestants_of(rows: Iterable[Row]) -> list[Contestant]:
    """Those that ran, in the order of contestants.py."""
    names = {row["contestant"] for row in rows}
    return [contestant for name, contestant in BY_NAME.items() if name in names]


def failure(rows: Iterable[Row], name: str) -> str:
    """Why a contestant has no figures; empty if it has."""
    return next((row["failed"] for row in rows if row["contestant"] == name and row["failed"]), "")


def _spread(rows: list[Row], name: str, metric: str) -> str:
    found = sorted(values(rows, name, metric).values())
    if not found:
        return "-"
    digits = 2 if metric == "prompt_s" else 0
    middle = f"{statistics.median(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({found[0]:.{digits}f}-{found[-1]:.{digits}f})"


def _ratios(rows: list[Row], metric: str, contestant: Contestant) -> str:
    shown = []
    for other in (PLAIN, contestant.nearest):
        share = None if other is None else ratio(rows, metric, contestant.name, other)
        shown.append("-" if share is None else f"{share:.2f}")
    return " / ".join(shown)


def table(rows: list[Row]) -> str:
    """Markdown: each setting's contestants with median, extremes, and ratios to transformers / to the nearest press."""
    lines = []
    for setting in settings(rows):
        here = of_setting(rows, setting)
        model, dtype, context, batch = setting
        rounds = len({(row["run"], row["round"]) for row in here})
        shares = ", ".join(f"{share:g}" for share in sorted({row["share"] for row in here}))
        lines += [f"\n{model}, {context} tokens, batch {batch}, {dtype}, share kept {shares}, up to {rounds} rounds\n"]
        lines += ["| | " + " | ".join(f"{title} | ratio" for title in METRICS.values()) + " | kept | found |"]
        lines += ["|---" * (2 * len(METRICS) + 3) + "|"]
        for contestant in contestants_of(here):
            name = contestant.name
            kept = values(here, name, "kept")
            if not kept:
                lines += [f"| {name} | failed: {failure(here, name)} " + "| " * (2 * len(METRICS) + 1) + "|"]
                continue
            cells = []
            for metric in METRICS:
                cells += [_spread(here, name, metric), _ratios(here, metric, contestant)]
            cells += [f"{statistics.median(kept.values()):.0f}", "{:.0f}/{:.0f}".format(*needles(here, name))]
            lines += [f"| {name} | " + " | ".join(cells) + " |"]
    return "\n".join(lines) + "\n"


def needles(rows: list[Row], name: str) -> tuple[float, float]:
    """Found and asked, over all rounds."""
    found, asked = (sum(values(rows, name, column).values()) for column in ("needles_found", "needles_asked"))
    return found, asked


def same_kept(rows: list[Row], name: str, other: str) -> bool:
    """Whether both kept the same number of entries, but for rounding (one entry, or `SAME_KEPT`)."""
    share = ratio(rows, "kept", name, other)
    entries = min(values(rows, other, "kept").values(), default=1.0)
    return share is not None and abs(share - 1) <= max(SAME_KEPT, 1.01 / entries)


def goals(rows: list[Row]) -> list[str]:
    """One line per goal and setting: met, missed, or why it was not judged."""
    lines = []
    for setting in settings(rows):
        here = of_setting(rows, setting)
        model, dtype, context, batch = setting
        where = f"({model}, {context} tokens, batch {batch}, {dtype})"

        def judge(metric: str, limit: float, what: str, name: str, other: str, here=here, where=where) -> None:  # type: ignore[no-untyped-def]
            share = ratio(here, metric, name, other)
            verdict = "not measured" if share is None else "met" if share <= limit else "missed"
            figure = "" if share is None else f"{share:.2f}, "
            lines.append(f"{verdict:<12} {what} of {name} against {other}: {figure}goal {limit} {where}")

        ours = [contestant for contestant in contestants_of(here) if contestant.side == "ours"]
        for contestant in ours:
            if contestant.nearest is None or not values(here, contestant.nearest, "kept"):
                continue
            if not same_kept(here, contestant.name, contestant.nearest):
                lines.append(f"not judged   {contestant.name} and {contestant.nearest} kept other numbers {where}")
                continue
            for metric, limit, what in PER_PEER:
                judge(metric, limit, what, contestant.name, contestant.nearest)
        if context == 4096:
            judge("prompt_s", 0.2, "prompt", "ours h2o", OBSERVED)
            judge("peak_mib", 1.1, "peak memory", "ours h2o", PLAIN)
        if context == 8192 and batch in (1, 4):
            for contestant in ours:
                if contestant.compresses:
                    judge("ms_per_token", 0.35 if batch == 1 else 0.25, "time per token", contestant.name, PLAIN)
    for context, what in ((4096, "H2O against ObservedAttention"), (8192, "a token against transformers")):
        if not any(setting[2] == context for setting in settings(rows)):
            lines.append(f"not measured {what} at {context} tokens")
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Bars: a row of panels per setting, a panel per metric; the thin line is the spread, the label the needles found."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = settings(rows)
    heights = [0.28 * len(contestants_of(of_setting(rows, setting))) + 1 for setting in shown]
    figure, axes = pyplot.subplots(
        len(shown),
        len(METRICS),
        figsize=(16, sum(heights)),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for line, setting in zip(axes, shown, strict=True):
        here = of_setting(rows, setting)
        ran = [contestant for contestant in contestants_of(here) if values(here, contestant.name, "kept")]
        for panel, (metric, title) in zip(line, METRICS.items(), strict=True):
            for at, contestant in enumerate(ran):
                found = sorted(values(here, contestant.name, metric).values())
                middle = statistics.median(found)
                panel.barh(at, middle, color=COLORS[contestant.side], height=0.7)
                panel.plot([found[0], found[-1]], [at, at], color="black", linewidth=1)
                panel.text(found[-1], at, f" {middle:.4g}", va="center", fontsize=7)
            panel.set_yticks(range(len(ran)), labels=[""] * len(ran))
            panel.set_title(title, fontsize=9)
            panel.margins(x=0.2)
            panel.set_xlim(left=0)
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
        counts = [needles(here, contestant.name) for contestant in ran]
        labels = [
            f"{contestant.name}, {found:.0f}/{asked:.0f}"
            for contestant, (found, asked) in zip(ran, counts, strict=True)
        ]
        line[0].set_yticks(range(len(ran)), labels=labels, fontsize=8)
        line[0].set_ylabel(f"{setting[0]}, {setting[1]}\n{setting[2]} tokens, batch {setting[3]}", fontsize=9)
    figure.suptitle(
        "Each contestant with the needles it found; grey: transformers, green: NVIDIA, blue: ours", fontsize=10
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
