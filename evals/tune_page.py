"""The page of a search: the recommendation, the front of loss against memory and time, and why the others lost."""

from collections.abc import Callable

from kvpress.evals.candidates import Candidate, Tuned, size
from kvpress.evals.charts import scatter
from kvpress.evals.page import NONE, Cell, Pictures, Row, Table, interval_cell, mark, number, render, text
from kvpress.evals.statistics import Estimate, pareto
from kvpress.evals.store import write_whole


def write_page(found: Tuned) -> None:
    """Write the page beside the YAML file.

    Raises:
        StoreError: it cannot be written.
    """
    request, limits = found.request, found.request.limits
    wanted = [
        f"memory up to {size(limits.memory)}" if limits.memory is not None else "",
        f"up to {limits.ms_per_token:g} ms per token" if limits.ms_per_token is not None else "",
        f"a loss of up to {limits.max_loss:.2%}" if limits.max_loss is not None else "",
    ]
    whole = render(
        "tune.html",
        f"Which policy for {request.model}?",
        sentence=found.sentence,
        notes=found.notes,
        asked=f"{', '.join(filter(None, wanted))}; of what holds that, the least {request.prefer}",
        data=request.data,
        context=f"{found.context:,}",
        machine=found.machine,
        policies={c.policy.name: c.policy.kind for c in found.candidates if c.losses},
        pictures_found=pictures(found),
        candidates=candidates_table(found),
        use="" if found.path is None else f"kvpress.patch(model, {str(found.path)!r})",
        command=request.command,
    )
    write_whole(found.page, whole)


def pictures(found: Tuned) -> list[Pictures]:
    """Loss over memory, and over time: the candidates whose loss is known."""
    known = [c for c in found.candidates if c.losses and c.bytes is not None]
    most = max((c.rows for c in known), default=0)
    caption = "Dashed: no candidate loses less at this cost or below. Lower and further left is better."
    costs: dict[str, Callable[[Candidate], float]] = {
        "cache at the context, MiB": lambda candidate: (candidate.bytes or 0) / 2**20,
        "ms per token": lambda candidate: candidate.ms or 0.0,
    }
    drawn = []
    for x_title, cost in costs.items():
        whole = [c for c in known if c.rows == most]
        front = [whole[i] for i in pareto([(cost(c), -_loss(c).mean) for c in whole])]
        marks = [
            mark(c.policy.name, c.label.replace("budget=", ""), c.policy.kind, cost(c), _loss(c), c in front,
                 c.rows == most, [c.runs["agreement"].id])
            for c in known
        ]  # fmt: skip
        if marks:
            charts = scatter(marks, x_title, "loss: tokens unlike full attention's", percent=True)
            drawn.append(Pictures(f"Loss over {x_title}", caption, charts))
    return drawn


def candidates_table(found: Tuned) -> Table:
    """All candidates, the recommended one first, with why the others lost."""
    has_metric = any("metric" in c.losses for c in found.candidates)
    columns = ("policy", "rows", "loss, %", *["metric lost, %"] * has_metric, "KL per token", "cache, MiB", "of full, %",
               "token, ms", "why not")  # fmt: skip
    order = sorted(found.candidates, key=lambda c: (c is not found.chosen, not c.losses, c.loss, c.bytes or 0))
    rows = []
    for candidate in order:
        kl = candidate.kl
        why = "recommended" if found.meets else "comes nearest"
        cells = [
            Cell(candidate.label.replace("budget=", ""), candidate.label),
            number(candidate.rows or None, "{:.0f}"),
            interval_cell(candidate.losses.get("agreement"), percent),
            *[interval_cell(candidate.losses.get("metric"), percent)] * has_metric,
            Cell(NONE) if kl is None else Cell(f"{kl.mean:.3g}", kl.mean),
            number(candidate.bytes, "{:.2f}", (), 2**-20),
            number(candidate.bytes, "{:.1f}", (), 100 / (candidate.full_bytes or 1)),
            number(candidate.ms, "{:.1f}"),
            text(why if candidate is found.chosen else found.reasons[candidate.label]),
        ]
        rows.append(Row(cells, candidate.policy.name, candidate.runs["agreement"].id))
    return Table("Candidates", columns, rows)


def percent(share: float) -> str:
    """A share in points of a hundred; no zero has a sign."""
    return f"{round(100 * share, 2) + 0.0:.2f}"


def _loss(candidate: Candidate) -> Estimate:
    """What is lost of agreement; chance does not make it less than nothing."""
    loss = candidate.losses["agreement"]
    return Estimate(max(0.0, loss.mean), max(0.0, loss.low), max(0.0, loss.high), loss.n)
