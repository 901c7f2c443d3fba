"""The page of a search: the recommendation, the front of loss against memory and time, and why the others lost."""

from collections.abc import Callable
from html import escape
from importlib.resources import files

from kvpress.evals.candidates import Candidate, Tuned, size
from kvpress.evals.charts import SHAPES, Mark, scatter
from kvpress.evals.page import NONE, Cell, number, table, text
from kvpress.evals.statistics import LEVEL, RULE, Estimate, pareto
from kvpress.evals.store import write_whole

HOW_TO_READ = f"""Loss is the share of tokens for which another one than full attention's is the most likely: full
attention's own continuation of each text is fed token by token under the policy. KL is the divergence of the two distributions, in
nats per token. Memory is what the cache of one sequence holds after a prompt; while a prompt is read, one layer holds more.
Intervals are {LEVEL:.0%} bootstrap intervals over rows. {RULE}. Candidates that were dropped early were measured on fewer rows
(hollow in the pictures)."""


def write_page(found: Tuned) -> None:
    """Write the page beside the YAML file.

    Raises:
        StoreError: it cannot be written.
    """
    style, script = (
        (files("kvpress.evals") / "data" / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    request, title = found.request, f"Which policy for {found.request.model}?"
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in found.notes)
    limits = request.limits
    wanted = [
        f"memory up to {size(limits.memory)}" if limits.memory is not None else "",
        f"up to {limits.ms_per_token:g} ms per token" if limits.ms_per_token is not None else "",
        f"a loss of up to {limits.max_loss:.2%}" if limits.max_loss is not None else "",
    ]
    asked = f"{', '.join(filter(None, wanted))}; of what holds that, the least {request.prefer}"
    use = "" if found.path is None else f"<h3>Use it</h3>\n<pre>kvpress.patch(model, {str(found.path)!r})</pre>\n"
    write_whole(
        found.page,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}pre {{ white-space: pre-wrap; '
        "overflow-wrap: anywhere; font-size: .875rem; }\n#runs td.text:last-child { white-space: normal; min-width: 16rem; }\n"
        f"</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p><strong>{escape(found.sentence)}</strong></p>\n{notes}"
        f'<p class="soft">Asked for: {escape(asked)}. Texts: {escape(request.data)}; context: {found.context:,} tokens; '
        f"{escape(found.machine)}.</p>\n<section>\n{charts(found)}</section>\n{candidates_table(found)}\n{use}"
        f"<h3>Again</h3>\n<pre>{escape(request.command)}</pre>\n"
        f'<p class="soft">{escape(HOW_TO_READ)}</p>\n<script>\n{script}</script>\n</body>\n</html>\n',
    )


def charts(found: Tuned) -> str:
    """Loss over memory, and over time."""
    figures = []
    for x_title, cost in (
        ("cache at the context, MiB", lambda candidate: (candidate.bytes or 0) / 2**20),
        ("ms per token", lambda candidate: candidate.ms or 0.0),
    ):
        svg = picture(found, x_title, cost)
        if svg:
            caption = "Dashed: no candidate loses less at this cost or below. Lower and further left is better."
            figures.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="charts">{"".join(figures)}</div>\n'


def picture(found: Tuned, x_title: str, cost: Callable[[Candidate], float]) -> str:
    """The candidates whose loss is known; the recommended one is on the front or close to it."""
    known = [c for c in found.candidates if c.losses and c.bytes is not None]
    most = max((c.rows for c in known), default=0)
    whole = [i for i, c in enumerate(known) if c.rows == most]
    front = {whole[i] for i in pareto([(cost(known[i]), -_loss(known[i]).mean) for i in whole])}
    kinds = list(dict.fromkeys(c.policy.kind for c in known))
    marks = []
    for i, candidate in enumerate(known):
        loss = _loss(candidate)
        tip = (
            f"{candidate.label}: {loss.mean:.2%} ({max(0.0, loss.low):.2%} to {loss.high:.2%}) at {cost(candidate):.4g}"
        )
        is_front = i in front or candidate is found.chosen
        kind, runs = kinds.index(candidate.policy.kind) % len(SHAPES), [candidate.runs["agreement"].id]
        x, y, low, high = cost(candidate), *(max(0.0, end) for end in (loss.mean, loss.low, loss.high))
        name = candidate.policy.name
        marks.append(Mark(x, y, low, high, short(candidate), tip, name, kind, is_front, candidate.rows < most, runs))
    return scatter(marks, x_title, "loss: tokens unlike full attention's", True) if marks else ""


def candidates_table(found: Tuned) -> str:
    """All candidates, the recommended one first, with why the others lost."""
    has_metric = any("metric" in c.losses for c in found.candidates)
    columns = ("policy", "rows", "loss, %", *["metric lost, %"] * has_metric, "KL per token", "cache, MiB", "of full, %",
               "token, ms", "why not")  # fmt: skip
    order = sorted(found.candidates, key=lambda c: (c is not found.chosen, not c.losses, c.loss, c.bytes or 0))
    rows = []
    for candidate in order:
        kl = candidate.kl
        why = "recommended" if found.meets else "comes nearest"
        rows.append(
            [
                Cell(escape(candidate.label.replace("budget=", "")), candidate.label, text=True),
                number(candidate.rows or None, "{:.0f}", ()),
                loss_cell(candidate.losses.get("agreement")),
                *[loss_cell(candidate.losses.get("metric"))] * has_metric,
                Cell(NONE, None) if kl is None else Cell(f"{kl.mean:.3g}", kl.mean),
                number(candidate.bytes, "{:.2f}", (), 2**-20),
                number(candidate.bytes, "{:.1f}", (), 100 / (candidate.full_bytes or 1)),
                number(candidate.ms, "{:.1f}", ()),
                text(why if candidate is found.chosen else found.reasons[candidate.label]),
            ]
        )
    ids = [candidate.runs["agreement"].id for candidate in order]
    return (
        f'<section id="runs">\n<h2>Candidates</h2>\n<p id="filter" hidden>Showing <span></span>. '
        f'<button type="button">Show all</button></p>\n{table(columns, rows, ids)}\n</section>'
    )


def loss_cell(loss: Estimate | None) -> Cell:
    """A loss in percent, and its interval."""
    if loss is None:
        return Cell(NONE, None)
    interval = "" if loss.low == loss.high else f" <small>{percent(loss.low)} to {percent(loss.high)}</small>"
    return Cell(f"{percent(loss.mean)}{interval}", loss.mean)


def percent(share: float) -> str:
    """A share in points of a hundred; no zero has a sign."""
    return f"{round(100 * share, 2) + 0.0:.2f}"


def short(candidate: Candidate) -> str:
    """A label for a picture."""
    label = candidate.label.replace("budget=", "")
    return label if len(label) <= 26 else f"{label[:25]}…"


def _loss(candidate: Candidate) -> Estimate:
    return candidate.losses["agreement"]
