"""Attention by its definition: one row at a time, in float64, entry by entry."""

import math

import torch


def attend(query, key, value, visible, *, scale, softcap=None, sinks=None, moved=None):
    """What each row reads, and the weight that each entry gets.

    `query` [batch, heads, rows, d]; `key`, `value` [batch, kv_heads, n, d]; `visible` bool [batch, kv_heads,
    rows, n]; `moved` is (query, bool [batch, kv_heads, older]): where True, that query scores instead.
    Returns in float64 outputs [batch, heads, rows, d], weights [batch, kv_heads, n] of rows and group summed.
    """
    batch, heads, rows, _ = query.shape
    group, entries = heads // key.shape[1], key.shape[2]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    mass = torch.zeros(*key.shape[:3], dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            keys, values = key[b, head // group].double(), value[b, head // group].double()
            for row in range(rows):
                scores = (keys @ query[b, head, row].double() * scale).tolist()
                if moved is not None:
                    other = (keys @ moved[0][b, head, row].double() * scale).tolist()
                    for entry, is_moved in enumerate(moved[1][b, head // group].tolist()):
                        scores[entry] = other[entry] if is_moved else scores[entry]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                seen = [entry for entry, yes in enumerate(visible[b, head // group, row].tolist()) if yes]
                if not seen:
                    continue
                logits = [scores[entry] for entry in seen] + ([] if sinks is None else [sinks[head].item()])
                top = max(logits)
                exponents = [math.exp(logit - top) for logit in logits]
                total = sum(exponents)
                weights = [0.0] * entries
                for entry, exponent in zip(seen, exponents, strict=False):  # a sink has no entry
                    weights[entry] = exponent / total
                received = torch.tensor(weights, dtype=torch.float64)
                output[b, head, row] = received @ values
                mass[b, head // group] += received
    return output, mass


def causal(batch, kv_heads, rows, entries, valid=None):
    """Visibility of the last `rows` of `entries` to themselves and to the (`valid`) older ones."""
    past = entries - rows
    visible = torch.zeros(batch, kv_heads, rows, entries, dtype=torch.bool)
    for row in range(rows):
        visible[:, :, row, : past + row + 1] = True
        if valid is not None:
            visible[:, :, row, :past] &= valid
    return visible


def eager(query, key, value, visible, *, scale):
    """The textbook computation in the tensors' own precision, as transformers' eager attention does it."""
    group = query.shape[1] // key.shape[1]
    keys, values, seen = (x.repeat_interleave(group, dim=1) for x in (key, value, visible))
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~seen, torch.finfo(query.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ values
