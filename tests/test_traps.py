"""The trap matrix: every policy in every situation that has broken caches elsewhere, against the oracle.

The oracle runs one sequence at a time, without a batch, a mask or a cache of tensors; so each of these tests says that a
sequence gives in the situation what it gives alone.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import kvpress
from kvpress.compat import CACHE
from support.matrix import CASES, EVICTING, VOCAB, Case, check, expect, kept, prompt, rows_to_ask, sharp_llama
from support.refusals import refused

NEW = 5  # tokens generated

every_policy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_eviction = pytest.mark.parametrize("case", EVICTING, ids=lambda case: case.id)


def sees_rows_alone(policy: Any) -> bool:
    return policy.evict_every == 1 and policy.observes.perturbation(0, 1, 4) is None


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def passes_of(text: list[int], output: Any, row: int, chunk: int | None = None) -> list[list[int]]:
    """The passes that `generate` made of one sequence: the prompt (in chunks), then each new token but the last."""
    chunks = [text] if chunk is None else [text[start : start + chunk] for start in range(0, len(text), chunk)]
    return chunks + [[token] for token in output.sequences[row, -len(output.logits) : -1].tolist()]


def check_generated(model: Any, case: Case, text: list[int], output: Any, row: int, chunk: int | None = None) -> None:
    steps = expect(model, case, passes_of(text, output, row, chunk))
    check(steps, [logits[row] for logits in output.logits], output[CACHE], row)


def padded(texts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    fill = [[0] * (width - len(text)) for text in texts]
    rows = [pad + text if side == "left" else text + pad for pad, text in zip(fill, texts, strict=True)]
    ones = [[1] * len(text) for text in texts]
    masks = [
        [0] * len(pad) + one if side == "left" else one + [0] * len(pad) for pad, one in zip(fill, ones, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(masks)


@torch.no_grad()
def feed(model: Any, ids: list[list[int]], cache: Any, mask: Any = None, **options: Any) -> torch.Tensor:
    """One bare forward; logits [batch, q, vocab], or [batch, 1, vocab] where other rows have none."""
    mask = None if mask is None else torch.tensor(mask)
    options |= rows_to_ask(model, len(ids[0]))
    return model(torch.tensor(ids), **{CACHE: cache}, attention_mask=mask, use_cache=True, **options).logits


# ---------------------------------------------------------------------------------------------------- ways to generate


@every_policy
def test_greedy(model: Any, case: Case) -> None:
    text = prompt(23)
    with kvpress.patch(model, case.policy):
        output = generate(model, torch.tensor([text]))
    check_generated(model, case, text, output, 0)


@every_policy
def test_batch(model: Any, case: Case) -> None:
    """Rows of a batch are their own: item 0 is not used for all."""
    texts = [prompt(21, seed) for seed in range(3)]
    with kvpress.patch(model, case.policy):
        output = generate(model, torch.tensor(texts))
    for row, text in enumerate(texts):
        check_generated(model, case, text, output, row)


@pytest.mark.every_case
@every_policy
def test_left_padded_batch(model: Any, case: Case) -> None:
    texts = [prompt(9, 0), prompt(24, 1), prompt(2, 2)]
    ids, mask = padded(texts, "left")
    with kvpress.patch(model, case.policy):
        output = generate(model, ids, attention_mask=mask)
    for row, text in enumerate(texts):
        check_generated(model, case, text, output, row)


@every_policy
def test_right_padded_batch(model: Any, case: Case) -> None:
    """Right padding reaches the model through a bare forward; decode steps follow with the mask extended."""
    texts, then = (
        [prompt(9, 0), prompt(22, 1), prompt(1, 2)],
        [prompt(NEW, 5), prompt(NEW, 6), prompt(NEW, 7)],
    )
    ids, mask = padded(texts, "right")
    positions = [len(text) for text in texts]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        first = feed(model, ids.tolist(), cache, mask.tolist())
        logits = [[first[row, min(len(text), first.shape[1]) - 1]] for row, text in enumerate(texts)]
        for step in range(NEW):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), dim=1)
            at = torch.tensor([[position + step] for position in positions])
            got = feed(model, [[tokens[step]] for tokens in then], cache, mask.tolist(), position_ids=at)
            for row in range(3):
                logits[row].append(got[row, -1])
    for row, text in enumerate(texts):
        check(expect(model, case, [text, *([token] for token in then[row])]), logits[row], cache, row)


@every_policy
def test_padding_in_the_middle(model: Any, case: Case) -> None:
    """A mask with a hole, as two turns of a left-padded batch leave it."""
    first, second = [prompt(6, 0), prompt(11, 1)], [prompt(8, 2), prompt(3, 3)]
    ids, mask = padded(first, "left")
    more, more_mask = padded(second, "left")
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        feed(model, ids.tolist(), cache, mask.tolist(), position_ids=places)
        whole = torch.cat((mask, more_mask), dim=1)
        places = (whole.cumsum(1) - 1).clamp(min=0)[:, -more.shape[1] :]
        logits = feed(model, more.tolist(), cache, whole.tolist(), position_ids=places)
    for row in range(2):
        check(expect(model, case, [first[row], second[row]]), [logits[row, -1]], cache, row)


@every_policy
def test_sampling_with_return_sequences(model: Any, case: Case) -> None:
    text = prompt(17)
    with kvpress.patch(model, case.policy), torch.random.fork_rng():
        torch.manual_seed(0)
        output = generate(model, torch.tensor([text]), do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1
    for row in range(3):
        check_generated(model, case, text, output, row)


@every_policy
def test_beams(model: Any, case: Case) -> None:
    """Each step's logits of each beam are those of the tokens that the beam holds, followed through every reordering."""
    text, seen = prompt(15), []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append((input_ids.clone(), scores.clone()))
            return scores

    with kvpress.patch(model, case.policy):
        model.generate(
            torch.tensor([text]),
            num_beams=3,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Watch()]),
        )
    for ids, scores in (seen[1], seen[-1]):
        for row in range(3):
            passes = [text, *([token] for token in ids[row, len(text) :].tolist())]
            expected = expect(model, case, passes)[-1].logits[-1].log_softmax(-1)
            torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)


@every_policy
def test_reordered_cache(model: Any, case: Case) -> None:
    """Reordering, repeating and selecting sequences carries everything that belongs to them."""
    texts = [prompt(20, 0), prompt(20, 1)]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        feed(model, texts, cache)
        feed(model, [[5], [6]], cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        feed(model, [[7], [8]], cache)
        cache.batch_repeat_interleave(2)
        feed(model, [[9], [10], [11], [12]], cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits = feed(model, [[13], [14]], cache)
    for row, tail in enumerate(([6, 8, 12, 13], [6, 7, 9, 14])):
        check(expect(model, case, [texts[1], *([token] for token in tail)]), [logits[row, -1]], cache, row)


@every_policy
def test_inputs_embeds(model: Any, case: Case) -> None:
    text = prompt(19)
    embeds = model.get_input_embeddings()(torch.tensor([text])).detach()
    with kvpress.patch(model, case.policy):
        output = model.generate(
            inputs_embeds=embeds,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    check_generated(model, case, text, output, 0)


# ---------------------------------------------------------------------------------------------------- chunks and turns


@every_policy
def test_prefill_chunk_size(model: Any, case: Case) -> None:
    text = prompt(23)
    with kvpress.patch(model, case.policy):
        if case.run_of(23) < 23:  # what the last token of a chunk asks for is not what the prompt asks for
            with refused("prefill_chunk_size=9", "leave prefill_chunk_size out"):
                generate(model, torch.tensor([text]), prefill_chunk_size=9)
            return
        output = generate(model, torch.tensor([text]), prefill_chunk_size=9)
    check_generated(model, case, text, output, 0, chunk=9)


@every_policy
def test_chunks_by_hand(model: Any, case: Case) -> None:
    chunks = [prompt(11, 0), prompt(3, 1), prompt(8, 2)]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        logits = [feed(model, [chunk], cache)[0, -1] for chunk in chunks]
        logits += [feed(model, [[token]], cache)[0, -1] for token in (5, 6, 7)]
    check(expect(model, case, [*chunks, [5], [6], [7]]), logits, cache)


@every_policy
def test_chunks_of_a_padded_batch(model: Any, case: Case) -> None:
    """Left padding in chunks: one sequence has nothing at all in the first chunk."""
    texts = [prompt(4, 0), prompt(18, 1)]
    ids, mask = padded(texts, "left")
    cuts = [(0, 8), (8, 16), (16, 18)]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        for start, stop in cuts:
            got = feed(
                model,
                ids[:, start:stop].tolist(),
                cache,
                mask[:, :stop].tolist(),
                position_ids=places[:, start:stop],
            )
        logits = [[got[row, -1]] for row in range(2)]
    alone = [[texts[0][:2], texts[0][2:]], [texts[1][:8], texts[1][8:16], texts[1][16:]]]
    for row in range(2):
        check(expect(model, case, alone[row]), logits[row], cache, row)


@every_policy
def test_second_turn(model: Any, case: Case) -> None:
    """`generate` again on the same cache, with the whole conversation as input."""
    first, question = prompt(20, 0), prompt(7, 1)
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        one = generate(model, torch.tensor([first]), **{CACHE: cache})
        assert one[CACHE] is cache
        talk = one.sequences[0].tolist() + question
        two = generate(model, torch.tensor([talk]), **{CACHE: cache})
    passes = passes_of(first, one, 0)
    passes.append([talk[len(first) + NEW - 1], *question])
    passes += [[token] for token in two.sequences[0, len(talk) : -1].tolist()]
    check(expect(model, case, passes), [logits[0] for logits in two.logits], cache)


@pytest.mark.every_case
@every_policy
def test_third_turn_after_decoding(model: Any, case: Case) -> None:
    """Turns after decode steps find slots in any order."""
    passes = [prompt(16, 0), [5], [6], [7], prompt(6, 1), [8], [9], prompt(9, 2), [10]]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        logits = [feed(model, [ids], cache)[0, -1] for ids in passes]
    check(expect(model, case, passes), logits, cache)


# ---------------------------------------------------------------------------------------------------- state


@every_policy
def test_several_caches_at_once(model: Any, case: Case) -> None:
    texts, caches = [prompt(18, 0), prompt(13, 1)], [DynamicCache(config=model.config), DynamicCache()]
    logits: list[list[torch.Tensor]] = [[], []]
    with kvpress.patch(model, case.policy):
        for index in (0, 1):
            logits[index].append(feed(model, [texts[index]], caches[index])[0, -1])
        for token in (5, 6, 7):
            for index in (0, 1):
                logits[index].append(feed(model, [[token + index]], caches[index])[0, -1])
    for index in (0, 1):
        passes = [texts[index], *([token + index] for token in (5, 6, 7))]
        check(expect(model, case, passes), logits[index], caches[index])


@every_policy
def test_two_models_two_policies(model: Any, case: Case) -> None:
    """A second model that shares the first one's config object, unpatched and then patched with another policy."""
    other, text = sharp_llama(seed=2), prompt(18)
    other.config = other.model.config = model.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    dense = generate(other, torch.tensor([text]))
    with kvpress.patch(model, case.policy):
        unpatched = generate(other, torch.tensor([text]))
        with kvpress.patch(other, CASES[4].policy):
            output, second = generate(model, torch.tensor([text])), generate(other, torch.tensor([text]))
        again = generate(model, torch.tensor([text]))
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, unpatched.logits, strict=True))
    check_generated(model, case, text, output, 0)
    check_generated(model, case, text, again, 0)
    check_generated(other, CASES[4], text, second, 0)


@every_policy
def test_nothing_leaks_between_samples(model: Any, case: Case) -> None:
    texts = [prompt(25, 0), prompt(14, 1)]
    with kvpress.patch(model, case.policy):
        outputs = [generate(model, torch.tensor([text])) for text in texts]
    for text, output in zip(texts, outputs, strict=True):
        check_generated(model, case, text, output, 0)


@every_policy
def test_reset_and_copy(model: Any, case: Case) -> None:
    """A cache that is reset is as new; a deep copy goes its own way."""
    text = prompt(16)
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(20, 9)], cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        feed(model, [text], cache)
        fork = copy.deepcopy(cache)
        one = [feed(model, [[token]], cache)[0, -1] for token in (5, 6)]
        two = [feed(model, [[token]], fork)[0, -1] for token in (7, 8)]
    check(expect(model, case, [text, [5], [6]]), one, cache)
    check(expect(model, case, [text, [7], [8]]), two, fork)


@every_policy
def test_no_mask_row(model: Any, case: Case) -> None:
    """A row whose mask is all zeros gives finite numbers and disturbs nobody."""
    text = prompt(12)
    mask = [[0] * 12, [1] * 12]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        logits = [feed(model, [prompt(12, 3), text], cache, mask)]
        for step, token in enumerate((5, 6)):
            mask = [[*row, 1] for row in mask]
            logits.append(
                feed(model, [[token], [token]], cache, mask, position_ids=torch.tensor([[step], [12 + step]]))
            )
    assert all(torch.isfinite(got).all() for got in logits)
    check(expect(model, case, [text, [5], [6]]), [got[1, -1] for got in logits], cache, 1)
    check(expect(model, case, [[5], [6]]), [got[0, -1] for got in logits[1:]], cache, 0)


@pytest.mark.parametrize("case", [c for c in EVICTING if sees_rows_alone(c.policy)], ids=lambda case: case.id)
def test_steps_in_which_a_sequence_has_no_token(model: Any, case: Case) -> None:
    """A decode step may be padding for one sequence: it has seen nothing then, and goes on later.

    Left out are policies that count steps (a rising temperature, evictions every so many of them): a batch counts together.
    """
    texts, turn = [prompt(20, 0), prompt(20, 1)], [prompt(6, 2), prompt(6, 3)]
    steps = [([5, 6], [1, 1]), ([7, 0], [1, 0]), ([8, 0], [1, 0]), ([9, 10], [1, 1])]
    mask = torch.ones(2, 20, dtype=torch.int64)
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        feed(model, texts, cache, mask.tolist())
        for rows, new in [*(([[a], [b]], [[x], [y]]) for (a, b), (x, y) in steps), (turn, [[1] * 6] * 2)]:
            mask = torch.cat((mask, torch.tensor(new)), dim=1)
            at = (mask.cumsum(1) - 1)[:, -len(rows[0]) :]
            logits = feed(model, rows, cache, mask.tolist(), position_ids=at)
    for row, tokens in enumerate(([5, 7, 8, 9], [6, 10])):
        passes = [texts[row], *([token] for token in tokens), turn[row]]
        check(expect(model, case, passes), [logits[row, -1]], cache, row)


@every_policy
def test_short_prompts(model: Any, case: Case) -> None:
    """Prompts shorter than any window or budget, down to one token."""
    for count in (1, 2, 3):
        text = prompt(count)
        with kvpress.patch(model, case.policy):
            output = generate(model, torch.tensor([text]))
        check_generated(model, case, text, output, 0)


# ---------------------------------------------------------------------------------------------------- eviction is real


@every_policy
def test_prompt_output_is_dense(model: Any, case: Case) -> None:
    """Eviction comes after the pass's attention: a prompt's own logits are transformers'.

    Where the rows of a prompt evict as they come, or read a selection, each is as the oracle says, and the prompt is not
    dense.
    """
    ids = torch.tensor([prompt(26)])
    with torch.no_grad():
        dense = model(ids).logits
        with kvpress.patch(model, case.policy):
            if case.cuts(26):
                with refused("a prompt of 26 tokens", "logits of all", "logits_to_keep=1"):
                    model(ids)
            ours = model(ids, **rows_to_ask(model, 26)).logits
    if not case.policy.leaves_prompts_exact:
        [step] = expect(model, case, [ids[0].tolist()])
        torch.testing.assert_close(ours[0], step.logits[-ours.shape[1] :], atol=1e-4, rtol=1e-4)
        assert (ours - dense[:, -ours.shape[1] :]).abs().max() > 1e-2
        return
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


@every_policy
def test_length_is_what_was_seen(model: Any, case: Case) -> None:
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(20)], cache)
        feed(model, [[5]], cache)
    assert cache.get_seq_length() == 21
    assert cache.get_mask_sizes(3, 0) == (24, 0)


@every_eviction
def test_memory_is_freed(model: Any, case: Case) -> None:
    """The tensors behind a cache are as small as what they hold, plus the spare slots that decode needs.

    Where kv heads share a layer's entries, that is so of all of them together.
    """
    with kvpress.patch(model, case.policy) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(400)], cache)
        feed(model, [[5]], cache)
        report = handle.report().to_dict()
    for layer, heads_kept, figures in zip(cache.layers, kept(cache), report["layers"], strict=True):
        held = sum(map(len, heads_kept)) / len(heads_kept)
        assert case.policy.heads == "shared" or {len(head) for head in heads_kept} == {held}
        head_dim, heads = layer.keys.shape[-1], layer.keys.shape[1]
        spare = case.policy.evict_every or 64  # type: ignore[attr-defined]
        slots = held + spare
        holders = [*layer.storage.holders(), {"free": layer.free}]
        tensors = [tensor for holder in holders for tensor in holder.values() if isinstance(tensor, torch.Tensor)]
        keys = vars(layer.storage).get("paged_keys", layer.keys)
        assert keys.untyped_storage().nbytes() <= slots * heads * head_dim * 4
        storages = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert storages <= figures["bytes"] + 64 <= storages + 128
        assert figures["kept"] == held
        assert figures["full_bytes"] == 401 * heads * head_dim * 4 * 2
        assert figures["seen"] == 401


@every_eviction
def test_layers_with_different_numbers(model: Any, case: Case) -> None:
    """Every pass works when layers keep different numbers of entries."""
    text, question = prompt(30), prompt(6, 1)
    policy_type = type(case.policy)

    class Uneven(policy_type):  # type: ignore[misc, valid-type]
        name = ""

        def quota(self, tokens: int, layer: int, layers: int) -> Any:
            whole = super().quota(tokens, layer, layers)
            return whole if layer == 0 else type(whole)(tokens * 2, whole.recent)

    uneven = Uneven(**{field.name: getattr(case.policy, field.name) for field in dataclasses.fields(case.policy)})
    with kvpress.patch(model, uneven) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, [text], cache)
        feed(model, [question], cache)
        feed(model, [[5]], cache)
        feed(model, [question], cache)
        figures = handle.report().to_dict()["layers"]
    assert figures[1]["kept"] == 43
    assert figures[0]["kept"] < 43 or case.policy.quota(43, 0, 2).total > 43  # type: ignore[attr-defined]
    assert kept(cache)[0] == expect(model, case, [text, question, [5], question])[-1].kept[0]


@every_policy
def test_bfloat16(case: Case) -> None:
    """In half precision everything stays finite and the number of entries is the same (of a layer, where heads share)."""
    text = prompt(30)
    full, half = sharp_llama(), sharp_llama().to(torch.bfloat16)
    sizes = []
    for model in (full, half):
        with kvpress.patch(model, case.policy):
            output = generate(model, torch.tensor([text]))
        assert all(torch.isfinite(logits).all() for logits in output.logits)
        held = [[len(head) for head in layer] for layer in kept(output[CACHE])]
        sizes.append([sum(layer) for layer in held] if case.policy.heads == "shared" else held)
    assert sizes[0] == sizes[1]
    assert output[CACHE].layers[0].keys.dtype == torch.bfloat16
    assert output.logits[0].shape[-1] == VOCAB
