"""The most similar of the entries that stay, for each entry that leaves (EMS)."""

import torch
from torch import Tensor

# Similarities of one tile of leaving entries, in float32 numbers: 16 MiB on a CPU, near the size of a last-level cache; 1 GiB on
# other devices, where memory is fast and a launch is not. There are two such tiles, K's and V's.
TILE_SIMILARITIES = 1 << 22
LARGE_TILE = 1 << 28
TINY = torch.finfo(torch.float32).tiny


def nearest_centre_reference(
    keys: Tensor,
    values: Tensor,
    centres: Tensor,
    is_centre: Tensor,
    rest: Tensor,
    *,
    raw_product: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of `nearest_centre`: one pair at a time."""

    def cosine(x: Tensor, y: Tensor) -> float:
        return (x @ y / (x.norm().clamp(min=TINY) * y.norm().clamp(min=TINY))).item()

    place = torch.zeros_like(rest)
    similarity = torch.full(rest.shape, float("-inf"), device=keys.device)
    for b in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            key, value = keys[b, head].float(), values[b, head].float()
            for at, slot in enumerate(rest[b, head].tolist()):
                for candidate, centre in enumerate(centres[b, head].tolist()):
                    factors = cosine(key[slot], key[centre]), cosine(value[slot], value[centre])
                    if not raw_product:
                        factors = max(0.0, factors[0]), max(0.0, factors[1])
                    product = factors[0] * factors[1]
                    if is_centre[b, head, candidate] and product > similarity[b, head, at]:
                        place[b, head, at], similarity[b, head, at] = candidate, product
    return place, similarity


def nearest_centre(
    keys: Tensor,
    values: Tensor,
    centres: Tensor,
    is_centre: Tensor,
    rest: Tensor,
    *,
    raw_product: bool = False,
) -> tuple[Tensor, Tensor]:
    """For each slot of `rest` the centre whose key and value are most like its own; of equals the first.

    The similarity of two entries is the cosine of their keys times the cosine of their values, each at least 0.

    Args:
        keys, values: [batch, kv_heads, n, head_dim].
        centres: int64 [batch, kv_heads, k], slots.
        is_centre: bool [batch, kv_heads, k], False for a slot that is none after all.
        rest: int64 [batch, kv_heads, m], slots.
        raw_product: take the cosines as they are, so that two negative ones make a positive product.

    Returns:
        place: int64 [batch, kv_heads, m], index into `centres`.
        similarity: float32 [batch, kv_heads, m], to that centre; -inf where there is none.
    """
    batch, kv_heads, m = rest.shape
    directions = [(x, _directions(x, centres).transpose(2, 3)) for x in (keys, values)]
    found: list[tuple[Tensor, Tensor]] = []
    most = TILE_SIMILARITIES if keys.device.type == "cpu" else LARGE_TILE
    tile = max(1, most // (batch * kv_heads * max(1, centres.shape[2])))
    for start in range(0, max(1, m), tile):
        slots = rest[:, :, start : start + tile]
        cosines = [_directions(x, slots) @ columns for x, columns in directions]
        if not raw_product:
            cosines = [cosine.clamp_(min=0) for cosine in cosines]
        product = cosines[0].mul_(cosines[1]).masked_fill_(~is_centre[:, :, None], float("-inf"))
        place = product.argmax(dim=-1)  # of equals the first, which `max` does not promise
        found.append((place, product.gather(-1, place[..., None])[..., 0]))
    places, similarities = zip(*found, strict=True)
    return torch.cat(places, dim=2), torch.cat(similarities, dim=2)


def _directions(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of x scaled to length 1, float32 [batch, kv_heads, slots, d]; a row of zeros stays one."""
    rows = x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])).float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=TINY)
