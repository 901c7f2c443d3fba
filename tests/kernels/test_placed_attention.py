"""placed_attention against its reference, a float64 loop, and what rows at the end and at the start of the entries read."""

import pytest
import torch

from kvpress.kernels import placed_attention as module
from kvpress.kernels.placed_attention import placed_attention, placed_attention_reference
from kvpress.kernels.prompt_attention import prompt_attention
from support.brute import attend

ENTRIES, BATCH, KV_HEADS = 150, 2, 2
AT = [0, 3, 4, 77, 78, 79, 110, 148, 149]


def inputs(at, group=2, head_dim=16, dtype=torch.float32, value_dim=None):
    """Query, key, value; the positions of the rows, and of the entries, which are every third from 5 on."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = made(BATCH, KV_HEADS * group, len(at), head_dim)
    key, value = made(BATCH, KV_HEADS, ENTRIES, head_dim), made(BATCH, KV_HEADS, ENTRIES, value_dim or head_dim)
    positions = 5 + 3 * torch.arange(ENTRIES)
    return query, key, value, positions[at], positions


@pytest.mark.parametrize("small", [False, True], ids=["tile", "tiles"])
@pytest.mark.parametrize("features", [(), ("softcap",), ("sinks",), ("softcap", "sinks")], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_is_its_definition(group, features, small, monkeypatch):
    if small:
        monkeypatch.setattr(module, "TILE_SCORES", 1)
    tensors = inputs(AT, group, value_dim=24)
    options = {"scale": 0.3}
    if "softcap" in features:
        options["softcap"] = 2.0
    if "sinks" in features:
        options["sinks"] = torch.linspace(-1, 2, KV_HEADS * group)
    output = placed_attention(*tensors, **options)
    assert output.shape == (BATCH, KV_HEADS * group, len(AT), 24)
    torch.testing.assert_close(output, placed_attention_reference(*tensors, **options), atol=1e-5, rtol=1e-5)
    query, key, value, at, positions = tensors
    visible = (positions <= at[:, None]).expand(BATCH, KV_HEADS, -1, -1)
    expected = attend(query, key, value, visible, **options)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(output.double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_rows_at_the_end_are_a_prompt_s():
    query, key, value, at, positions = inputs(range(ENTRIES - 20, ENTRIES))
    expected, _, _ = prompt_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(
        placed_attention(query, key, value, at, positions, scale=0.3), expected, atol=1e-5, rtol=1e-5
    )


def test_what_is_behind_a_row_is_not_read():
    query, key, value, at, positions = inputs(AT[:6])
    output = placed_attention(query, key, value, at, positions, scale=0.3)
    key[:, :, AT[5] + 1 :] = float("nan")
    value[:, :, AT[5] + 1 :] = float("nan")
    assert torch.equal(placed_attention(query, key, value, at, positions, scale=0.3), output)


def test_lower_precision_sums_in_float32():
    tensors = inputs(AT, dtype=torch.bfloat16)
    output = placed_attention(*tensors, scale=0.3)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, placed_attention_reference(*tensors, scale=0.3), atol=1e-2, rtol=1e-2)
