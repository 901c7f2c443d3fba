"""The demo from the arguments to the files."""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvpress
from kvpress.demo.needle import Haystack, Needle, PromptError
from kvpress.demo.plots import draw_heat_map, draw_memory_accuracy
from kvpress.demo.results import Record, summarise, write_results
from kvpress.demo.runner import PLAIN, Comparison, Variant, make_variants
from kvpress.demo.table import results_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# A prompt whose passes and steps are not timed takes at most about so much of the time of one where they are.
TIMED_EXTRA = 0.6


@dataclass(frozen=True)
class Plan:
    """What to compare on which prompts.

    Attributes:
        policies: names; empty for all that there are.
        compiled: those of them whose compiled steps are timed beside the others, at their first budget.
        budgets: shares (float) or entries (int), each tried with each policy that takes one.
        lengths: tokens per prompt.
        depths: how many, spread evenly from the text's start to its end.
        samples: prompts per length and depth.
        seed: of the texts and numbers.
        minutes: no new prompt is begun that would end later; 0 for no limit. The first is always answered.

    Raises:
        PolicyError: an unknown policy, a budget that does not work, or a policy to compile that is not compared.
        PromptError: fewer than one depth or sample.
    """

    policies: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    budgets: tuple[int | float, ...] = (0.25, 0.5)
    lengths: tuple[int, ...] = (2000, 4000)
    depths: int = 3
    samples: int = 1
    seed: int = 0
    minutes: float = 3.5

    def __post_init__(self) -> None:
        if min(self.depths, self.samples) < 1:
            raise PromptError(f"depths={self.depths}, samples={self.samples} make no prompt; give at least 1 of each")
        self.variants()  # what cannot work is said before a model is loaded

    def variants(self) -> list[Variant]:
        """What is compared."""
        names = self.policies or tuple(kvpress.available())
        return make_variants(names, self.budgets, max(self.lengths), self.compiled)


def run_demo(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    plan: Plan,
    out: Path,
    console: Console,
) -> list[Record]:
    """Run the plan, print the table, and write heat_map.png, memory_accuracy.png, results.json and results.csv.

    Args:
        name: the model's, as it is shown.
        out: an existing folder for the files.

    Raises:
        PolicyError: a named policy that does not work on this model.
        UnsupportedModelError: a model that kvpress cannot patch.
        PromptError: a length that is too short.
    """
    started = time.perf_counter()
    haystack = Haystack(tokenizer)
    needles = make_needles(haystack, plan)
    variants = patchable(model, plan.variants(), console)
    setting = describe(model, name)
    console.print(
        "{model}: {dtype} on {device}, {threads} threads, torch {torch}, transformers {transformers}".format(**setting)
    )

    comparison = Comparison(model, tokenizer, variants)
    records = answer_all(comparison, needles, plan.minutes, console)
    done = len(records) // len(variants)
    if done < len(needles):
        console.print(f"{plan.minutes:g} minutes allow {done} of {len(needles)} prompts; --minutes 0 runs all")

    summaries = summarise(records)
    console.print(results_table(summaries, needles[0].length))
    for record in records:
        if record.not_compiled:
            console.print(f"{record.variant} was not compiled: {record.not_compiled}")
        elif record.compiled_ms:
            console.print(f"compiling {record.variant} took {record.compile_seconds:.0f} s", highlight=False)
    setting |= {"plan": asdict(plan), "query_aware": True, "seconds": time.perf_counter() - started}
    write_results(out, setting | {"peak_memory_bytes": peak_memory()}, records, summaries)
    title = f"{name}, {setting['dtype']}, needle in a haystack, {done} prompt{'' if done == 1 else 's'}"
    draw_heat_map(out / "heat_map.png", records, title)
    draw_memory_accuracy(out / "memory_accuracy.png", summaries, title)
    memory = f", peak memory of the process {peak_memory() / 1e9:.2f} GB" if peak_memory() else ""
    console.print(f"{time.perf_counter() - started:.0f} s{memory}; results and pictures in {out}", highlight=False)
    return records


def make_needles(haystack: Haystack, plan: Plan) -> list[Needle]:
    """Every length at every depth, `samples` times; in an order that may stop anywhere: depths spread out, long first."""
    depths = [0.5] if plan.depths == 1 else [i / (plan.depths - 1) for i in range(plan.depths)]
    spread = sorted(range(plan.depths), key=lambda i: (i * 0.618) % 1)
    return [
        haystack.needle(length, depths[i], plan.seed + sample)
        for sample in range(plan.samples)
        for i in spread
        for length in sorted(set(plan.lengths), reverse=True)
    ]


def patchable(model: "PreTrainedModel", variants: Sequence[Variant], console: Console) -> list[Variant]:
    """The variants that this model can have; the others are left out, which is said.

    Raises:
        PolicyError, UnsupportedModelError: it cannot have full attention under kvpress, or no other policy.
    """
    kept, refused = [], None
    for variant in variants:
        try:
            if variant.instance is not None:
                kvpress.patch(model, variant.instance).unpatch()
        except (kvpress.PolicyError, kvpress.UnsupportedModelError) as error:
            if variant.policy == "full":
                raise
            console.print(f"left out {variant.label}: {error}")
            refused = error
        else:
            kept.append(variant)
    if refused is not None and {variant.policy for variant in kept} <= {PLAIN, "full"}:
        raise refused
    return kept


def answer_all(comparison: Comparison, needles: Sequence[Needle], minutes: float, console: Console) -> list[Record]:
    """Answer the needles in order until the time is up; the first one, of the longest length, is timed."""
    records: list[Record] = []
    per_token = 0.0  # seconds of the last prompt per token of its length
    deadline = time.perf_counter() + 60 * minutes if minutes else float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(needles) * len(comparison.variants))
        for needle in needles:
            began = time.perf_counter()
            if records and began + per_token * needle.length > deadline:
                break
            where = f"{needle.length} tokens, needle at {needle.depth:.0%}"
            progress.update(task, description=where)
            for record in comparison.run(needle, timed=needle is needles[0]):
                records.append(record)
                progress.update(task, advance=1, description=f"{where}, {record.variant}")
            per_token = (time.perf_counter() - began) / needle.length
            if needle is needles[0]:
                per_token *= TIMED_EXTRA
    return records


def describe(model: "PreTrainedModel", name: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
