"""The contexts of torch that a caller may be in, `inference_mode` and `autocast`, and change between the passes of a cache."""

import copy
from contextlib import nullcontext
from itertools import cycle

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import H2O, Full
from support.matrix import BACK, CASES, check, conversation, expect, prompt, rows_to_ask, sharp_llama
from support.models import tiny_llama, tiny_opt
from test_families import FAMILIES, build

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
BY_NAME = {case.policy.name: [other for other in CASES if other.policy.name == case.policy.name] for case in CASES}
# The second case of a policy is the less usual one.
each_policy = pytest.mark.parametrize("case", [cases[:2][-1] for cases in BY_NAME.values()], ids=lambda case: case.id)
# What is compiled is the same for every policy.
some_policies = pytest.mark.parametrize("name", ["full", "ada_kv"])


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def feed(model, ids, cache, mask=None):
    """The logits of a pass, [batch, count, vocab]; [batch, 1, vocab] where some of its tokens are left out."""
    ids = torch.as_tensor(ids)
    options = {CACHE: cache, **rows_to_ask(model, ids.shape[1])}
    return model(ids, attention_mask=mask, **options).logits.detach().clone()


def padded():
    ids = torch.tensor([[0] * 8 + prompt(9), prompt(17, 1)])
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    return ids, mask


def more(mask):
    return torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)


# ---------------------------------------------------------------------- inference mode


INSIDE, OUTSIDE, NO_GRAD = torch.inference_mode, nullcontext, torch.no_grad


@each_policy
def test_the_passes_of_a_cache_in_and_out_of_inference_mode(model, case):
    """Prompt, steps, a second turn and its steps, against the oracle; the prompt inside, or outside."""
    passes = conversation(3)
    wanted = expect(model, case, passes)
    for contexts in ((INSIDE, OUTSIDE), (OUTSIDE, INSIDE, INSIDE, NO_GRAD)):
        logits, cache = [], DynamicCache(config=model.config)
        with kvpress.patch(model, case.policy):
            for ids, context in zip(passes, cycle(contexts), strict=False):
                with context():
                    logits.append(feed(model, [ids], cache)[0, -1])
        check(wanted, logits, cache)


@each_policy
def test_what_is_done_to_a_cache_in_between(model, case):
    """A padded batch reordered, copied, chosen from and repeated inside, and decoded outside, and the other way round."""

    def logits(contexts):
        ids, mask = padded()
        contexts, got = cycle(contexts), []
        with kvpress.patch(model, case.policy):
            with next(contexts)():
                cache = DynamicCache(config=model.config)
                got.append(feed(model, ids, cache, mask))
            for change in ("reorder", "deepcopy", "select", "repeat", "prompt"):
                for _ in range(2):
                    with next(contexts)():
                        mask = more(mask)
                        got.append(feed(model, torch.full((len(mask), 1), 7), cache, mask))
                with next(contexts)():
                    if change == "reorder":
                        cache.reorder_cache(torch.tensor([1, 0]))
                        mask = mask.flip(0)
                    elif change == "deepcopy":
                        cache = copy.deepcopy(cache)
                    elif change == "select":
                        cache.batch_select_indices(torch.tensor([1]))
                        mask = mask[1:]
                    elif change == "repeat":
                        cache.batch_repeat_interleave(2)
                        mask = mask.repeat_interleave(2, dim=0)
                    else:
                        mask = torch.cat((mask, mask.new_ones(len(mask), 3)), dim=1)
                        got.append(feed(model, [[5, 6, 9]] * len(mask), cache, mask))
        return got

    expected = logits([NO_GRAD])
    for contexts in ([INSIDE, OUTSIDE], [INSIDE, INSIDE, OUTSIDE]):
        for got, wanted in zip(logits(contexts), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@each_policy
def test_generate_goes_on_outside(model, case):
    ids = torch.tensor([prompt(20), prompt(20, 1)])
    turn = torch.tensor([prompt(4, 2), prompt(4, 3)])

    def generate(contexts):
        results, seen, cache = [], ids, DynamicCache(config=model.config)
        with kvpress.patch(model, case.policy):
            for context in contexts:
                with context():
                    options = {CACHE: cache, "attention_mask": torch.ones_like(seen)}
                    seen = model.generate(seen, **options, max_new_tokens=4, do_sample=False)
                    results.append(seen)
                    seen = torch.cat((seen, turn), dim=1)
        return results

    expected = generate([NO_GRAD] * 3)
    for contexts in ((INSIDE, OUTSIDE, INSIDE), (OUTSIDE, INSIDE, OUTSIDE)):
        for got, wanted in zip(generate(contexts), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", BACK, ids=lambda case: case.id)
def test_tokens_are_taken_back_inside_and_fed_again_outside(model, case):
    def logits(first, second):
        cache = DynamicCache(config=model.config)
        with kvpress.patch(model, case.policy):
            with first():
                feed(model, [prompt(20)], cache)
                feed(model, [[7]], cache)
                feed(model, [[8]], cache)
                cache.crop(-2)
            with second():
                got = [feed(model, [[7]], cache)]
                cache.crop(-1)
            with first():
                return [*got, feed(model, [[9]], cache), feed(model, [[10]], cache)]

    for contexts in ((INSIDE, OUTSIDE), (OUTSIDE, INSIDE)):
        for got, wanted in zip(logits(*contexts), logits(NO_GRAD, NO_GRAD), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@each_policy
def test_beams_inside_and_steps_outside(model, case):
    """Beam search reorders the cache at every step."""
    ids = torch.tensor([prompt(16)])

    def after_beams(first, second):
        cache = DynamicCache(config=model.config)
        with kvpress.patch(model, case.policy):
            with first():
                model.generate(ids, **{CACHE: cache}, num_beams=2, max_new_tokens=4, do_sample=False)
            with second():
                return [feed(model, [[7]] * 2, cache) for _ in range(3)]

    for got, wanted in zip(after_beams(INSIDE, OUTSIDE), after_beams(NO_GRAD, NO_GRAD), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@some_policies
def test_compiled_steps(model, name):
    torch.compiler.reset()
    case = BY_NAME[name][0]

    def logits(contexts):
        cache, got = DynamicCache(config=model.config), []
        passes = [prompt(24), *([token] for token in prompt(6, 1))]
        with kvpress.patch(model, case.policy) as handle:
            counter = CompileCounter()
            handle.compile(counter)
            for ids, context in zip(passes, contexts, strict=False):
                with context():
                    got.append(feed(model, [ids], cache))
            assert counter.frame_count == 1  # inside and outside
        return got

    expected = logits([NO_GRAD] * 7)
    for contexts in ((INSIDE, *[NO_GRAD] * 6), (INSIDE, NO_GRAD, INSIDE, NO_GRAD, OUTSIDE, INSIDE, NO_GRAD)):
        for got, wanted in zip(logits(contexts), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@each_policy
def test_scores_and_shared_prompts(model, case):
    """`kvpress.score` inside, and a prompt that was recorded in one context and adopted in the other."""
    text, answers = prompt(19), [prompt(3, 1), prompt(4, 2)]
    with kvpress.patch(model, case.policy):
        expected = kvpress.score(model, text, answers)
        with torch.inference_mode():
            got = kvpress.score(model, text, answers)
    for one, other in zip(got, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)

    ids = torch.tensor([text])
    for first, second in ((INSIDE, OUTSIDE), (OUTSIDE, INSIDE)):
        with first():
            shared = kvpress.record_prompt(model, ids)
        with kvpress.patch(model, case.policy) as handle:
            if not handle.shares_prompts:
                return
            with second():
                cache = handle.adopt_prompt(shared)
                logits = [shared.logits[0], feed(model, [[7]], cache)[0, -1]]
            with first():
                logits.append(feed(model, [[8]], cache)[0, -1])
        check(expect(model, case, [text, [7], [8]]), logits, cache)


@each_policy
def test_a_plain_cache_is_taken_over(model, case):
    """Filled by an unpatched model; and what it held of gradients does not come along."""

    def logits(contexts):
        contexts, got, cache = iter(contexts), [], DynamicCache(config=model.config)
        with next(contexts)():
            feed(model, [prompt(20)], cache)
        with kvpress.patch(model, case.policy):
            for ids, context in zip([prompt(3, 1), [7], [8], [9]], contexts, strict=True):
                with context():
                    got.append(feed(model, [ids], cache))
        assert not any(layer.keys.requires_grad for layer in cache.layers)
        return got

    try:
        expected = logits([NO_GRAD] * 5)
    except PolicyError as error:
        assert "unpatched run" in str(error)
        return
    for contexts in ([INSIDE, OUTSIDE, OUTSIDE, INSIDE, OUTSIDE], [OUTSIDE, OUTSIDE, INSIDE, OUTSIDE, INSIDE]):
        for got, wanted in zip(logits(contexts), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@every_case
def test_nothing_lasting_is_made_in_inference_mode(model, case):
    """So nothing that a policy keeps from step to step can fail later, in whatever order contexts come."""
    cache, (ids, mask) = DynamicCache(config=model.config), padded()
    with kvpress.patch(model, case.policy), torch.inference_mode():
        for _ in range(2):
            feed(model, ids, cache, mask)
            for _ in range(3):
                mask = more(mask)
                feed(model, torch.full((2, 1), 7), cache, mask)
            ids, mask = ids[:, -3:], torch.cat((mask, mask.new_ones(2, 3)), dim=1)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache, mask = copy.deepcopy(cache), mask.flip(0)
            for layer in cache.layers:
                held = {name: tensor for holder in layer._holders() for name, tensor in holder.items()} | vars(
                    layer.facts
                )
                held["tokens"] = layer.texts.seen_tensor
                made = [name for name, x in held.items() if isinstance(x, torch.Tensor) and x.is_inference()]
                assert not made, f"made in inference mode: {made}"


# ---------------------------------------------------------------------- autocast


def dense_and_ours(model, policy, contexts, passes):
    """Logits of each pass, of the unpatched model and of the patched one, in the given contexts."""

    def run():
        cache, got = DynamicCache(config=model.config), []
        mask = None
        for (ids, new), context in zip(passes, cycle(contexts), strict=False):
            mask = new if mask is None or new is None else torch.cat((mask, new), dim=1)
            with context(), torch.no_grad():
                got.append(feed(model, ids, cache, mask).float())
        return got, cache

    dense, _ = run()
    with kvpress.patch(model, policy):
        ours, cache = run()
    return dense, ours, cache


def assert_near(ours, dense, dtype, pad=False):
    """Logits of passes; those of the first prompt's padding mean nothing."""
    for number, (got, wanted) in enumerate(zip(ours, dense, strict=True)):
        rows = slice(8, None) if pad and number == 0 else slice(None)
        assert_near_one(got[:, rows], wanted[:, rows], dtype)


def assert_near_one(got, wanted, dtype):
    """As near to the largest logit as several roundings to the dtype leave; a wrong entry more or less is far from it."""
    difference = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert difference <= 8 * torch.finfo(dtype).eps


def turns(pad):
    """A prompt, four steps, a second turn and two steps, of two sequences; the first one padded or not."""
    ids, mask = padded()
    steps = [(torch.full((2, 1), token), torch.ones(2, 1, dtype=torch.long)) for token in (7, 8, 9, 11)]
    second = torch.tensor([prompt(5, 4), prompt(5, 5)]), torch.ones(2, 5, dtype=torch.long)
    passes = [(ids, mask), *steps, second, *steps[:2]]
    return passes if pad else [(ids.clamp(min=3), None), *((ids, None) for ids, _ in passes[1:])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_policy
def test_room_for_everything_is_dense_under_autocast(model, case, dtype):
    for pad in (False, True):
        dense, ours, cache = dense_and_ours(model, case.roomy, [lambda: autocast(dtype)], turns(pad))
        assert_near(ours, dense, dtype, pad)
    for layer in cache.layers:
        assert layer.dtype == layer.keys.dtype == layer.values.dtype == dtype
        assert all(stat.dtype == torch.float32 for stat in layer.stats.values())


@each_policy
def test_a_prefix_under_autocast_goes_on_without_and_the_reverse(model, case):
    """The cache keeps the dtype of its first pass."""
    for pad, contexts in (
        (True, [autocast, nullcontext]),
        (False, [nullcontext, autocast]),
        (True, [nullcontext, autocast]),
    ):
        dense, ours, cache = dense_and_ours(model, case.roomy, contexts, turns(pad))
        assert_near(ours, dense, torch.bfloat16, pad)
        held = torch.bfloat16 if contexts[0] is autocast else torch.float32
        assert all(layer.dtype == layer.keys.dtype == layer.values.dtype == held for layer in cache.layers)


@each_policy
def test_generate_under_autocast(model, case):
    """Every policy, evicting and selecting, greedy and by beams, padded; what is kept is as many entries as without."""
    ids, mask = padded()
    with kvpress.patch(model, case.policy) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        plain = handle.report().total
        with autocast():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            told = handle.report().total
            model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False)
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, ids.shape[1] + 5)
    assert (told.kept, told.seen) == (plain.kept, plain.seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_under_autocast(family):
    """Query, key and value arrive in one dtype or in several, by the family."""
    model = build(family)
    for policy in (Full(), H2O(budget=500)):
        dense, ours, _ = dense_and_ours(model, policy, [autocast], turns(pad=True))
        assert_near(ours, dense, torch.bfloat16, pad=True)


def test_statistics_are_float32_under_autocast(model):
    """Each row gives out the group's whole attention: 2 per row and kv head. In bfloat16 the sum would be off by 0.01."""
    for pad in (False, True):
        _, _, cache = dense_and_ours(model, H2O(budget=500), [autocast], turns(pad))
        rows = torch.tensor([[20.0 if pad else 28.0], [28.0]]).expand(2, 2)
        for layer in cache.layers:
            torch.testing.assert_close(layer.stats["mass"].sum(-1), 2 * rows, atol=1e-4, rtol=0)


def test_exact_and_differentiable_without_a_cache_under_autocast(model):
    ids, mask = padded()

    def run():
        with autocast():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        weight = model.model.layers[0].self_attn.k_proj.weight
        return logits.detach()[:, 8:].float(), torch.autograd.grad(logits[:, 8:].float().square().mean(), weight)[0]

    dense, expected = run()
    with kvpress.patch(model, H2O(budget=5)):
        logits, gradient = run()
    assert_near_one(logits, dense, torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99


@some_policies
def test_compiled_steps_under_autocast(model, name):
    torch.compiler.reset()
    case = BY_NAME[name][0]
    passes = [(prompt(24), None), *(([token], None) for token in prompt(4, 1))]
    passes = [(torch.tensor([ids]), mask) for ids, mask in passes]
    _, ours, _ = dense_and_ours(model, case.roomy, [autocast], passes)
    cache, counter = DynamicCache(config=model.config), CompileCounter()
    with kvpress.patch(model, case.roomy) as handle, torch.no_grad():
        handle.compile(counter)
        for (ids, _), wanted in zip(passes, ours, strict=True):
            with autocast():
                got = feed(model, ids, cache)
            assert_near_one(got, wanted, torch.bfloat16)
        assert counter.frame_count == 1
    torch.compiler.reset()


@each_policy
def test_a_plain_cache_and_a_shared_prompt_under_autocast(model, case):
    """A `DynamicCache` filled under autocast holds keys and values of different dtypes."""
    dtype, text = torch.bfloat16, torch.tensor([prompt(20)])
    passes = [(text, None), (torch.tensor([[4, 5, 6]]), None), (torch.tensor([[7]]), None), (torch.tensor([[8]]), None)]
    dense, _, _ = dense_and_ours(model, Full(), [lambda: autocast(dtype)], passes)
    cache = DynamicCache(config=model.config)
    with autocast(dtype), torch.no_grad():
        feed(model, text, cache)
        shared = kvpress.record_prompt(model, text)
    with kvpress.patch(model, case.roomy) as handle, torch.no_grad():
        if handle.shares_prompts:
            with autocast(dtype):
                adopted = handle.adopt_prompt(shared)
                for (ids, _), wanted in zip(passes[1:], dense[1:], strict=True):
                    assert_near_one(feed(model, ids, adopted), wanted, dtype)
            adopted = handle.adopt_prompt(shared)
            feed(model, [[7]], adopted)
            assert {layer.dtype for layer in adopted.layers} == {dtype}
        try:
            for (ids, _), wanted in zip(passes[1:], dense[1:], strict=True):
                with autocast(dtype):
                    assert_near_one(feed(model, ids, cache), wanted, dtype)
        except PolicyError as error:
            assert "unpatched run" in str(error)


def test_linear_layers_and_mlps_give_autocasts_dtype():
    """As torch's own do, whatever runs them: a step's linear layer with a bias, and an MLP in tiles."""
    model = tiny_opt()
    linear = torch.nn.Linear(512, 512)
    model.extra = linear
    long = tiny_llama()
    hidden, wide = torch.randn(1, 1, 512), torch.randn(1, 600, 32)
    mlp = long.model.layers[0].mlp
    with torch.no_grad(), autocast():
        expected, expected_mlp = linear(hidden), mlp(wide)
        with kvpress.patch(model, Full()), kvpress.patch(long, Full()):
            assert "forward" in linear.__dict__ and "forward" in mlp.__dict__
            got, got_mlp = linear(hidden), mlp(wide)
    assert got.dtype == expected.dtype == got_mlp.dtype == expected_mlp.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_mlp, expected_mlp)


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", ["full", "h2o", "snapkv", "quest", "ada_kv"])
def test_a_padded_first_prompt_is_attended_without_a_mask(model, name, monkeypatch):
    """So each sequence can take the fastest kernel, which knows none."""
    masks, attend = [], kvpress.prompt.prompt_attention

    def spy(query, key, value, valid=None, **options):
        masks.append(valid)
        return attend(query, key, value, valid, **options)

    monkeypatch.setattr(kvpress.prompt, "prompt_attention", spy)
    ids, mask = padded()
    case = next(case for case in CASES if case.policy.name == name)
    with kvpress.patch(model, case.policy), torch.no_grad():
        model(ids, attention_mask=mask)
        assert masks == [None] * 4  # of two layers and two sequences
