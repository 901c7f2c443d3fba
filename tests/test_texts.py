"""What a cache knows of its sequences is one object for all its layers, whatever transformers does with them one by one."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import H2O, Full, TidalDecode
from kvpress.policy import Call, Feed, Feeds, RoutePolicy, Texts
from kvpress.registry import make_policies
from support.matrix import prompt, sharp_llama


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=3)


def texts_of(cache) -> Texts:
    """The one object that all layers of the cache share."""
    found = {id(layer.texts): layer.texts for layer in cache.layers}
    assert len(found) == 1
    return next(iter(found.values()))


@torch.no_grad()
def fill(model, steps=2, mask=None):
    """A cache of two sequences of 9 columns and some decode steps."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt(9), prompt(9, 1)]), attention_mask=mask, **{CACHE: cache})
    for step in range(steps):
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        model(torch.tensor([[5 + step], [7 + step]]), attention_mask=mask, **{CACHE: cache})
    return cache


def padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return mask


@pytest.mark.parametrize("policy", [Full(), H2O(budget=0.5), H2O(budget=0.5, evict="each_row")], ids=str)
def test_columns_and_real_tokens(model, policy):
    with kvpress.patch(model, policy):
        texts = texts_of(fill(model, mask=padded()))
        assert (texts.columns, texts.seen_tensor.tolist()) == (11, [7, 11])
        texts = texts_of(fill(model))
        assert (texts.columns, texts.seen, texts.seen_tensor.tolist()) == (11, [11, 11], [11, 11])


def test_beams_change_the_sequences_once(model):
    with kvpress.patch(model, TidalDecode(k=2, sparse_layer_start=0, correct_every=4)):
        cache = fill(model, mask=padded())
        cache.batch_repeat_interleave(2)
        assert texts_of(cache).seen_tensor.tolist() == [7, 7, 11, 11]
        assert texts_of(cache).inputs.tolist() == [[5, 6], [5, 6], [7, 8], [7, 8]]
        cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        assert texts_of(cache).seen_tensor.tolist() == [11, 7]
        assert texts_of(cache).inputs.tolist() == [[7, 8], [5, 6]]
        assert texts_of(cache).columns == cache.get_seq_length() == 11


def test_tokens_are_taken_back_once(model):
    with kvpress.patch(model, TidalDecode(k=2, sparse_layer_start=0, correct_every=4)):
        cache = fill(model)
        cache.crop(-1)
        texts = texts_of(cache)
        assert (texts.columns, texts.seen, texts.seen_tensor.tolist()) == (10, [10, 10], [10, 10])
        assert texts.inputs.tolist() == [[5], [7]]
        assert [layer.length for layer in cache.layers] == [10] * 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "saved"]
)
def test_a_copy_goes_its_own_way(model, copied):
    with kvpress.patch(model, Full()):
        cache = fill(model)
        other = copied(cache)
        with torch.no_grad():
            model(torch.tensor([[3], [4]]), **{CACHE: other})
        assert (texts_of(cache).columns, texts_of(other).columns) == (11, 12)
        assert (cache.get_seq_length(), other.get_seq_length()) == (11, 12)


def test_layers_share_anew_after_a_reset(model):
    with kvpress.patch(model, Full()) as handle, torch.no_grad():
        cache = fill(model)
        cache.reset()
        assert cache.get_seq_length() == 0
        model(torch.tensor([prompt(5)]), **{CACHE: cache})
        assert (texts_of(cache).columns, texts_of(cache).seen) == (5, [5])
        del cache
        assert handle.report().total.seen == 5  # what a report needs outlives the cache


# ------------------------------------------------------------------ the route role


@dataclass(frozen=True, kw_only=True)
class Halves(RoutePolicy):
    """Prompts in two runs; the caller gets the rows of the second, without its first one."""

    name = "halves"

    def feeds(self, call: Call, texts: Texts) -> Feeds:
        if call.count == 1:
            yield call
            return
        half = call.count // 2
        before = texts.columns
        yield Feed(call.tokens[:, :half], None)
        assert texts.columns == before + half
        yield Feed(call.tokens[:, half:], None, first=1)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3, 7])
def test_a_route_of_several_runs(model, padding):
    ids = torch.tensor([prompt(10)])
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, :padding] = 0
    expected = model(ids, attention_mask=mask[:, :10]).logits
    more = model(torch.cat((ids, torch.tensor([[9]])), dim=1), attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    with kvpress.patch(model, Halves()) as handle:
        got = model(ids, attention_mask=mask[:, :10], **{CACHE: cache}).logits
        real = max(0, padding - 6)
        torch.testing.assert_close(got[:, real:], expected[:, 6 + real :], atol=1e-5, rtol=1e-4)
        got = model(torch.tensor([[9]]), attention_mask=mask, **{CACHE: cache}).logits
        torch.testing.assert_close(got, more[:, -1:], atol=1e-5, rtol=1e-4)
        assert handle.report().total.seen == 11 - padding


def test_a_route_beside_eviction(model):
    """The halves of a prompt are passes: what is kept is what two passes leave."""
    policy, ids = H2O(budget=4), prompt(12)
    with kvpress.patch(model, policy), torch.no_grad():
        plain = DynamicCache(config=model.config)
        for part in (ids[:6], ids[6:]):
            model(torch.tensor([part]), **{CACHE: plain})
    with kvpress.patch(model, [policy, Halves()]), torch.no_grad():
        routed = DynamicCache(config=model.config)
        model(torch.tensor([ids]), **{CACHE: routed})
    for one, other in zip(plain.layers, routed.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.keys, other.keys)


def test_a_role_is_played_once():
    assert TidalDecode.roles == ("selection", "route")
    with pytest.raises(PolicyError, match=r"tidal_decode\(\) and halves\(\) both play the role 'route'"):
        make_policies([TidalDecode(), Halves()])
