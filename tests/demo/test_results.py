"""Summaries and intervals, by hand."""

import csv
import json
from dataclasses import replace

import pytest

from kvpress.demo.results import Record, summarise, wilson_interval, write_results

Z = 1.959964


@pytest.mark.parametrize(
    ("found", "n", "low", "high"),
    [
        (10, 10, 10 / (10 + Z * Z), 1.0),  # at the ends the formula falls together to n / (n + z^2)
        (0, 10, 0.0, Z * Z / (10 + Z * Z)),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 1 / (1 + Z * Z), 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval(found, n, low, high):
    assert wilson_interval(found, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 10, 57])
def test_wilson_interval_holds_the_share(n):
    for found in range(n + 1):
        low, high = wilson_interval(found, n)
        assert 0 <= low <= found / n <= high <= 1


@pytest.mark.parametrize(("found", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_of_nothing(found, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(found, n)


def records():
    short = Record(
        variant="h2o 0.5",
        policy="h2o",
        budget="0.5",
        length=100,
        depth=0.0,
        seed=0,
        number="1234567",
        answer=" 1234567",
        found=True,
        cache_bytes=100,
        plain_bytes=200,
        read_share=0.5,
        prompt_seconds=1.0,
        plain_prompt_seconds=1.0,
        step_ms=(),
        plain_step_ms=(),
    )
    times = {"prompt_seconds": 3.0, "plain_prompt_seconds": 2.0}
    long = replace(
        short, length=200, found=False, cache_bytes=180, plain_bytes=300, step_ms=(4.0, 6.0), plain_step_ms=(8.0, 6.0)
    )
    return [short, replace(long, **times)]


def test_summary():
    (summary,) = summarise(records())
    assert (summary.found, summary.prompts, summary.cache_bytes) == (1, 2, 140)
    assert summary.share_of_full == 280 / 500
    assert (summary.prompt_seconds, summary.prompt_ratio) == (3.0, 1.5)  # at the longest length alone
    assert (summary.step_ms, summary.step_ratio) == (5.0, 0.75)  # of the blocks beside each other: 0.5 and 1


def test_variants_keep_their_order():
    first, second = records()
    found = summarise([replace(first, variant="b"), replace(first, variant="a"), replace(second, variant="b")])
    assert [summary.variant for summary in found] == ["b", "a"]


def test_files(tmp_path):
    write_results(tmp_path, {"model": "tiny"}, records(), summarise(records()))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["setting"] == {"model": "tiny"}
    assert [record["found"] for record in content["records"]] == [True, False]
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], float(row["share_of_full"])) == ("h2o 0.5", 280 / 500)
