"""`kvpress demo`: the shipped configuration data/demo.yaml, run as `kvpress ablate` runs one, with a table and a page."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvpress.evals.commands import summary
from kvpress.evals.config import Plan, Run, make_plan, put
from kvpress.evals.environment import describe
from kvpress.evals.executor import Loader
from kvpress.evals.locations import ConfigError, load
from kvpress.evals.report import write_report
from kvpress.evals.results import PolicyResult, Setting, load_results, settings
from kvpress.evals.runner import Portion, RunError, refusal, run_plan
from kvpress.evals.store import make_folder
from kvpress.evals.sweep import grids
from kvpress.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make(
    out: Path,
    *,
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    policies: Sequence[str] = (),
    budgets: Sequence[int | float] = (),
    lengths: Sequence[int] = (),
    depths: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
) -> Plan:
    """The shipped configuration with some of it replaced; see `kvpress demo --help`.

    Raises:
        ConfigError, PolicyError: what cannot work.
    """
    with as_file(files("kvpress.evals") / "data" / "demo.yaml") as path:
        tree, locations = load(path)
    replaced: dict[str, tuple[tuple[str, ...], Any]] = {
        "--out": (("out",), str(out)),
        "--model": (("defaults", "model"), model),
        "--device": (("defaults", "device"), device),
        "--dtype": (("defaults", "dtype"), dtype),
        "--lengths": (("defaults", "task", "lengths"), sorted(set(lengths), reverse=True) or None),
        "--depths": (("defaults", "task", "depths"), depths and _spread(depths)),
        "--samples": (("defaults", "task", "repeats"), samples),
        "--seed": (("defaults", "task", "seed"), seed),
    }
    for option, (keys, value) in replaced.items():
        if value is not None:
            put(tree, locations, keys, value, option)
    if policies or budgets:
        budgets = sorted(budgets, key=lambda budget: (isinstance(budget, int), budget))  # as the table has them
        compared, longest = tree["sweep"][-1], max(tree["defaults"]["task"]["lengths"])
        sweep = grids(policies or compared["policy"], budgets or compared["budget"], longest)
        if budgets and not any("budget" in grid for grid in sweep):
            raise ConfigError(f"--budgets {', '.join(map(str, budgets))}: none of the policies takes one; leave it out")
        put(tree, locations, ("sweep",), sweep, "--policies, --budgets")
    return make_plan(tree, locations)


def _spread(count: int) -> list[float]:
    """The middles of so many equal parts of the text."""
    return [(i + 0.5) / count for i in range(count)]


def run(plan: Plan, minutes: float, console: Console, loader: Loader = load_model) -> int:
    """Run a plan of one model, print the table, write the report's page; the exit code.

    Args:
        minutes: no prompt is begun after so much time; 0 for no limit.

    Raises:
        PolicyError, UnsupportedModelError: the model can have none of the policies, or not even full attention.
        ConfigError, TaskError, ModelLoadError, RunError, StoreError: what cannot run.
    """
    make_folder(plan.out)
    started, spec = time.monotonic(), plan.runs[0].model
    with console.status(f"loading {spec.name} (a first start may take half a minute)"):
        model, tokenizer = spec.load(loader)
    there = describe(model, plan.runs[0].task.seed)
    setting = "{dtype} on {hardware}, {threads} threads, torch {packages[torch]}, transformers {packages[transformers]}"
    console.print(f"{spec.name}: {setting.format(**there)}", highlight=False)
    plan = replace(plan, runs=possible(plan.runs, model, console))
    until = time.monotonic() + 60 * minutes if minutes else math.inf
    outcome = run_plan(
        plan, console, retry=True, loader=lambda *_, **__: (model, tokenizer), portion=Portion(until=until)
    )
    ids = {run.id for run in plan.runs}
    found = settings(result for result in load_results([plan.out]) if result.id in ids)
    if not found and not outcome.exit_code:
        raise RunError(f"{minutes:g} minutes were over before a prompt was answered; give --minutes more, or 0 for all")
    for one in found:
        console.print(table(one))
    if outcome.exit_code:
        console.print(summary(outcome, plan.out), highlight=False, soft_wrap=True)
    elif outcome.finished + outcome.finished_before < len(plan.runs):
        console.print(f"{minutes:g} minutes were too short for all prompts; the same command goes on", highlight=False)
    if found:
        page, *_ = write_report([plan.out], plan.out, f"kvpress demo: {spec.name}", only=ids)
        console.print(f"{time.monotonic() - started:.0f} s; {page} shows it", highlight=False, soft_wrap=True)
    return outcome.exit_code


def possible(runs: Sequence[Run], model: "PreTrainedModel", console: Console) -> tuple[Run, ...]:
    """The runs that a model can have; the others are left out, which is said.

    Raises:
        PolicyError, UnsupportedModelError: it cannot have full attention, or no other of the policies.
    """
    refused = {run.id: error for run in runs if (error := refusal(run, model)) is not None}
    kept = tuple(run for run in runs if run.id not in refused)
    if refused and len(kept) < 2:
        raise next(iter(refused.values()))
    for run in runs:
        if run.id in refused:
            console.print(f"left out {run.policy}: {refused[run.id]}", highlight=False, soft_wrap=True)
    return kept


def table(setting: Setting) -> Table:
    """One row per policy, narrow enough for 80 columns.

    Prompts are timed at a policy's first budget: what it observes of a shared prompt is there for its other budgets.
    """
    longest = max(row["meta"]["length"] for entry in setting.policies for _, row in entry.figures.samples)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("policy", overflow="fold", vertical="bottom")
    for name in ("found", "cache\nMiB", "of\nfull", "read", "prompt\ns", "×", "token\nms", "×"):
        shown.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    names: list[list[str]] = []
    for entry in setting.policies:
        figures, first = entry.figures, entry.names not in names
        names.append(entry.names)
        timed = figures.part(lambda _, row: row["meta"]["length"] == longest)
        found = sum(row["score"] == 1 for _, row in figures.samples)
        cells = [
            f"{found}/{len(figures.samples)}",
            _figure(figures.mean("bytes"), "{:.1f}", 2**-20),
            _figure(figures.share("bytes", "full_bytes"), "{:.0%}"),
            _figure(figures.mean("read_share"), "{:.0%}"),
        ]
        for name, form, scale in (("prompt_ms", "{:.2f}", 1e-3), ("token_ms", "{:.1f}", 1.0)):
            ratio = None if setting.reference is None else timed.ratio(name, setting.reference)
            known = first or name != "prompt_ms"
            cells += [_figure(timed.median(name), form, scale), _figure(ratio, "{:.2f}")] if known else ["", ""]
        shown.add_row(escape(_name(entry)), *cells)
    shares = any(entry.figures.prompts_shared for entry in setting.policies)
    shared = (
        " (one for all policies that leave it exact) and making the policy's cache from it, at its first budget"
        * shares
    )
    shown.caption = (
        "found: needles found (the prompt that is compressed holds the question). cache, of full: bytes held after the "
        "answer, and their share of what transformers' own cache would hold. read: share of the entries that a step reads. "
        f"prompt: the prompt pass{shared}. prompt, token: at {longest} tokens. ×: against full attention on the same prompts."
    )
    shown.caption_justify = "left"
    return shown


def _name(entry: PolicyResult) -> str:
    """The policy as short as it is clear, with its budget where that is the default, too."""
    name, budget = entry.label.removesuffix("()"), entry.figures.samples[0][0].config["budget"]
    return f"{name}({budget})" if name != entry.label and budget is not None else name


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number; nothing where nothing was measured."""
    return "" if value is None else form.format(value * scale)
