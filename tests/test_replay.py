"""A decode step that is recorded once and replayed gives what it gives without: it reads no number from the host."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import H2O, Quest, SnapKV
from kvpress.replay import ReplayedSteps
from support.matrix import GRAPHS, TOGETHER, rows_to_ask, sharp_llama
from support.models import token_ids
from support.recorder import Recorder

STEPS = 14


def replaying(handle, record=Recorder):
    """Let a handle's decode steps be recorded and replayed as they would be on a GPU."""
    forward, made = handle._patched_forward(), []

    def kept(function):
        made.append(record(function))
        return made[-1]

    forward.run = ReplayedSteps(forward.inner, forward.cache_argument, kept)
    return made


def generate(model, inputs, steps=STEPS):
    return model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_scores=True, return_dict_in_generate=True
    )


@pytest.mark.parametrize("padding", [0, 5], ids=["alike", "padded"])
@pytest.mark.parametrize(
    "policies",
    [*([case.policy] for case in GRAPHS), *TOGETHER],
    ids=lambda several: "+".join(one.describe().replace(" ", "") for one in several),
)
def test_every_policy(policies, padding):
    ids = token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    model, inputs = sharp_llama(layers=3), {"input_ids": ids, "attention_mask": mask}
    with kvpress.patch(model, policies) as handle:
        plain = generate(model, inputs)
        told = handle.report().total
    with kvpress.patch(model, policies) as handle:
        made = replaying(handle)
        replayed = generate(model, inputs)
        found = handle.report().total
    assert (found.seen, found.kept, found.read_share) == (told.seen, told.kept, told.read_share)
    assert (
        told.bytes <= found.bytes <= 1.05 * told.bytes
    )  # where widths must not change, there are some places to spare
    if not getattr(policies[0], "correct_every", 0):  # whose steps are cut short by prompt passes
        assert 1 <= len(made) <= 6
    assert torch.equal(replayed.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(replayed.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("policy", [SnapKV(budget=0.5, window=4), H2O(budget=10), Quest(budget=8, page_size=4)])
def test_turns_copies_and_beams_are_recorded_anew(policy):
    """After a second turn, in a copy of a cache and with its sequences in another order a recording is not of these tensors."""
    model, results = sharp_llama(layers=3), []
    for replay in (False, True):
        with kvpress.patch(model, policy) as handle:
            made = replaying(handle) if replay else []
            cache, logits = DynamicCache(config=model.config), []

            def feed(ids, cache, logits=logits):
                logits.append(model(ids, **{CACHE: cache}).logits[:, -1])

            feed(token_ids(2, 24), cache)
            for step in range(5):
                feed(token_ids(2, 1, step), cache)
            feed(token_ids(2, 6, 9), cache)
            for step in range(4):
                feed(token_ids(2, 1, step), cache)
            other = copy.deepcopy(cache)
            for held in (cache, other):
                for step in range(3):
                    feed(token_ids(2, 1, step), held)
            cache.reorder_cache(torch.tensor([1, 0]))
            for step in range(3):
                feed(token_ids(2, 1, step), cache)
            if replay:
                assert len(made) >= 4
            results.append(torch.stack(logits))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_without_a_gpu_it_is_refused():
    handle = kvpress.patch(sharp_llama(), H2O(budget=8))
    with pytest.raises(PolicyError, match="backend='replay' records CUDA graphs, and LlamaForCausalLM is on cpu"):
        handle.compile("replay")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["full", "h2o", "snapkv", "tidal_decode"])
def test_on_a_gpu(policy):
    """As a CUDA graph."""
    model, inputs = sharp_llama(layers=3).cuda(), {"input_ids": token_ids(2, 24).cuda()}
    with kvpress.patch(model, policy):
        plain = generate(model, inputs)
    with kvpress.patch(model, policy) as handle:
        handle.compile("replay")
        replayed = generate(model, inputs)
    torch.testing.assert_close(torch.stack(replayed.scores), torch.stack(plain.scores), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.id)
def test_a_step_waits_for_nothing_on_a_gpu(case):
    """torch raises an error where the host waits for the device."""
    model, ids = sharp_llama(layers=3).cuda(), token_ids(1, 40).cuda()
    with kvpress.patch(model, case.policy) as handle:
        handle.compile("replay")
        cache = DynamicCache(config=model.config)
        model(ids[:, :16], **{CACHE: cache}, **rows_to_ask(model, 16))
        places = torch.arange(40, device=ids.device)[None]
        for step in range(16, 40):
            # The first steps make what policies keep, and record.
            torch.cuda.set_sync_debug_mode("error" if step >= 36 else "default")
            try:
                model(ids[:, step : step + 1], position_ids=places[:, step : step + 1], **{CACHE: cache})
            finally:
                torch.cuda.set_sync_debug_mode("default")
