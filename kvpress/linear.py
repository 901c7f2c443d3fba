"""Linear layers of a decode step on a CPU: which of torch's products multiplies the few rows by a weight matrix.

All forms give the same numbers but for rounding. Which one is fastest depends on the processor, the dtype, the shape and the
number of rows, by a factor of up to two, so it is measured: once per process for each of them, in less than `BUDGET`
seconds for a model. The environment variable KVPRESS_LINEAR names a form instead, for results that are the same to the
last bit in every run.
"""

import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpress.errors import PolicyError

VARIABLE, MEASURED = "KVPRESS_LINEAR", "measured"
# A choice holds for up to so many rows, and is measured with so many.
ROWS = {1: 1, 8: 4, 32: 16}
# Another form than torch's own `linear` has to take at most this share of its time, in all rounds but one.
CLEARLY, ROUNDS = 0.9, 7
# Measured on pieces of the matrices, of at most so many numbers: small enough to be quick, enough that no cache has them all.
PIECE, PIECES = 1 << 19, 16
# Seconds for the measurements of a model. What they do not reach, because the machine is busy, stays torch's own.
BUDGET = 0.1
# Numbers of a matrix for which the choice matters; outputs of one part of a split matrix, at least; parts, at most.
SMALLEST, PART_OUTPUTS, PARTS = 1 << 16, 32, 64
# Tensors that are nothing but numbers. Others (quantised, split over processes) know their own products.
PLAIN = (Tensor, nn.Parameter)

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # input, weight, bias, as `functional.linear`
Shape = tuple[torch.dtype, int, int]  # of a weight: dtype, out_features, in_features
_measured: dict[tuple[Shape, int, int], str] = {}  # shape, rows at most, threads -> form
_forwards: set[Callable[..., Tensor]] = set()
_lock = threading.Lock()


def bmm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer as a batch of products, each with a part of the outputs and on a thread of its own.

    MKL multiplies few float32 rows by one matrix on a single thread of some processors.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features], contiguous.
        bias: [out_features].

    Returns:
        [..., out_features].
    """
    outputs, inputs = weight.shape
    rows = input.shape[:-1].numel()
    parts = math.gcd(outputs, PARTS)
    while parts > 1 and outputs // parts < PART_OUTPUTS:
        parts //= 2
    output = torch.bmm(input.reshape(1, rows, -1).expand(parts, -1, -1), weight.view(parts, -1, inputs).mT)
    output = output.transpose(0, 1).reshape(*input.shape[:-1], outputs)
    return output if bias is None else output + bias


def mm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer as the weight matrix times the rows as columns, for which MKL has the better kernel on some processors.

    Arguments and result are those of `bmm`.
    """
    columns = input.reshape(-1, input.shape[-1]).t().contiguous()
    output = torch.mm(weight, columns).t().contiguous().view(*input.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias


def mv(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of a single row as a matrix times a vector, which for bfloat16 has a kernel of its own.

    Arguments and result are those of `bmm`; all dimensions of `input` but the last have size 1.
    """
    output = torch.mv(weight, input.reshape(-1)).view(*input.shape[:-1], -1)
    return output if bias is None else output + bias


FORMS: dict[str, Product] = {"linear": functional.linear, "bmm": bmm, "mm": mm, "mv": mv}


def check_variable() -> str:
    """What the environment variable says: a form, or that it is to be measured.

    Raises:
        PolicyError: something else.
    """
    wanted = os.environ.get(VARIABLE) or MEASURED
    if wanted not in (MEASURED, *FORMS):
        raise PolicyError(f"{VARIABLE}={wanted!r}: not one of {MEASURED}, {', '.join(FORMS)}; or unset it")
    return wanted


def choose_forwards(layers: Iterable[nn.Linear]) -> dict[nn.Linear, Callable[..., Tensor]]:
    """Linear layer -> the `forward` that it is to have; without those that stay as they are.

    A layer stays where torch's own product is the choice for every number of rows, and where its weight is not a plain
    matrix on a CPU.
    """
    by_shape: dict[Shape, list[nn.Linear]] = {}
    for layer in layers:
        if layer.weight.numel() >= SMALLEST and _is_plain(layer.weight):
            by_shape.setdefault((layer.weight.dtype, *layer.weight.shape), []).append(layer)
    names: dict[Shape, list[str]] = {shape: [] for shape in by_shape}
    wanted, deadline = check_variable(), time.perf_counter() + BUDGET
    for limit in ROWS:  # single rows first, as they are what most people run
        for shape, alike in by_shape.items():
            names[shape].append(_choice(wanted, shape, [layer.weight for layer in alike], limit, deadline))
    return {
        layer: make_forward(shape[0], tuple(names[shape]))
        for shape, alike in by_shape.items()
        if set(names[shape]) != {"linear"}
        for layer in alike
    }


@functools.cache
def make_forward(dtype: torch.dtype, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """A linear layer's `forward` with a form for each class of `ROWS`; constants, so that a compiled step has them too.

    Where the weight has become something else meanwhile (another dtype or device, quantised, sparse), it is torch's own.
    """
    forms = tuple((limit, FORMS[name]) for limit, name in zip(ROWS, names, strict=True))

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        weight, rows = self.weight, input.shape[:-1].numel()
        for limit, product in forms:
            if rows <= limit:
                if (
                    product is not functional.linear
                    and rows > 0
                    and type(input) in PLAIN
                    and _is_plain(weight)
                    and weight.dtype == dtype
                    and not torch.is_autocast_enabled("cpu")
                ):
                    return product(input, weight, self.bias)
                break
        return functional.linear(input, weight, self.bias)

    _forwards.add(forward)
    return forward


def is_chosen(function: Callable[..., Any]) -> bool:
    """Whether a function is one that `make_forward` made."""
    return function in _forwards


def _is_plain(weight: Any) -> bool:
    return type(weight) in PLAIN and weight.is_cpu and weight.layout == torch.strided and weight.is_contiguous()


def possible(dtype: torch.dtype, limit: int) -> list[str]:
    """The forms for up to `limit` rows that can be faster than `linear`, and itself."""
    names = ["linear"]
    if dtype == torch.float32:
        names.append("bmm")
        if limit > 1:
            names.append("mm")
    if dtype in (torch.float32, torch.bfloat16, torch.float16) and limit == 1:
        names.append("mv")
    return names


def _choice(wanted: str, shape: Shape, weights: Sequence[Tensor], limit: int, deadline: float) -> str:
    """The form for matrices of one shape, for up to `limit` rows; "linear" where the wanted one cannot be."""
    names = possible(shape[0], limit)
    if wanted != MEASURED:
        return wanted if wanted in names else "linear"
    if len(names) == 1:
        return "linear"
    key = (shape, limit, torch.get_num_threads())
    with _lock:
        if key not in _measured:
            _measured[key] = fastest(measure(weights, ROWS[limit], names, deadline))
        return _measured[key]


def fastest(times: dict[str, list[float]]) -> str:
    """The form whose best time is the least, if it is clearly less than that of `linear` and no matter of luck."""
    best = min(times, key=lambda name: min(times[name], default=math.inf))
    rounds = list(zip(times[best], times["linear"], strict=True))
    won = sum(mine < linear for mine, linear in rounds)
    clearly = len(rounds) == ROUNDS and min(times[best]) <= CLEARLY * min(times["linear"])
    return best if clearly and won >= ROUNDS - 1 else "linear"


@torch.no_grad()
def measure(
    weights: Sequence[Tensor], rows: int, names: Sequence[str], deadline: float = math.inf
) -> dict[str, list[float]]:
    """Form -> seconds for one piece of such matrices, in each of `ROUNDS` rounds, in which the forms take turns.

    Args:
        weights: of one shape and dtype, each [out_features, in_features].
        rows: of the input.
        deadline: no round is begun after it (`time.perf_counter`).
    """
    outputs, inputs = weights[0].shape
    height = min(outputs, max(PARTS, PIECE // inputs // PARTS * PARTS))
    pieces = [piece for weight in weights for piece in weight.detach().split(height)][:PIECES]
    input = torch.ones(rows, inputs, dtype=weights[0].dtype, device="cpu")
    times: dict[str, list[float]] = {name: [] for name in names}
    turn = cycle(pieces)
    for round_ in range(-1, ROUNDS):
        if time.perf_counter() > deadline:
            break
        if round_ < 0:  # a loaded file's weights are read from it when they are first touched
            for piece in pieces:
                functional.linear(input[:1], piece)
        for name in names:
            product, piece = FORMS[name], next(turn)
            start = time.perf_counter()
            product(input, piece, None)
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return times
