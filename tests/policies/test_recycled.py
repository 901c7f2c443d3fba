"""Recycled Attention: its sets by hand on one layer, its schedules, and what it reads in a model."""

import pytest
import torch

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import RecycledAttention, SnapKV
from kvpress.policy import Selected, View
from kvpress.registry import make_policies
from oracles import recycled
from support.matrix import prompt, sharp_llama
from support.reads import check_oracle, dense, positions_read, run, watch

PASSES = [prompt(24), *([token] for token in prompt(9, 1)), prompt(5, 2), *([token] for token in prompt(4, 3))]
STEPS = [*range(24, 33), *range(38, 42)]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=3)


class Layer:
    """One layer under a policy, without a model; the weights of every read are given."""

    def __init__(self, policy, count, heads=1, kv_heads=1):
        self.policy, self.count, self.heads, self.kv_heads, self.state = policy, count, heads, kv_heads, {}
        self.steps = 0  # since the prompt

    def view(self, query):
        query = torch.tensor([1.0, 0.0] if query is None else query).expand(1, self.heads, 1, -1)
        positions = torch.arange(self.count, dtype=torch.int32).expand(1, self.kv_heads, -1)
        keys = torch.zeros(1, self.kv_heads, self.count, 2)
        seen = torch.tensor([self.count])
        return View(
            layer=0,
            layers=1,
            query=query,
            positions=positions,
            valid=None,
            seen=seen,
            scale=1.0,
            softcap=None,
            turn=None,
            state=self.state,
            shared={},
            fetch=lambda: keys,
            length=self.count,
            newest=self.count - 1,
            places=self.count,
            phase=self.policy.phase(self.steps),
        )

    def prompt(self, *weights, query=None):
        self.policy.after_read(self.view(query), Selected(), torch.tensor([weights]))
        return self

    def step(self, weights, query=None):
        """A step that gives the positions these weights; what it reads, per kv head."""
        self.count += 1
        self.steps += 1
        view = self.view(query)
        selected = self.policy.select(view)
        read = positions_read(view, selected)
        slots = torch.arange(self.count).expand(1, self.kv_heads, -1) if selected.index is None else selected.index
        mass = [[weights.get(at, 0.0) for at in slots[0, 0].tolist()]] * self.heads
        self.policy.after_read(view, selected, torch.tensor([mass]))
        return read[0]

    @property
    def set(self):
        return sorted(self.state["index"][0, 0][self.state["chosen"][0, 0]].tolist())


def test_the_set_after_a_prompt_is_what_its_last_row_attends_to():
    assert Layer(RecycledAttention(budget=2), 5).prompt([0.1, 0.4, 0.2, 0.3, 0.0]).set == [1, 3]
    assert Layer(RecycledAttention(budget=0.6), 5).prompt([0.1, 0.4, 0.2, 0.3, 0.0]).set == [1, 2, 3]
    assert Layer(RecycledAttention(budget=2), 5).prompt([0.2] * 5).set == [0, 1]  # ties go to the earlier position


def test_a_recycling_step_swaps_the_least_attended():
    layer = Layer(RecycledAttention(budget=2), 5).prompt([0.1, 0.4, 0.2, 0.3, 0.0])
    assert layer.step({1: 0.2, 3: 0.5, 5: 0.3}) == [1, 3, 5] and layer.set == [3, 5]
    assert layer.step({3: 0.5, 5: 0.4, 6: 0.1}) == [3, 5, 6] and layer.set == [3, 6]  # its own token stays
    assert layer.step({3: 0.3, 6: 0.3, 7: 0.4}) == [3, 6, 7] and layer.set == [3, 7]  # of equals the newest leaves


def test_a_set_with_room_grows():
    layer = Layer(RecycledAttention(budget=4), 2).prompt([0.5, 0.5])
    assert layer.set == [0, 1]
    assert layer.step({}) == [0, 1, 2] and layer.set == [0, 1, 2]
    assert layer.step({}) == [0, 1, 2, 3] and layer.set == [0, 1, 2, 3]
    assert layer.step({0: 0.4, 1: 0.1, 2: 0.2, 3: 0.2, 4: 0.1}) == [0, 1, 2, 3, 4] and layer.set == [0, 2, 3, 4]


def test_a_full_step_reads_all_and_makes_the_set_anew():
    layer = Layer(RecycledAttention(budget=2, stride=3), 5).prompt([0.1, 0.4, 0.2, 0.3, 0.0])
    assert layer.step({3: 1.0}) == [1, 3, 5]
    assert layer.step({3: 1.0}) == [3, 5, 6]
    assert layer.step({0: 0.5, 2: 0.4}) == list(range(8)) and layer.set == [0, 2]
    assert [len(layer.step({0: 1.0})) for _ in range(6)] == [3, 3, 11, 3, 3, 14]


def test_group_reduce():
    """Two query heads: the maximum and the sum choose differently."""
    rows = [0.5, 0.3, 0.2, 0.0], [0.0, 0.3, 0.2, 0.5]
    assert Layer(RecycledAttention(budget=2), 4, heads=2).prompt(*rows).set == [0, 3]
    assert Layer(RecycledAttention(budget=1, group_reduce="sum"), 4, heads=2).prompt(*rows).set == [1]
    assert Layer(RecycledAttention(budget=1), 4, heads=2).prompt(*rows).set == [0]


def test_dynamic_schedule_by_hand():
    """Every second step the query is compared with that of the last full step (or the prompt's last row)."""
    policy = RecycledAttention(budget=1, query_stride=2, similarity=0.5, stride=1)
    layer = Layer(policy, 3).prompt([1.0, 0.0, 0.0], query=[1.0, 0.0])
    sizes = [len(layer.step({}, query)) for query in ([0.0, 1.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0])]
    assert sizes == [2, 2, 2, 7, 2]  # the first is not looked at; the fourth differs from the prompt's row
    sizes = [len(layer.step({}, query)) for query in ([0.0, 2.0], [9.0, 9.0], [1.0, 0.2])]
    assert sizes == [2, 2, 11]


SETTINGS = [
    {"budget": 5, "stride": 3},
    {"budget": 0.4, "stride": 4},
    {"budget": 28, "stride": 50},
    {"budget": 4, "stride": 50, "group_reduce": "sum"},
    {"budget": 6, "query_stride": 2, "similarity": 0.2},
    {"budget": 0.2, "query_stride": 3, "similarity": 0.1, "group_reduce": "sum"},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_reads_and_logits_are_the_oracles(model, fields, monkeypatch):
    log = watch(monkeypatch, RecycledAttention)
    logits, _, _ = run(model, RecycledAttention(**fields), PASSES)
    check_oracle(recycled.Recycling(model, recycled.RecycledAttention(**fields)), PASSES, logits, log)
    assert {at for at, _ in log} == set(STEPS)


@pytest.mark.parametrize(
    "fields",
    [{"stride": 1, "budget": 1}, {"budget": 42}, {"budget": 4096, "stride": 2}, {"query_stride": 1, "similarity": 2.0}],
    ids=str,
)
def test_dense(model, fields, monkeypatch):
    """Every step full, or room for all: the same as full attention."""
    log = watch(monkeypatch, RecycledAttention)
    logits, _, report = run(model, RecycledAttention(**fields), PASSES)
    torch.testing.assert_close(torch.cat(logits, dim=1), dense(model, PASSES)[0], atol=1e-5, rtol=1e-4)
    assert all(heads == [list(range(at + 1))] * 4 for (at, _), heads in log.items())
    assert report.total.read_share == 1


def full_steps(log):
    """For each decode step whether each layer read everything."""
    return [[all(len(head) == at + 1 for head in log[at, layer]) for layer in range(3)] for at in STEPS]


@pytest.mark.parametrize("similarity", [-1.0, -2.0, -1])
def test_a_similarity_of_at_most_minus_one_never_refreshes(model, similarity, monkeypatch):
    log = watch(monkeypatch, RecycledAttention)
    run(model, RecycledAttention(budget=3, stride=1, query_stride=1, similarity=similarity), PASSES)
    assert not any(map(any, full_steps(log)))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_similarity_above_one_refreshes_at_every_look(model, every, monkeypatch):
    log = watch(monkeypatch, RecycledAttention)
    run(model, RecycledAttention(budget=3, query_stride=every, similarity=1.01), PASSES)
    steps = [*range(1, 10), *range(1, 5)]  # counted anew after the second prompt
    assert full_steps(log) == [[step % every == 0] * 3 for step in steps]


def test_the_cache_holds_every_position(model):
    """Before and after full steps."""
    for count in (1, 3, len(PASSES)):
        _, cache, _ = run(model, RecycledAttention(budget=3, stride=2), PASSES[:count])
        seen = sum(map(len, PASSES[:count]))
        for layer in cache.layers:
            assert layer.positions[:, :, : layer.length].sort(-1).values.tolist() == [[list(range(seen))] * 2]


def test_sequences_of_a_batch_decide_for_themselves(model, monkeypatch):
    """With the dynamic schedule one sequence may need a full step where another does not."""
    texts = [prompt(20, 4), prompt(20, 5)]
    steps = [[[token], [other]] for token, other in zip(prompt(12, 6), prompt(12, 7), strict=True)]
    policy = RecycledAttention(budget=4, query_stride=1, similarity=0.3)
    mixed, original = [], RecycledAttention._is_full

    def spy(self, view):
        full = original(self, view)
        mixed.append(isinstance(full, torch.Tensor))
        return full

    monkeypatch.setattr(RecycledAttention, "_is_full", spy)
    select = RecycledAttention.select
    for row in range(2):
        monkeypatch.setattr(RecycledAttention, "select", select)
        log = watch(monkeypatch, RecycledAttention, row)
        run(model, policy, [texts, *steps])
        monkeypatch.setattr(RecycledAttention, "select", select)
        alone = watch(monkeypatch, RecycledAttention)
        run(model, policy, [texts[row], *(step[row] for step in steps)])
        assert log == alone
    assert any(mixed) and not all(mixed)


def test_a_padded_token_in_decode_does_not_join(model, monkeypatch):
    """A sequence whose step is padding reads as before, and its set stays."""
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 12] = 0
    policy = RecycledAttention(budget=4, stride=50)
    texts, steps = [prompt(12, 4), prompt(12, 5)], [[[5], [6]], [[7], [8]], [[9], [10]]]
    logits, _, _ = run(model, policy, [texts, *steps], mask)
    alone, _, _ = run(model, policy, [texts[0], [7], [9]])
    for got, expected in zip(logits[2:], alone[1:], strict=True):
        torch.testing.assert_close(got[0, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_the_last_row_may_be_of_an_earlier_chunk(model):
    """A sequence that has only padding in the last chunk of the prompt keeps its set by its own last row."""
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 8:14] = 0
    texts, steps = [prompt(8, 4), prompt(14, 5)], [[[token], [token + 1]] for token in prompt(3, 6)]
    policy = RecycledAttention(budget=3)
    logits, _, _ = run(model, policy, [[texts[0], texts[1][:8]], [[0] * 6, texts[1][8:]], *steps], mask)
    alone, _, _ = run(model, policy, [texts[0], *(step[0] for step in steps)])
    for got, expected in zip(logits[2:], alone[1:], strict=True):
        torch.testing.assert_close(got[0, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_report_counts_what_is_read(model):
    """Two recycling steps of K + 1 entries, then a full one."""
    _, cache, report = run(model, RecycledAttention(budget=5, stride=3), PASSES[:4])
    assert report.total.read_share == pytest.approx((6 + 6 + 27) / (25 + 26 + 27))
    assert report.total.kept == 27
    layer = cache.layers[0]
    assert report.layers[0].bytes == layer.nbytes
    held = [layer.keys, layer.values, layer.positions, *layer.state.values(), layer.last_row, layer.last_position]
    assert layer.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, torch.Tensor))


def test_taken_back_tokens_make_the_next_step_full(model, monkeypatch):
    """After a crop the set may point at what is gone: the next step reads everything."""
    from transformers import DynamicCache

    log, cache = watch(monkeypatch, RecycledAttention), DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, RecycledAttention(budget=3)):
        for ids, crop in ((prompt(20), -2), ([5], 0), ([6], -1), ([7], 0), ([8], 0)):
            model(torch.tensor([ids]), **{CACHE: cache})
            if crop:
                cache.crop(crop)
    assert [len(log[at, 0][0]) for at in (18, 19, 20)] == [19, 20, 4]


def test_defaults():
    policy = RecycledAttention()
    assert (policy.budget, policy.stride, policy.query_stride, policy.similarity) == (4096, 50, None, None)
    assert policy.group_reduce == "max" and kvpress.make_policy("recycled") == policy
    assert RecycledAttention.at_budget(64) == RecycledAttention(budget=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget=0 is too small"),
        ({"stride": 0}, "stride=0 does not work; give an int of at least 1"),
        ({"query_stride": 0, "similarity": 0.8}, "query_stride=0 does not work"),
        ({"query_stride": 5}, "query_stride=5, similarity=None: the dynamic schedule needs both"),
        ({"similarity": 0.8}, "query_stride=None, similarity=0.8: the dynamic schedule needs both"),
        ({"query_stride": 5, "similarity": "high"}, "similarity='high' is no number"),
        ({"query_stride": 5, "similarity": float("nan")}, "similarity=nan is no number"),
        ({"group_reduce": "mean"}, "group_reduce='mean' does not work; choose one of 'max', 'sum'"),
    ],
    ids=str,
)
def test_bad_values(fields, message):
    with pytest.raises(PolicyError) as caught:
        RecycledAttention(**fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("company", ["h2o", "streaming_llm"])
def test_company_that_frees_slots_is_refused(company):
    with pytest.raises(PolicyError, match=rf"{company}\(.*frees slots in decode.*snapkv"):
        make_policies([company, "recycled"])
    make_policies([SnapKV(), "recycled"])
