"""The report as one HTML page that needs nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from kvpress.evals.charts import Chart, Mark, heat_map, library, scatter
from kvpress.evals.results import (
    Columns,
    Figures,
    PolicyResult,
    Result,
    Setting,
    breakdowns,
    differences,
    gap,
    label,
    length_of,
    measures,
    turn_columns,
)
from kvpress.evals.statistics import RULE, Difference, Estimate, pareto
from kvpress.evals.templates import chart, fill, read_data

NONE = "–"
MEASURES = ("cache, MiB", "of full, %", "kept, %", "read, %", "prompt, ms", "token, ms")
TRIANGLES = "▼ ▲: worse or better than full attention on the same samples, beyond chance."
SHARED = "† One prompt pass served several policies: the time is that pass and making this policy's cache from it."


@dataclass(frozen=True)
class Cell:
    """What a cell shows.

    Attributes:
        shown: its text.
        value: what it is sorted by; texts are left-aligned.
        small: what stands beside it, as its interval.
        runs: what it leads to: ids of runs in the table of runs.
        href: what it leads to: a place beside the page.
        tone: "gain", "loss", or nothing.
        mark: a word after it.
        tip: what a pointer shows.
    """

    shown: str
    value: float | str | None = None
    small: str = ""
    runs: Sequence[str] = ()
    href: str = ""
    tone: str = ""
    mark: str = ""
    tip: str = ""

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str)


@dataclass(frozen=True)
class Row:
    """A row of a table, whose first cell names it; the run and the policy that it is about."""

    cells: Sequence[Cell]
    policy: str = ""
    run: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts by each column, and what is said below it."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's name, and whether it holds texts."""
        return [(name, all(row.cells[i].is_text for row in self.rows)) for i, name in enumerate(self.columns)]


@dataclass(frozen=True)
class Pictures:
    """Pictures by their titles under one heading."""

    title: str
    caption: str
    charts: Mapping[str, Chart]


def render(template: str, title: str, **values: Any) -> str:
    """A page of one of the templates in `data/`."""
    inlined = {
        "style": Markup(read_data("report.css")),
        "script": Markup(read_data("report.js")),
        "library": Markup(library()),
    }
    return fill(template, title=title, rule=RULE, config=chart("config.yaml"), **inlined, **values)


def page(
    title: str, found: Sequence[Setting], results: Sequence[Result], notes: Sequence[str], links: dict[str, str]
) -> str:
    """The whole page.

    Args:
        found: the settings, each a section.
        results: all runs, for their table.
        notes: what a reader should know first.
        links: run's id -> where it is, relative to the page.
    """
    return render(
        "report.html",
        title,
        notes=notes,
        settings=[section(setting) for setting in found],
        runs=runs_table(results, links),
    )


def section(setting: Setting) -> dict[str, Any]:
    """One setting: pictures, policies, tasks, lengths, heat maps."""
    warnings = []
    if setting.reference is None:
        warnings.append("Full attention did not run here, so that there is nothing to compare with.")
    if not all(entry.complete for entry in setting.policies):
        warnings.append(
            "Policies marked * lack samples that others have: compare their difference to full attention, "
            "not their score. They are hollow in the charts and never on the front."
        )
    tables = [policies_table(setting)]
    tables += [pivot(setting, f"Score by {by}", columns, by) for by, columns in breakdowns(setting).items()]
    if setting.turns:
        columns = turn_columns(setting)
        tables += [pivot(setting, "Score by turn", columns), kept_table(setting, columns)]
    return {
        "title": setting.title,
        "machine": setting.machine,
        "warnings": warnings,
        "policies": {policy_of(entry): entry.kind for entry in setting.policies},
        "pictures": pictures(setting),
        "tables": tables,
        "maps": [maps for task in setting.tasks if (maps := heat_maps(setting, task))],
    }


def pictures(setting: Setting) -> list[Pictures]:
    """Score against bytes, against milliseconds, and where policies read less of a prompt against how much they read."""
    y_title = "score" if setting.percent else "mean probability of a token"
    found = []
    for name, scale, x_title, cost in (
        ("bytes", 2**-20, "cache after the answer, MiB", partial(Figures.mean, name="bytes")),
        ("token_ms", 1.0, "ms per token", partial(Figures.median, name="token_ms")),
        *[("density", 100.0, "density of the prompt's attention, %", partial(Figures.mean, name="density"))]
        * setting.plans,
    ):
        costs = [(entry, cost(entry.figures)) for entry in setting.policies]
        known = [(entry, value * scale) for entry, value in costs if value is not None]
        whole = [(entry, value) for entry, value in known if entry.complete]
        front = {whole[i][0].policy for i in pareto([(value, _estimate(entry).mean) for entry, value in whole])}
        marks = [
            mark(policy_of(entry), entry.label, entry.kind, value, _estimate(entry), entry.policy in front, entry.complete,
                 entry.figures.runs)
            for entry, value in known
        ]  # fmt: skip
        caption = "Dashed: no policy is better at this cost or less."
        if name == "token_ms" and len({row["prompt_tokens"] for e, _ in known for _, row in e.figures.samples}) > 1:
            caption += " Median over prompts of several lengths."
        if marks:
            charts = scatter(marks, x_title, y_title, setting.percent)
            found.append(Pictures(f"{y_title.capitalize()} over {x_title}", caption, charts))
    return found


def mark(
    policy: str, name: str, kind: str, cost: float, found: Estimate, front: bool, whole: bool, runs: Sequence[str]
) -> Mark:
    """A policy in a picture, with its score and its cost in words."""
    score = f"{found.mean:.1%} ({found.low:.1%} to {found.high:.1%}), n={found.n}"
    return Mark(policy, name, kind, cost, found.mean, found.low, found.high, score, f"{cost:.4g}", front, whole, runs)


def _estimate(entry: PolicyResult) -> Estimate:
    found = entry.figures.estimate
    assert found is not None
    return found


def policy_of(entry: PolicyResult) -> str:
    """What policies that differ in their budget share."""
    return " + ".join(entry.names)


def _row(entry: PolicyResult, cells: Sequence[Cell], star: str = "") -> Row:
    return Row([Cell(entry.label + star, entry.label), *cells], policy_of(entry))


def policies_table(setting: Setting) -> Table:
    """One row per policy and parameters."""
    compared, more = any(entry.figures.kl for entry in setting.policies), measures(setting)
    heading = "score, %" if setting.percent else "probability"
    columns = ("policy", "kind", "n", heading, "to full", *["KL per token"] * compared, *more, *MEASURES)
    rows = []
    for entry in setting.policies:
        figures = entry.figures
        failed = f" +{figures.failed} failed" if figures.failed else ""
        cells = [
            Cell(entry.kind, entry.kind),
            number(len(figures.samples), f"{{:.0f}}{failed}", figures.runs),
            estimate_cell(figures.estimate, figures.runs, setting.percent),
            difference_cell(None if entry.is_reference else figures.difference(setting.reference), figures.runs),
            *[divergence_cell(figures.kl, figures.runs)] * compared,
            *(number(measure(figures), form, figures.runs) for measure, form in more.values()),
            *measure_cells(figures, figures.runs),
        ]
        rows.append(_row(entry, cells, "" if entry.complete else " *"))
    return Table("Policies", columns, rows)


def measure_cells(figures: Figures, runs: Sequence[str]) -> list[Cell]:
    """Bytes, shares and times."""
    shared = "†" if figures.prompts_shared else ""
    return [
        number(figures.mean("bytes"), "{:.2f}", runs, 2**-20),
        number(figures.share("bytes", "full_bytes"), "{:.1f}", runs, 100),
        number(figures.share("kept", "seen"), "{:.1f}", runs, 100),
        number(figures.mean("read_share"), "{:.1f}", runs, 100),
        number(figures.median("prompt_ms"), "{:.0f}" + shared, runs),
        number(figures.median("token_ms"), "{:.1f}", runs),
    ]


def pivot(setting: Setting, name: str, columns: Columns, by: str = "") -> Table:
    """Scores by policy (rows) and something else (columns); with the difference of two groups whose samples are paired."""
    gaps = [gap(columns, by, entry.figures) for entry in setting.policies]
    heads = ["policy", *columns, *[" − ".join(columns)] * any(gaps)]
    references = [part(setting.reference) if setting.reference else None for part in columns.values()]
    rows = []
    for entry, between in zip(setting.policies, gaps, strict=True):
        cells = []
        for part, reference in zip(columns.values(), references, strict=True):
            figures = part(entry.figures)
            found = figures.estimate
            if found is None:
                cells.append(Cell(NONE))
                continue
            apart = None if entry.is_reference else figures.difference(reference)
            tone = "" if apart is None or not apart.significant else "gain" if apart.mean > 0 else "loss"
            tip = f"{score(found.low, setting.percent)} to {score(found.high, setting.percent)}, n={found.n}"
            if tone and apart is not None:
                tip += f"; {points(apart.mean)} to full attention"
            shown = score(found.mean, setting.percent) + {"gain": " ▲", "loss": " ▼", "": ""}[tone]
            cells.append(Cell(shown, found.mean, runs=figures.runs, tone=tone, tip=tip))
        rows.append(_row(entry, [*cells, *[difference_cell(between, entry.figures.runs)] * any(gaps)]))
    return Table(name, heads, rows, TRIANGLES)


def kept_table(setting: Setting, columns: Columns) -> Table:
    """Share of the seen tokens that the cache holds, by policy (rows) and turn (columns)."""
    rows = []
    for entry in setting.policies:
        parts = [part(entry.figures) for part in columns.values()]
        rows.append(_row(entry, [number(one.share("kept", "seen"), "{:.1f}", one.runs, 100) for one in parts]))
    return Table("Entries kept after each turn, in %", ("policy", *columns), rows)


def heat_maps(setting: Setting, task: str) -> dict[str, Any] | None:
    """One map per policy of a task whose samples have a depth; None for another."""
    found: list[tuple[PolicyResult, dict[tuple[float, tuple[float, str]], list[tuple[float, str]]]]] = []
    for entry in setting.policies:
        cells: dict[tuple[float, tuple[float, str]], list[tuple[float, str]]] = {}
        for result, row in entry.figures.samples:
            if result.config["task"] == task and isinstance(row["meta"].get("depth"), int | float):
                where = (float(row["meta"]["depth"]), length_of(row))
                cells.setdefault(where, []).append((row["score"], result.id))
        if cells:
            found.append((entry, cells))
    if not found:
        return None
    rows = sorted({depth for _, cells in found for depth, _ in cells})
    columns = sorted({length for _, cells in found for _, length in cells})
    names = [f"{depth:.0%}" for depth in rows], [name for _, name in columns]
    charts = []
    for entry, cells in found:
        values = {
            (f"{depth:.0%}", length): (
                sum(score for score, _ in scores) / len(scores),
                len(scores),
                list(dict.fromkeys(run for _, run in scores)),
            )
            for (depth, (_, length)), scores in cells.items()
        }
        charts.append((entry.label, policy_of(entry), heat_map(values, *names, entry.label, policy_of(entry))))
    title = f"{task}: score in percent by depth (down) and length (across)"
    return {"title": title, "width": max(150, 46 * len(columns) + 56), "charts": charts}


def runs_table(results: Sequence[Result], links: dict[str, str]) -> Table:
    """One row per run, with where it is."""
    columns = ("policy", "run", "task", "length", "question", "seed", "n", "failed", "score", "to full", *MEASURES, "model",
               "commit")  # fmt: skip
    rows = []
    for result, apart in zip(results, differences(results), strict=True):
        config, figures = result.config, result.figures
        commit = result.sessions[-1]["commit"] or result.sessions[-1]["kvpress"]
        cells = [
            Cell(label(config["policy"]), config["policy"]),
            Cell(result.id, result.id, href=links[result.id], mark="" if result.finished else "(unfinished)"),
            text(config["task"]),
            number(config["length"], "{:.0f}"),
            text("seen" if result.query_aware else "unseen"),
            number(config["seed"], "{:.0f}"),
            number(len(figures.samples), "{:.0f}"),
            number(figures.failed, "{:.0f}"),
            estimate_cell(figures.estimate, (), config["metric"] != "perplexity"),
            difference_cell(apart, ()),
            *measure_cells(figures, ()),
            text(config["definition"]["model"]),
            text(commit),
        ]
        rows.append(Row(cells, run=result.id))
    return Table("Runs", columns, rows, SHARED)


def text(value: object) -> Cell:
    """A text."""
    return Cell(str(value), str(value))


def number(value: float | None, form: str, runs: Sequence[str] = (), scale: float = 1.0) -> Cell:
    """A number that leads to its runs."""
    return Cell(NONE) if value is None else Cell(form.format(value * scale), value, runs=runs)


def score(value: float, percent: bool) -> str:
    """In percent without the sign, or with three digits."""
    return f"{value * 100:.1f}" if percent else f"{value:.3g}"


def estimate_cell(found: Estimate | None, runs: Sequence[str], percent: bool) -> Cell:
    """Mean and interval."""
    return interval_cell(found, lambda value: score(value, percent), runs)


def divergence_cell(found: Estimate | None, runs: Sequence[str]) -> Cell:
    """KL divergence per token, and its interval."""
    return interval_cell(found, "{:.3g}".format, runs)


def interval_cell(found: Estimate | None, form: Callable[[float], str], runs: Sequence[str] = ()) -> Cell:
    """A mean, and its interval where it has one."""
    if found is None:
        return Cell(NONE)
    interval = "" if found.low == found.high else f"{form(found.low)} to {form(found.high)}"
    return Cell(form(found.mean), found.mean, interval, runs)


def difference_cell(found: Difference | None, runs: Sequence[str]) -> Cell:
    """Difference in points of a hundred with its mark, and its interval."""
    if found is None:
        return Cell(NONE)
    tone = "" if not found.significant else "gain" if found.mean > 0 else "loss"
    interval = f"{points(found.low)} to {points(found.high)}"
    return Cell(points(found.mean), found.mean, interval, runs, tone=tone, mark="" if found.significant else "n.s.")


def points(value: float) -> str:
    """A difference of scores in points of a hundred, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")
