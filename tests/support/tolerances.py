"""How far apart two right results may be, whatever processor computes them."""

import torch


def tolerance(expected, dtype, sums):
    """An absolute tolerance for results that are float32 sums of so many terms, and are rounded to `dtype` at the end.

    Processors add in orders of their own, with fused multiply-adds or without. So many roundings are like a random walk, of
    sqrt(sums) steps; four times that is far out, and still far below what one wrong term makes. The rounding to a lower
    precision adds an eps on each side.

    Args:
        expected: the results; the largest one says how large a rounding is.
        dtype: of what is compared.
        sums: terms that a result adds up, those of what goes into it included.
    """
    roundings = 4 * sums**0.5 * torch.finfo(torch.float32).eps
    if dtype != torch.float32:
        roundings += 2 * torch.finfo(dtype).eps
    return roundings * expected.abs().max().item()
