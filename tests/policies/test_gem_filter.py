"""GemFilter: what the first layers pick, and that the model then runs on that alone, whoever counts the whole prompt."""

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import AdaKV, GemFilter, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect, XAttention
from kvpress.policy import Look
from oracles.gem_filter import GemFilter as Rules
from oracles.gem_filter import smoothed
from support.matrix import prompt, sharp_llama
from support.models import tiny_opt
from support.refusals import refused
from support.tiny_families import tiny_family

NEW = 5


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=4)


def picked(model, ids, policy):
    """What the oracle picks of a prompt."""
    rules = Rules(policy.k, policy.r, policy.kernel_size, policy.keep_first, policy.keep_last)
    return rules.runner(model, rules).cut(ids)


def generate(model, ids, **options):
    return model.generate(
        ids if isinstance(ids, torch.Tensor) else torch.tensor([ids]),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def same(one, other, row=slice(None)):
    torch.testing.assert_close(torch.stack(one.logits)[:, row], torch.stack(other.logits), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ what is picked


def of(sums, k, **fields):
    """What is picked by these sums: one head of one channel, a query of 1."""
    key = torch.tensor(sums)[None, None, :, None]
    real = torch.ones(1, len(sums), dtype=torch.bool)
    return GemFilter(k=k, **fields).pick(Look(torch.ones_like(key), key), real, torch.tensor([k]))[0].tolist()


def test_smoothing_of_the_paper():
    """Zeros past the ends count; the values are computed by hand."""
    assert smoothed([10, 0, 0, 0, 0, 5], 5) == [2, 2, 2, 1, 1, 1]
    assert smoothed([0, 0, 0, 10, 0, 0, 0, 0], 5) == [0, 2, 2, 2, 2, 2, 0, 0]
    assert of([10.0, 0, 0, 0, 0, 5], 3) == [0, 1, 2]
    assert of([0, 0, 0, 10.0, 0, 0, 0, 0], 5) == [1, 2, 3, 4, 5]
    assert of([0, 0, 0, 10.0, 0, 0, 0, 0], 2) == [1, 2]  # of equals the earlier ones
    assert of([0, 0, 0, 10.0, 0, 0, 0, 0], 1, kernel_size=1) == [3]
    assert of([0, 0, 0, 10.0, 0, 0, 0, 0], 4, keep_first=1, keep_last=1) == [0, 1, 2, 7]


def test_padding_is_not_there():
    """Neighbours are neighbours among a sequence's own tokens, and its last token asks, wherever padding is."""
    sums, query = torch.zeros(3, 8), torch.zeros(3, 1, 8, 1)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 1, 1]]).bool()
    for row in range(3):
        own = real[row].nonzero().flatten()
        sums[row, own] = torch.tensor([10.0, 0, 0, 0, 0, 5])
        query[row, 0, own[-1]] = 1.0
    sums[~real] = float("nan")
    got = GemFilter(k=4).pick(Look(query, sums[:, None, :, None]), real, torch.tensor([3, 3, 4]))
    assert got.tolist() == [[-1, 2, 3, 4], [-1, 0, 1, 2], [0, 1, 2, 5]]


def test_all_heads_of_a_group_count(model):
    ids = prompt(40)
    with kvpress.patch(model, GemFilter(k=9, r=2)) as handle:
        generate(model, ids)
        assert handle.report().kept_ids == [picked(model, ids, GemFilter(k=9, r=2))]


@pytest.mark.parametrize(("layers", "r"), [(32, 13), (40, 19), (28, 11), (2, 0)])
def test_the_layer_of_the_authors(layers, r):
    assert GemFilter().filter_layer(layers) == r
    assert GemFilter(r=0).filter_layer(layers) == 0


# ------------------------------------------------------------------ what is run


@pytest.mark.parametrize("r", [0, 1, 3])
def test_layers_behind_the_one_that_picks_do_not_run_on_the_prompt(model, r):
    rows, hooks = [], []
    for index, layer in enumerate(model.model.layers):
        for name, module in (("layer", layer), ("mlp", layer.mlp)):

            def note(module, args, output, index=index, name=name):
                rows.append((name, index, args[0].shape[1]))

            hooks.append(module.register_forward_hook(note))
    with kvpress.patch(model, GemFilter(k=6, r=r)):
        generate(model, prompt(30))
    for hook in hooks:
        hook.remove()
    whole = [(name, index) for name, index, count in rows if count == 30]
    assert whole == [
        (name, index) for index in range(r) for name in ("mlp", "layer")
    ]  # r itself ends before its attention
    assert [index for name, index, count in rows if (name, count) == ("layer", 6)] == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", [GemFilter(k=6, r=1), GemFilter(k=0.3, r=2, keep_first=1, keep_last=3)], ids=str)
def test_it_is_the_model_on_the_short_prompt(model, policy):
    """An unpatched model that is given what is picked says the same, step by step."""
    ids = prompt(30)
    short = picked(model, ids, policy)
    assert len(short) < 10
    dense = generate(model, short)
    with kvpress.patch(model, policy):
        ours = generate(model, ids)
    same(ours, dense)
    assert ours.sequences[0].tolist() == ids + dense.sequences[0, len(short) :].tolist()


def test_padded_batches_pick_each_their_own(model):
    """Also where one sequence is short enough, and where another model counts positions by the mask."""
    policy, texts = GemFilter(k=8, r=1), [prompt(30, 1), prompt(5, 2), prompt(19, 3)]
    ids = torch.tensor([[0] * (30 - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (30 - len(text)) + [1] * len(text) for text in texts])
    with kvpress.patch(model, policy) as handle:
        ours = generate(model, ids, attention_mask=mask)
        kept = handle.report().kept_ids
    for row, text in enumerate(texts):
        short = picked(model, text, policy)
        assert kept[row] == short
        same(ours, generate(model, short), slice(row, row + 1))
    opt = tiny_opt(layers=3)
    with kvpress.patch(opt, policy) as handle:
        ours = generate(opt, ids, attention_mask=mask)
        kept = handle.report().kept_ids
    for row, short in enumerate(kept):
        assert len(short) == min(8, len(texts[row]))
        same(ours, generate(opt, short), slice(row, row + 1))


@torch.no_grad()
def test_short_prompts_are_exact(model):
    ids = torch.tensor([prompt(8), prompt(8, 1)])
    dense, hidden = model(ids).logits, model.model(ids).last_hidden_state
    with kvpress.patch(model, GemFilter(k=8)) as handle:
        torch.testing.assert_close(model(ids, use_cache=True).logits, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.model(ids).last_hidden_state, hidden, atol=1e-5, rtol=1e-5)
        with refused("left no token ids out", "short enough"):
            handle.report().kept_text(None)
    with kvpress.patch(model, GemFilter(k=4)):  # nor is a pass without a cache cut
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_decoder_alone_gives_the_last_tokens(model):
    """The hidden states of each sequence's last token, wherever the padding is."""
    text = prompt(20)
    with kvpress.patch(model, GemFilter(k=6, r=1)):
        alone = model.model(torch.tensor([text])).last_hidden_state
        right = torch.tensor([text + [0] * 4, prompt(24, 1)]), torch.tensor([[1] * 20 + [0] * 4, [1] * 24])
        both = model.model(right[0], attention_mask=right[1]).last_hidden_state
    assert alone.shape == (1, 1, 32) and both.shape == (2, 1, 32)
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
    expected = model.model(torch.tensor([picked(model, text, GemFilter(k=6, r=1))])).last_hidden_state[:, -1:]
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ what the caller counts


@torch.no_grad()
def test_the_cache_counts_what_the_caller_counts(model):
    with kvpress.patch(model, GemFilter(k=6, r=1)) as handle:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(30)]), **{CACHE: cache}, logits_to_keep=1)
        assert (cache.get_seq_length(), cache.layers[0].length) == (30, 6)
        report = handle.report()
        assert (report.total.seen, report.total.kept) == (30, 6)
        assert report.total.full_bytes == 30 * 4 * 2 * 2 * 8 * 4  # layers, kv heads, K and V, head_dim, float32
        steps = [model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1] for token in (5, 6)]
        assert handle.report().total.read_share == pytest.approx((7 + 8) / (31 + 32))
        turn = model(torch.tensor([prompt(4, 1)]), **{CACHE: cache}).logits[0]  # short enough: all rows
        long = model(torch.tensor([prompt(9, 2)]), **{CACHE: cache}, logits_to_keep=1).logits[0]
        assert cache.get_seq_length() == 45 and cache.layers[0].positions.max() == 6 + 2 + 4 + 6 - 1
        assert [len(ids) for ids in handle.report().kept_ids] == [12]
    policy = GemFilter(k=6, r=1)
    short = [*picked(model, prompt(30), policy), 5, 6, *prompt(4, 1), *picked(model, prompt(9, 2), policy)]
    dense = model(torch.tensor([short])).logits[0]
    found = torch.cat((torch.stack(steps), turn, long))
    torch.testing.assert_close(found, torch.cat((dense[6:12], dense[-1:])), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_position_ids_may_be_given_or_not(model):
    """In a padded batch, too, and with an offset."""
    texts = [prompt(20), prompt(12, 1)]
    ids, mask = torch.tensor([texts[0], [0] * 8 + texts[1]]), torch.tensor([[1] * 20, [0] * 8 + [1] * 12])
    found = []
    for offset in (None, 0, 50):
        cache, logits, told = DynamicCache(config=model.config), [], mask
        with kvpress.patch(model, GemFilter(k=6, r=1)):
            for step in (ids, torch.tensor([[5], [6]]), torch.tensor([[7], [8]])):
                told = told if step is ids else torch.nn.functional.pad(told, (0, 1), value=1)
                places = (
                    {}
                    if offset is None
                    else {"position_ids": (told.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :] + offset}
                )
                output = model(step, attention_mask=told, **places, **{CACHE: cache}, logits_to_keep=1)
                logits.append(output.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_steps_can_be_taken_back_and_the_prompt_cannot(model):
    with kvpress.patch(model, GemFilter(k=6, r=1)):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(30)]), **{CACHE: cache}, logits_to_keep=1)
        first = [model(torch.tensor([[token]]), **{CACHE: cache}).logits for token in (5, 6)]
        with refused("cannot take back 3 tokens", "gem_filter(k=6, r=1)", "2 tokens ago"):
            cache.crop(-3)
        cache.crop(-2)
        assert cache.get_seq_length() == 30 and {layer.length for layer in cache.layers} == {6}
        again = [model(torch.tensor([[token]]), **{CACHE: cache}).logits for token in (5, 6)]
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)


def test_what_was_picked_can_be_read(model):
    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

    texts = [prompt(30), prompt(30, 1)]
    with kvpress.patch(model, GemFilter(k=5, r=1)) as handle:
        generate(model, torch.tensor(texts))
        assert handle.report().kept_text(Words()) == [
            " ".join(map(str, picked(model, text, GemFilter(k=5, r=1)))) for text in texts
        ]
        model.generate(torch.tensor(texts), num_beams=2, max_new_tokens=3, do_sample=False)
        assert len(handle.report().kept_text(Words())) == 4  # a beam each
        model.generate(inputs_embeds=model.get_input_embeddings()(torch.tensor(texts)), max_new_tokens=2)
        with refused("given as embeddings"):
            handle.report().kept_text(Words())


# ------------------------------------------------------------------ company


@pytest.mark.parametrize(
    "other",
    [
        SnapKV(budget=6, window=3, kernel_size=3),
        SnapKV(budget=0.5, window=2, evict="after_prompt"),
        AdaKV(SnapKV(budget=6, window=2)),
        StreamingLLM(sink=1, recent=5),
        Quest(budget=4, page_size=2, dense_layers=0),
        XAttention(stride=1, threshold=0.4, block_size=2),
        TokenSelect(n_init=1, n_local=3, k=2, chunk=3),
    ],
    ids=str,
)
def test_others_see_the_short_prompt(model, other):
    """Beside it a policy does what it does alone with what is picked, in a padded batch, too."""
    policy, texts = GemFilter(k=10, r=1), [prompt(30), prompt(21, 1)]
    ids, mask = torch.tensor([texts[0], [0] * 9 + texts[1]]), torch.tensor([[1] * 30, [0] * 9 + [1] * 21])
    with kvpress.patch(model, [policy, other]) as handle:
        ours = generate(model, ids, attention_mask=mask)
        kept = handle.report().total.kept
    alone = 0
    for row, text in enumerate(texts):
        with kvpress.patch(model, other) as handle:
            same(ours, generate(model, picked(model, text, policy)), slice(row, row + 1))
            alone += handle.report().total.kept
    assert kept == pytest.approx(alone)


def test_two_routes_are_refused(model):
    with refused("role 'route'", "keep one"):
        kvpress.patch(model, [GemFilter(), TidalDecode()])


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"k": 0}, ("k=0",)),
        ({"k": 1.5}, ("k=1.5", "(0, 1]")),
        ({"r": -1}, ("r=-1", "at least 0")),
        ({"r": 1.0}, ("r=1.0",)),
        ({"kernel_size": 4}, ("kernel_size=4", "odd")),
        ({"keep_first": -1}, ("keep_first=-1",)),
        ({"k": 8, "keep_first": 4, "keep_last": 5}, ("keep_first=4", "keep_last=5", "k=8")),
    ],
    ids=str,
)
def test_values(fields, words):
    with refused(*words):
        GemFilter(**fields)


def test_a_layer_past_the_last(model):
    before = dict(vars(model))
    with refused("r=4", "4 attention layers", "0 to 3"):
        kvpress.patch(model, GemFilter(r=4))
    assert vars(model) == before


def test_models_with_other_layers():
    with refused("gem_filter(r=0)", "layers without full attention", "use another policy"):
        kvpress.patch(tiny_family("gemma3"), GemFilter(r=0))


@torch.no_grad()
def test_logits_that_were_never_computed(model):
    """Refused before anything is run, in a way that leaves cache and model usable."""
    ids, ran = torch.tensor([prompt(20)]), []
    with kvpress.patch(model, GemFilter(k=6, r=1)):
        hook = model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
        cache = DynamicCache(config=model.config)
        for wanted, words in ((0, "logits of all"), (3, "logits of the last 3"), (torch.tensor([19]), "logits of all")):
            with refused("cuts a prompt of 20 tokens", words, "logits_to_keep=1", "(k=20)"):
                model(ids, **{CACHE: cache}, logits_to_keep=wanted)
        with refused("logits_to_keep=1"):
            model(ids, None, None, cache)
        with refused("not with an assistant"):
            model.generate(ids.repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=5)
        with refused("prefill_chunk_size=8"):
            generate(model, ids, prefill_chunk_size=8)
        with refused("3 axes"):
            model(ids, position_ids=torch.arange(20).expand(3, 1, 20), **{CACHE: cache}, logits_to_keep=1)
        with refused("token_type_ids for each token"):
            model.model(ids, **{CACHE: cache}, token_type_ids=torch.zeros_like(ids))
        hook.remove()
        assert not ran and cache.get_seq_length() == 0
        generate(model, ids, prefill_chunk_size=32)  # in one
        assert model(ids, **{CACHE: cache}, logits_to_keep=1).logits.shape == (1, 1, 97)


def test_it_is_taken_off_without_a_trace(model):
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    with kvpress.patch(model, GemFilter(k=6)):
        generate(model, prompt(20))
        assert "forward" in vars(model)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before


def test_what_interrupts_a_look_leaves_no_trace(model):
    ids, cache = torch.tensor([prompt(20)]), DynamicCache(config=model.config)

    def stop(*_):
        raise KeyboardInterrupt

    with kvpress.patch(model, GemFilter(k=6, r=2)) as handle, torch.no_grad():
        hook = model.model.layers[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids, **{CACHE: cache}, logits_to_keep=1)
        hook.remove()
        assert cache.get_seq_length() == 0
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        assert handle.report().total.kept == 6
    with pytest.raises(PolicyError):
        handle.report(DynamicCache(config=model.config))
