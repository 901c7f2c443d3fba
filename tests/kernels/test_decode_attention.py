"""decode_attention on both paths against its reference, a float64 loop and the same-precision textbook computation.

gpu/test_decode_attention.py has what only the Triton kernels do.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

from kvpress.kernels import decode_attention as module
from kvpress.kernels import decode_scores as scores_module
from kvpress.kernels.decode_attention import decode_attention, decode_attention_reference
from support.attention_inputs import BATCH, KV_HEADS, options
from support.attention_inputs import step_inputs as inputs
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on
from support.brute import attend, eager
from support.tolerances import tolerance

# NumPy, in Triton's interpreter, says so where a logarithm of zero or an overflow to infinity is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

SIZES = pytest.mark.parametrize("slots", [1, 63, 111], ids="{}-slots".format)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256], ids="d-{}".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NEAR = {"atol": 1e-5, "rtol": 2e-5}
WITH_MASS = pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
FEATURES = [
    (), ("valid",), ("softcap",), ("sinks",), ("moved",), ("moved-thrice",), ("first-moved",), ("valid", "first-moved"),
    ("valid", "softcap", "sinks", "moved"), ("valid", "softcap", "sinks", "moved-thrice"),
]  # fmt: skip
ALL_FEATURES = pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")


def attended(backend, *tensors, **chosen):
    """Output, weights and LSE on the CPU, of tensors that go where the path runs."""
    tensors, chosen = tree_map(lambda x: on(backend, x)[0], (tensors, chosen))
    return tuple(x if x is None else x.cpu() for x in decode_attention(*tensors, **chosen, backend=backend))


def brute(query, key, value, valid=None, **chosen):
    """The float64 loop, on the slots that are valid."""
    visible = torch.ones(key.shape[:3], dtype=torch.bool) if valid is None else valid
    return attend(query, key, value, visible[:, :, None], **chosen)


@SIZES
@GROUPS
@HEAD_DIMS
@BACKENDS_AND_DTYPES
@WITH_MASS
def test_is_as_precise_as_torch(slots, group, head_dim, dtype, with_mass, backend):
    """The error against float64 is at most twice that of eager attention in the same precision."""
    query, key, value = inputs(slots, group, head_dim, dtype)
    scale = head_dim**-0.5
    expected, _ = brute(query, key, value, scale=scale)
    visible = torch.ones(BATCH, KV_HEADS, 1, slots, dtype=torch.bool)
    torch_error = (eager(query, key, value, visible, scale=scale).double() - expected).abs().max()
    output, _, _ = attended(backend, query, key, value, scale=scale, with_mass=with_mass)
    assert output.dtype == dtype and output.shape == query.shape
    floor = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (output.double() - expected).abs().max() <= 2 * torch_error + floor


@BACKENDS
@SIZES
@GROUPS
@WITH_MASS
@ALL_FEATURES
def test_equals_the_definition(slots, group, features, with_mass, backend):
    """Every feature alone and all together, against the loop and the reference."""
    query, key, value = inputs(slots, group, 16, seed=2)
    chosen = options(features, slots, query)
    expected, expected_mass = brute(query, key, value, scale=0.3, **chosen)
    reference, reference_mass, _ = decode_attention_reference(query, key, value, scale=0.3, **chosen)
    output, mass, _ = attended(backend, query, key, value, scale=0.3, **chosen, with_mass=with_mass)
    torch.testing.assert_close(reference, expected.float(), **NEAR)
    torch.testing.assert_close(reference_mass, expected_mass.float(), **NEAR)
    torch.testing.assert_close(output, expected.float(), **NEAR)
    if with_mass:
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass, expected_mass.float(), **NEAR)
    else:
        assert mass is None


@WITH_MASS
@BACKENDS_AND_DTYPES
@ALL_FEATURES
def test_slice_of_a_larger_buffer(features, with_mass, dtype, backend):
    """Slots past those in use are never read, and the stride between heads makes no difference."""
    query, key, value = inputs(63, 3, 64, dtype, spare=9)
    chosen = options(features, 63, query)
    strided = attended(backend, query, key, value, scale=0.2, **chosen, with_mass=with_mass)
    compact = attended(backend, query, key.contiguous(), value.contiguous(), scale=0.2, **chosen, with_mass=with_mass)
    assert not key.is_contiguous()
    far = tolerance(compact[0], dtype, sums=63 + 64)
    torch.testing.assert_close(strided[0], compact[0], rtol=0, atol=far)
    if with_mass:
        torch.testing.assert_close(strided[1], compact[1], **NEAR)


@WITH_MASS
@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("features", [(), ("softcap",), ("sinks",), ("moved",)], ids=lambda n: "+".join(n) or "plain")
def test_no_valid_slot_gives_zeros(features, with_mass, dtype, backend):
    """A kv head that holds nothing reads zeros; the others are untouched."""
    query, key, value = inputs(63, 3, 16, dtype)
    chosen = options(("valid", *features), 63, query)
    output, mass, _ = attended(backend, query, key, value, scale=0.25, **chosen, with_mass=with_mass)
    assert output.isfinite().all()
    assert (output[-1, -3:] == 0).all()
    assert (output[:-1] != 0).any(-1).all() and (output[-1, :-3] != 0).any(-1).all()
    if with_mass:
        assert (mass[-1, -1] == 0).all() and mass.isfinite().all()


@GROUPS
@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("features", [(), ("valid",), ("softcap",), ("moved",)], ids=lambda n: "+".join(n) or "plain")
def test_u5_mass_sums_to_the_group(group, dtype, features, backend):
    """U5: one row per query head, so the weights of a kv head sum to the group (0 where it holds nothing)."""
    query, key, value = inputs(111, group, 16, dtype)
    chosen = options(features, 111, query)
    _, mass, _ = attended(backend, query, key, value, scale=0.25, **chosen, with_mass=True)
    expected = torch.full((BATCH, KV_HEADS), float(group))
    if "valid" in chosen:
        expected[-1, -1] = 0
        assert (mass[~chosen["valid"]] == 0).all()
    torch.testing.assert_close(mass.sum(-1), expected, **NEAR)


@BACKENDS
def test_sinks_take_their_share_of_the_mass(backend):
    """A large sink logit takes nearly all of the weight, one at -inf takes none."""
    query, key, value = inputs(63, 1, 16)
    none = attended(backend, query, key, value, scale=0.25, with_mass=True)
    sinks = torch.full((KV_HEADS,), float("-inf"))
    absent = attended(backend, query, key, value, scale=0.25, sinks=sinks, with_mass=True)
    large = attended(backend, query, key, value, scale=0.25, sinks=sinks.fill_(50.0), with_mass=True)
    torch.testing.assert_close(absent, none, **NEAR)
    assert large[1].sum() < 1e-6 and large[0].abs().max() < 1e-6


@BACKENDS
def test_slots_in_any_order(backend):
    """A permutation of the slots permutes the mass and leaves the output."""
    query, key, value = inputs(63, 3, 16)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(3))
    output, mass, _ = attended(backend, query, key, value, scale=0.25, with_mass=True)
    moved, moved_mass, _ = attended(backend, query, key[:, :, order], value[:, :, order], scale=0.25, with_mass=True)
    torch.testing.assert_close(moved, output, **NEAR)
    torch.testing.assert_close(moved_mass, mass[:, :, order], **NEAR)


@BACKENDS
def test_u6_heads_do_not_leak(backend):
    """U6: permuting the kv heads with their groups permutes the results."""
    query, key, value = inputs(63, 3, 16)
    flipped = query.unflatten(1, (KV_HEADS, 3)).flip(1).flatten(1, 2)
    output, mass, _ = attended(backend, query, key, value, scale=0.25, with_mass=True)
    other, other_mass, _ = attended(backend, flipped, key.flip(1), value.flip(1), scale=0.25, with_mass=True)
    torch.testing.assert_close(other.unflatten(1, (KV_HEADS, 3)).flip(1).flatten(1, 2), output, **NEAR)
    torch.testing.assert_close(other_mass.flip(1), mass, **NEAR)


@BACKENDS
@pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
def test_large_logits(with_mass, backend):
    """Scores in the thousands neither overflow nor become NaN, also capped."""
    query, key, value = (100 * x for x in inputs(63, 3, 16))
    for softcap in (None, 30.0):
        output, _, _ = attended(backend, query, key, value, scale=0.25, softcap=softcap, with_mass=with_mass)
        expected, _ = brute(query, key, value, scale=0.25, **({} if softcap is None else {"softcap": softcap}))
        torch.testing.assert_close(output, expected.float(), rtol=1e-3, atol=1e-2)


@DTYPES
@pytest.mark.parametrize("features", [(), ("valid", "softcap", "sinks", "moved")], ids=["plain", "all"])
def test_tiles_of_keys(monkeypatch, dtype, features):
    """Keys that are converted in several tiles, the last one short, give the same result."""
    query, key, value = inputs(111, 3, 64, dtype)
    chosen = options(features, 111, query)
    whole = decode_attention(query, key, value, scale=0.2, **chosen, with_mass=True)
    monkeypatch.setattr(scores_module, "TILE_KEYS", 25 * BATCH * KV_HEADS * 64)
    tiled = decode_attention(query, key, value, scale=0.2, **chosen, with_mass=True)
    torch.testing.assert_close(tiled[0], whole[0])
    torch.testing.assert_close(tiled[1], whole[1])


@BACKENDS
@pytest.mark.parametrize(
    "features", [(), ("valid",), ("valid", "softcap", "sinks", "moved")], ids=lambda n: "+".join(n) or "plain"
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["i32", "i64"])
@WITH_MASS
def test_listed_slots(features, index_dtype, with_mass, backend):
    """With an index the result is that of a cache that holds only the listed slots, in their order."""
    query, key, value = inputs(63, 3, 16, spare=4)
    index = torch.rand(BATCH, KV_HEADS, 63, generator=torch.Generator().manual_seed(5)).argsort(-1)[..., :20]
    chosen = {"scale": 0.25, **options(features, 20, query)}
    listed = (x.gather(2, index[..., None].expand(-1, -1, -1, 16)) for x in (key, value))
    expected = brute(query, *listed, **chosen)
    index = index.to(index_dtype)
    reference = decode_attention_reference(query, key, value, **chosen, index=index)
    output, mass, _ = attended(backend, query, key, value, **chosen, index=index, with_mass=with_mass)
    for found in (reference, (output, mass)):
        torch.testing.assert_close(found[0], expected[0].float(), **NEAR)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1].float(), **NEAR)


@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")
def test_lse(dtype, features, backend):
    """The weights are exp(score - LSE); a head that reads nothing has -inf, or its sink."""
    query, key, value = inputs(63, 3, 16, dtype)
    chosen = {"scale": 0.25, **options(features, 63, query)}
    _, _, expected = decode_attention_reference(query, key, value, **chosen)
    output, mass, lse = attended(backend, query, key, value, **chosen, with_lse=True)
    assert lse.dtype == torch.float32 and lse.shape == query.shape[:2] and mass is None
    torch.testing.assert_close(lse, expected, **NEAR)
    assert output.equal(attended(backend, query, key, value, **chosen, with_mass=True)[0])
    if features == ():
        scores = (query.float().unflatten(1, (KV_HEADS, 3)) * 0.25 * key.float()[:, :, None, :1]).sum(-1)[..., 0]
        weights = attended(backend, query, key, value, **chosen, with_mass=True, per_head=True)[1]
        torch.testing.assert_close((scores.flatten(1, 2) - lse).exp(), weights[..., 0], **NEAR)


@BACKENDS
def test_lse_merges_parts(backend):
    """Two halves of the slots, weighed by their LSE, are the whole."""
    query, key, value = inputs(63, 3, 16)
    whole, _, _ = attended(backend, query, key, value, scale=0.25)
    halves = [
        attended(backend, query, key[:, :, part], value[:, :, part], scale=0.25, with_lse=True)
        for part in (slice(0, 20), slice(20, 63))
    ]
    weights = torch.stack([lse for _, _, lse in halves]).softmax(0)[..., None, None]
    torch.testing.assert_close(
        sum(w * output for w, (output, _, _) in zip(weights, halves, strict=True)), whole, **NEAR
    )


def test_a_backend_that_cannot_run(monkeypatch):
    """Triton on a CPU without the interpreter, and a backend that does not exist."""
    query, key, value = inputs(1, 1, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton'"):
        decode_attention(query, key, value, scale=0.25, backend="triton")
    with pytest.raises(ValueError, match="does not exist"):
        decode_attention(query, key, value, scale=0.25, backend="cuda")


@pytest.mark.parametrize(("tasks", "slots", "threads", "parts"), [
    (3, 8192, 2, 2), (4, 8192, 2, 1), (1, 8192, 2, 2), (3, 4095, 2, 1), (8, 65536, 16, 2), (3, 65536, 16, 16), (24, 65536, 5, 1)
])  # fmt: skip
def test_no_thread_waits_for_another(tasks, slots, threads, parts, monkeypatch):
    """As many parts as make the tasks a multiple of the threads; none of few slots, and none where tasks are many."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert module._parts(tasks, slots) == parts
    assert parts == 1 or tasks * parts % threads == 0


@pytest.mark.parametrize("slots", [1, 7, 8, 63, 111])
@pytest.mark.parametrize("parts", [2, 3, 7])
@DTYPES
def test_parts_merge_to_the_whole(slots, parts, dtype, monkeypatch):
    """Parts of equal length and what is left behind them, in a buffer with more slots than are in use."""
    monkeypatch.setattr(module, "_parts", lambda tasks, number: min(parts, number))
    query, key, value = inputs(slots, 3, 16, dtype, seed=7, spare=5)
    expected, _ = brute(query, key, value, scale=0.4)
    output, _, _ = decode_attention(query, key, value, scale=0.4)
    assert output.dtype == dtype  # each part's output is rounded once before they are merged
    far = tolerance(expected, dtype, sums=slots + 16)
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=far)


@pytest.mark.parametrize("listed", [False, True], ids=["all-slots", "listed"])
@pytest.mark.parametrize("per_head", [False, True], ids=["summed", "per-head"])
@pytest.mark.parametrize(
    "features",
    [
        ("moved-thrice",),
        ("first-moved",),
        ("valid", "softcap", "sinks", "moved-thrice"),
        ("valid", "sinks", "first-moved"),
    ],
    ids="+".join,
)
def test_parts_merged_by_their_lse(features, per_head, listed):
    """What a GPU does with more other queries than its kernel has: output, weights and LSE are those of one softmax."""
    query, key, value = inputs(63, 3, 16, seed=4)
    count, index = (20, None) if listed else (63, None)
    if listed:
        index = torch.rand(BATCH, KV_HEADS, 63, generator=torch.Generator().manual_seed(5)).argsort(-1)[..., :20]
    chosen = options(features, count, query)
    if per_head and "valid" in chosen:
        chosen["valid"] = chosen["valid"].repeat_interleave(3, dim=1)
    every = {"with_mass": True, "per_head": per_head, "with_lse": True}
    expected = decode_attention(query, key, value, scale=0.3, index=index, **chosen, **every)
    valid, moved, sinks = chosen.pop("valid", None), chosen.pop("moved"), chosen.pop("sinks", None)
    options_of_parts = {"softcap": None, **chosen, "scale": 0.3, "index": index, "page_size": 1, "backend": "torch"}
    found = module._by_parts(query, key, value, valid, moved, sinks, None, True, per_head, True, **options_of_parts)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=f"does not go with {len(moved)} other queries"):
        module._by_parts(query, key, value, valid, moved, sinks, (), True, per_head, True, **options_of_parts)
