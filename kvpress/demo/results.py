"""What the demo measured: one record per prompt and variant, and one summary per variant."""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kvpress.intervals import wilson_interval


@dataclass(frozen=True)
class Record:
    """One prompt answered by one variant.

    Attributes:
        variant: the variant's label; `policy` and `budget` are its parts.
        cache_bytes: bytes that the cache held when the answer was finished.
        plain_bytes: the same for unpatched transformers on the same prompt.
        read_share: share of the seen entries that a decode step read.
        prompt_seconds, plain_prompt_seconds: the prompt pass, patched and unpatched; nan where it was not timed.
        step_ms, plain_step_ms: milliseconds per decode step in each timed block, the two taken in turns; empty where
            nothing was timed.
        compiled_ms, plain_compiled_ms: the same with compiled steps; empty where nothing was compiled.
        compile_seconds: the steps in which the graph was made; nan where none was.
        not_compiled: why not, where it was to be.
    """

    variant: str
    policy: str
    budget: str
    length: int
    depth: float
    seed: int
    number: str
    answer: str
    found: bool
    cache_bytes: int
    plain_bytes: int
    read_share: float
    prompt_seconds: float
    plain_prompt_seconds: float
    step_ms: tuple[float, ...]
    plain_step_ms: tuple[float, ...]
    compiled_ms: tuple[float, ...] = ()
    plain_compiled_ms: tuple[float, ...] = ()
    compile_seconds: float = math.nan
    not_compiled: str = ""


@dataclass(frozen=True)
class Summary:
    """One variant over all its prompts.

    Attributes:
        low, high: the 95 % Wilson interval of the accuracy found / prompts.
        cache_bytes: mean over the prompts.
        share_of_full: bytes held over the bytes that unpatched transformers held on the same prompts.
        prompt_seconds, prompt_ratio: median prompt pass of the timed prompts, and median ratio to unpatched.
        step_ms, step_ratio: median decode step there, and median over the blocks of the ratio to the unpatched block
            beside it; nan when nothing was timed.
        compiled_ms, compiled_ratio: the same with compiled steps; nan where nothing was compiled.
    """

    variant: str
    policy: str
    budget: str
    found: int
    prompts: int
    low: float
    high: float
    cache_bytes: float
    share_of_full: float
    read_share: float
    prompt_seconds: float
    prompt_ratio: float
    step_ms: float
    step_ratio: float
    compiled_ms: float = math.nan
    compiled_ratio: float = math.nan


def summarise(records: Iterable[Record]) -> list[Summary]:
    """One summary per variant, in the order in which the variants first came."""
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        by_variant.setdefault(record.variant, []).append(record)
    return [_summary(of_variant) for of_variant in by_variant.values()]


def _summary(records: list[Record]) -> Summary:
    found = sum(record.found for record in records)
    timed = [record for record in records if record.step_ms]
    prompts = [(r.prompt_seconds, r.plain_prompt_seconds) for r in timed if not math.isnan(r.prompt_seconds)]
    steps = [(ms, plain) for r in timed for ms, plain in zip(r.step_ms, r.plain_step_ms, strict=True)]
    compiled = [(ms, plain) for r in timed for ms, plain in zip(r.compiled_ms, r.plain_compiled_ms, strict=True)]
    return Summary(
        records[0].variant,
        records[0].policy,
        records[0].budget,
        found,
        len(records),
        *wilson_interval(found, len(records)),
        cache_bytes=fmean(r.cache_bytes for r in records),
        share_of_full=sum(r.cache_bytes for r in records) / sum(r.plain_bytes for r in records),
        read_share=fmean(r.read_share for r in records),
        prompt_seconds=median(own for own, _ in prompts) if prompts else math.nan,
        prompt_ratio=median(own / plain for own, plain in prompts) if prompts else math.nan,
        step_ms=median(ms for ms, _ in steps) if steps else math.nan,
        step_ratio=median(ms / plain for ms, plain in steps) if steps else math.nan,
        compiled_ms=median(ms for ms, _ in compiled) if compiled else math.nan,
        compiled_ratio=median(ms / plain for ms, plain in compiled) if compiled else math.nan,
    )


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: what was not measured is null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def write_results(folder: Path, setting: dict[str, Any], records: list[Record], summaries: list[Summary]) -> None:
    """Write results.json (setting, summaries, every record) and results.csv (the summaries) into `folder`."""
    content = {
        "setting": setting,
        "summary": [_without_nan(asdict(s)) for s in summaries],
        "records": [_without_nan(asdict(r)) for r in records],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Summary)])
        writer.writeheader()
        writer.writerows(asdict(summary) for summary in summaries)
