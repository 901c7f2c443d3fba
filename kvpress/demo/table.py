"""The demo's table."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from kvpress.demo.results import Summary

COLUMNS = (
    "budget",
    "found",
    "cache\nMiB",
    "of\nfull",
    "read",
    "prompt\ns",
    "×",
    "token\nms",
    "×",
    "com-\npiled\n×",
)


def results_table(summaries: Sequence[Summary], longest: int) -> Table:
    """One row per variant, narrow enough for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("policy", no_wrap=True, vertical="bottom")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for s in summaries:
        table.add_row(
            s.policy,
            s.budget,
            f"{s.found}/{s.prompts}",
            f"{s.cache_bytes / 2**20:.1f}",
            f"{s.share_of_full:.0%}",
            f"{s.read_share:.0%}",
            _figure(s.prompt_seconds, 2),
            _figure(s.prompt_ratio, 2),
            _figure(s.step_ms, 1),
            _figure(s.step_ratio, 2),
            _figure(s.compiled_ratio, 2),
        )
    table.caption = (
        "found: needles found (the prompt that is compressed holds the question); cache, of full: bytes held after the "
        "answer, mean over the prompts, and their share of unpatched transformers'; read: share of entries that a step "
        f"reads; prompt, token: seconds (at a policy's first budget) and milliseconds at {longest} tokens; compiled: "
        "a token with compile=True; ×: ratio to unpatched transformers in the same run, decode steps taken in turns"
    )
    table.caption_justify = "left"
    return table


def _figure(value: float, digits: int) -> str:
    """A number; nothing where nothing was measured."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"
