"""Run a policy on one cache layer, without a model: random keys and values, attention mass as given."""

import math
from contextlib import contextmanager

import torch

from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.policy import Roles
from kvpress.tokens import plain_tokens

HEAD_DIM = 4


def new_layer(policy, scale=1.0):
    """The only layer of a model under a policy; scores are products times `scale`."""
    layer = KVLayer(Roles.of([policy]), 0, 1)
    layer.scores = Scores(scale)
    return layer


def observe(layer, query, tokens, past=0):
    """Let the layer's observer see a prompt pass whose entries are stored, query [batch, heads, count, head_dim]."""
    layer.observe_prompt(query, tokens, layer.scores, None, past, mass_known=False)


def counted(layer):
    """What the layer's observer answers now: name -> float32 [batch, kv_heads, entries held]."""
    held = layer.positions[:, :, : layer.length]
    return layer.observer.answer(layer.observed, held, layer._keys_in_place, layer.scores)


def feed(layer, count, mass=None, batch=1, kv_heads=1, seed=0):
    """Append a prompt pass of `count` tokens to the layer and observe `mass` [batch, kv_heads, entries held]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, kv_heads, count, HEAD_DIM, generator=generator)
    tokens = plain_tokens(batch, count, layer.texts.seen, layer.texts.seen_tensor, "cpu")
    layer.append(keys, values, tokens)
    if mass is not None:
        layer.add_mass(mass)
    return tokens


def prompt(policy, count, mass=None, layer=None, **shape):
    """A prompt pass of `count` tokens, on a new layer or one that has seen others; the layer."""
    layer = new_layer(policy) if layer is None else layer
    layer.close_prompt(feed(layer, count, mass, **shape))
    return layer


@contextmanager
def stepping(layer, key, value, tokens):
    """A decode step of key and value [batch, kv_heads, 1, head_dim]: in the block they are stored, and evicted after it."""
    layer.settle()
    layer.open_step(tokens)
    layer.write(key, value, tokens)
    yield
    layer.evict_step(tokens)
    layer.close_step(tokens)
    layer.texts.advance(1, tokens.seen, tokens.seen_tensor)


def in_use(layer):
    """Positions of the slots in use, that of a step in progress included."""
    return layer.positions[:, :, : layer.length if layer.step is None else layer.step.stop]


def step(layer, mass=None, batch=1, kv_heads=1, seed=0):
    """A decode step; `mass` maps positions to what each entry gets in it, the same in all heads, or says it for each slot."""
    key, value = torch.randn(2, batch, kv_heads, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    tokens = plain_tokens(batch, 1, layer.texts.seen, layer.texts.seen_tensor, "cpu")
    with stepping(layer, key, value, tokens):
        if isinstance(mass, dict):
            held = in_use(layer)
            layer.add_mass(torch.tensor([mass.get(at, 0.0) for at in held.flatten().tolist()]).view(held.shape))
        elif mass is not None:
            layer.add_mass(mass(in_use(layer).shape))


def attended(policy, query, key, passes):
    """Run rows of given queries over entries of given keys, [batch, heads, n, head_dim], so many tokens a pass.

    Scores are plain products. A later pass of one token is a decode step. Returns the layer and what it kept after each
    pass: for each sequence and kv head the sorted positions.
    """
    layer, seen, sets = new_layer(policy), 0, []
    for count in passes:
        rows, decode, past = slice(seen, seen + count), seen > 0 and count == 1, layer.length
        tokens = plain_tokens(key.shape[0], count, layer.texts.seen, layer.texts.seen_tensor, "cpu")
        if decode:
            with stepping(layer, key[:, :, rows], key[:, :, rows], tokens):
                layer.observe_step(query[:, :, rows], tokens, layer.scores, layer.steps, None, mass=None)
        else:
            layer.append(key[:, :, rows], key[:, :, rows], tokens)
            observe(layer, query[:, :, rows], tokens, past)
            layer.close_prompt(tokens)
        seen += count
        sets.append([[kept(layer, b, head) for head in range(key.shape[1])] for b in range(key.shape[0])])
    return layer, sets


def rows_that_give(*weights):
    """Queries and keys, [1, 1, n, n], of rows that give their entries these softmax weights (of those they see)."""
    n = len(weights)
    logs = [[math.log(weight) if weight else 0.0 for weight in row] for row in weights]
    return torch.tensor(logs).view(1, 1, n, n), torch.eye(n).view(1, 1, n, n)


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
