"""LazyLLM: which tokens stop where, that they come back to what they would have been, and that no layer runs on one twice."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError, UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.policies import (
    DualChunkAttention,
    Full,
    GemFilter,
    LazyLLM,
    Packed,
    Quest,
    SnapKV,
    TidalDecode,
    XAttention,
)
from kvpress.policy import Depth
from oracles.lazy_llm import LazyLLM as Rules
from support.matrix import prompt, sharp_llama
from support.models import tiny_opt
from support.refusals import refused
from support.tiny_families import tiny_family
from test_families import FAMILIES, build

PASSES = [prompt(24), *([token] for token in prompt(5, 1)), prompt(7, 2), *([token] for token in prompt(3, 3))]
HYBRIDS = ("gemma3", "gemma2-softcap", "gpt-oss-sinks")


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=4)


def new_cache(model):
    return DynamicCache(config=model.config)


@torch.no_grad()
def feed(model, ids, cache, **options):
    """Logits of the last row, [batch, vocab]."""
    ids = ids if isinstance(ids, torch.Tensor) else torch.tensor([ids])
    return model(ids, **{CACHE: cache}, logits_to_keep=1, **options).logits[:, -1]


def held(cache, row=0):
    """The positions that each layer has run on, and those that wait before it, of one sequence."""
    ran = [{at for at in layer.positions[row, 0].tolist() if at >= 0} for layer in cache.layers]
    waits = [
        [at for at in layer.waiting["positions"][row].tolist() if at >= 0] if layer.waiting else []
        for layer in cache.layers
    ]
    return ran, waits


class Watched(LazyLLM):
    """Notes which tokens are in play in each layer but the last, and behind it, of every sequence."""

    name = ""
    seen: list = []  # noqa: RUF012

    def rows(self, depth):
        goes_on = super().rows(depth)
        after = depth.positions if goes_on is None else depth.positions[goes_on]
        self.seen.append((depth.layer, depth.positions.tolist(), after.tolist()))
        return goes_on


@pytest.fixture
def watched():
    Watched.seen = []
    return Watched


class RowsRun:
    """Notes how many rows each layer's MLP is given, while it is open."""

    def __init__(self, model):
        self.layers, self.counts = model.model.layers, []

    def __enter__(self):
        def note(index):
            return lambda _, args: self.counts.append((index, args[0].shape[0] * args[0].shape[1]))

        self.hooks = [layer.mlp.register_forward_pre_hook(note(index)) for index, layer in enumerate(self.layers)]
        return self.counts

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# ------------------------------------------------------------------ the specification's tests


@pytest.mark.parametrize("policy", [LazyLLM(rate=0), LazyLLM(layers=[]), LazyLLM(rate=[0.0, 0.0, 0.0])], ids=str)
def test_t1_without_a_rate_it_is_the_model(model, policy):
    """All rows of a prompt have logits, nothing waits, and every pass is the dense model's."""
    whole = torch.tensor([[token for ids in PASSES for token in ids]])
    with torch.no_grad():
        dense, logits = model(whole).logits[0], []
        with kvpress.patch(model, policy):
            cache = new_cache(model)
            for ids in PASSES:
                logits.append(model(torch.tensor([ids]), **{CACHE: cache}).logits[0])
    torch.testing.assert_close(torch.cat(logits), dense, atol=1e-5, rtol=1e-4)
    assert not any(layer.waiting for layer in cache.layers)


@pytest.mark.parametrize("batch", [1, 3])
def test_t2_a_token_waits_before_the_first_layer_that_it_has_not_run_through(model, batch):
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        cache, came_back = new_cache(model), 0
        for number, ids in enumerate(PASSES):
            rows = torch.tensor([[(token + 11 * row) % 90 + 3 for token in ids] for row in range(batch)])
            before = [held(cache, row)[1] if number else [] for row in range(batch)]
            feed(model, rows, cache)
            for row in range(batch):
                ran, waits = held(cache, row)
                assert not waits[0] and all(len(set(one)) == len(one) for one in waits)
                for layer in range(3):
                    assert ran[layer + 1] | set(waits[layer + 1]) == ran[layer]
                    assert not ran[layer + 1] & set(waits[layer + 1])
                if number:
                    came_back += sum(len(set(b) - set(w)) for b, w in zip(before[row], waits, strict=True))
    assert came_back > 5 * batch  # else this shows nothing


def test_t3_t6_no_layer_runs_on_a_token_twice(model):
    """The rows that go through the MLPs are just those that the cache has got since."""
    with kvpress.patch(model, LazyLLM(rate=0.5)) as handle:
        cache, last, total = new_cache(model), [0] * 4, 0
        for ids in PASSES:
            with RowsRun(model) as counts:
                feed(model, ids, cache)
            sizes = [len(ran) for ran in held(cache)[0]]
            assert counts == [(layer, sizes[layer] - last[layer]) for layer in range(4)]
            last, total = sizes, total + sum(count for _, count in counts)
        assert total < 4 * sum(map(len, PASSES))
        assert handle.report().total.kept == total / 4


def test_t4_fewer_go_on_and_the_newest_does(model, watched):
    with kvpress.patch(model, watched(rate=0.6)):
        cache, seen = new_cache(model), 0
        for ids in PASSES:
            watched.seen.clear()
            seen += len(ids)
            feed(model, ids, cache)
            before = list(range(seen))
            assert [layer for layer, _, _ in watched.seen] == [0, 1, 2]
            for _, positions, after in watched.seen:
                assert positions == before and set(after) < set(positions) and after[-1] == seen - 1
                assert len(after) == len(positions) - int(0.6 * len(positions))
                before = after


def test_t5_a_hundred_tokens(model):
    with kvpress.patch(model, LazyLLM()), RowsRun(model) as counts:
        feed(model, prompt(100), new_cache(model))
    assert counts == [(0, 100), (1, 70), (2, 49), (3, 35)]


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, []), (2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (30, [8, 17, 26]), (32, [8, 18, 27])]
)
def test_layers_of_the_paper_s_figure(layers, expected):
    assert LazyLLM().dropping_layers(layers) == expected
    LazyLLM().check_layers(layers)


def test_shares_are_rounded_down():
    """0.29 of 100 is 29, as 0.3 of 10 is 3; and the newest stays."""
    assert LazyLLM(rate=0.29).stopping(100, 0, 4) == 29
    assert [LazyLLM().stopping(n, 0, 4) for n in (1, 3, 4, 10, 100)] == [0, 0, 1, 3, 30]
    assert LazyLLM(rate=1).stopping(7, 0, 4) == 6
    assert LazyLLM().stopping(100, 3, 4) == 0
    per_layer = LazyLLM(layers=[0, 2], rate=[0.5, 0.25])
    assert [per_layer.stopping(8, layer, 4) for layer in range(4)] == [4, 0, 2, 0]


def test_who_goes_on():
    """The best of the newest token's row, of equal ones the earlier; the newest whatever it gives itself."""

    def goes_on(row, rate):
        row = torch.tensor(row)
        depth = Depth(0, 4, torch.arange(len(row)) * 3, lambda: row)
        answer = LazyLLM(rate=rate).rows(depth)
        return None if answer is None else answer.nonzero().flatten().tolist()

    assert goes_on([0.4, 0.1, 0.3, 0.2, 0.0], 0.4) == [0, 2, 4]
    assert goes_on([0.2, 0.2, 0.2, 0.2, 0.2], 0.4) == [0, 1, 4]
    assert goes_on([0.9, 0.0, 0.0, 0.1], 1.0) == [3]
    assert goes_on([0.9, 0.1], 0.4) is None


@torch.no_grad()
def test_the_row_is_the_newest_token_s_attention(model, monkeypatch):
    """The mean over all query heads of what transformers' eager attention gives, in a prompt and in a step."""
    rows = []
    monkeypatch.setattr(LazyLLM, "rows", lambda self, depth: rows.append(depth.row) if depth.layer < 2 else None)
    ids = torch.tensor([prompt(20)])
    with kvpress.patch(model, LazyLLM(rate=0)):
        cache = new_cache(model)
        feed(model, ids[:, :15], cache)
        feed(model, ids[:, 15:19], cache)
        feed(model, ids[:, 19:], cache)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights = eager(ids, output_attentions=True).attentions
    expected = [weights[layer][0, :, last, : last + 1].mean(0) for last in (14, 18, 19) for layer in range(2)]
    for found, one in zip(rows, expected, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ what comes back


@torch.no_grad()
@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in HYBRIDS])
def test_the_dense_model_under_masks_of_each_layer(family, watched):
    """Every row that was ever run, in whatever step, is that of one eager pass of the same family over all tokens.

    In that pass a row attends, layer by layer, what was in play there when the row was run. So rows that came back have the
    rotation, the learned position and the hidden state that they had when they stopped.
    """
    model = build(family)
    layers = model.config.num_hidden_layers
    passes, logits, reads = PASSES[:4], [], [{} for _ in range(layers)]
    with kvpress.patch(model, watched(rate=0.4)):
        cache, before = new_cache(model), [set() for _ in range(layers)]
        for ids in passes:
            watched.seen.clear()
            logits.append(feed(model, ids, cache)[0])
            play = [positions for _, positions, _ in watched.seen] + [watched.seen[-1][2]]
            ran, _ = held(cache)
            for layer in range(layers):
                reads[layer].update({at: play[layer] for at in ran[layer] - before[layer]})
            before = ran
    tokens = [token for ids in passes for token in ids]
    assert sum(len(one) for one in reads) < layers * len(tokens)
    expected = masked(model, tokens, reads)
    ends = torch.tensor([len(ids) for ids in passes]).cumsum(0) - 1
    torch.testing.assert_close(torch.stack(logits), expected[ends], atol=1e-4, rtol=1e-4)


def masked(model, tokens, reads):
    """Logits [n, vocab] of an eager pass in which each row reads what is listed for it in each layer; others themselves."""
    n, hooks = len(tokens), []
    model.set_attn_implementation("eager")

    def restrict(layer):
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min)
        for row in range(n):
            for at in reads[layer].get(row, [row]):
                if at <= row:
                    mask[0, 0, row, at] = 0

        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for module in model.modules():
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int):
            hooks.append(module.register_forward_pre_hook(restrict(module.layer_idx), with_kwargs=True))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in HYBRIDS])
def test_padded_batches_of_every_family(family):
    """Each sequence is what it is alone, and with nothing that stops what transformers gives."""
    model = build(family)
    texts = [prompt(20), prompt(9, 1), prompt(14, 2)]
    ids = torch.tensor([[0] * (20 - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (20 - len(text)) + [1] * len(text) for text in texts])

    def generate(ids, mask=None):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=mask, **options, return_dict_in_generate=True, output_logits=True)
        return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, 1)

    tokens, dense = generate(ids, mask)
    with kvpress.patch(model, LazyLLM(rate=0.0)):
        found, logits = generate(ids, mask)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        _, logits = generate(ids, mask)
        for row, text in enumerate(texts):
            _, alone = generate(torch.tensor([text]), torch.ones(1, len(text)))
            torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


def test_heads_that_share_keys_are_as_heads_with_copies():
    """Grouped heads against a model in which each has keys and values of its own, equal ones."""
    grouped, single = sharp_llama(layers=3), sharp_llama(layers=3, kv_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = weight.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    single.load_state_dict(state)
    found = []
    for one in (grouped, single):
        with kvpress.patch(one, LazyLLM(rate=0.4)):
            cache = new_cache(one)
            found.append(torch.stack([feed(one, ids, cache)[0] for ids in PASSES]))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_the_newest_token_reads_itself(model):
    """With its value changed in one layer its logits change, at every step."""
    for layer in range(4):
        results = []
        for factor in (1.0, 3.0):
            with kvpress.patch(model, LazyLLM(rate=0.7)):
                cache = new_cache(model)
                feed(model, PASSES[0], cache)

                def change(module, args, output, factor=factor):
                    output[:, -1] *= factor  # the newest is the last row that a layer runs on
                    return output

                steps = []
                for ids in PASSES[1:5]:
                    fork = copy.deepcopy(cache)
                    hook = model.model.layers[layer].self_attn.v_proj.register_forward_hook(change)
                    steps.append(feed(model, ids, fork)[0])
                    hook.remove()
                    feed(model, ids, cache)
                results.append(torch.stack(steps))
        assert (results[0] - results[1]).abs().amax(-1).min() > 1e-3


def test_beams_and_copies_take_what_waits_along(model):
    """A repeated, reordered and copied cache goes on as each sequence alone does."""
    texts, rules = [prompt(20), prompt(20, 1)], Rules(rate=0.4)
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        cache = new_cache(model)
        feed(model, torch.tensor(texts), cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
        cache = copy.deepcopy(cache)
        logits = [feed(model, torch.tensor([[5], [6], [7], [8]]), cache)]
        cache.batch_select_indices(torch.tensor([2, 0]))
        logits.append(feed(model, torch.tensor([[9], [10]]), cache))
    for text, tail, rows in ((texts[1], [7, 9], (2, 0)), (texts[1], [5, 10], (0, 1))):
        steps = rules.runner(model, rules).run([text, *([token] for token in tail)])
        for got, row, step in zip(logits, rows, steps[1:], strict=True):
            torch.testing.assert_close(got[row], step.logits[-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_the_unpatched_model_filled(model):
    """Its tokens have been everywhere; those that come now stop and come back."""
    text = torch.tensor([prompt(20)])
    for policy in (LazyLLM(rate=0), LazyLLM(rate=0.4)):
        cache = model(text, use_cache=True)[CACHE]
        with kvpress.patch(model, policy):
            logits = [feed(model, ids, cache)[0] for ids in PASSES[1:]]
            ran, waits = held(cache)
        if policy.rate == 0:
            whole = torch.cat((text, torch.tensor([[token for ids in PASSES[1:] for token in ids]])), 1)
            ends = 19 + torch.tensor([len(ids) for ids in PASSES[1:]]).cumsum(0)
            torch.testing.assert_close(torch.stack(logits), model(whole).logits[0, ends], atol=1e-4, rtol=1e-4)
        assert all(set(range(20)) <= one for one in ran)
        for layer in range(3):
            assert ran[layer + 1] | set(waits[layer + 1]) == ran[layer]


# ------------------------------------------------------------------ what the caller gets and counts


@torch.no_grad()
def test_lengths_and_the_report(model):
    with kvpress.patch(model, LazyLLM()) as handle:
        cache = new_cache(model)
        feed(model, prompt(100), cache)
        assert cache.get_seq_length() == 100 and cache.get_mask_sizes(3, 0) == (103, 0)
        report = handle.report()
        assert [report.layers[layer].kept for layer in range(4)] == [100, 70, 49, 35]
        assert {layer.full_bytes for layer in report.layers.values()} == {100 * 2 * 2 * 8 * 4}
        shares = [n * (n + 1) / (100 * 101) for n in (100, 70, 49, 35)]
        assert [report.layers[layer].density for layer in range(4)] == pytest.approx(shares)
        feed(model, [5], cache)
        report = handle.report()
        read = [n / 101 for n in (101, 71, 50, 35)]
        assert [report.layers[layer].read_share for layer in range(4)] == pytest.approx(read)
        assert report.total.density == pytest.approx(sum(shares) / 4)


@torch.no_grad()
def test_hidden_states_are_those_of_the_last_tokens(model):
    """The decoder alone, and hidden states of all layers: [batch, 1, hidden], wherever the padding is."""
    texts = [prompt(20), prompt(13, 1)]
    ids = torch.tensor([texts[0], texts[1] + [0] * 7])
    mask = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        both = model.model(ids, attention_mask=mask, output_hidden_states=True)
        alone = [model.model(torch.tensor([text]), output_hidden_states=True) for text in texts]
    assert both.last_hidden_state.shape == (2, 1, 32)
    for row, one in enumerate(alone):
        assert {hidden.shape for hidden in one.hidden_states} == {(1, 1, 32)}
        torch.testing.assert_close(both.last_hidden_state[row], one.last_hidden_state[0], atol=1e-5, rtol=1e-4)
        for got, expected in zip(both.hidden_states, one.hidden_states, strict=True):
            torch.testing.assert_close(got[row], expected[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_that_were_never_computed(model):
    """Refused before anything is run, in a way that leaves cache and model usable."""
    ids, ran = torch.tensor([prompt(20)]), []
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        hook = model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
        cache = new_cache(model)
        for wanted, words in ((0, "logits of all"), (3, "logits of the last 3"), (torch.tensor([19]), "logits of all")):
            with refused("a prompt of 20 tokens", words, "logits_to_keep=1", "rate=0"):
                model(ids, **{CACHE: cache}, logits_to_keep=wanted)
        with refused("not with an assistant"):
            model.generate(ids.repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=5)
        hook.remove()
        assert not ran and cache.get_seq_length() == 0
        assert model(ids, **{CACHE: cache}, logits_to_keep=1).logits.shape == (1, 1, 97)
        with refused("some of the 23 tokens seen", "a prompt of 3 tokens"):
            model(ids[:, :3], **{CACHE: cache})
        assert model(ids[:, :1], **{CACHE: cache}).logits.shape == (1, 1, 97)  # a step
        assert model(ids[:, :2], use_cache=True).logits.shape == (1, 2, 97)  # so few that none stops
        assert model(ids, use_cache=False).logits.shape == (1, 20, 97)  # exact


def test_tokens_cannot_be_taken_back(model):
    with kvpress.patch(model, LazyLLM(rate=0.4)):
        cache = new_cache(model)
        feed(model, prompt(20), cache)
        feed(model, [5], cache)
        assert not cache.is_croppable if hasattr(cache, "is_croppable") else True
        with refused("cannot take back 1 tokens", "lazy_llm(rate=0.4)", "another policy"):
            cache.crop(-1)
        feed(model, [6], cache)
        assert cache.get_seq_length() == 22


def test_what_interrupts_a_pass(model):
    """Its cache lacks tokens in some layers and says so; a new one works."""
    cache = new_cache(model)

    def stop(*_):
        raise KeyboardInterrupt

    with kvpress.patch(model, LazyLLM(rate=0.4)):
        feed(model, prompt(20), cache)
        hook = model.model.layers[2].mlp.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            feed(model, [5], cache)
        hook.remove()
        with refused("ended by an error", "lazy_llm(rate=0.4)", "start a new cache"):
            feed(model, [5], cache)
        feed(model, prompt(20), new_cache(model))
        cache.reset()
        feed(model, prompt(20), cache)


def test_it_is_taken_off_without_a_trace(model):
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    with kvpress.patch(model, LazyLLM()):
        feed(model, prompt(20), new_cache(model))
        assert "forward" in vars(model.model.layers[0])
        copied = copy.deepcopy(model)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    ids = torch.tensor([prompt(20)])
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, model(ids).logits)


def test_hooks_see_what_a_layer_is_given(model):
    """Those of a decoder layer the call's tokens, those inside of it the tokens that it runs on."""
    outside, inside = [], []
    hooks = [
        model.model.layers[3].register_forward_hook(lambda _, args, out: outside.append((args[0].shape, out.shape))),
        model.model.layers[3].mlp.register_forward_pre_hook(lambda _, args: inside.append(args[0].shape)),
    ]
    with kvpress.patch(model, LazyLLM()):
        feed(model, prompt(100), new_cache(model))
    for hook in hooks:
        hook.remove()
    assert outside == [((1, 100, 32), (1, 100, 32))] and inside == [(1, 35, 32)]


def test_learned_positions_without_position_ids():
    """OPT adds them before its first layer."""
    opt = tiny_opt(layers=3)
    texts = [prompt(20), prompt(11, 1)]
    ids, mask = torch.tensor([texts[0], [0] * 9 + texts[1]]), torch.tensor([[1] * 20, [0] * 9 + [1] * 11])
    with kvpress.patch(opt, LazyLLM(rate=0.4)):
        both = feed(opt, ids, new_cache(opt), attention_mask=mask)
        for row, text in enumerate(texts):
            torch.testing.assert_close(both[row], feed(opt, text, new_cache(opt))[0], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ company, and wrong use


@pytest.mark.parametrize(
    "other",
    [SnapKV(budget=80), Quest(budget=32), XAttention(), Packed(), DualChunkAttention()],
    ids=lambda policy: policy.name,
)
def test_beside_others(model, other):
    before = dict(vars(model))
    with refused(other.describe(), "under lazy_llm()", "use one of them"):
        kvpress.patch(model, [LazyLLM(), other])
    with refused("use one of them"):
        kvpress.patch(model, [other, LazyLLM()])
    assert vars(model) == before


def test_two_routes_are_refused(model):
    for other in (GemFilter(), TidalDecode()):
        with refused("role 'route'", "keep one"):
            kvpress.patch(model, [LazyLLM(), other])
    kvpress.patch(model, [LazyLLM(), Full()]).unpatch()  # which has nothing against it


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rate": -0.1}, ("rate=-0.1", "0 to 1")),
        ({"rate": 1.5}, ("rate=1.5",)),
        ({"rate": "0.3"}, ("rate='0.3'",)),
        ({"rate": float("nan")}, ("rate=nan",)),
        ({"rate": [0.3, 2]}, ("rate=2",)),
        ({"layers": 3}, ("layers=3", "no list")),
        ({"layers": "012"}, ("layers='012'",)),
        ({"layers": [0, -1]}, ("-1", "at least 0")),
        ({"layers": [0, 1.0]}, ("1.0",)),
        ({"layers": [2, 1]}, ("(2, 1)", "ascending")),
        ({"layers": [1, 1]}, ("(1, 1)", "once")),
        ({"layers": [0, 1], "rate": [0.3]}, ("1 numbers for 2 layers",)),
    ],
    ids=str,
)
def test_values(fields, words):
    with refused(*words):
        LazyLLM(**fields)


def test_layers_that_the_model_does_not_have(model):
    before = dict(vars(model))
    for layers in ([3], [0, 7]):
        with refused(f"layers={tuple(layers)}", "4 attention layers", "0 to 2"):
            kvpress.patch(model, LazyLLM(layers=layers))
    with refused("2 numbers", "after 3 layers ([0, 1, 2])"):
        kvpress.patch(model, LazyLLM(rate=[0.1, 0.2]))
    assert vars(model) == before


def test_models_with_other_layers():
    with refused("lazy_llm()", "layers without full attention", "use another policy"):
        kvpress.patch(tiny_family("gemma3"), LazyLLM())


def test_a_model_without_a_list_of_layers(model):
    other = copy.deepcopy(model)
    other.model.layers = torch.nn.Sequential(*other.model.layers)
    before = dict(vars(other.model))
    with refused("LlamaModel has no list of 4 layers", "use another policy", error=UnsupportedModelError):
        kvpress.patch(other, LazyLLM())
    assert vars(other.model) == before and other.config._attn_implementation == "sdpa"


def test_steps_are_no_graphs(model):
    before = dict(vars(model.model))
    with refused("lazy_llm()", "no graph", "leave compile out"):
        kvpress.patch(model, LazyLLM(), compile=True)
    assert vars(model.model) == before
    with kvpress.patch(model, LazyLLM()) as handle:
        for backend in ("eager", "inductor"):
            with refused("no graph"):
                handle.compile(backend)


def test_prompts_cannot_be_shared(model):
    shared = kvpress.record_prompt(model, torch.tensor([prompt(20)]))
    with kvpress.patch(model, LazyLLM()) as handle, pytest.raises(PolicyError, match="cannot be shared"):
        handle.adopt_prompt(shared)
