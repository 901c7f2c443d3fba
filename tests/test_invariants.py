"""The universal invariants U1 to U7 of every policy (U8: `docs/architecture.md`, a single pass is exact)."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.kernels import gumbel_noise
from kvpress.policy import Mass
from support.matrix import CASES, EVICTING, GRAPHS, Case, conversation, prompt, run, sharp_llama
from support.spies import replace_decode_attention

every_policy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_eviction = pytest.mark.parametrize("case", EVICTING, ids=lambda case: case.id)
STEPS = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


@every_policy
def test_u1_room_for_everything_is_full_attention(model: Any, case: Case) -> None:
    passes = conversation(STEPS)
    whole = torch.tensor([[token for ids in passes for token in ids]])
    with torch.no_grad():
        dense = model(whole).logits[0]
    logits, sets = run(model, case.roomy, passes)
    torch.testing.assert_close(torch.cat(logits), dense, atol=1e-5, rtol=1e-4)
    assert all(head == list(range(whole.shape[1])) for layer in sets[-1] for head in layer)


@every_policy
def test_u1_greedy_tokens_are_the_same(model: Any, case: Case) -> None:
    ids = torch.tensor([prompt(24), prompt(24, 1)])
    dense = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    with kvpress.patch(model, case.roomy):
        ours = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(ours, dense)


@every_eviction
def test_u2_evicted_never_returns(model: Any, case: Case) -> None:
    passes = conversation(STEPS)
    _, sets = run(model, case.policy, passes)
    seen = 0
    for ids, before, after in zip(passes, [[[[]] * 2] * 2, *sets], sets, strict=False):
        new = set(range(seen, seen + len(ids)))
        seen += len(ids)
        for layer_before, layer_after in zip(before, after, strict=True):
            for head_before, head_after in zip(layer_before, layer_after, strict=True):
                assert set(head_after) <= set(head_before) | new


@every_eviction
def test_u3_size_after_the_first_eviction(model: Any, case: Case) -> None:
    """The budget, and what decode has added since it evicted last; where kv heads share it, on average over them."""
    policy: Any = case.policy
    passes = [prompt(24), *([token] for token in prompt(STEPS, 1))]
    _, sets = run(model, policy, passes)
    totals = [min(24, policy.quota(24, layer, 2).total) for layer in range(2)]
    for step, layers in enumerate(sets[1:], 1):
        more = step % policy.evict_every if policy.evict_every is not None else step
        for layer, total in zip(layers, totals, strict=True):
            assert sizes(policy, layer) == {total + more}
    for layer, total in zip(sets[0], totals, strict=True):
        assert sizes(policy, layer) == {24 if policy.evict == "after_prompt" else total}


def sizes(policy: Any, layer: list[list[int]]) -> set[float]:
    """How many entries the kv heads of a layer keep, or how many on average where they share."""
    if policy.heads == "shared":
        return {sum(map(len, layer)) / len(layer)}
    return {len(head) for head in layer}


# Where tokens may stop, a step is no write into a slot: tests/policies/test_lazy_llm.py has it.
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.id)
def test_u4_the_newest_token_is_attended_by_its_own_query(model: Any, case: Case) -> None:
    """Changing the value of the newest token alone changes its own output, at every step.

    It is found by its value: where a policy selects, what is attended are copies of some slots. A step that is part of a
    pass that corrects earlier ones is a row of a prompt, which is exact.
    """
    from kvpress.kernels import decode_attention as module
    from kvpress.kernels.gather_slots import gather_slots
    from kvpress.layer import KVLayer
    from kvpress.storage import pages

    passes = [prompt(24), *([token] for token in prompt(4, 1))]
    original, weights, rows = module.decode_attention, [], set()
    in_pages = pages.paged_attention

    def spy(query: Any, key: Any, value: Any, valid: Any = None, **options: Any) -> Any:
        # The entry whose key is the one just stored must have weight: a huge value there must show in the output.
        if options.get("index") is not None:
            key, value = (gather_slots(slots, options["index"]) for slots in (key, value))
            options["index"] = None
        output, mass, lse = original(query, key, value, valid, **options)
        marked, layer = value.clone(), layer_now[0]
        if layer is None:  # what a prompt's last row reads, which a policy looks at before the first step
            return output, mass, lse
        slots = layer.positions[0].argmax(-1).tolist()
        found = [(value[0, head] == layer.values[0, head, slot]).all(-1) for head, slot in enumerate(slots)]
        if all(head.any() for head in found):
            marked[0, torch.stack(found)] += 1e4
            weights.append((original(query, key, marked, valid, **options)[0] - output).abs().amax(-1).min().item())
            rows.add((layer.index, int(layer.positions.max())))
        return output, mass, lse

    def spy_pages(query: Any, key: Any, value: Any, owner: Any, valid: Any, **options: Any) -> Any:
        output, mass = in_pages(query, key, value, owner, valid, **options)
        layer = layer_now[0]
        newest = layer.storage.paged_positions == layer.storage.paged_positions.max()
        assert newest.sum() == options["kv_heads"]
        marked = value + 1e4 * newest[..., None]
        weights.append((in_pages(query, key, marked, owner, valid, **options)[0] - output).abs().amax(-1).min().item())
        rows.add((layer.index, int(layer.storage.paged_positions.max())))
        return output, mass

    layer_now: list[Any] = [None]
    write = KVLayer.write

    def watch(self: Any, *args: Any) -> None:
        layer_now[0] = self
        write(self, *args)

    patcher = pytest.MonkeyPatch()
    replace_decode_attention(patcher, spy)
    patcher.setattr(pages, "paged_attention", spy_pages)
    patcher.setattr(KVLayer, "write", watch)
    try:
        run(model, case.policy, passes)
    finally:
        patcher.undo()
    start = case.run_of(24)
    # A prompt's rows may be attended as decode steps are.
    first = 0 if getattr(case.policy, "evict", None) == "each_row" else start
    period = getattr(case.policy, "correct_every", 0) + 1
    steps = [at for at in range(first, start + 4) if period == 1 or (at - 23) % period]
    assert {(layer, at) for layer in range(2) for at in steps} <= rows
    assert min(weights) > 1e-6


@pytest.mark.parametrize(
    "case", [case for case in EVICTING if isinstance(case.policy.observes, Mass)], ids=lambda c: c.id
)  # type: ignore[attr-defined]
def test_u5_each_row_adds_the_group_size(model: Any, case: Case) -> None:
    """H6 too: right before the first eviction the scores of a kv head sum to (rows seen) * group.

    Where later rows make earlier ones fade, each row counts by its age (A5).
    """
    cache = DynamicCache(config=model.config)
    policy: Any = case.roomy
    if policy.evict == "after_prompt":
        policy = dataclasses.replace(policy, evict="each_pass")
    with torch.no_grad(), kvpress.patch(model, policy):
        for rows, ids in ((24, prompt(24)), (25, [5]), (26, [6]), (33, prompt(7, 2))):
            model(torch.tensor([ids]), **{CACHE: cache})
            for layer in cache.layers:
                group = model.config.num_attention_heads // layer.stats["mass"].shape[1]
                sums = layer.stats["mass"][:, :, : layer.length].sum(-1)
                counted = sum(policy.observes.fading**age for age in range(rows))
                torch.testing.assert_close(sums, torch.full_like(sums, counted * group), atol=1e-3, rtol=0)


@every_eviction
def test_u6_permuting_heads_permutes_results(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No leak between kv heads: with the heads' weights swapped, what the heads keep is swapped.

    A policy's noise is another for each head, so the heads take theirs with them.
    """
    one, two = sharp_llama(layers=1), sharp_llama(layers=1)
    attention = two.model.layers[0].self_attn
    size, group = attention.head_dim, attention.num_key_value_groups
    with torch.no_grad():
        for projection, width in (
            (attention.q_proj, size * group),
            (attention.k_proj, size),
            (attention.v_proj, size),
        ):
            projection.weight.copy_(projection.weight.roll(width, dims=0))
        attention.o_proj.weight.copy_(attention.o_proj.weight.roll(size * group, dims=1))
    logits, sets = run(one, case.policy, conversation(STEPS))
    places = gumbel_noise.gumbel_offsets
    monkeypatch.setattr(gumbel_noise, "gumbel_offsets", lambda *args: places(*args).roll(group, dims=1))
    swapped_logits, swapped_sets = run(two, case.policy, conversation(STEPS))
    for a, b in zip(logits, swapped_logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert [[layer[::-1] for layer in step] for step in sets] == swapped_sets


def chunks_cannot_matter(policy: Any) -> bool:
    return policy.evict == "each_pass" or (policy.evict == "each_row" and not policy.keeps_a_share)


@pytest.mark.parametrize("sizes", [(24,), (11, 13), (2, 20, 2)], ids=str)
@pytest.mark.parametrize("case", [c for c in EVICTING if chunks_cannot_matter(c.policy)], ids=lambda c: c.id)
def test_u7_chunks_keep_what_one_shot_keeps(model: Any, case: Case, sizes: tuple[int, ...]) -> None:
    """With evict="after_prompt" the chunks of a prompt never change what is kept.

    Nor do they where the rows of a prompt evict as they come: then there is nothing to wait for. (With a share such rows
    evict to the share of what was seen at the end of their chunk, so chunks do matter; those cases are left out.)
    """
    text, steps = prompt(24), [[5], [6], [7]]
    chunks, start = [], 0
    for size in sizes:
        chunks.append(text[start : start + size])
        start += size
    waits: Any = case.policy
    if waits.evict != "each_row":
        waits = dataclasses.replace(waits, evict="after_prompt")
    logits, sets = run(model, case.policy, [text, *steps])
    chunk_logits, chunk_sets = run(model, waits, [*chunks, *steps])
    assert sets[1:] == chunk_sets[len(chunks) :]
    for a, b in zip(logits[1:], chunk_logits[len(chunks) :], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@every_policy
def test_same_run_twice_is_the_same(model: Any, case: Case) -> None:
    """Bitwise repeatable, and the global random state is not touched."""
    state = torch.random.get_rng_state()
    one, sets = run(model, case.policy, conversation(STEPS))
    two, again = run(model, case.policy, conversation(STEPS))
    assert sets == again
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
