"""Attention mass: column sums of the softmax weights of given query rows, without their outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.exponentials import exp_
from kvpress.kernels.gumbel_noise import gumbel_noise, gumbel_noise_in_order

# Scores of one tile of rows, in float32 numbers (16 MiB).
TILE_SCORES = 1 << 22
# And its rows at most: the scores of more rows at 2k to 4k entries leave the caches, and take a fourth longer.
TILE_ROWS = 64


@dataclass(frozen=True)
class Perturbation:
    """Noise and temperature of the softmax whose mass is counted: softmax((score + noise) / temperature) (Keyformer).

    Attributes:
        temperature: above 0, a number or a tensor []; 1 leaves the scores as they are.
        seed: of the Gumbel noise; None for no noise.
        layer: index of the layer, so that layers have their own noise.
        fresh: new noise for every row, or one number per head and entry for all rows.
    """

    temperature: float | Tensor = 1.0
    seed: int | None = None
    layer: int = 0
    fresh: bool = True


def attention_mass_reference(
    query: Tensor,
    row_positions: Tensor,
    key: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    row_weights: Tensor | None = None,
    perturbation: Perturbation | None = None,
) -> Tensor:
    """The definition of `attention_mass`, one row at a time in plain float32."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    noise = torch.zeros(batch, heads, rows, key.shape[2], device=key.device)
    if perturbation is not None and perturbation.seed is not None:
        at = row_positions if perturbation.fresh else torch.zeros_like(row_positions)
        noise = gumbel_noise(perturbation.seed, perturbation.layer, at, positions, heads)
    for b in range(batch):
        for head in range(heads):
            held = positions[b, head // group]
            for row in range(rows):
                visible = (held >= 0) & (held <= row_positions[b, row])
                if row_positions[b, row] < 0 or not visible.any():
                    continue
                scores = key[b, head // group].float() @ query[b, head, row].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if perturbation is not None:
                    scores = (scores + noise[b, head, row]) / perturbation.temperature
                scores = scores.masked_fill(~visible, float("-inf"))
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].float()))
                weight = 1.0 if row_weights is None else row_weights[b, row]
                mass[b, head // group] += weight * scores.softmax(-1)[: held.shape[0]]
    return mass


def attention_mass(
    query: Tensor,
    row_positions: Tensor,
    key: Tensor,
    positions: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    row_weights: Tensor | None = None,
    perturbation: Perturbation | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax weight that each entry gets from the given rows, summed over the rows and over the group.

    Args:
        query: [batch, heads, rows, head_dim]; query head h reads kv head h // (heads / kv_heads).
        row_positions: int [batch, rows], the position of each row; a row at -1 is padding and adds nothing.
        key: [batch, kv_heads, n, head_dim]; only the entry dimension may be strided.
        positions: int [batch, kv_heads, n]; -1 for an empty slot. A row sees the entries at its position and before.
            None says that entry i is at position i and the rows are at the last ones: no mask is needed then.
        scale, softcap, sinks: as in `decode_attention`.
        row_weights: float32 [batch, rows], a factor on each row; None for 1.
        perturbation: noise and temperature on the scores; None for the attention's own softmax. The sinks, if any, are
            left as they are.
        lse: float32 [batch, heads, rows], natural logarithm of the summed exp of each row's scores (with noise and
            temperature) over what it sees, and of its sink; None to compute it here. `sinks` is not looked at with it.
        backend: "triton" and "auto" on CUDA run the Triton kernels; they sum without atomics, so equal inputs give equal
            results.

    Returns:
        float32 [batch, kv_heads, n]. Without `row_weights` it sums to (real rows) * group over the entries (less with
        sinks).

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import attention_mass as gpu

        return gpu.attention_mass(
            query,
            row_positions,
            key,
            positions,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            row_weights=row_weights,
            perturbation=perturbation,
            lse=lse,
        )
    batch, heads, rows, head_dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    group = heads // kv_heads
    keys = key.flatten(0, 1).float().transpose(1, 2)
    grouped = query.reshape(batch, kv_heads, group, rows, head_dim)
    lowest = torch.finfo(torch.float32).min
    mass = torch.zeros(batch * kv_heads, 1, entries, dtype=torch.float32, device=key.device)
    tile = max(1, min(TILE_ROWS, TILE_SCORES // (batch * heads * entries)))
    future = torch.ones(tile, tile, dtype=torch.bool, device=query.device).triu_(1)
    for start in range(0, rows, tile):
        tile_rows = grouped[:, :, :, start : start + tile].float() * scale
        count = tile_rows.shape[3]
        at = row_positions[:, start : start + count]
        seen = entries if positions is not None else entries - rows + start + count
        scores = torch.bmm(tile_rows.reshape(batch * kv_heads, group * count, head_dim), keys[:, :, :seen])
        scores = scores.view(batch, kv_heads, group, count, seen)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if perturbation is not None:
            scores = _perturbed(scores, at, positions, perturbation)
        hidden = None
        if positions is None:
            scores[..., seen - count :].masked_fill_(future[:count, :count], lowest)
        else:
            hidden = (positions[:, :, None] > at[:, None, :, None]) | (positions[:, :, None] < 0)
            scores = scores.masked_fill_(hidden[:, :, None], lowest)
        if lse is not None:
            row_lse = lse[:, :, start : start + count].reshape(batch, kv_heads, group, count, 1)
            weights = exp_(scores.sub_(row_lse))
        elif sinks is not None:
            column = sinks.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, count, 1)
            weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :seen]
        else:
            weights = scores.softmax(dim=-1)
        if hidden is not None:  # a row that sees nothing has no softmax
            weights = weights.masked_fill_(hidden[:, :, None], 0.0)
        if row_weights is None:
            mass[:, 0, :seen] += weights.sum(dim=(2, 3)).flatten(0, 1)
        else:
            factors = row_weights[:, None, None, start : start + count].expand(batch, kv_heads, group, count)
            factors = factors.reshape(batch * kv_heads, 1, group * count)
            mass[:, :, :seen] += torch.bmm(factors, weights.view(batch * kv_heads, group * count, seen))
    return mass.view(batch, kv_heads, entries)


def _perturbed(scores: Tensor, at: Tensor, positions: Tensor | None, perturbation: Perturbation) -> Tensor:
    """(scores + noise) / temperature, scores [batch, kv_heads, group, rows, n] in place."""
    batch, kv_heads, group, rows, entries = scores.shape
    if perturbation.seed is not None:
        places = at if perturbation.fresh else torch.zeros_like(at)
        if positions is None:
            noise = gumbel_noise_in_order(perturbation.seed, perturbation.layer, places, entries, kv_heads * group)
        else:
            noise = gumbel_noise(perturbation.seed, perturbation.layer, places, positions, kv_heads * group)
        scores = scores.add_(noise.view(batch, kv_heads, group, rows, entries))
    temperature = perturbation.temperature
    return scores if not isinstance(temperature, Tensor) and temperature == 1 else scores.div_(temperature)
