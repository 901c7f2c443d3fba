"""Scores of given texts: the model's own under full attention, the oracle's under a policy, however they are batched."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import kvpress
from kvpress.errors import PolicyError
from kvpress.policies import H2O, SnapKV, StreamingLLM, TokenSelect
from support.matrix import CASES, VOCAB, Case, expect, prompt, sharp_llama
from support.models import tiny_opt

CONTEXT, TEXT = prompt(20), prompt(7, 1)
MODES = ["decode", "sequential"]


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


@torch.no_grad()
def dense(model: Any, context: list[int], text: list[int]) -> torch.Tensor:
    """Log-probabilities of the text from one forward pass over everything."""
    logits = model(torch.tensor([context + text])).logits[0].float().log_softmax(-1)
    return torch.stack([logits[len(context) - 1 + i, token] for i, token in enumerate(text)])


def oracle(model: Any, case: Case, context: list[int], text: list[int], mode: str) -> torch.Tensor:
    passes = [context] if mode == "decode" else [[token] for token in context]
    steps = expect(model, case, passes + [[token] for token in text[:-1]])[len(passes) - 1 :]
    return torch.stack([step.logits[-1].log_softmax(-1)[token] for step, token in zip(steps, text, strict=True)])


def same(score: kvpress.Score, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(score.log_probs), expected.float(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patched", [False, True])
def test_full_attention_is_the_models_own(model: Any, patched: bool, mode: Any) -> None:
    with kvpress.patch(model, "full") if patched else nullcontext():
        score = kvpress.score(model, CONTEXT, TEXT, mode=mode)
    expected = dense(model, CONTEXT, TEXT)
    same(score, expected)
    assert score.count == 7
    assert score.sum == pytest.approx(expected.sum().item(), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean().item()), rel=1e-4)


def test_greedy_texts_are_seen_as_such(model: Any) -> None:
    """What `generate` gives, whole and in part; with one token changed anywhere it is not; beside others in a batch."""
    text = model.generate(torch.tensor([CONTEXT]), max_new_tokens=4, do_sample=False)[0, len(CONTEXT) :].tolist()
    changed = [[*text[:at], (text[at] + 1) % VOCAB, *text[at + 1 :]] for at in range(4)]
    scores = kvpress.score(model, CONTEXT, [text, text[:2], *changed])
    assert [score.is_greedy for score in scores] == [True, True, False, False, False, False]


@pytest.mark.parametrize("case", [c for c in CASES if c.policy.roles], ids=lambda case: case.id)
def test_a_policy_shows(model: Any, case: Case) -> None:
    """The oracle's log-probabilities, which are not those of full attention."""
    context, text = prompt(30), prompt(8, 1)
    with kvpress.patch(model, case.policy):
        score = kvpress.score(model, context, text)
    same(score, oracle(model, case, context, text, "decode"))
    assert (torch.tensor(score.log_probs) - dense(model, context, text)).abs().max() > 0.05


@pytest.mark.parametrize("policy", [H2O(heavy=3, recent=5), StreamingLLM(sink=2, recent=6)], ids=lambda p: p.describe())
def test_sequential_acts_from_the_first_token(model: Any, policy: Any) -> None:
    case = next(case for case in CASES if case.policy == policy)
    with kvpress.patch(model, policy):
        score = kvpress.score(model, CONTEXT, TEXT, mode="sequential")
        other = kvpress.score(model, CONTEXT, TEXT)
    same(score, oracle(model, case, CONTEXT, TEXT, "sequential"))
    assert abs(score.sum - other.sum) > 0.1


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "policy", [None, H2O(heavy=3, recent=5), TokenSelect(n_init=2, n_local=5, k=4, chunk=4)], ids=str
)
def test_forks_and_padding_are_as_alone(model: Any, policy: Any, mode: Any) -> None:
    """Several continuations of several contexts, all of different lengths.

    No token comes twice in a text: TokenSelect's first layer has the same votes for equal tokens, and rounding, which
    depends on the batch, would choose among them.
    """
    distinct = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(0)) + 3
    contexts = [distinct[:count].tolist() for count in (20, 13, 26)]
    lengths = [[5, 1], [8], [2, 6, 6]]
    groups = [[distinct[30 + i : 30 + i + count].tolist() for i, count in enumerate(row)] for row in lengths]
    with nullcontext() if policy is None else kvpress.patch(model, policy):
        found = kvpress.score(model, contexts, groups, mode=mode)
        for context, group, scores in zip(contexts, groups, found, strict=True):
            assert [score.count for score in scores] == list(map(len, group))
            for text, score in zip(group, scores, strict=True):
                same(score, torch.tensor(kvpress.score(model, context, text, mode=mode).log_probs))


def test_the_context_is_computed_once(model: Any) -> None:
    fed: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        with kvpress.patch(model, H2O(budget=0.3)) as handle:
            kvpress.score(model, CONTEXT, [prompt(3, 1), prompt(2, 2), prompt(3, 3)])
            assert handle.report().total.kept == 3 * 6
    finally:
        hook.remove()
    assert fed == [(1, 20), (3, 1), (3, 1)]


def test_nesting_is_kept(model: Any) -> None:
    """What goes in as a list comes out as one; tensors and tuples do too."""
    one = kvpress.score(model, CONTEXT, TEXT)
    assert isinstance(one, kvpress.Score)
    assert kvpress.score(model, torch.tensor(CONTEXT), torch.tensor(TEXT)) == one
    assert kvpress.score(model, tuple(CONTEXT), [tuple(TEXT)]) == [one]
    assert kvpress.score(model, torch.tensor([CONTEXT]), torch.tensor([TEXT])) == [one]
    assert kvpress.score(model, [CONTEXT], [[TEXT]]) == [[one]]


def test_learned_positions() -> None:
    """A model that counts its positions itself, from the mask."""
    model = tiny_opt()
    contexts, texts = [prompt(9), prompt(4, 1)], [prompt(3, 2), prompt(5, 3)]
    for patched in (False, True):
        with kvpress.patch(model, "full") if patched else nullcontext():
            found = kvpress.score(model, contexts, texts)
        for context, text, score in zip(contexts, texts, found, strict=True):
            same(score, dense(model, context, text))


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("context", "text", "message"),
    [
        ([], TEXT, "a context is empty; give at least a start token"),
        (CONTEXT, [], "a continuation is empty"),
        (CONTEXT, [TEXT, []], "a continuation is empty"),
        ([CONTEXT, []], [TEXT, TEXT], "a context is empty"),
        ([CONTEXT, CONTEXT], [TEXT], "2 contexts and 1 entries"),
        ([CONTEXT], TEXT, "nested 2 and 1 deep"),
        ([CONTEXT], [[[TEXT]]], "nested 2 and 4 deep"),
        ([CONTEXT, CONTEXT], [[TEXT], TEXT], "a continuation is 14"),
        ([CONTEXT], [[]], "a continuation is empty"),
        ("text", TEXT, "nested 0 and 1 deep"),
        (CONTEXT, [5, 97], "a continuation has the token 97; give ids from 0 to 96"),
        ([5, -1], TEXT, "a context has the token -1"),
        ([5, 1.5], TEXT, "a context has the token 1.5"),
        ([5, "a"], TEXT, "a context has the token 'a'"),
    ],
    ids=str,
)
def test_bad_ids(model: Any, context: Any, text: Any, message: str) -> None:
    with pytest.raises(PolicyError) as error:
        kvpress.score(model, context, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_mode(model: Any) -> None:
    with pytest.raises(PolicyError, match="mode='stepwise' does not work"):
        kvpress.score(model, CONTEXT, TEXT, mode="stepwise")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (H2O(budget=0.2), "keeps a share of the prompt; give its budget as entries"),
        (SnapKV(budget=64), "evicts after prompts only"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_sequential_refuses_what_a_prompt_of_one_token_cannot_show(model: Any, policy: Any, message: str) -> None:
    with kvpress.patch(model, policy), pytest.raises(PolicyError, match=message):
        kvpress.score(model, CONTEXT, TEXT, mode="sequential")


def test_no_gradients_are_kept(model: Any) -> None:
    """A score is numbers; the model's mode and the random state are left alone."""
    state, training = torch.random.get_rng_state(), model.training
    kvpress.score(model, CONTEXT, TEXT)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
