"""prompt_attention against its reference, a float64 loop and the same-precision textbook computation."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kvpress.kernels import backend
from kvpress.kernels import prompt_attention as module
from kvpress.kernels.backend import use_flash_attn, use_torch_flash
from kvpress.kernels.prompt_attention import prompt_attention, prompt_attention_reference
from support.attention_inputs import BATCH, KV_HEADS, options
from support.attention_inputs import prompt_inputs as inputs
from support.brute import attend, causal, eager

ROWS = pytest.mark.parametrize("rows", [1, 63, 111], ids="{}-rows".format)
PAST = pytest.mark.parametrize("past", [0, 1, 47], ids="{}-past".format)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4], ids="group-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [16, 64, 80], ids="d-{}".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WITH_MASS = pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
FEATURES = [
    (),
    ("valid",),
    ("softcap",),
    ("sinks",),
    ("moved",),
    ("valid", "moved"),
    ("valid", "sinks", "moved"),
    ("valid", "softcap", "sinks", "moved"),
]
ALL_FEATURES = pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows, the fewest there are."""
    monkeypatch.setattr(module, "TILE_SCORES", 1)


def brute(query, key, value, valid=None, **chosen):
    """The float64 loop with causal visibility."""
    visible = causal(BATCH, KV_HEADS, query.shape[2], key.shape[2], valid)
    return attend(query, key, value, visible, **chosen)


@ROWS
@PAST
@GROUPS
@pytest.mark.parametrize("head_dim", [16, 80], ids="d-{}".format)
@DTYPES
def test_is_as_precise_as_torch(rows, past, group, head_dim, dtype):
    """On both ways the error against float64 is at most twice that of eager attention in that precision."""
    query, key, value = inputs(rows, past, group, head_dim, dtype)
    scale = head_dim**-0.5
    visible = causal(BATCH, KV_HEADS, rows, past + rows)
    expected, _ = attend(query, key, value, visible, scale=scale)
    torch_error = (eager(query, key, value, visible, scale=scale).double() - expected).abs().max()
    floor = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    for with_mass in (False, True):
        output, _, _ = prompt_attention(query, key, value, scale=scale, with_mass=with_mass)
        assert output.dtype == dtype and output.shape == query.shape
        assert (output.double() - expected).abs().max() <= 2 * torch_error + floor


@pytest.mark.parametrize("rows", [1, 63], ids="{}-rows".format)
@PAST
@pytest.mark.parametrize("group", [1, 3], ids="group-{}".format)
@ALL_FEATURES
def test_equals_the_definition(rows, past, group, features, small_tiles):
    """Every feature alone and together, on both ways, against the loop and the reference."""
    query, key, value = inputs(rows, past, group, 16, seed=2)
    chosen = options(features, past, query)
    expected, expected_mass = brute(query, key, value, scale=0.3, **chosen)
    reference, reference_mass = prompt_attention_reference(query, key, value, scale=0.3, **chosen)
    torch.testing.assert_close(reference, expected.float())
    torch.testing.assert_close(reference_mass, expected_mass.float())
    output, none, _ = prompt_attention(query, key, value, scale=0.3, **chosen)
    torch.testing.assert_close(output, expected.float())
    assert none is None
    output, mass, _ = prompt_attention(query, key, value, scale=0.3, **chosen, with_mass=True)
    torch.testing.assert_close(output, expected.float())
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, expected_mass.float())


@HEAD_DIMS
@GROUPS
@DTYPES
@ALL_FEATURES
def test_tiles_equal_parts(group, head_dim, dtype, features, small_tiles):
    """Seven tiles of rows give what the merged parts give, to the rounding of the dtype."""
    query, key, value = inputs(111, 29, group, head_dim, dtype, seed=3)
    chosen = options([name for name in features if name != "softcap"], 29, query)
    parts, _, _ = prompt_attention(query, key, value, scale=head_dim**-0.5, **chosen)
    tiles, _, _ = prompt_attention(query, key, value, scale=head_dim**-0.5, **chosen, with_mass=True)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(tiles, parts, **tolerance)


@pytest.mark.parametrize("past", [0, 5], ids="{}-past".format)
def test_tile_size_changes_nothing(past, monkeypatch):
    """Tiles of 16, of 50 and of 256 rows (300 rows are two of them) give the same."""
    query, key, value = inputs(300, past, 3, 16, seed=4)
    expected = prompt_attention(query, key, value, scale=0.25, with_mass=True)
    for scores in (1, 50 * BATCH * KV_HEADS * 3 * (300 + past)):
        monkeypatch.setattr(module, "TILE_SCORES", scores)
        tiled = prompt_attention(query, key, value, scale=0.25, with_mass=True)
        torch.testing.assert_close(tiled, expected)
    torch.testing.assert_close(prompt_attention(query, key, value, scale=0.25)[0], expected[0])


@WITH_MASS
@DTYPES
@ALL_FEATURES
def test_slice_of_a_larger_buffer(features, dtype, with_mass):
    """Entries past those in use are never read, and the stride between heads makes no difference."""
    query, key, value = inputs(63, 21, 3, 64, dtype, spare=9)
    chosen = options(features, 21, query)
    strided = prompt_attention(query, key, value, scale=0.2, **chosen, with_mass=with_mass)
    compact = prompt_attention(query, key.contiguous(), value.contiguous(), scale=0.2, **chosen, with_mass=with_mass)
    assert not key.is_contiguous()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(strided[0], compact[0], **tolerance)
    if with_mass:
        torch.testing.assert_close(strided[1], compact[1])


@WITH_MASS
@DTYPES
def test_transposed_query(dtype, with_mass):
    """Models hand their query over as a transposed view [batch, rows, heads, d]; so must any layout work."""
    query, key, value = inputs(63, 21, 3, 16, dtype)
    chosen = options(("valid", "moved"), 21, query)
    view = query.transpose(1, 2).contiguous().transpose(1, 2)
    chosen_view = {
        **chosen,
        "moved": (chosen["moved"][0].transpose(1, 2).contiguous().transpose(1, 2), chosen["moved"][1]),
    }
    expected, _, _ = prompt_attention(query, key, value, scale=0.2, **chosen, with_mass=with_mass)
    output, _, _ = prompt_attention(view, key, value, scale=0.2, **chosen_view, with_mass=with_mass)
    torch.testing.assert_close(output, expected)


@WITH_MASS
@DTYPES
@pytest.mark.parametrize("features", [(), ("softcap",), ("sinks",), ("moved",)], ids=lambda n: "+".join(n) or "plain")
def test_nothing_held_before(features, dtype, with_mass):
    """Where all older slots are empty the result is that without them, and their mass is zero."""
    query, key, value = inputs(63, 21, 3, 16, dtype)
    chosen = options(features, 21, query)
    valid = torch.zeros(BATCH, KV_HEADS, 21, dtype=torch.bool)
    output, mass, _ = prompt_attention(query, key, value, valid, scale=0.25, **chosen, with_mass=with_mass)
    chosen.pop("moved", None)
    alone, alone_mass, _ = prompt_attention(
        query, key[:, :, 21:], value[:, :, 21:], scale=0.25, **chosen, with_mass=with_mass
    )
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output, alone, **tolerance)
    if with_mass:
        assert (mass[..., :21] == 0).all()
        torch.testing.assert_close(mass[..., 21:], alone_mass)


@ROWS
@GROUPS
@DTYPES
@pytest.mark.parametrize("features", [(), ("valid",), ("softcap",), ("moved",)], ids=lambda n: "+".join(n) or "plain")
def test_u5_mass_sums_to_rows_times_group(rows, group, dtype, features, small_tiles):
    """U5 and H6: every row of every query head gives one, so a kv head's weights sum to rows * group."""
    query, key, value = inputs(rows, 13, group, 16, dtype)
    chosen = options(features, 13, query)
    _, mass, _ = prompt_attention(query, key, value, scale=0.25, **chosen, with_mass=True)
    torch.testing.assert_close(mass.sum(-1), torch.full((BATCH, KV_HEADS), float(rows * group)))
    if "valid" in chosen:
        assert (mass[..., :13][~chosen["valid"]] == 0).all()


def test_h2_rows_by_hand():
    """H2: rows [1,0,0], [.6,.4,0], [.1,.6,.3] are summed to [1.7, 1.0, 0.3]."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.1, 0.6, 0.3]])
    # Identity keys make the query the scores; the softmax of the logarithms is the row again.
    query = rows.log().clamp(min=-1e4).view(1, 1, 3, 3)
    key = torch.eye(3).view(1, 1, 3, 3)
    output, mass, _ = prompt_attention(query, key, key, scale=1.0, with_mass=True)
    torch.testing.assert_close(mass.flatten(), torch.tensor([1.7, 1.0, 0.3]))
    torch.testing.assert_close(output[0, 0], rows)


@WITH_MASS
def test_chunks_equal_one_pass(with_mass):
    """Rows fed in chunks read what they read in one pass, and the chunks' masses add up."""
    query, key, value = inputs(63, 0, 3, 16)
    output, mass, _ = prompt_attention(query, key, value, scale=0.25, with_mass=with_mass)
    chunks, total = [], torch.zeros(BATCH, KV_HEADS, 63)
    for start, stop in [(0, 20), (20, 21), (21, 63)]:
        chunk, part, _ = prompt_attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], scale=0.25, with_mass=with_mass
        )
        chunks.append(chunk)
        if with_mass:
            total[..., :stop] += part
    torch.testing.assert_close(torch.cat(chunks, dim=2), output)
    if with_mass:
        torch.testing.assert_close(total, mass)


@WITH_MASS
def test_large_logits(with_mass):
    """Scores in the thousands neither overflow nor become NaN, in any part."""
    query, key, value = inputs(63, 21, 3, 16)
    output, mass, _ = prompt_attention(query * 100, key * 100, value, scale=0.25, with_mass=with_mass)
    expected, _ = brute(query * 100, key * 100, value, scale=0.25)
    torch.testing.assert_close(output, expected.float(), rtol=1e-3, atol=1e-3)
    assert mass is None or mass.isfinite().all()


@pytest.mark.parametrize("past", [0, 21], ids="{}-past".format)
@pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")
@DTYPES
def test_lse(past, features, dtype, small_tiles):
    """On both ways the LSE is that of the row's scores and sink; asking for it changes neither output nor mass."""
    query, key, value = inputs(63, past, 3, 16, dtype)
    chosen = options(features, past, query)
    keys = key.float().repeat_interleave(3, dim=1)
    scores = query.float() @ keys.transpose(-1, -2) * 0.25
    if "moved" in chosen and past:
        moved, slots = chosen["moved"]
        other = moved.float() @ keys[:, :, :past].transpose(-1, -2) * 0.25
        where = slots.repeat_interleave(3, dim=1)[:, :, None]
        scores[..., :past] = torch.where(where, other, scores[..., :past])
    if "softcap" in chosen:
        scores = 1.5 * torch.tanh(scores / 1.5)
    visible = causal(BATCH, KV_HEADS, 63, 63 + past, chosen.get("valid"))
    scores = scores.masked_fill(~visible.repeat_interleave(3, dim=1), float("-inf"))
    if "sinks" in chosen:
        scores = torch.cat((scores, chosen["sinks"].view(1, -1, 1, 1).expand(BATCH, -1, 63, 1)), dim=-1)
    for with_mass in (False, True):
        output, mass, lse = prompt_attention(
            query, key, value, scale=0.25, **chosen, with_mass=with_mass, with_lse=True
        )
        assert lse.dtype == torch.float32
        close = 1e-5 if with_mass or dtype == torch.float32 else 1e-3  # torch's own operator rounds within a part
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=close, atol=close)
        alone, alone_mass, none = prompt_attention(query, key, value, scale=0.25, **chosen, with_mass=with_mass)
        assert none is None
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(output, alone, **tolerance)
        torch.testing.assert_close(mass, alone_mass)


class FakeFlash:
    """Stands in for flash-attn: writes down what it is asked, and does it as its documentation says."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=self))
        monkeypatch.setattr(module, "use_flash_attn", lambda query, value: True)

    def __call__(self, q, k, v, **options):
        self.calls.append((q.shape, k.shape, v.shape, options))
        query, key, value = (x.transpose(1, 2).float() for x in (q, k, v))
        keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = query @ keys.transpose(-1, -2) * options["softmax_scale"]
        if options["softcap"] > 0:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(hidden, float("-inf"))
        output = (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype)
        return output, scores.logsumexp(-1), None


@PAST
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_flash_attn_gets_what_it_wants(past, softcap, monkeypatch):
    """Its layout, the model's scale, the causal mask and the cap; its output and LSE come back in ours."""
    query, key, value = inputs(63, past, 3, 16, torch.bfloat16)
    expected, _, expected_lse = prompt_attention(query, key, value, scale=0.2, softcap=softcap, with_lse=True)
    flash = FakeFlash(monkeypatch)
    output, mass, lse = prompt_attention(query, key, value, scale=0.2, softcap=softcap, with_lse=True)
    options = {"softmax_scale": 0.2, "causal": True, "softcap": softcap or 0.0, "return_attn_probs": True}
    shapes = (BATCH, 63, 6, 16), (BATCH, 63 + past, 2, 16), (BATCH, 63 + past, 2, 16)
    assert flash.calls == [(*shapes, options)]
    assert mass is None
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    assert prompt_attention(query, key, value, scale=0.2)[2] is None


@PAST
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_mass_from_the_lse_of_flash_attn(past, softcap, monkeypatch):
    """The column sums of the same softmax, of which only the LSE is known."""
    query, key, value = inputs(63, past, 3, 16)
    expected = prompt_attention_reference(query, key, value, scale=0.2, softcap=softcap)
    FakeFlash(monkeypatch)
    output, mass, lse = prompt_attention(query, key, value, scale=0.2, softcap=softcap, with_mass=True)
    assert lse is None
    torch.testing.assert_close(output, expected[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(mass, expected[1], atol=2e-5, rtol=2e-5)


@PAST
@GROUPS
@pytest.mark.parametrize("features", [(), ("sinks",)], ids=["plain", "sinks"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mass_from_the_lse_of_parts(past, group, features, backend, monkeypatch):
    """As on CUDA, where parts are merged and the mass is a pass of its own: output, mass and LSE are those of the definition."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (it is optional)")
    query, key, value = inputs(33, past, group, 16)
    chosen = options(features, past, query)
    expected = prompt_attention_reference(query, key, value, scale=0.2, **chosen)
    _, _, expected_lse = prompt_attention(query, key, value, scale=0.2, **chosen, with_mass=True, with_lse=True)
    original = module.attention_mass
    monkeypatch.setattr(module, "_flash_takes_parts", lambda *_: True)
    monkeypatch.setattr(module, "attention_mass", lambda *args, **how: original(*args, **how, backend=backend))
    monkeypatch.setattr(module, "_in_tiles", None)
    output, mass, lse = prompt_attention(query, key, value, scale=0.2, **chosen, with_mass=True, with_lse=True)
    torch.testing.assert_close(output, expected[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(mass, expected[1], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["own", "older"])
def test_the_flash_kernel_of_cuda_has_this_signature(causal):
    """Checked by PyTorch itself on tensors without numbers: groups stay groups, and the LSE is of all heads and rows."""
    query = torch.empty(2, 32, 100, 128, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 8, 100 if causal else 1000, 128, dtype=torch.bfloat16, device="meta")
    output, lse = module._part(query, key, key, None, 0.1, causal)
    assert output.shape == query.shape and output.dtype == query.dtype
    assert lse.shape == (2, 32, 100) and lse.dtype == torch.float32


def test_torch_flash_runs_where_it_can(monkeypatch):
    """From compute capability 8.0 on, in half precision, with heads of one width up to 256."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    capability = {"cuda:0": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device])

    def tensor(dtype=torch.bfloat16, head_dim=128, device="cuda:0"):
        return SimpleNamespace(dtype=dtype, shape=(1, 4, 8, head_dim), is_cuda=device != "cpu", device=device)

    assert use_torch_flash(tensor(), tensor())
    for refused in (
        {"device": "cuda:1"}, {"device": "cpu"}, {"dtype": torch.float32}, {"head_dim": 264}, {"head_dim": 44},
    ):  # fmt: skip
        assert not use_torch_flash(tensor(**refused), tensor(**refused))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not use_torch_flash(tensor(), tensor())


@pytest.mark.parametrize("features", [("valid",), ("sinks",), ("moved",)], ids="+".join)
def test_flash_attn_is_not_asked_for_what_it_has_not(features, monkeypatch):
    """Empty slots, sinks and a second query stay with the other ways."""
    query, key, value = inputs(63, 21, 3, 16)
    chosen = options(features, 21, query)
    expected, _, _ = prompt_attention(query, key, value, scale=0.2, **chosen)
    flash = FakeFlash(monkeypatch)
    assert torch.equal(prompt_attention(query, key, value, scale=0.2, **chosen)[0], expected)
    assert not flash.calls


def test_flash_attn_runs_where_it_can(monkeypatch):
    """In half precision on CUDA, with heads of one width up to 256, where it is installed."""
    monkeypatch.setattr(backend, "flash_attn_installed", lambda: True)

    def tensor(dtype=torch.bfloat16, head_dim=128, is_cuda=True):
        return SimpleNamespace(dtype=dtype, shape=(1, 4, 8, head_dim), is_cuda=is_cuda)

    assert use_flash_attn(tensor(), tensor())
    assert use_flash_attn(tensor(torch.float16, 256), tensor(torch.float16, 256))
    for query, value in (
        (tensor(is_cuda=False), tensor(is_cuda=False)),
        (tensor(torch.float32), tensor(torch.float32)),
        (tensor(head_dim=264), tensor(head_dim=264)),
        (tensor(head_dim=192), tensor()),
        (tensor(head_dim=44), tensor(head_dim=44)),
    ):
        assert not use_flash_attn(query, value)
    monkeypatch.setattr(backend, "flash_attn_installed", lambda: False)
    assert not use_flash_attn(tensor(), tensor())
