"""Run a policy on one cache layer, without a model: random keys and values, attention mass as given."""

import torch

from kvpress.layer import KVLayer
from kvpress.passes import plain_tokens

HEAD_DIM = 4


def feed(layer, count, mass=None, batch=1, kv_heads=1, seed=0):
    """Append a pass of `count` tokens to the layer and observe `mass` [batch, kv_heads, entries held]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, kv_heads, count, HEAD_DIM, generator=generator)
    tokens = plain_tokens(batch, count, layer.tokens, layer.facts.tokens, "cpu")
    layer.append(keys, values, tokens)
    if mass is not None:
        layer.observe(mass)
    return tokens


def prompt(policy, count, mass=None, layer=None, **shape):
    """A prompt pass of `count` tokens, on a new layer or one that has seen others; the layer."""
    layer = KVLayer(policy, 0, 1) if layer is None else layer
    layer.close_prompt(feed(layer, count, mass, **shape))
    return layer


def step(layer, mass=None, **shape):
    """A decode step; `mass` maps positions to what each entry gets in it, the same in all heads."""
    layer.settle()
    feed(layer, 1, **shape)
    if mass is not None:
        held = layer.positions[:, :, : layer.length]
        layer.observe(torch.tensor([mass.get(at, 0.0) for at in held.flatten().tolist()]).view(held.shape))
    layer.evict_step()


def kept(layer, row=0, head=0):
    """The positions that one sequence and kv head holds, sorted."""
    held = layer.positions[row, head, : layer.length].tolist()
    assert len(set(held) - {-1}) == len([at for at in held if at >= 0]), f"an entry is held twice: {held}"
    return sorted(at for at in held if at >= 0)


def row(*scores):
    """Attention mass of one sequence and kv head, [1, 1, n]."""
    return torch.tensor([[scores]])


def random_mass(*shape, seed=0):
    """Positive float32 numbers, all different."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1e-3
