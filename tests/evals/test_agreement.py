"""Agreement with full attention: against logits of plain passes, in batches, with turns, and where it cannot run."""

import json

import pytest
import torch
from rich.console import Console
from torch.nn import functional

import kvpress
from kvpress.compat import CACHE
from kvpress.evals import answer as answering
from kvpress.evals.results import load_results, settings
from kvpress.evals.runner import run_plan
from kvpress.policies import H2O
from support.plans import plan

CHUNKED = {"name": "token_select", "n_init": 4, "n_local": 32, "chunk": 32, "k": 16}
WHAT = ("index", "score", "kl", "answer", "kept", "seen", "bytes")


def made(wanted, loaded):
    assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).failed == 0
    return {
        run.policy: sorted(
            map(json.loads, (wanted.out / run.id / "samples.jsonl").read_text().splitlines()),
            key=lambda row: row["index"],
        )
        for run in wanted.runs
    }


@torch.inference_mode()
def expected(model, ids, question, tokens, policy):
    """Share of equal top tokens and mean divergence, from logits one by one: the dense model's without any cache."""
    given = torch.tensor([[*ids, *question]])
    dense, reference = [], []
    for _ in range(tokens):
        logits = model(given).logits[0, -1].float()
        dense.append(logits)
        reference.append(int(logits.argmax()))
        given = torch.cat((given, torch.tensor([[reference[-1]]])), 1)
    with kvpress.patch(model, policy):
        output = model(torch.tensor([ids]), use_cache=True)
        cache, logits, found = output[CACHE], output.logits[0, -1], []
        for token in [*question, *reference]:
            found.append(logits.float())
            logits = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True).logits[0, -1]
    found = found[len(question) :]
    same = [int(own.argmax()) == token for own, token in zip(found, reference, strict=True)]
    divergences = [
        float(functional.kl_div(own.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="sum"))
        for own, full in zip(found, dense, strict=True)
    ]
    return sum(same) / tokens, sum(divergences) / tokens


@pytest.mark.parametrize("query_aware", [True, False])
def test_share_of_equal_tokens_and_divergence(folder, loaded, tmp_path, query_aware):
    model, tokenizer = loaded
    defaults = {"query_aware": query_aware, "agreement": 9, "samples": 1}
    wanted = plan(folder, tmp_path, defaults=defaults, sweep={"policy": ["full", "h2o"], "budget": [30]})
    found = made(wanted, loaded)
    run = wanted.runs[1]
    prompt = run.task.prompt(next(iter(run.task.samples(tokenizer))), tokenizer)
    ids, question = (prompt.context + prompt.question, []) if query_aware else (prompt.context, prompt.question)
    share, divergence = expected(model, ids, question, 9, H2O(budget=30))
    (row,) = found["h2o(budget=30)"]
    assert row["score"] == pytest.approx(share)
    assert row["kl"] == pytest.approx(divergence, rel=1e-3)
    assert row["kl"] > 1e-4 and row["new_tokens"] == 9
    (row,) = found["full()"]
    assert (row["score"], row["kl"]) == (1.0, 0.0)
    assert row["token_ms"] > 0


def test_batches_turns_and_own_prompt_passes(folder, loaded, tmp_path):
    """The same however samples are grouped and prompts are shared, with policies that cannot share one among them."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"context": word * 60, "question": "What?", "turns": ["And?"] * (n % 2)}
        for n, word in enumerate(["red ", "sky ", "map "])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sweep = [{"policy": ["full", "h2o"], "budget": [20]}, {"policy": [CHUNKED]}]
    defaults = {"task": {"name": "jsonl", "path": str(path)}, "agreement": 5}
    one = made(plan(folder, tmp_path / "1", defaults=defaults, sweep=sweep), loaded)
    other = made(
        plan(folder, tmp_path / "2", defaults=defaults, sweep=sweep, batch_size=4, share_prompts=False), loaded
    )
    for policy, own in one.items():
        for a, b in zip(own, other[policy], strict=True):
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-9)
            assert {name: a[name] for name in WHAT if name != "kl"} == {name: b[name] for name in WHAT if name != "kl"}
    assert [row["new_tokens"] for row in one["full()"]] == [5, 10, 5]
    assert len({row["kl"] for own in one.values() for row in own}) > 4  # policies and samples do differ


def test_a_full_model_that_fails_is_the_rows_error(folder, loaded, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("too much")

    monkeypatch.setattr(answering, "_continue", full)
    wanted = plan(folder, tmp_path, defaults={"agreement": 3}, sweep={"policy": ["full", "h2o"], "budget": [9]})
    assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).failed == 4
    text = (wanted.out / wanted.runs[0].id / "samples.jsonl").read_text()
    assert "full attention, which is compared with: MemoryError: too much" in text


def test_it_is_a_setting_and_a_run_of_its_own(folder, loaded, tmp_path):
    for defaults in ({"agreement": 3}, {"agreement": 4}, {}):
        wanted = plan(folder, tmp_path, defaults={**defaults, "samples": 1})
        assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).finished == 1
    assert {s.family for s in settings(load_results([tmp_path]))} == {"needle", "agreement with full attention, needle"}


@torch.inference_mode()
def test_perplexity_compares_along_the_text(folder, loaded, tmp_path):
    """The most likely tokens and the divergence at each of the text's own next tokens, and their probability: as logits of
    passes without any cache say for full attention, and fed one by one under the policy. Batches are the same."""
    model, tokenizer = loaded
    task = {"name": "perplexity", "length": 200, "scored": 30, "stretches": 2}
    options = {
        "defaults": {"task": task, "query_aware": False, "agreement": 11},
        "sweep": {"policy": ["full", "h2o"], "budget": [30]},
    }
    wanted = plan(folder, tmp_path / "1", **options)
    found = made(wanted, loaded)
    prompts = [wanted.runs[1].task.prompt(one, tokenizer) for one in wanted.runs[1].task.samples(tokenizer)]
    for row, full, prompt in zip(found["h2o(budget=30)"], found["full()"], prompts, strict=True):
        tokens = prompt.question[:11]
        dense = model(torch.tensor([prompt.context + tokens])).logits[0, -12:-1].log_softmax(-1)
        with kvpress.patch(model, H2O(budget=30)):
            output = model(torch.tensor([prompt.context]), use_cache=True)
            own = [output.logits[0, -1]]
            for token in tokens[:-1]:
                own.append(model(torch.tensor([[token]]), **{CACHE: output[CACHE]}, use_cache=True).logits[0, -1])
        under = torch.stack(own).log_softmax(-1)
        assert row["score"] == pytest.approx(float((dense.argmax(-1) == under.argmax(-1)).float().mean()))
        divergence = functional.kl_div(under, dense, log_target=True, reduction="sum") / 11
        assert row["kl"] == pytest.approx(float(divergence), rel=1e-3) and row["kl"] > 1e-4
        for one, log_probs in ((row, under), (full, dense)):
            nll = -log_probs[torch.arange(11), torch.tensor(tokens)].mean()
            assert one["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-3)
        assert (full["score"], full["kl"]) == (1.0, 0.0) and row["prompt_tokens"] == 211
    together = made(plan(folder, tmp_path / "2", batch_size=2, **options), loaded)
    for policy, rows in found.items():
        for a, b in zip(rows, together[policy], strict=True):
            assert (b["batch"], b["score"]) == (2, a["score"])
            assert (b["kl"], b["perplexity"]) == pytest.approx((a["kl"], a["perplexity"]), rel=1e-3, abs=1e-9)
