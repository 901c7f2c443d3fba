"""Samples of one shape answered together: the same answers as one by one, under every policy."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kvpress.evals import answer as answering
from kvpress.evals import executor
from kvpress.evals.runner import run_plan
from kvpress.evals.store import read_rows
from kvpress.models import load_model
from support.models import shipped_policies
from support.plans import plan

POLICIES = [
    "full",
    "h2o",
    "h2o_prefill",
    "finch",
    "key_diff",
    "knorm",
    "observed_attention",
    "a2sf",
    {"name": "a2sf", "evict": "each_row"},
    "a2sf_prefill",
    "keyformer",
    {"name": "ems", "window": 8, "recent": 8, "evict_every": 4},
    "snapkv",
    "pyramid_kv",
    "ada_kv",
    {"name": "streaming_llm", "recent": 60},
    "tova",
    "quest",
    "tidal_decode",
    {"name": "tidal_decode", "correct_every": 3},
    {"name": "recycled", "stride": 4},
    {"name": "recycled", "query_stride": 2, "similarity": 0.8},
]
CHUNKED = {"name": "token_select", "n_init": 4, "n_local": 32, "chunk": 32, "k": 16}
CHUNKS = {"name": "dual_chunk", "chunk_size": 60, "local_size": 12}
PACKED = {"name": "packed", "residual": 16}
SPARSE = {"name": "x_attention", "stride": 4, "block_size": 16, "threshold": 0.6}
SHAPED = {"name": "minference", "default": ["vertical_slash", 16, 40], "sink": 4, "recent": 16, "block_size": 16}
FLEXIBLE = {"name": "flex_prefill", "gamma": 0.6, "min_budget": 16, "block_size": 16}
TREE = {"name": "hip", "k": 16, "window": 24, "sink": 4, "block_size": 16, "dense_layers": 0}
PRUNED = {
    "name": "infinite_hip",
    "n_sink": 4,
    "n_stream": 24,
    "l_c": [8, 4],
    "k": [64, 16],
    "early_k": 16,
    "refresh": [4, 2],
    "block_size": 16,
}
CASCADE = {"name": "kascade", "k": 0.3, "least": 1, "tile": 16}
SKIPPING = {"name": "skip_softmax", "scale": 20, "tile": 16}
CUT = {"name": "gem_filter", "r": 0}
LAZY = {"name": "lazy_llm", "rate": 0.4}
SAME = (
    "index",
    "prompt_hash",
    "prompt_tokens",
    "meta",
    "answer",
    "score",
    "new_tokens",
    "seen",
    "kept",
    "full_bytes",
    "error",
)


@pytest.fixture(scope="module")
def loaded(folder):
    """A model whose attention is far from uniform, so that each sample has an answer of its own."""
    model, tokenizer = load_model(folder, "cpu", "float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model, tokenizer


@pytest.fixture
def rows(loaded):
    """Runs a plan with that model, and gives policy -> its rows by index."""

    def go(wanted):
        outcome = run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded)
        assert outcome.exit_code == 0
        return {run.policy: read_rows(wanted.out / run.id) for run in wanted.runs}

    return go


def sweep():
    others = [CHUNKED, CHUNKS, SPARSE, SKIPPING, FLEXIBLE, SHAPED, TREE, PRUNED, CASCADE, CUT, LAZY, PACKED]
    listed = [one if isinstance(one, str) else one["name"] for one in [*POLICIES, *others]]
    fixed = [one for one in POLICIES if isinstance(one, dict) and "recent" in one]
    return set(shipped_policies()) - set(listed), [
        {"policy": [*(one for one in POLICIES if one not in fixed), CUT], "budget": [0.3]},
        {"policy": [*fixed, CHUNKED, SPARSE, SKIPPING, FLEXIBLE, SHAPED, TREE, PRUNED, CASCADE, CHUNKS, LAZY, PACKED]},
    ]


FED = [{"policy": ["full", "h2o", "snapkv", "quest", "ems"], "budget": [0.3]}, {"policy": [CHUNKED]}]


@pytest.mark.parametrize("query_aware", [True, False])
def test_batches_give_the_answers_of_single_samples(rows, tmp_path, monkeypatch, query_aware):
    """Answers of different lengths, too: what a sample held when its answer ended is its own."""
    ends = set(torch.randperm(258, generator=torch.Generator().manual_seed(0))[:25].tolist())
    monkeypatch.setattr(answering, "end_tokens", lambda *_: ends)
    forgotten, grids = sweep()
    assert not forgotten, f"list {forgotten} here"
    depths = {"lengths": [360], "depths": [0.1, 0.4, 0.6, 0.8, 1.0]}
    task = {"name": "needle", "haystack": "noise"} if query_aware else {"name": "passkey"}  # whose questions are alike
    grids = grids if query_aware else FED
    parts = {"defaults": {"task": task | depths, "query_aware": query_aware}, "sweep": grids}
    single = rows(plan("tiny", tmp_path / "1", **parts))
    batched = rows(plan("tiny", tmp_path / "3", batch_size=3, **parts))
    assert len(single) == (len(POLICIES) + 12 if query_aware else 6)
    for policy, own in single.items():
        for index, row in own.items():
            other = batched[policy][index]
            assert [other[name] for name in SAME] == [row[name] for name in SAME], (policy, index)
            if "evict='each_row'" in policy or policy.startswith(
                (
                    "token_select",
                    "x_attention",
                    "skip_softmax",
                    "flex_prefill",
                    "minference",
                    "hip",
                    "infinite_hip",
                    "kascade",
                    "dual_chunk",
                    "gem_filter",
                    "lazy_llm",
                )
            ):
                # these change a prompt's own attention, or cut it
                assert other["batch"] == 1 and other["read_share"] == row["read_share"]
                continue
            # a batch's few numbers per sequence, and slots as wide as its widest, are shared out; pages come whole
            assert other["bytes"] == pytest.approx(row["bytes"], rel=0.2 if policy.startswith("ada_kv") else 0.02)
            # what is read is as wide as the widest of the batch
            assert other["read_share"] == pytest.approx(
                row["read_share"], rel=0.25 if policy.startswith("ada_kv") else 0.1
            )
            assert row["batch"] == 1 and other["batch"] == (3 if index < 3 else 2)
    assert len({row["new_tokens"] for own in single.values() for row in own.values()}) > 2
    assert len({row["answer"] for row in single["full()"].values()}) > 1


def test_perplexity_in_batches(rows, tmp_path):
    task = {"name": "perplexity", "length": 200, "scored": 30, "stretches": 3}
    parts = {"defaults": {"task": task, "query_aware": False}, "sweep": {"policy": ["full", "h2o"], "budget": [20]}}
    single = rows(plan("tiny", tmp_path / "1", **parts))
    batched = rows(plan("tiny", tmp_path / "3", batch_size=3, **parts))
    for policy, own in single.items():
        for index, row in own.items():
            assert batched[policy][index]["score"] == pytest.approx(row["score"], rel=1e-4)
            assert batched[policy][index]["batch"] == 3


def test_only_samples_of_one_shape_are_together(rows, tmp_path, monkeypatch):
    """Of equal length, and missing in the same policies."""
    batches = []
    real = executor.answer_batch

    def noted(model, tokenizer, policies, samples, shared):
        batches.append((policies[0].name, [sample.source.index for sample in samples]))
        return real(model, tokenizer, policies, samples, shared)

    monkeypatch.setattr(executor, "answer_batch", noted)
    task = {"name": "needle", "lengths": [360, 380], "depths": [0.1, 0.9]}
    wanted = plan(
        "tiny", tmp_path, defaults={"task": task}, sweep={"policy": ["full", "h2o"], "budget": [0.5]}, batch_size=3
    )
    rows(wanted)
    assert sorted(batches) == [(name, [first, first + 1]) for name in ("full", "h2o") for first in (0, 2)]
    full = wanted.out / wanted.runs[0].id
    (full / "finished.json").unlink()
    kept = [line for line in (full / "samples.jsonl").read_text().splitlines() if json.loads(line)["index"] == 2]
    (full / "samples.jsonl").write_text("\n".join(kept) + "\n")
    batches.clear()
    again = rows(wanted)
    assert batches == [("full", [0, 1]), ("full", [3])]
    assert sorted(again["full()"]) == list(range(4))


def test_what_is_too_much_at_once_is_answered_one_by_one(rows, tmp_path, monkeypatch):
    task = {"name": "needle", "lengths": [360], "depths": [0.1, 0.5, 0.9]}
    wanted = plan("tiny", tmp_path / "a", defaults={"task": task}, batch_size=3)
    expected = rows(replace(wanted, out=tmp_path / "b", batch_size=1))

    real = executor.answer_batch

    def full(model, tokenizer, policies, samples, shared):
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, policies, samples, shared)

    monkeypatch.setattr(executor, "answer_batch", full)
    found = rows(wanted)
    assert [row["answer"] for row in found["full()"].values()] == [row["answer"] for row in expected["full()"].values()]
    assert [row["batch"] for row in found["full()"].values()] == [1, 1, 1]
