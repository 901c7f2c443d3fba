"""Launch shapes of the Triton kernels: a heuristic's, or a better one that was measured on this kind of GPU.

`benchmarks/tune.py` writes gpu/tuned/<name of the GPU>.json, which holds only what beat the heuristic:

    {"gpu": "NVIDIA H200", "triton": "3.6.0", "shapes": {"attention_mass.lse 128x2": {"block_n": 128, "num_warps": 8}}}

Nothing is tried out when a kernel is launched: a shape depends on the kernel, its sizes and the name of the GPU where the tensors
are. What is made of shapes is `planned`: made once for each, since a decode step asks for the same ones in every layer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

TUNED = Path(__file__).parent / "gpu" / "tuned"

Shape = dict[str, int]
Made = TypeVar("Made")

_plans: list[Any] = []  # functions with a cache

# Set while `trying` runs: kernel -> the shape that is tried, and the keys that were asked for meanwhile.
_tried: dict[str, tuple[Shape, set[str]]] = {}


def tuned_file(gpu: str) -> Path:
    """Where the shapes of a GPU of this name are."""
    return TUNED / ("".join(c if c.isalnum() else "_" for c in gpu) + ".json")


def planned(function: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what a function of sizes and a device makes of launch shapes, until `forget_plans`."""
    kept = lru_cache(maxsize=4096)(function)
    _plans.append(kept)
    return kept


def forget_plans() -> None:
    """Make plans anew: a file of shapes has changed, or shapes are tried."""
    for kept in _plans:
        kept.cache_clear()


@lru_cache
def gpu_name(device: torch.device) -> str:
    """Name of a CUDA device; "" of any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@lru_cache
def read_shapes(path: Path) -> dict[str, Shape]:
    """Kernel and sizes -> shape; nothing where there is no file.

    Raises:
        ValueError: the file is not what `benchmarks/tune.py` writes.
    """
    if not path.is_file():
        return {}
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
        good = all(type(number) is int and number > 0 for shape in shapes.values() for number in shape.values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no launch shapes ({error!r}); delete it or run benchmarks/tune.py") from error
    if not good:
        raise ValueError(f"{path} has a launch shape that is no number above 0; delete it or run benchmarks/tune.py")
    return shapes


def launch_shape(kernel: str, device: torch.device, *sizes: int, **heuristic: int) -> Shape:
    """The heuristic's shape, or what was measured to be better for this kernel and these sizes on this GPU.

    Args:
        kernel: a name, the same for all launches whose shapes are tuned together.
        device: where the tensors are, which need not be the current device.
        sizes: what the shape depends on and what does not change from token to token (head dimension, bytes of a number).
        heuristic: the shape by name, as `block_n=64, num_warps=4`.
    """
    key = " ".join((kernel, "x".join(map(str, sizes)))).strip()
    if kernel in _tried:
        shape, asked = _tried[kernel]
        asked.add(key)
        return {**heuristic, **shape}
    name = gpu_name(device)
    return {**heuristic, **read_shapes(tuned_file(name)).get(key, {})} if name else heuristic


@contextmanager
def trying(kernel: str, shape: Shape) -> Iterator[set[str]]:
    """Launch a kernel with this shape (of {}, the heuristic's) whatever its sizes; yields the keys it was asked for."""
    asked: set[str] = set()
    _tried[kernel] = shape, asked
    forget_plans()
    try:
        yield asked
    finally:
        del _tried[kernel]
        forget_plans()
