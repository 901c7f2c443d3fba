"""Packed storage: the numbers by hand, the errors, the bytes, what is exact when, and a model under it against the oracle."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import (
    A2SF,
    EMS,
    H2O,
    AdaKV,
    DualChunkAttention,
    KeyDiff,
    Packed,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
    XAttention,
)
from kvpress.registry import make_policies
from kvpress.storage.packed import group_size, pack, unpack
from oracles import oracle_of
from oracles.packed import rounded
from support.matrix import TOGETHER, kept, prompt, run, sharp_llama
from support.models import tiny_llama

PASSES = [prompt(14), *([token] for token in prompt(4, 1)), prompt(5, 2), *([token] for token in prompt(3, 3))]


@dataclass(frozen=True)
class Pair:
    """Packed and a policy beside it, and the oracle of both."""

    beside: Any
    packed: Packed
    oracle: Any

    @property
    def id(self) -> str:
        return f"{self.beside.describe()}+{self.packed.describe()}".replace(" ", "")


def pair(beside: Any, fields: dict[str, Any], piece: int | None = None, **packing: Any) -> Pair:
    rules = oracle_of(Packed)(**packing, over=oracle_of(beside)(**fields), piece=piece)
    return Pair(beside(**fields), Packed(**packing), rules)


EIGHT = {"bits": 8, "group": 4, "residual": 3}
FOUR = {"bits": 4, "group": 8, "residual": 0}
PAIRS = [
    pair(H2O, {"budget": 0.4}, **EIGHT),
    pair(H2O, {"budget": 0.4, "evict": "after_prompt"}, **FOUR),
    pair(SnapKV, {"budget": 0.5, "window": 4, "kernel_size": 3}, **EIGHT),
    pair(SnapKV, {"budget": 0.5, "window": 4, "kernel_size": 3}, **FOUR),
    pair(Quest, {"budget": 8, "page_size": 4, "dense_layers": 0}, **EIGHT),
    pair(KeyDiff, {"budget": 7}, **EIGHT),
    pair(A2SF, {"budget": 7, "alpha": 0.5, "evict": "each_row"}, **EIGHT),
    pair(StreamingLLM, {"sink": 2, "recent": 6}, **EIGHT),
    pair(H2O, {"budget": 0.4, "rope": "reindex"}, piece=1, **EIGHT),
    pair(TokenSelect, {"n_init": 2, "n_local": 5, "k": 4, "chunk": 4, "theta": 0.3}, piece=1, **EIGHT),
    pair(XAttention, {"stride": 2, "threshold": 0.5, "block_size": 4}, **EIGHT),
    pair(DualChunkAttention, {"chunk_size": 8, "local_size": 3}, piece=5, **EIGHT),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("bits", "numbers", "codes", "read"),
    [
        (2, (0, 1, 2, 4), (0, 1, 2, 3), (0, 4 / 3, 8 / 3, 4)),
        (2, (-1, 0.25, 0.5, 2), (0, 1, 2, 3), (-1, 0, 1, 2)),  # 1.25 and 1.5: half goes to the even code
        (2, (0, 0.4, 1.1, 3), (0, 0, 1, 3), (0, 0, 1, 3)),
        (4, (0, 1, 2, 4), (0, 4, 8, 15), (0, 16 / 15, 32 / 15, 4)),
        (4, (-1, 0, 0.5, 2), (0, 5, 8, 15), (-1, 0, 0.6, 2)),  # 7.5 goes to 8
        (8, (0, 51, 102.4, 255), (0, 51, 102, 255), (0, 51, 102, 255)),
        (8, (3, 3, 3, 3), (0, 0, 0, 0), (3, 3, 3, 3)),
    ],
)
def test_by_hand(bits: int, numbers: tuple[float, ...], codes: tuple[int, ...], read: tuple[float, ...]) -> None:
    """In float64, where halves are halves. The first code is in a byte's lowest bits."""
    held, scale, zero = pack(torch.tensor(numbers, dtype=torch.float64), bits, 4)
    each = 8 // bits
    expected = [sum(code << bits * i for i, code in enumerate(codes[at : at + each])) for at in range(0, 4, each)]
    assert held.tolist() == expected
    assert zero.item() == numbers[0] and scale.item() == pytest.approx((numbers[3] - numbers[0]) / (2**bits - 1))
    torch.testing.assert_close(unpack(held, scale, zero, bits, 4), torch.tensor(read, dtype=torch.float64))
    assert rounded(list(numbers), bits, 4) == pytest.approx(read)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("width", "group"), [(64, 64), (80, 40), (7, 7), (6, 2), (5, 1)])
def test_the_error_is_half_a_scale_at_most(bits: int, dtype: torch.dtype, width: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 50, width, generator=generator) * 30).to(dtype)
    codes, scale, zero = pack(x, bits, group)
    assert codes.shape[-1] == -(-width * bits // 8) and codes.dtype == torch.uint8
    assert scale.shape[-1] == zero.shape[-1] == width // group
    read = unpack(codes, scale, zero, bits, width)
    slack = 1e-5 * x.abs().max() if dtype != torch.float64 else 1e-12
    assert ((read - x.to(read.dtype)).abs() <= scale.repeat_interleave(group, -1) / 2 + slack).all()
    of_group = read.unflatten(-1, (-1, group)), x.to(read.dtype).unflatten(-1, (-1, group))
    torch.testing.assert_close(of_group[0].amin(-1), of_group[1].amin(-1), rtol=0, atol=0)
    torch.testing.assert_close(of_group[0].amax(-1), of_group[1].amax(-1), rtol=1e-5, atol=1e-4)


def test_groups_are_even() -> None:
    """The largest divisor of the head dimension that is no larger than asked for."""
    assert [group_size(width, 64) for width in (8, 64, 80, 96, 128, 576)] == [8, 64, 40, 48, 64, 64]
    assert group_size(8, 3) == 2


# ------------------------------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("bits", 3, "bits=3 does not work; choose one of 2, 4, 8"),
        ("bits", 16, "bits=16 does not work; choose one of 2, 4, 8"),
        ("bits", "8", "bits='8' does not work; choose one of 2, 4, 8"),
        ("group", 0, "group=0 does not work; give an int of at least 1"),
        ("group", 32.0, "group=32.0 does not work; give an int of at least 1"),
        ("group", True, "group=True does not work; give an int of at least 1"),
        ("residual", -1, "residual=-1 does not work; give an int of at least 0"),
        ("residual", 0.5, "residual=0.5 does not work; give an int of at least 0"),
        ("residual", None, "residual=None does not work; give an int of at least 0"),
    ],
)
def test_bad_values(field: str, value: Any, reason: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Packed(**{field: value})
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (EMS(budget=50), r"ems\(budget=50.*\) merges what it drops .* packed\(\) never packs an entry again; use"),
        (
            AdaKV(SnapKV(budget=40)),
            r"ada_kv\(.*\) leaves a different number of entries .* packed\(\) does not pack; use",
        ),
        (Packed(bits=4), r"both play the role 'storage'; keep one of them"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refused_beside(beside: Any, reason: str) -> None:
    """In either order, before anything is changed."""
    for both in ([Packed(), beside], [beside, Packed()]):
        with pytest.raises(PolicyError, match=reason):
            make_policies(both)


# ----------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.id)
def test_beside_another_policy(case: Pair) -> None:
    """In float64, where no two codes are equally near: what is kept after every pass, and the logits of every pass."""
    model = sharp_llama().double()
    logits, sets = run(model, [case.beside, case.packed], PASSES)
    steps = case.oracle.runner(model, case.oracle).run(PASSES)
    for got, found, step in zip(logits, sets, steps, strict=True):
        torch.testing.assert_close(got[-1].float(), step.logits[-1], atol=1e-5, rtol=1e-5)
        assert found == step.kept
    exact, _ = run(model, case.beside, PASSES)
    assert max((a - b).abs().max() for a, b in zip(exact[1:], logits[1:], strict=True)) > 1e-3


@pytest.mark.parametrize("policies", TOGETHER, ids=lambda policies: "+".join(one.name for one in policies))
def test_with_room_for_everything_nothing_changes(model: Any, policies: list[Any]) -> None:
    *others, packed = policies
    expected, sets = run(model, others, PASSES)
    found, other_sets = run(model, [*others, Packed(bits=packed.bits, residual=100)], PASSES)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sets == other_sets


# -------------------------------------------------------------------------------------------------------- what is exact


@torch.no_grad()
def test_what_is_exact(model: Any) -> None:
    """The newest tokens of each sequence, whatever slots they are in; the others as packed once, through a second turn."""
    policy = Packed(bits=8, group=8, residual=5)

    def fed(policies: Any) -> Any:
        cache = DynamicCache(config=model.config)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :4] = 0
        with kvpress.patch(model, policies):
            model(torch.tensor([prompt(12), prompt(12, 1)]), attention_mask=mask, **{CACHE: cache})
            for step in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                model(torch.tensor([[3 + step], [9 + step]]), attention_mask=mask, **{CACHE: cache})
        return cache

    # What the first layer holds does not depend on what is read.
    plain, packed = fed("full").layers[0], fed(policy).layers[0]
    assert torch.equal(plain.positions, packed.positions[:, :, : plain.positions.shape[2]])
    for name in ("keys", "values"):
        exact, read = getattr(plain, name), getattr(packed, name)
        for row, seen in enumerate((11, 15)):
            for head in range(2):
                for slot, position in enumerate(plain.positions[row, head].tolist()):
                    if position < 0:
                        continue
                    expected = exact[row, head, slot].tolist()
                    if position < seen - 5:
                        expected = rounded(expected, 8, 8)
                        assert expected != exact[row, head, slot].tolist()
                    assert read[row, head, slot].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_prompt_in_one_pass_is_exact_and_its_chunks_read_what_was_packed(model: Any) -> None:
    ids = torch.tensor([prompt(20)])
    dense = model(ids).logits
    with kvpress.patch(model, Packed(bits=4, residual=2)):
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-4)
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], **{CACHE: cache})
        second = model(ids[:, 10:], **{CACHE: cache}).logits
    assert (second - dense[:, 10:]).abs().max() > 1e-2


@torch.no_grad()
def test_copies_beams_and_crops(model: Any) -> None:
    """A copy, a beam and a cropped cache go on as the sequence did alone."""
    policy, text = Packed(bits=8, group=4, residual=3), prompt(12)

    def steps(cache: Any, *tokens: list[int]) -> torch.Tensor:
        return torch.stack([model(torch.tensor([[t] for t in ids]), **{CACHE: cache}).logits[:, -1] for ids in tokens])

    with kvpress.patch(model, policy):
        alone = DynamicCache(config=model.config)
        model(torch.tensor([text]), **{CACHE: alone})
        steps(alone, [4], [5])
        other = copy.deepcopy(alone)
        expected = steps(alone, [6], [7], [8])
        assert torch.equal(steps(other, [6], [7], [8]), expected)
        beams = DynamicCache(config=model.config)
        model(torch.tensor([text, prompt(12, 1)]), **{CACHE: beams})
        steps(beams, [4, 9], [5, 9])
        beams.reorder_cache(torch.tensor([1, 0]))
        beams.batch_repeat_interleave(2)
        beams.batch_select_indices(torch.tensor([2, 0]))
        torch.testing.assert_close(steps(beams, [6, 1], [7, 1], [8, 1])[:, :1], expected, atol=1e-4, rtol=1e-4)
        # What is cropped away is not read, though it stands in the ring until others come.
        other.crop(-3)
        torch.testing.assert_close(steps(other, [6], [7], [8])[-1], expected[-1], atol=0.1, rtol=0.1)
        assert kept(other) == kept(alone)


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("dtype", "bits", "share"),
    [
        (torch.bfloat16, 8, 0.5625),
        (torch.float32, 8, 0.28125),
        (torch.bfloat16, 4, 0.3125),
        (torch.float32, 4, 0.15625),
        (torch.bfloat16, 2, 0.1875),
    ],
)
@torch.no_grad()
def test_bytes(dtype: torch.dtype, bits: int, share: float) -> None:
    """bits / 8 bytes of each number, and 8 for a scale and a zero of every 64 of them."""
    model = tiny_llama(heads=2, kv_heads=1, head_dim=64, max_position_embeddings=512).to(dtype)
    tokens, residual = 400, 32
    with kvpress.patch(model, Packed(bits=bits, residual=residual)) as handle:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(tokens)]), **{CACHE: cache})
        total = handle.report().total
    layer, full = cache.layers[0], 2 * 64 * dtype.itemsize
    slots = layer.storage.capacity
    ring = (residual + 1) * (full + 4)
    assert layer.nbytes == slots * (full * share + 4) + ring
    assert total.full_bytes == 2 * tokens * full
    assert total.bytes == pytest.approx(2 * layer.nbytes, rel=0.01)


@torch.no_grad()
def test_nothing_of_a_pass_is_left(model: Any) -> None:
    """The exact keys and values of a prompt go with its pass, with an eviction policy and without."""
    for policies in ([Packed(residual=2)], [SnapKV(budget=30, window=4), Packed(residual=2)]):
        with kvpress.patch(model, policies):
            cache = DynamicCache(config=model.config)
            model(torch.tensor([prompt(100)]), **{CACHE: cache})
        for layer in cache.layers:
            assert not layer.storage.coming and layer.storage.made is None
            assert layer.nbytes == layer.facts.nbytes


@pytest.mark.parametrize("residual", [0, 3])
def test_steps_that_are_taken_back(model: Any, residual: int) -> None:
    """As TidalDecode takes them back and feeds them again: every token is there once."""
    with kvpress.patch(model, [TidalDecode(k=5, sparse_layer_start=0, correct_every=2), Packed(residual=residual)]):
        output = model.generate(
            torch.tensor([prompt(16)]), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
        )
    assert all(head == list(range(23)) for layer in kept(output[CACHE]) for head in layer)
