"""Launch shapes of the Triton kernels for the GPU at hand, tried out and written down.

    python benchmarks/tune.py                                     # all kernels, head dimensions 64 and 128, bfloat16
    python benchmarks/tune.py --only decode_attention --head-dims 128
    python benchmarks/tune.py --interpret --out try.json          # a tiny run on the CPU: shows that it runs
    python benchmarks/tune.py --inspect                           # no GPU: shared memory, registers and spills of every launch

For each kernel and size every candidate is timed by CUDA-graph replay on the cases of scripts/gpu_check.py. What beats the
heuristic by at least 3 %, is slower in none of the cases and gives the right result goes into
kernels/gpu/tuned/<name of the GPU>.json, which the kernels read when they are launched; entries of other kernels and sizes
stay. Nothing else is tuned: delete the file to go back to the heuristics.
"""

import argparse
import itertools
import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if "--interpret" in sys.argv:  # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
import triton  # noqa: E402
from gpu import timing  # noqa: E402
from gpu_kernels import TINY, Case, Maker, Sizes, first_line  # noqa: E402

from kvpress.kernels.launch_shapes import Shape, gpu_name, trying, tuned_file  # noqa: E402

GAIN = 0.97  # what takes longer than this share of the heuristic's time is not worth an entry
NOISE = 1.02  # of a case that gains nothing
MOST_ERROR = 0.02

# Kernel -> what is tried, and the cases (methods of `Maker`, and a batch) that it is timed on.
TRIED: dict[str, tuple[dict[str, list[int]], list[tuple[str, int]]]] = {
    "decode_attention": (
        {"block_n": [16, 32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [2, 3, 4]},
        [("decode", 1), ("decode", 8), ("scores", 1)],
    ),
    "decode_attention.listed": (
        {"block_n": [32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [3, 5, 6, 7]},
        [("decode_selected", 1), ("decode_selected", 8)],
    ),
    "decode_attention.split": (
        {"waves": [1, 2, 3, 4], "keys": [64, 128, 256, 512]},
        [("decode", 1), ("decode", 8), ("decode_selected", 1), ("decode_selected", 8), ("pages", 1)],
    ),
    "topk_select": (
        {"block": [1024, 2048, 4096], "num_warps": [4, 8, 16]},
        [("topk", 1), ("topk", 8)],
    ),
    "attention_mass.lse": (
        {"block_m": [64, 128], "block_n": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
        [("mass_without_lse", 1), ("window", 1)],
    ),
    "attention_mass.mass": (
        {"block_m": [32, 64, 128], "block_n": [64, 128], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
        [("mass", 1), ("window", 1)],
    ),
    "antidiagonal_mass": (
        {"block_m": [64, 128], "block_n": [64, 128], "block_d": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
        [("antidiagonals", 1)],
    ),
    "vertical_slash_mass": (
        {"block_m": [32, 64], "block_n": [64, 128], "num_warps": [4, 8], "num_stages": [2, 3]},
        [("slashes", 1)],
    ),
    "block_sparse_attention": (
        {"block_m": [64, 128], "block_n": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
        [("block_sparse", 1)],
    ),
}


def mass_without_lse(maker: Maker, batch: int) -> Case:
    """The mass of a prompt whose LSE is to be computed too."""
    case = maker.mass(batch)
    case.calls["kvpress"] = case.calls["kvpress, LSE not given"]
    return case


def make(maker: Maker, name: str, batch: int) -> Case:
    """A case by name."""
    own = {"mass_without_lse": mass_without_lse}
    return own[name](maker, batch) if name in own else getattr(maker, name)(batch)


def sizes(options: argparse.Namespace) -> Iterator[Sizes]:
    """What is tuned for."""
    if options.interpret:
        yield TINY
        return
    for head_dim in options.head_dims:
        for block_size in (128, 64):
            yield replace(Sizes(), head_dim=head_dim, block_size=block_size, dtype=getattr(torch, options.dtype))


def candidates(tried: dict[str, list[int]], tiny: bool) -> list[Shape]:
    """Every combination; two of them for a tiny run."""
    shapes = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
    return shapes[:: max(1, len(shapes) - 1)] if tiny else shapes


def best_shape(cases: list[Case], kernel: str, shapes: list[Shape], device: torch.device) -> tuple[Shape, float] | None:
    """The shape with the least time against the heuristic's, in the geometric mean over the cases; None if none gains."""

    def times(shape: Shape) -> list[float]:
        with trying(kernel, shape):
            return [timing(case.calls["kvpress"], device, case.waits).ms for case in cases]

    before = times({})
    gains: list[tuple[float, Shape]] = []
    for shape in shapes:
        try:
            shares = [ours / other for ours, other in zip(times(shape), before, strict=True)]
        except Exception as error:  # more shared memory or registers than there are, a tile that does not fit the block
            print(f"  {text(shape)}: {first_line(error)}", flush=True)
            continue
        gain = math.exp(sum(map(math.log, shares)) / len(shares))
        print(f"  {text(shape)}: {gain:.3f} of the heuristic's time", flush=True)
        if gain <= GAIN and max(shares) <= NOISE:
            gains.append((gain, shape))
    for gain, shape in sorted(gains, key=lambda one: one[0]):
        with trying(kernel, shape):
            if all(case.error() <= MOST_ERROR for case in cases):
                return shape, gain
        print(f"  {text(shape)}: wrong results", flush=True)
    return None


def text(shape: Shape) -> str:
    """For people."""
    return " ".join(f"{name}={number}" for name, number in shape.items())


def keys_asked(case: Case, kernel: str) -> set[str]:
    """The keys of the shapes that a case asks for."""
    with trying(kernel, {}) as asked:
        case.calls["kvpress"][0]()
    return set(asked)


def tune(options: argparse.Namespace, device: torch.device, store: Callable[[str, Shape], None]) -> None:
    """Tune the chosen kernels at all sizes, key by key."""
    done: set[str] = set()
    for kernel in options.only:
        tried, named = TRIED[kernel]
        for chosen in sizes(options):
            maker = Maker(chosen, device)
            made = [partial(make, maker, name, min(batch, chosen.batches[-1])) for name, batch in named]
            keys: dict[str, list[Callable[[], Case]]] = {}
            for one in made:  # one case in memory at a time
                for key in keys_asked(one(), kernel) - done:
                    keys.setdefault(key, []).append(one)
            for key, of_key in keys.items():
                done.add(key)
                print(key, flush=True)
                found = best_shape([one() for one in of_key], kernel, candidates(tried, options.interpret), device)
                print("  the heuristic stays" if found is None else f"  {text(found[0])}: {found[1]:.3f}", flush=True)
                if found is not None:
                    store(key, found[0])


def store_in(path: Path, gpu: str) -> Callable[[str, Shape], None]:
    """What adds an entry to the file."""

    def store(key: str, shape: Shape) -> None:
        content = {"gpu": gpu, "triton": triton.__version__, "shapes": {}}
        if path.is_file():
            content["shapes"] = json.loads(path.read_text(encoding="utf-8"))["shapes"]
        content["shapes"] = dict(sorted({**content["shapes"], key: shape}.items()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    return store


def inspect(modules: list[str], architectures: list[int]) -> None:
    """What every launch that is in use takes, by Triton's compiler: no GPU is needed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import gpu_launches

    for architecture in architectures:
        rows = gpu_launches.compiled_for(architecture, *modules)
        print(gpu_launches.heading(architecture))
        for row in sorted(rows, key=gpu_launches.line):
            print(gpu_launches.line(row))
        largest = max(row["shared"] for row in rows)
        spilling = sum(row["spilled"] > 0 for row in rows)
        print(f"{len(rows)} launches; {largest} B of shared memory at most; {spilling} spill\n", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRIED, default=list(TRIED), metavar="KERNEL")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="by default the file that the kernels read for this GPU")
    parser.add_argument(
        "--interpret", action="store_true", help="tiny, on the CPU in Triton's interpreter; needs --out"
    )
    parser.add_argument("--inspect", action="store_true", help="print what the compiler says of each launch, and stop")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90], help="for --inspect")
    options = parser.parse_args()
    if options.inspect:
        chosen = [] if options.only == list(TRIED) else sorted({name.partition(".")[0] for name in options.only})
        inspect(chosen, options.architectures)
        return
    if options.interpret:
        if options.out is None:
            parser.error("--interpret needs --out: what it writes is of no use to any GPU")
        # Triton's interpreter does not get on with every NumPy; the tests know what to do about it.
        runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing to tune (--interpret shows on a CPU that this runs)")
        return
    device = torch.device("cpu") if options.interpret else torch.device("cuda", torch.cuda.current_device())
    path = options.out or tuned_file(gpu_name(device))
    tune(options, device, store_in(path, gpu_name(device) or "interpreter"))
    print(f"{path} has what was found" if path.is_file() else "no shape beats the heuristics: nothing written")


if __name__ == "__main__":
    main()
