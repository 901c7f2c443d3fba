"""The demo's table."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from kvpress.demo.results import Summary

COLUMNS = (
    "budget",
    "found",
    "95 %",
    "cache\nMiB",
    "of\nfull",
    "read",
    "prompt\ns",
    "×",
    "token\nms",
    "×",
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
            f"{s.low:.0%}–{s.high:.0%}".replace("%–", "–"),
            f"{s.cache_bytes / 2**20:.2f}",
            f"{s.share_of_full:.0%}",
            f"{s.read_share:.0%}",
            "" if math.isnan(s.prompt_seconds) else f"{s.prompt_seconds:.2f}",
            "" if math.isnan(s.prompt_ratio) else f"{s.prompt_ratio:.2f}",
            f"{s.step_ms:.1f}",
            f"{s.step_ratio:.2f}",
        )
    table.caption = (
        "found: needles found, with the 95 % Wilson interval (the prompt that is compressed holds the question); "
        "cache, of full: bytes held after the answer, mean over the prompts, and their share of unpatched transformers'; "
        f"read: share of entries that a step reads; prompt, token: seconds (at a policy's first budget) and milliseconds at "
        f"{longest} tokens; ×: ratio to unpatched transformers in the same run, its decode steps taken in turns"
    )
    table.caption_justify = "left"
    return table
