"""What only the Triton decode attention does: splits, masks of query heads, pages, noise; ../test_decode_attention.py has what
both paths do.
"""

import mmap

import pytest
import torch
from torch.utils._pytree import tree_map

from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.decode_attention import decode_attention, decode_attention_reference
from kvpress.kernels.gpu import decode_attention as gpu
from support.accelerator import DEVICE, DTYPES
from support.attention_inputs import BATCH, KV_HEADS
from support.attention_inputs import step_inputs as inputs

# NumPy, in the interpreter, says so where a logarithm of zero or an overflow to infinity is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

CPU = torch.device("cpu")
LENGTHS = pytest.mark.parametrize("slots", [1, 63, 111], ids="{}-slots".format)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
ALL = ("valid-per-head", "index", "softcap", "sinks")
FEATURES = [
    (), ("valid",), ("valid-per-head",), ("index",), ("softcap",), ("sinks",), ("moved",), ("first-moved",),
    ("valid", "index"), (*ALL, "moved"), (*ALL, "first-moved"),
]  # fmt: skip
ALL_FEATURES = pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")
SPLITS = pytest.mark.parametrize("keys_per_split", [128, 16], ids=["one-split", "several-splits"])


def options(features, slots, query, seed=1, index_dtype=torch.int64):
    """Keyword arguments for the named features; the last sequence's last kv head has no valid entry at all."""
    generator = torch.Generator().manual_seed(seed)
    chosen, entries = {}, slots
    if "index" in features:
        entries = max(1, slots // 2)
        chosen["index"] = torch.rand(BATCH, KV_HEADS, slots, generator=generator).argsort(-1)[..., :entries]
        chosen["index"] = chosen["index"].to(index_dtype)
    for name, rows in (("valid", KV_HEADS), ("valid-per-head", query.shape[1])):
        if name in features:
            chosen["valid"] = torch.rand(BATCH, rows, entries, generator=generator) < 0.6
            chosen["valid"][-1, -rows // KV_HEADS :] = False
    if "softcap" in features:
        chosen["softcap"] = 1.5
    if "sinks" in features:
        chosen["sinks"] = torch.randn(query.shape[1], generator=generator)
    if "moved" in features:
        marked = torch.rand(BATCH, KV_HEADS, entries, generator=generator) < 0.4
        chosen["moved"] = [(torch.randn(query.shape, generator=generator).to(query.dtype), marked)]
    if "first-moved" in features:
        chosen["moved"] = [(torch.randn(query.shape, generator=generator).to(query.dtype), (entries + 1) // 2)]
    return chosen


def on_device(*tensors, **chosen):
    """The Triton result, of tensors that go to the device and back."""
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    chosen = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, chosen)
    results = decode_attention(*tensors, **chosen, backend="triton")
    return tuple(x if x is None else x.cpu() for x in results)


@LENGTHS
@GROUPS
@SPLITS
@ALL_FEATURES
def test_equals_the_definition(slots, group, keys_per_split, features, monkeypatch):
    """Output, weights and LSE, in one piece and merged from splits; what is not written stays NaN."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    query, key, value = inputs(slots, group, 32, seed=2, spare=5)
    chosen = options(features, slots, query)
    expected = decode_attention_reference(query, key, value, scale=0.3, **chosen)
    found = on_device(query, key, value, scale=0.3, **chosen, with_mass=True, with_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


@SPLITS
@pytest.mark.parametrize("features", [(), ("index", "valid-per-head")], ids=["plain", "index"])
def test_weights_per_head(features, keys_per_split, monkeypatch):
    """Not summed, they are those of the torch path, and sum to those of the group."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    query, key, value = inputs(63, 3, 32)
    chosen = {"scale": 0.2, **options(features, 63, query)}
    _, weights, _ = on_device(query, key, value, **chosen, with_mass=True, per_head=True)
    _, expected, _ = decode_attention(query, key, value, **chosen, with_mass=True, per_head=True, backend="torch")
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=2e-5)
    _, mass, lse = on_device(query, key, value, **chosen, with_mass=True)
    assert lse is None
    torch.testing.assert_close(weights.unflatten(1, (KV_HEADS, 3)).sum(2), mass)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["i32", "i64"])
def test_reads_only_what_is_listed_and_valid(index_dtype):
    """NaN in every slot that is not listed, or that nobody looks at, changes nothing; nor does an index of it."""
    query, key, value = inputs(63, 3, 32, seed=4)
    chosen = options(("index", "valid-per-head"), 63, query, index_dtype=index_dtype)
    expected = decode_attention_reference(query, key, value, scale=0.3, **chosen)
    looked = chosen["valid"].unflatten(1, (KV_HEADS, 3)).any(2)
    read = torch.zeros(BATCH, KV_HEADS, 63, dtype=torch.bool).scatter_(2, chosen["index"].long(), looked)
    key, value = (x.masked_fill(~read[..., None], float("nan")) for x in (key, value))
    found = on_device(query, key, value, scale=0.3, **chosen, with_mass=True, with_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_results_in_memory_full_of_nan(monkeypatch):
    """Every number that is returned is written: buffers that start as NaN make no difference."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", 16)
    query, key, value = inputs(111, 3, 80)
    expected = on_device(query, key, value, scale=0.2, with_mass=True, with_lse=True)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **how: x.new_full(shape, float("nan"), **how))
    found = on_device(query, key, value, scale=0.2, with_mass=True, with_lse=True)
    for ours, before in zip(found, expected, strict=True):
        assert ours.equal(before)


@pytest.mark.parametrize("count", [0, 1, 20, 63, 100], ids="first-{}".format)
@DTYPES
def test_moved_by_count_is_moved_by_mark(count, dtype):
    """A number of first slots is a mask that is True there; strides of the second query and of the mask mean nothing."""
    query, key, value = inputs(63, 3, 80, dtype)
    other = torch.randn(BATCH, KV_HEADS * 3, 80, 2, generator=torch.Generator().manual_seed(9)).to(dtype)
    other = other[..., :1].transpose(2, 3)
    marked = (torch.arange(63) < count).expand(BATCH, KV_HEADS, 63).repeat_interleave(2, dim=2)[..., ::2]
    one = on_device(query, key, value, scale=0.2, moved=[(other, count)], with_mass=True, with_lse=True)
    two = on_device(query, key, value, scale=0.2, moved=[(other, marked)], with_mass=True, with_lse=True)
    for ours, theirs in zip(one, two, strict=True):
        assert torch.equal(ours, theirs)
    expected = decode_attention_reference(*(x.float() for x in (query, key, value)), scale=0.2, moved=[(other, count)])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(one[0].float(), expected[0], atol=tolerance, rtol=tolerance)
    plain = on_device(query, key, value, scale=0.2, with_mass=True)[1]
    assert (count == 0) == torch.equal(one[1], plain)


@SPLITS
@pytest.mark.parametrize("form", ["moved", "first-moved"])
def test_moved_entries_of_pages(form, keys_per_split, monkeypatch):
    """The mark is of an entry, not of a page, and the first entries are those of the pages listed first."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    query, key, value = inputs(63, 3, 32, seed=5)
    index, valid = paged(63, 8, KV_HEADS * 3)
    moved = options((form,), index.shape[2] * 8, query)["moved"]
    chosen = {"index": index, "valid": valid, "page_size": 8, "scale": 0.3, "moved": moved}
    listed, read = entries_of(index, valid, 8, 63)
    expected = decode_attention_reference(query, key, value, read, index=listed, scale=0.3, moved=moved)
    found = on_device(query, key, value, **chosen, with_mass=True, with_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def paged(slots, page_size, rows, seed=3):
    """A random half of the pages in any order with the last, short one among them, and who reads which."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-slots // page_size)
    order = torch.rand(BATCH, KV_HEADS, pages - 1, generator=generator).argsort(-1)[..., : pages // 2]
    index = torch.cat((order, torch.full((BATCH, KV_HEADS, 1), pages - 1)), dim=-1)
    valid = torch.rand(BATCH, rows, index.shape[2], generator=generator) < 0.7
    valid[0, :, -1] = True
    return index, valid


def entries_of(index, valid, page_size, slots):
    """The lists of pages as lists of slots, page by page: the independent definition."""
    heads = valid.shape[1]
    listed = torch.zeros(*index.shape[:2], index.shape[2] * page_size, dtype=torch.int64)
    read = torch.zeros(BATCH, heads, listed.shape[2], dtype=torch.bool)
    for b in range(BATCH):
        for kv_head in range(KV_HEADS):
            for place, page in enumerate(index[b, kv_head].tolist()):
                for within in range(page_size):
                    slot, at = page * page_size + within, place * page_size + within
                    listed[b, kv_head, at] = min(slot, slots - 1)
                    rows = heads // KV_HEADS
                    own = slice(kv_head * rows, (kv_head + 1) * rows)
                    read[b, own, at] = valid[b, own, place] & (slot < slots)
    return listed, read


@pytest.mark.parametrize("group", [1, 3, 8], ids="group-{}".format)
@pytest.mark.parametrize(("slots", "page_size"), [(1, 16), (63, 16), (111, 7), (64, 2)], ids=str)
@pytest.mark.parametrize("rows", ["none", "kv-head", "head"])
@SPLITS
def test_pages(slots, page_size, group, rows, keys_per_split, monkeypatch):
    """Pages are the slots they have: with everything read, per kv head and per query head; NaN elsewhere is not read."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    query, key, value = inputs(slots, group, 32, seed=5, spare=6)
    index, valid = paged(slots, page_size, KV_HEADS * (group if rows == "head" else 1))
    valid = torch.ones_like(valid) if rows == "none" else valid
    listed, read = entries_of(index, valid, page_size, slots)
    expected = decode_attention_reference(query, key, value, read, index=listed, scale=0.3)
    looked = read.unflatten(1, (KV_HEADS, -1)).any(2)
    unread = torch.ones(BATCH, KV_HEADS, slots, dtype=torch.bool)
    for b, kv_head, place in looked.nonzero().tolist():
        unread[b, kv_head, listed[b, kv_head, place]] = False
    for buffer in (key, value):
        buffer.masked_fill_(unread[..., None], float("nan"))
    chosen = {"index": index.int(), "page_size": page_size, "scale": 0.3, "with_mass": True, "with_lse": True}
    found = on_device(query, key, value, **chosen, **({} if rows == "none" else {"valid": valid}))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


PERTURBATIONS = {
    "temperature": Perturbation(1.7),
    "noise": Perturbation(1.0, seed=3, layer=2),
    "noise-and-temperature": Perturbation(0.8, seed=5, layer=1, fresh=False),
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS.values(), ids=list(PERTURBATIONS))
@pytest.mark.parametrize(
    "features", [(), ("valid",), ("sinks", "softcap"), (*ALL, "moved")], ids=lambda names: "+".join(names) or "plain"
)
@pytest.mark.parametrize("slots", [1, 63], ids="{}-slots".format)
@SPLITS
def test_perturbed_mass(slots, features, perturbation, keys_per_split, monkeypatch):
    """The mass is that of the noisy softmax at its temperature; output and LSE are those of the plain one."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    query, key, value = inputs(slots, 3, 32, seed=6, spare=3)
    chosen = options(features, slots, query)
    entries = chosen["index"].shape[2] if "index" in chosen else slots
    generator = torch.Generator().manual_seed(7)
    positions = torch.stack([torch.randperm(400_000, generator=generator)[:entries] for _ in range(BATCH * KV_HEADS)])
    row, positions = torch.tensor([[400_000], [399_999]]), positions.view(BATCH, KV_HEADS, entries).int()
    perturbed = perturbation, row, positions
    expected = decode_attention_reference(query, key, value, scale=0.3, perturbed=perturbed, **chosen)
    plain = decode_attention_reference(query, key, value, scale=0.3, **chosen)
    perturbed = perturbation, row.to(DEVICE), positions.to(DEVICE)
    found = on_device(query, key, value, scale=0.3, perturbed=perturbed, **chosen, with_mass=True, with_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(found[0], plain[0], atol=2e-6, rtol=2e-5)
    assert slots == 1 or (found[1] - plain[1]).abs().max() > 0.01
    # Per head, and without the mass: nothing is perturbed then.
    weights = on_device(query, key, value, scale=0.3, perturbed=perturbed, **chosen, with_mass=True, per_head=True)[1]
    torch.testing.assert_close(weights.unflatten(1, (KV_HEADS, 3)).sum(2), found[1])
    output, mass, _ = on_device(query, key, value, scale=0.3, perturbed=perturbed, **chosen)
    assert mass is None and torch.equal(output, found[0])


class Strides:
    """A kernel that is launched with other strides than its tensors have."""

    def __init__(self, kernel, **strides):
        self.kernel, self.strides = kernel, strides

    def __getitem__(self, grid):
        def launch(*args, **options):
            args = [self.strides.get(name, x) for name, x in zip(self.kernel.arg_names, args, strict=False)]
            return self.kernel[grid](*args, **options)

        return launch


def test_offsets_past_two_to_the_31(monkeypatch):
    """The ninth slot begins 2^31 numbers behind the first; on a CPU nothing but their two pages is ever allocated."""
    head_dim, far = 16, 1 << 28
    if DEVICE.type == "cuda":
        storage = torch.zeros(8 * far + head_dim, dtype=torch.float16, device=DEVICE)
        first, ninth = storage[:head_dim], storage[-head_dim:]
    else:
        memory = mmap.mmap(-1, 2 * (8 * far + head_dim), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        parts = (torch.frombuffer(memory, dtype=torch.float16, count=head_dim, offset=at) for at in (0, 16 * far))
        first, ninth = parts
    first.fill_(1.0)
    ninth.fill_(2.0)
    slots = first.view(1, 1, 1, head_dim)
    index = torch.tensor([[[0, 8]]], device=DEVICE)
    monkeypatch.setattr(gpu, "attend_kernel", Strides(gpu.attend_kernel, stride_kn=far, stride_vn=far))
    output, mass, _ = on_device(torch.ones_like(slots), slots, slots, scale=0.1, index=index, with_mass=True)
    expected = (torch.tensor([1.0, 2.0]) * head_dim * 0.1).softmax(0)
    torch.testing.assert_close(mass.flatten(), expected)
    torch.testing.assert_close(output.float().mean(), expected[0] + 2 * expected[1], atol=1e-3, rtol=0)


def test_split_count_fills_the_device_once():
    """About two waves of programs, no split of fewer than 128 keys, and always one."""
    assert gpu.split_count(131072, 8, CPU) == 33
    assert gpu.split_count(131072, 1024, CPU) == 1
    assert gpu.split_count(300, 8, CPU) == 3
    assert gpu.split_count(1, 1, CPU) == gpu.split_count(0, 1, CPU) == 1


@pytest.mark.parametrize("seed", [None, 3], ids=["temperature", "noise"])
def test_a_temperature_on_the_device(seed):
    """A tensor gives what the number gives, and nothing waits for it."""
    query, key, value = inputs(63, 3, 32, seed=6)
    positions = torch.arange(63, dtype=torch.int32).expand(BATCH, KV_HEADS, 63).contiguous().to(DEVICE)
    row = torch.full((BATCH, 1), 63, dtype=torch.int32, device=DEVICE)
    for number, temperature in ((1.7, torch.tensor(1.7)), (1.0, torch.tensor(1.0, dtype=torch.float64))):
        masses = [
            on_device(
                query, key, value, scale=0.3, with_mass=True, perturbed=(Perturbation(one, seed=seed), row, positions)
            )[1]
            for one in (number, temperature.to(DEVICE))
        ]
        torch.testing.assert_close(*masses)


@pytest.mark.parametrize(("keys_per_split", "with_mass", "launches"), [(128, False, 1), (16, False, 2), (16, True, 2)])
def test_launches(keys_per_split, with_mass, launches, monkeypatch):
    """The merge of the splits and the mass are one launch."""
    monkeypatch.setattr(gpu, "KEYS_PER_SPLIT", keys_per_split)
    counted, original = [], gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *args, **options: (counted.append(args[0]), original(*args, **options)))
    query, key, value = inputs(111, 3, 32)
    on_device(query, key, value, scale=0.3, with_mass=with_mass)
    assert len(counted) == launches
