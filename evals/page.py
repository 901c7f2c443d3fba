"""The report as one HTML page that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from kvpress.evals.charts import SHAPES, Mark, heat_map, scatter, shape
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

NONE = "–"
MEASURES = ("cache, MiB", "of full, %", "kept, %", "read, %", "prompt, ms", "token, ms")


@dataclass(frozen=True)
class Cell:
    """What a cell shows and what it is sorted by; a text column is left-aligned."""

    html: str
    value: float | str | None
    text: bool = False


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
    style, script = (
        (files("kvpress.evals") / "data" / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    warnings = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
    sections = "".join(section(setting) for setting in found)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n{warnings}{HOW_TO_READ}\n{sections}{runs_table(found, results, links)}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


HOW_TO_READ = f"""<p class="soft">Scores are means over samples (over tasks first), with 95 % bootstrap intervals. A difference
is to full attention on the same samples. {RULE}. Bytes and times are measured, never
nominal. Each number leads to its runs, each run to its rows. One difference in twenty without any cause would still
be taken for significant: look for what several tasks agree on.</p>"""


def section(setting: Setting) -> str:
    """One setting: charts, policies, tasks, lengths, heat maps."""
    parts = [f"<section>\n<h2>{escape(setting.title)}</h2>", f'<p class="soft">{escape(setting.machine)}</p>']
    if setting.reference is None:
        parts.append('<p class="warn">Full attention did not run here, so that there is nothing to compare with.</p>')
    if not all(entry.complete for entry in setting.policies):
        parts.append(
            '<p class="warn">Policies marked * lack samples that others have: compare their difference to full attention, '
            "not their score. They are hollow in the charts and never on the front.</p>"
        )
    parts += [chips(setting), charts(setting), "<h3>Policies</h3>", policies_table(setting)]
    parts += [f"<h3>Score by {by}</h3>{pivot(setting, columns, by)}" for by, columns in breakdowns(setting).items()]
    if setting.turns:
        columns = turn_columns(setting)
        parts += [f"<h3>Score by turn</h3>{pivot(setting, columns)}", "<h3>Entries kept after each turn, in %</h3>"]
        parts.append(kept_table(setting, columns))
    parts += [heat_maps(setting, task) for task in setting.tasks]
    return "\n".join([*parts, "</section>\n"])


def chips(setting: Setting) -> str:
    """A button for each policy, with the mark of its kind."""
    found: dict[str, str] = {}
    for entry in setting.policies:
        found.setdefault(policy_of(entry), entry.kind)
    buttons = "".join(
        f'<button type="button" class="k{kind_index(setting, kind)}" data-policy="{escape(policy)}" aria-pressed="false" '
        f'title="{escape(kind)}"><svg viewBox="-7 -7 14 14" aria-hidden="true">'
        f"{shape(SHAPES[kind_index(setting, kind)], 0, 0)}</svg><span>{escape(policy)}</span></button>"
        for policy, kind in found.items()
    )
    return f'<div class="chips">{buttons}</div>'


def charts(setting: Setting) -> str:
    """Score against bytes, and against milliseconds."""
    y_title = "score" if setting.percent else "mean probability of a token"
    figures = []
    for name, scale, x_title, cost in (
        ("bytes", 2**-20, "cache after the answer, MiB", lambda figures: figures.mean("bytes")),
        ("token_ms", 1.0, "ms per token", lambda figures: figures.median("token_ms")),
    ):
        costs = [(entry, cost(entry.figures)) for entry in setting.policies]
        known = [(entry, value * scale) for entry, value in costs if value is not None]
        if not known:
            continue
        whole = [i for i, (entry, _) in enumerate(known) if entry.complete]
        front = {whole[i] for i in pareto([(known[i][1], _mean(known[i][0])) for i in whole])}
        marks = [_mark(setting, entry, x, i in front) for i, (entry, x) in enumerate(known)]
        caption = "Dashed: no policy is better at this cost or less."
        if (
            name == "token_ms"
            and len({row["prompt_tokens"] for entry in setting.policies for _, row in entry.figures.samples}) > 1
        ):
            caption += " Median over prompts of several lengths."
        svg = scatter(marks, x_title, y_title, setting.percent)
        figures.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _mark(setting: Setting, entry: PolicyResult, x: float, front: bool) -> Mark:
    found = entry.figures.estimate
    assert found is not None
    tip = f"{entry.policy}: {found.mean:.1%} ({found.low:.1%} to {found.high:.1%}) at {x:.4g}"
    name = entry.label if len(entry.label) <= 26 else f"{entry.label[:25]}…"
    return Mark(
        x, found.mean, found.low, found.high, name, tip, policy_of(entry), kind_index(setting, entry.kind), front,
        not entry.complete, entry.figures.runs,
    )  # fmt: skip


def _mean(entry: PolicyResult) -> float:
    found = entry.figures.estimate
    assert found is not None
    return found.mean


def kind_index(setting: Setting, kind: str) -> int:
    """The shape and colour of a kind of policies: in the order in which they come."""
    kinds = list(dict.fromkeys(entry.kind for entry in setting.policies))
    return kinds.index(kind) % len(SHAPES)


def policy_of(entry: PolicyResult) -> str:
    """What policies that differ in their budget share."""
    return " + ".join(entry.names)


def policies_table(setting: Setting) -> str:
    """One row per policy and parameters."""
    compared, more = any(entry.figures.kl for entry in setting.policies), measures(setting)
    columns = (
        "policy", "kind", "n", score_title(setting.percent), "to full", *["KL per token"] * compared, *more, *MEASURES,
    )  # fmt: skip
    rows = []
    for entry in setting.policies:
        figures = entry.figures
        star = "" if entry.complete else " *"
        failed = f" +{figures.failed} failed" if figures.failed else ""
        rows.append(
            [
                Cell(escape(entry.label) + star, entry.label, text=True),
                Cell(escape(entry.kind), entry.kind, text=True),
                number(len(figures.samples), f"{{:.0f}}{failed}", figures.runs),
                estimate_cell(figures.estimate, figures.runs, setting.percent),
                difference_cell(None if entry.is_reference else figures.difference(setting.reference), figures.runs),
                *[divergence_cell(figures.kl, figures.runs)] * compared,
                *(number(measure(figures), form, figures.runs) for measure, form in more.values()),
                *measure_cells(figures),
            ]
        )
    return table(columns, rows)


def measure_cells(figures: Figures) -> list[Cell]:
    """Bytes, shares and times."""
    runs = figures.runs
    shared = "†" if figures.prompts_shared else ""
    return [
        number(figures.mean("bytes"), "{:.2f}", runs, 2**-20),
        number(figures.share("bytes", "full_bytes"), "{:.1f}", runs, 100),
        number(figures.share("kept", "seen"), "{:.1f}", runs, 100),
        number(figures.mean("read_share"), "{:.1f}", runs, 100),
        number(figures.median("prompt_ms"), "{:.0f}" + shared, runs),
        number(figures.median("token_ms"), "{:.1f}", runs),
    ]


def pivot(setting: Setting, columns: Columns, by: str = "") -> str:
    """Scores by policy (rows) and something else (columns); with the difference of two groups whose samples are paired."""
    gaps = [gap(columns, by, entry.figures) for entry in setting.policies]
    heads = ["policy", *columns, *[" − ".join(columns)] * any(gaps)]
    references = [part(setting.reference) if setting.reference else None for part in columns.values()]
    rows = []
    for entry, apart_groups in zip(setting.policies, gaps, strict=True):
        cells = [Cell(escape(entry.label), entry.label, text=True)]
        for part, reference in zip(columns.values(), references, strict=True):
            figures = part(entry.figures)
            found = figures.estimate
            if found is None:
                cells.append(Cell(NONE, None))
                continue
            apart = None if entry.is_reference else figures.difference(reference)
            shown = link(score(found.mean, setting.percent), figures.runs)
            tip = f"{score(found.low, setting.percent)} to {score(found.high, setting.percent)}, n={found.n}"
            cells.append(Cell(f'<span title="{tip}">{shown}</span>{mark_of(apart)}', found.mean))
        rows.append([*cells, *[difference_cell(apart_groups, entry.figures.runs)] * any(gaps)])
    return table(heads, rows) + (
        '<p class="soft">▼ ▲: worse or better than full attention on the same samples, beyond chance.</p>'
    )


def kept_table(setting: Setting, columns: Columns) -> str:
    """Share of the seen tokens that the cache holds, by policy (rows) and something else (columns)."""
    rows = []
    for entry in setting.policies:
        parts = [part(entry.figures) for part in columns.values()]
        shares = [number(figures.share("kept", "seen"), "{:.1f}", figures.runs, 100) for figures in parts]
        rows.append([Cell(escape(entry.label), entry.label, text=True), *shares])
    return table(("policy", *columns), rows)


def heat_maps(setting: Setting, task: str) -> str:
    """One map per policy of a task whose samples have a depth; nothing for another."""
    maps, depths, lengths = [], set(), set()
    for entry in setting.policies:
        cells: dict[tuple[float, tuple[float, str]], list[tuple[float, str]]] = {}
        for result, row in entry.figures.samples:
            if result.config["task"] == task and isinstance(row["meta"].get("depth"), int | float):
                where = (float(row["meta"]["depth"]), length_of(row))
                cells.setdefault(where, []).append((row["score"], result.id))
        depths |= {depth for depth, _ in cells}
        lengths |= {length for _, length in cells}
        maps.append((entry, cells))
    if not depths:
        return ""
    rows, columns = sorted(depths), sorted(lengths)
    drawn = []
    for entry, cells in maps:
        if cells:
            values = {
                (rows.index(depth), columns.index(length)): (
                    sum(score for score, _ in found) / len(found),
                    len(found),
                    list(dict.fromkeys(run for _, run in found)),
                )
                for (depth, length), found in cells.items()
            }
            names = [f"{depth:.0%}" for depth in rows], [name for _, name in columns]
            svg = heat_map(values, *names, entry.policy)
            caption = f"<figcaption>{escape(entry.label)}</figcaption>"
            drawn.append(f'<figure data-map="{escape(policy_of(entry))}">{caption}{svg}</figure>')
    return (
        f"<h3>{escape(task)}: score in percent by depth (down) and length (across)</h3>\n"
        f'<div class="maps">{"".join(drawn)}</div>'
    )


def runs_table(found: Sequence[Setting], results: Sequence[Result], links: dict[str, str]) -> str:
    """One row per run, with where it is."""
    columns = ("policy", "run", "task", "length", "question", "seed", "n", "failed", "score", "to full", *MEASURES, "model",
               "commit")  # fmt: skip
    rows, ids = [], []
    for result, apart in zip(results, differences(results), strict=True):
        config, figures = result.config, result.figures
        percent = config["metric"] != "perplexity"
        state = "" if result.finished else " (unfinished)"
        rows.append(
            [
                Cell(escape(label(config["policy"])), config["policy"], text=True),
                Cell(f'<a href="{escape(links[result.id])}">{result.id}</a>{state}', result.id, text=True),
                text(config["task"]),
                number(config["length"], "{:.0f}", ()),
                text("seen" if result.query_aware else "unseen"),
                number(config["seed"], "{:.0f}", ()),
                number(len(figures.samples), "{:.0f}", ()),
                number(figures.failed, "{:.0f}", ()),
                estimate_cell(figures.estimate, (), percent),
                difference_cell(apart, ()),
                *(Cell(_plain(cell.html), cell.value) for cell in measure_cells(figures)),
                text(config["definition"]["model"]),
                text(result.sessions[-1]["commit"] or result.sessions[-1]["kvpress"]),
            ]
        )
        ids.append(result.id)
    shared = "† One prompt pass served several policies: the time is that pass and making this policy's cache from it."
    return (
        f'<section id="runs">\n<h2>Runs</h2>\n<p id="filter" hidden>Showing <span></span>. '
        f'<button type="button">Show all</button></p>\n{table(columns, rows, ids)}\n<p class="soft">{shared}</p>\n</section>'
    )


def _plain(html: str) -> str:
    """A number without the link to its runs."""
    return html.partition(">")[2].removesuffix("</a>") if html.startswith("<a") else html


def _breakable(name: str) -> str:
    """A policy's name that may go on in the next line where its words end."""
    return name.replace("_", "_<wbr>")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], ids: Sequence[str] = ()) -> str:
    """A table that sorts by each column; the first cell of a row names it."""
    texts = [all(row[i].text for row in rows) for i in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{" class=text" if left else ""}><button type="button">{escape(name)}</button></th>'
        for name, left in zip(columns, texts, strict=True)
    )
    body = []
    for i, row in enumerate(rows):
        run = f' data-run="{ids[i]}"' if ids else ""
        cells = "".join(
            f"<{tag}{' class=text' if cell.text else ''}{scope}{_value(cell)}>{html}</{tag}>"
            for cell, html, tag, scope in (
                (c, c.html, "td", "") if j else (c, _breakable(c.html), "th", ' scope="row"') for j, c in enumerate(row)
            )
        )
        body.append(f"<tr{run}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(body)}\n</tbody></table></div>'


def _value(cell: Cell) -> str:
    return "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'


def text(value: object) -> Cell:
    """A text."""
    return Cell(escape(str(value)), str(value), text=True)


def number(value: float | None, form: str, runs: Sequence[str], scale: float = 1.0) -> Cell:
    """A number that leads to its runs."""
    return Cell(NONE, None) if value is None else Cell(link(form.format(value * scale), runs), value)


def link(shown: str, runs: Sequence[str]) -> str:
    """What is shown, leading to these runs."""
    return f'<a href="#runs" data-runs="{" ".join(runs)}">{shown}</a>' if runs else shown


def score_title(percent: bool) -> str:
    """The heading of a column of scores."""
    return "score, %" if percent else "probability"


def score(value: float, percent: bool) -> str:
    """In percent without the sign, or with three digits."""
    return f"{value * 100:.1f}" if percent else f"{value:.3g}"


def estimate_cell(found: Estimate | None, runs: Sequence[str], percent: bool) -> Cell:
    """Mean and interval."""
    if found is None:
        return Cell(NONE, None)
    interval = f"{score(found.low, percent)} to {score(found.high, percent)}"
    return Cell(f"{link(score(found.mean, percent), runs)} <small>{interval}</small>", found.mean)


def divergence_cell(found: Estimate | None, runs: Sequence[str]) -> Cell:
    """KL divergence per token, and its interval."""
    if found is None:
        return Cell(NONE, None)
    interval = "" if found.low == found.high else f" <small>{found.low:.3g} to {found.high:.3g}</small>"
    return Cell(f"{link(f'{found.mean:.3g}', runs)}{interval}", found.mean)


def difference_cell(found: Difference | None, runs: Sequence[str]) -> Cell:
    """Difference in points of a hundred with its mark, and its interval."""
    if found is None:
        return Cell(NONE, None)
    shown = link(points(found.mean), runs)
    shown = f'<span class="{"gain" if found.mean > 0 else "loss"}">{shown}</span>' if found.significant else shown
    mark = "" if found.significant else ' <span class="ns">n.s.</span>'
    return Cell(f"{shown}{mark} <small>{points(found.low)} to {points(found.high)}</small>", found.mean)


def mark_of(found: Difference | None) -> str:
    """A triangle for a significant difference."""
    if found is None or not found.significant:
        return ""
    better = found.mean > 0
    return f' <span class="{"gain" if better else "loss"}" title="{points(found.mean)}">{"▲" if better else "▼"}</span>'


def points(value: float) -> str:
    """A difference of scores in points of a hundred, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")
