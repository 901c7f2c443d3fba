"""Budgets, quotas and what every eviction policy has in common, on a cache layer without a model."""

import dataclasses
import gc
import math
from fractions import Fraction

import pytest
import torch

import kvpress
from kvpress import PolicyError
from kvpress.policies import H2O, AdaKV, Full, Keyformer, PyramidKV, SnapKV, StreamingLLM
from kvpress.policy import (
    Budget,
    Entries,
    EvictionPolicy,
    Mass,
    Nothing,
    Policy,
    Quota,
    Window,
    check_budget,
    entries_for,
    pool_scores,
)
from kvpress.tokens import masked_tokens, plain_tokens
from support.layers import feed, in_use, kept, new_layer, observe, prompt, random_mass, row, step, stepping
from support.matrix import EVICTING, sharp_llama
from support.matrix import prompt as text

LIMIT = torch.finfo(torch.float32).max

POLICIES = {
    "h2o": H2O(heavy=2, recent=3),
    "h2o-heavy-only": H2O(heavy=5, recent=0),
    "h2o-recent-only": H2O(heavy=0, recent=5),
    "streaming": StreamingLLM(sink=2, recent=3),
    "streaming-no-sink": StreamingLLM(sink=0, recent=5),
    "snapkv": SnapKV(budget=5, window=2, kernel_size=3),
    "snapkv-max": SnapKV(budget=5, window=2, kernel_size=3, pooling="max"),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
DROPPING = {name: policy for name, policy in POLICIES.items() if policy.evict_every is not None}
dropping_policy = pytest.mark.parametrize("policy", DROPPING.values(), ids=DROPPING.keys())


def run_prompt(policy, count, batch=1, kv_heads=1, layer=None, seed=0, mass=None):
    """A prompt pass with whatever the policy observes, from the seed."""
    layer = new_layer(policy) if layer is None else layer
    past = layer.length
    tokens = feed(layer, count, batch=batch, kv_heads=kv_heads, seed=seed)
    if isinstance(policy.observes, Mass):
        layer.add_mass(random_mass(batch, kv_heads, layer.length, seed=seed) if mass is None else mass)
    if isinstance(policy.observes, Window):
        generator = torch.Generator().manual_seed(seed + 1)
        observe(layer, torch.randn(batch, 2 * kv_heads, count, 4, generator=generator), tokens, past)
    layer.close_prompt(tokens)
    return layer


class TestBudgets:
    """An int is entries, a float a share of the prompt, rounded down."""

    @pytest.mark.parametrize(
        ("budget", "tokens", "expected"),
        [
            pytest.param(7, 3, 7, id="int-whatever-the-prompt"),
            pytest.param(0.29, 100, 29, id="0.29-of-100"),
            pytest.param(0.57, 100, 57, id="0.57-of-100"),
            pytest.param(0.1, 30, 3, id="0.1-of-30"),
            pytest.param(0.7, 10, 7, id="0.7-of-10"),
            pytest.param(0.2, 9, 1, id="0.2-of-9"),
            pytest.param(0.2, 4, 0, id="0.2-of-4"),
            pytest.param(0.999, 1000, 999, id="0.999-of-1000"),
            pytest.param(1.0, 1000, 1000, id="all"),
            pytest.param(0.0, 1000, 0, id="none"),
        ],
    )
    def test_entries_for(self, budget, tokens, expected):
        """Hand values, with shares that have no exact binary form."""
        assert entries_for(budget, tokens) == expected

    @pytest.mark.parametrize("tokens", [1, 7, 100, 1000, 4097, 131072, 1_000_000], ids="{}-tokens".format)
    def test_shares_are_exact_decimals(self, tokens):
        """All shares of two and three digits are rounded down as the decimal that was written."""
        for digits in range(1, 1000):
            share = digits / 1000
            assert entries_for(share, tokens) == math.floor(Fraction(digits, 1000) * tokens)

    @pytest.mark.parametrize("value", [1, 512, 0.2, 1.0, 1e-9], ids=str)
    def test_accepted(self, value):
        """Ints from 1 and floats in (0, 1]."""
        check_budget(value)

    @pytest.mark.parametrize("value", [0, 0.0], ids=str)
    def test_zero_only_where_allowed(self, value):
        """A part of a budget may be empty, a budget may not."""
        check_budget(value, minimum=0)
        with pytest.raises(PolicyError, match=rf"budget={value} is too small.*(at least 1|\(0, 1\])"):
            check_budget(value)


class TestPolicies:
    """Policies are values."""

    @every_policy
    def test_frozen_and_comparable(self, policy):
        """Equal fields make equal policies, which can be keys; fields cannot be set."""
        twin = dataclasses.replace(policy)
        assert twin == policy and hash(twin) == hash(policy) and twin is not policy
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.evict = "after_prompt"
        assert dataclasses.replace(policy, evict="after_prompt") != policy

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (Full(), "full()"),
            (H2O(budget=0.2), "h2o(budget=0.2)"),
            (H2O(heavy=2, recent=3), "h2o(heavy=2, recent=3)"),
            (SnapKV(), "snapkv()"),
            (SnapKV(budget=64, pooling="max"), "snapkv(budget=64, pooling='max')"),
            (StreamingLLM(recent=8, rope="original"), "streaming_llm(recent=8, rope='original')"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_describe(self, policy, text):
        """The name with the fields that are not at their default, in the order of the class."""
        shown = set(policy.describe().rstrip(")").split("(")[1].split(", "))
        expected = set(text.rstrip(")").split("(")[1].split(", "))
        assert policy.describe().split("(")[0] == text.split("(")[0] and shown == expected

    @every_policy
    def test_by_name(self, policy):
        """A mapping with the fields builds the same policy, and overrides win."""
        mapping = {"name": policy.name, **dataclasses.asdict(policy)}
        assert kvpress.make_policy(mapping) == policy
        assert kvpress.make_policy(mapping, evict="after_prompt") == dataclasses.replace(policy, evict="after_prompt")
        assert type(policy) is kvpress.available()[policy.name]

    def test_a_new_policy_is_one_class(self):
        """A subclass with a name is available by that name, and its score decides."""

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Oddest(EvictionPolicy):
            """Keeps odd positions first."""

            name = "oddest_for_a_test"
            budget: Budget = 3

            def quota(self, tokens, layer, layers):
                return Quota(entries_for(self.budget, tokens), 1)

            def score(self, entries):
                return (entries.positions % 2).float()

        policy = kvpress.make_policy("oddest_for_a_test")
        assert policy == Oddest()
        assert kept(prompt(policy, 7)) == [1, 3, 6]
        del policy, Oddest
        gc.collect()
        assert "oddest_for_a_test" not in kvpress.available()  # other tests see the package's policies alone

    @pytest.mark.parametrize(
        ("kernel_size", "pooling", "expected"),
        [
            pytest.param(3, "max", [0.0, 9.0, 9.0, 9.0, 0.0], id="max-3"),
            pytest.param(3, "avg", [0.0, 3.0, 3.0, 3.0, 0.0], id="avg-3"),
            pytest.param(1, "max", [0.0, 0.0, 9.0, 0.0, 0.0], id="max-1-is-none"),
            pytest.param(1, "avg", [0.0, 0.0, 9.0, 0.0, 0.0], id="avg-1-is-none"),
            pytest.param(5, "max", [9.0] * 5, id="max-5"),
            pytest.param(5, "avg", [1.8] * 5, id="avg-5-counts-the-padding"),
        ],
    )
    def test_pool_scores(self, kernel_size, pooling, expected):
        """The spec's row [0, 0, 9, 0, 0]."""
        pooled = pool_scores(row(0.0, 0.0, 9.0, 0.0, 0.0), kernel_size, pooling)
        torch.testing.assert_close(pooled, row(*expected))

    def test_pooling_at_the_ends(self):
        """Average pooling counts zeros past the ends; maximum pooling does not, even of negative scores."""
        torch.testing.assert_close(pool_scores(row(3.0, 0.0, 6.0), 3, "avg"), row(1.0, 3.0, 2.0))
        torch.testing.assert_close(pool_scores(row(-3.0, -5.0, -6.0), 3, "max"), row(-3.0, -3.0, -5.0))

    @pytest.mark.parametrize("policy", [case.policy for case in EVICTING], ids=lambda policy: policy.describe())
    def test_keeps_a_share_where_the_quota_depends_on_the_prompt(self, policy):
        """In any layer of a few: also where the share is a default, an inner policy's, or of one part only."""
        quotas = [
            [policy.quota(tokens, layer, layers) for layers in (1, 2, 3) for layer in range(layers)]
            for tokens in (1, 1 << 30)
        ]
        assert policy.keeps_a_share == (quotas[0] != quotas[1])

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [
            (H2O(), True),
            (H2O(heavy=4, recent=0.5), True),
            (H2O(heavy=4, recent=3), False),
            (StreamingLLM(), False),
            (StreamingLLM(recent=0.5), True),
            (AdaKV(SnapKV(budget=0.5)), True),
            (AdaKV(SnapKV(budget=64)), False),
            (Keyformer(budget=64, recent_ratio=0.3), False),
            (PyramidKV(budget=64), True),  # a short prompt has no pyramid
            (PyramidKV(budget=64, beta=1), False),
        ],
        ids=lambda value: value.describe() if isinstance(value, Policy) else "",
    )
    def test_keeps_a_share_by_hand(self, policy, expected):
        assert policy.keeps_a_share == expected

    def test_what_was_not_observed_is_refused_by_name(self):
        """A policy that scores by attention and observes nothing is told what to say."""
        entries = Entries(torch.zeros(1, 1, 3, dtype=torch.int32), torch.ones(1, 1, 3, dtype=torch.bool))
        for name in ("mass", "last_rows"):
            with pytest.raises(PolicyError, match=rf"'{name}' was not observed.*`observes`.*Mass\(\)"):
                getattr(entries, name)

        class Blind(H2O):
            name = ""
            observes = Nothing()

        model = sharp_llama()
        with torch.no_grad(), kvpress.patch(model, Blind(budget=4)), pytest.raises(PolicyError, match="`observes`"):
            model(torch.tensor([text(20)]))


class TestSelection:
    """What a layer keeps under any policy."""

    @every_policy
    @pytest.mark.parametrize("tokens", [1, 4, 5], ids="{}-tokens".format)
    def test_u1_short_prompts_stay_whole(self, policy, tokens):
        """U1: nothing goes while the budget holds the prompt."""
        assert kept(run_prompt(policy, tokens)) == list(range(tokens))

    @every_policy
    @pytest.mark.parametrize("tokens", [6, 7, 63, 111], ids="{}-tokens".format)
    def test_u3_prompt_comes_down_to_the_budget(self, policy, tokens):
        """U3, H7: exactly the budget stays, the newest entries in it, in each sequence and head."""
        layer = run_prompt(policy, tokens, batch=2, kv_heads=3)
        recent = policy.quota(tokens, 0, 1).recent
        for b in range(2):
            for head in range(3):
                held = kept(layer, b, head)
                assert len(held) == 5 and held[5 - recent :] == list(range(tokens - recent, tokens))

    @dropping_policy
    def test_u2_u3_h7_every_step(self, policy):
        """U2, U3, H7: a step drops exactly one entry, what is gone stays gone, the newest are there."""
        layer = run_prompt(policy, 9, batch=2, kv_heads=2)
        recent = policy.quota(9, 0, 1).recent
        before = {(b, h): set(kept(layer, b, h)) for b in range(2) for h in range(2)}
        for seen in range(10, 25):
            mass = (
                (lambda shape, seed=seen: random_mass(*shape, seed=seed)) if isinstance(policy.observes, Mass) else None
            )
            step(layer, mass, batch=2, kv_heads=2, seed=seen)
            for place, held in before.items():
                now = set(kept(layer, *place))
                assert len(now) == 5 and now <= held | {seen - 1}
                assert set(range(seen - recent, seen)) <= now
                before[place] = now

    @every_policy
    @pytest.mark.parametrize("passes", [[9, 4], [3, 1, 6], [6, 6, 6]], ids=str)
    def test_u2_later_prompt_passes(self, policy, passes):
        """Chunks and turns compress again: the budget holds after each, and what is gone stays gone."""
        layer, seen, before = new_layer(policy), 0, set()
        for count in passes:
            run_prompt(policy, count, layer=layer, seed=seen)
            now = set(kept(layer))
            assert now <= before | set(range(seen, seen + count))
            seen += count
            assert len(now) == min(5, seen)
            assert layer.get_seq_length() == seen
            before = now

    @every_policy
    def test_after_prompt_waits_for_the_first_step(self, policy):
        """With evict="after_prompt" passes only add up; the first decode step evicts before it attends."""
        layer = run_prompt(dataclasses.replace(policy, evict="after_prompt"), 9)
        assert kept(layer) == list(range(9))
        run_prompt(layer.eviction, 4, layer=layer)
        assert kept(layer) == list(range(13))
        layer.settle()
        assert len(kept(layer)) == 5

    @every_policy
    def test_u6_heads_and_sequences_are_independent(self, policy):
        """U6: a sequence or head keeps what it keeps alone; flipping them flips the sets."""
        generator = torch.Generator().manual_seed(5)
        keys, values = torch.randn(2, 2, 2, 12, 4, generator=generator)
        queries, mass = torch.randn(2, 2, 12, 4, generator=generator), random_mass(2, 2, 12)

        def sets(rows, heads):
            layer = new_layer(policy)
            tokens = feed(layer, 12, batch=len(rows), kv_heads=len(heads))
            pick = torch.tensor(rows)[:, None], torch.tensor(heads)
            layer.keys[:, :, :12], layer.values[:, :, :12] = keys[pick], values[pick]
            if isinstance(policy.observes, Mass):
                layer.add_mass(mass[pick])
            if isinstance(policy.observes, Window):
                observe(layer, queries[pick], tokens)
            layer.close_prompt(tokens)
            return {(b, h): kept(layer, i, j) for i, b in enumerate(rows) for j, h in enumerate(heads)}

        together = sets([0, 1], [0, 1])
        assert sets([1, 0], [1, 0]) == together
        for b, head in together:
            assert sets([b], [head]) == {(b, head): together[b, head]}

    @every_policy
    def test_keys_and_values_follow_their_positions(self, policy):
        """What stays is what came in, entry by entry, also after steps into freed slots."""
        layer = new_layer(policy)
        stored = {}

        def remember(before):
            for slot, at in enumerate(in_use(layer)[0, 0].tolist()):
                if at >= before:
                    stored[at] = layer.keys[0, 0, slot].clone(), layer.values[0, 0, slot].clone()

        tokens = feed(layer, 9)
        remember(0)
        if isinstance(policy.observes, Window):
            observe(layer, torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0)), tokens)
        layer.close_prompt(tokens)
        for seen in range(9, 20):
            key, value = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(seen))
            with stepping(layer, key, value, plain_tokens(1, 1, [seen], layer.texts.seen_tensor, "cpu")):
                remember(seen)
            for slot, at in enumerate(layer.positions[0, 0, : layer.length].tolist()):
                if at >= 0:
                    assert torch.equal(layer.keys[0, 0, slot], stored[at][0])
                    assert torch.equal(layer.values[0, 0, slot], stored[at][1])

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("policy", [H2O(budget=0.5), StreamingLLM(sink=1, budget=0.5)], ids=["h2o", "streaming"])
    def test_padded_sequences_have_their_own_share(self, policy, side):
        """A share is of each sequence's real tokens; padding takes no slot of the longer ones, in steps neither."""
        lengths, generator = [12, 7, 4], torch.Generator().manual_seed(0)
        mask = torch.tensor([[column < length for column in range(12)] for length in lengths])
        mask = mask.flip(1) if side == "left" else mask
        layer, mass = new_layer(policy), random_mass(3, 1, 12)
        tokens = masked_tokens(mask, None, None, prompt=True)
        layer.append(*torch.randn(2, 3, 1, 12, 4, generator=generator), tokens)
        if isinstance(policy.observes, Mass):
            for b, length in enumerate(lengths):
                layer.add_mass(mass[b : b + 1, :, :length], slice(b, b + 1))
        layer.close_prompt(tokens)
        for b, length in enumerate(lengths):
            alone = prompt(policy, length, mass[b : b + 1, :, :length] if isinstance(policy.observes, Mass) else None)
            assert kept(layer, b) == kept(alone) and len(kept(layer, b)) == length // 2
        for step_index in range(4):
            tokens = masked_tokens(
                torch.ones(3, 1, dtype=torch.bool), layer.texts.seen, layer.texts.seen_tensor, prompt=False
            )
            with stepping(layer, *torch.randn(2, 3, 1, 1, 4, generator=generator), tokens):
                pass
            for b, length in enumerate(lengths):
                assert len(kept(layer, b)) == length // 2 and kept(layer, b)[-1] == length + step_index

    @dropping_policy
    def test_short_sequence_of_a_batch_fills_up_first(self, policy):
        """While the long sequence drops an entry a step, the short one keeps all until it is at its budget too."""
        mask = torch.tensor([[True] * 12, [False] * 9 + [True] * 3])
        layer, generator = new_layer(policy), torch.Generator().manual_seed(0)
        tokens = masked_tokens(mask, None, None, prompt=True)
        layer.append(*torch.randn(2, 2, 1, 12, 4, generator=generator), tokens)
        layer.close_prompt(tokens)
        for seen in range(3, 10):
            assert len(kept(layer, 0)) == 5 and len(kept(layer, 1)) == min(5, seen)
            if seen <= 5:
                assert kept(layer, 1) == list(range(seen))
            tokens = masked_tokens(
                torch.ones(2, 1, dtype=torch.bool), layer.texts.seen, layer.texts.seen_tensor, prompt=False
            )
            with stepping(layer, *torch.randn(2, 2, 1, 1, 4, generator=generator), tokens):
                pass

    def test_share_per_layer_and_prompt(self):
        """A share is of the tokens seen when the latest prompt pass ended; steps do not change it."""
        layer = prompt(StreamingLLM(sink=0, budget=0.5), 10)
        assert len(kept(layer)) == 5
        for _ in range(4):
            step(layer)
        assert len(kept(layer)) == 5
        prompt(None, 6, layer=layer)
        assert len(kept(layer)) == 10


class TestBrokenScores:
    """A score that is not finite neither protects its entry nor costs another its place."""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
    @pytest.mark.parametrize("where", ["old", "recent", "every"])
    def test_h2o_prompt(self, bad, where):
        """The count is right and the recent ones stay, wherever the number is."""
        mass = random_mass(1, 2, 12)
        mass[0, 0, {"old": slice(2, 5), "recent": slice(10, 12), "every": slice(0, 12)}[where]] = bad
        layer = prompt(H2O(heavy=3, recent=2), 12, mass, kv_heads=2)
        clean = prompt(H2O(heavy=3, recent=2), 12, random_mass(1, 2, 12), kv_heads=2)
        assert len(kept(layer)) == 5 and kept(layer)[-2:] == [10, 11]
        assert kept(layer, head=1) == kept(clean, head=1), "the other head is untouched"

    def test_h2o_never_nan_before_finite(self):
        """Finite scores, zero and negative ones too, win over NaN."""
        nan = float("nan")
        assert kept(prompt(H2O(heavy=3, recent=1), 6, row(nan, -2.0, nan, 0.0, -LIMIT / 2, 0.0))) == [
            1,
            3,
            4,
            5,
        ]
        assert kept(prompt(H2O(heavy=3, recent=1), 6, row(nan, 5.0, nan, nan, nan, 0.0))) == [0, 1, 2, 5]

    @pytest.mark.parametrize("bad", [float("nan"), float("-inf")], ids=["nan", "-inf"])
    def test_h2o_step_drops_it_first(self, bad):
        """In decode a broken score is the next victim; the newest token never is."""
        layer = prompt(H2O(heavy=3, recent=1), 4, row(1.0, bad, 0.1, 1.0))
        step(layer, {4: 0.5})
        assert kept(layer) == [0, 2, 3, 4]
        step(layer, {5: bad})
        assert 5 in kept(layer) and len(kept(layer)) == 4

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
    def test_h2o_all_broken_step(self, bad):
        """Every score broken in a step: one leaves, the recent ones stay."""
        layer = prompt(H2O(heavy=3, recent=2), 5, torch.full((1, 1, 5), bad))
        for seen in range(6, 12):
            step(layer, dict.fromkeys(range(20), bad))
            assert len(kept(layer)) == 5 and kept(layer)[-2:] == [seen - 2, seen - 1]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
    @pytest.mark.parametrize("pooling", ["avg", "max"])
    def test_snapkv_broken_key(self, bad, pooling):
        """A key that is not finite makes its head's mass NaN; the count and the window are right."""
        policy = SnapKV(budget=5, window=2, kernel_size=3, pooling=pooling)
        layer, clean = new_layer(policy), new_layer(policy)
        for one in (layer, clean):
            tokens = feed(one, 12, kv_heads=2)
            if one is layer:
                one.keys[0, 0, 4] = bad
            query = torch.randn(1, 4, 12, 4, generator=torch.Generator().manual_seed(0))
            observe(one, query, tokens)
            one.close_prompt(tokens)
        assert len(kept(layer)) == 5 and kept(layer)[-2:] == [10, 11]
        assert kept(layer, head=1) == kept(clean, head=1), "the other head is untouched"

    @pytest.mark.parametrize("pooling", ["avg", "max"])
    def test_snapkv_never_nan_before_finite(self, pooling, monkeypatch):
        """Entries whose weight is exactly zero, as far ones are in a sharp softmax, win over NaN."""
        policy = SnapKV(budget=3, window=1, kernel_size=1, pooling=pooling)
        mass = row(float("nan"), 0.0, float("nan"), 0.0, 1.0)
        candidates = torch.tensor([[[True, True, True, True, False]]])
        positions = torch.arange(5, dtype=torch.int32).view(1, 1, 5)
        score = policy.score(Entries(positions, candidates, {"mass": mass}))
        layer = new_layer(policy)
        tokens = feed(layer, 5)
        monkeypatch.setattr(Window, "answer", lambda *_: {"mass": mass})
        layer.close_prompt(tokens)
        assert kept(layer) == [1, 3, 4], f"scores {score.tolist()}"
