"""Time of the CPU kernels against plain torch and SDPA.

    python benchmarks/kernels.py                                   # every kernel, both shapes, float32 and bfloat16
    python benchmarks/kernels.py --only block_sparse --shapes smollm2 --dtypes float32

The implementations of one case run interleaved, a call of each per round after a warm-up; `ms` is the median and `ratio`
the median over rounds of (this one / ours in that round): above 1 it is slower than ours. Rows of cases that ran
replace those in the CSV, the others stay. At the end come the goals with what was measured. Inputs are random.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.decode_attention import decode_attention, decode_attention_reference
from kvpress.kernels.decode_scores import decode_scores, decode_scores_reference
from kvpress.kernels.exponentials import exp_
from kvpress.kernels.gather_slots import gather_slots
from kvpress.kernels.page_scores import page_scores, page_scores_reference
from kvpress.kernels.rope_shift import rope_shift
from kvpress.kernels.topk_select import topk_select

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
OURS = "kvpress"
FIELDS = ["kernel", "shape", "dtype", "size", "implementation", "ms", "ratio"]


class Shape(NamedTuple):
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {"smollm2": Shape(9, 3, 64), "llama-8b": Shape(32, 8, 128)}


class Case(NamedTuple):
    """Implementations of one operation at one size, ours among them under the name `OURS`."""

    size: str
    calls: dict[str, Callable[[], Any]]


class Goal(NamedTuple):
    """`implementation` takes at least `times` as long as ours in the case `kernel`."""

    kernel: str
    implementation: str
    times: float


GOALS = [
    Goal("decode_selected", "sdpa enable_gqa, all entries", 50),
    Goal("decode_selected", "sdpa, K and V repeated, all entries", 50),
    Goal("decode", "sdpa enable_gqa", 1.5),
    Goal("attention_mass", "sdpa, causal", 1 / 1.5),
    Goal("block_sparse", "sdpa, causal", 4),
]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(shape: Shape, rows: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: query [1, heads, rows, head_dim], key and value [1, kv_heads, n, head_dim]."""
    query = random(1, shape.heads, rows, shape.head_dim, dtype=dtype)
    key, value = (random(1, shape.kv_heads, n, shape.head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return query, key, value


def chosen_blocks(heads: int, blocks: int, density: float, seed: int = 0) -> Tensor:
    """Random key blocks of each query block, int64 [1, heads, blocks, m], -1 for none: its own, and a share of those seen."""
    order = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    place = torch.arange(blocks)
    order.masked_fill_(place > place[:, None], -1.0)
    order[:, place, place] = 2.0
    wanted = ((place + 1) * density).round().clamp(min=1)
    found = order.topk(int(wanted.max()), dim=-1).indices
    return found.masked_fill_(torch.arange(found.shape[-1]) >= wanted[:, None], -1)[None]


def decode(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """One token over all entries."""
    query, key, value = qkv(shape, 1, n, dtype)
    scale, group = shape.head_dim**-0.5, shape.heads // shape.kv_heads
    return Case(
        f"{n} entries",
        {
            OURS: lambda: decode_attention(query, key, value, scale=scale),
            "kvpress, with mass": lambda: decode_attention(query, key, value, scale=scale, with_mass=True),
            "sdpa enable_gqa": lambda: sdpa(query, key, value, enable_gqa=True),
            "sdpa, K and V repeated": lambda: sdpa(query, *(x.repeat_interleave(group, 1) for x in (key, value))),
            "reference": lambda: decode_attention_reference(query, key, value, scale=scale),
        },
    )


def decode_selected(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """One token over 512 listed entries."""
    query, key, value = qkv(shape, 1, n, dtype)
    scale, group = shape.head_dim**-0.5, shape.heads // shape.kv_heads
    order = torch.rand(1, shape.kv_heads, n, generator=torch.Generator().manual_seed(3))
    index = order.argsort(-1)[..., : min(512, n)].sort(-1).values
    return Case(
        f"{index.shape[2]} of {n} entries",
        {
            OURS: lambda: decode_attention(query, key, value, scale=scale, index=index),
            "sdpa enable_gqa, all entries": lambda: sdpa(query, key, value, enable_gqa=True),
            "sdpa, K and V repeated, all entries": lambda: sdpa(
                query, *(x.repeat_interleave(group, 1) for x in (key, value))
            ),
            "reference": lambda: decode_attention_reference(query, key, value, scale=scale, index=index),
        },
    )


def scores(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """q.k of one token with all entries."""
    query, key, _ = qkv(shape, 1, n, dtype)
    return Case(
        f"{n} entries",
        {
            OURS: lambda: decode_scores(query, key, scale=0.1),
            "reference": lambda: decode_scores_reference(query, key, scale=0.1),
        },
    )


def mass(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """Column sums of a prompt's softmax."""
    query, key, value = qkv(shape, n, n, dtype)
    scale, group, at = shape.head_dim**-0.5, shape.heads // shape.kv_heads, torch.arange(n)[None]
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *(x.repeat_interleave(group, 1) for x in (key, value)), 0.0, True, scale=scale
    )

    def eager() -> Tensor:
        """The n x n matrix, one kv head at a time."""
        hidden = torch.ones(n, n, dtype=torch.bool).triu_(1)
        sums = []
        for head in range(shape.kv_heads):
            rows = query[0, head * group : (head + 1) * group].float() * scale
            weights = (rows @ key[0, head].float().T).masked_fill_(hidden, float("-inf")).softmax(-1)
            sums.append(weights.sum((0, 1)))
        return torch.stack(sums)

    return Case(
        f"{n} tokens",
        {
            OURS: lambda: attention_mass(query, at, key, None, scale=scale),
            "kvpress, LSE given": lambda: attention_mass(query, at, key, None, scale=scale, lse=lse),
            "sdpa, causal": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
            "n x n matrix": eager,
        },
    )


def block_sparse(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """A prompt that reads a tenth of what causal attention does, each head other blocks."""
    query, key, value = qkv(shape, n, n, dtype)
    scale = shape.head_dim**-0.5
    by_size = {size: chosen_blocks(shape.heads, -(-n // size), 0.1) for size in (64, 128)}
    # A twentieth of the entries, and the nearest distances that make up another.
    order = torch.rand(1, shape.heads, n, generator=torch.Generator().manual_seed(1)).argsort(dim=-1)
    columns, diagonals = order[..., : n // 20], torch.arange(n // 40).expand(1, shape.heads, -1)
    return Case(
        f"{n} tokens, 10 %",
        {
            OURS: lambda: block_sparse_attention(query, key, value, scale=scale, blocks=by_size[64]),
            "kvpress, blocks of 128": lambda: block_sparse_attention(
                query, key, value, scale=scale, blocks=by_size[128], block_size=128
            ),
            "kvpress, columns and diagonals": lambda: block_sparse_attention(
                query, key, value, scale=scale, columns=columns, diagonals=diagonals
            ),
            "sdpa, causal": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        },
    )


def topk(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """A sixteenth of the entries, by score."""
    numbers, k = random(1, shape.kv_heads, n, dtype=torch.float32), max(1, n // 16)
    counts = torch.full((1, 1), k)
    return Case(
        f"{k} of {n} entries",
        {
            OURS: lambda: topk_select(numbers, counts, k),
            "torch.topk, unsorted": lambda: numbers.topk(k, sorted=False),
            "torch.topk and sort": lambda: numbers.topk(k).indices.sort(),
            "stable sort": lambda: numbers.sort(descending=True, stable=True).indices[..., :k].sort(),
        },
    )


def gather(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """A tenth of the entries to a new buffer."""
    _, key, _ = qkv(shape, 1, n, dtype)
    order = torch.rand(1, shape.kv_heads, n, generator=torch.Generator().manual_seed(3))
    index = order.argsort(-1)[..., : max(1, n // 10)].sort(-1).values
    return Case(
        f"{index.shape[2]} of {n} entries",
        {
            OURS: lambda: gather_slots(key, index),
            "torch.gather": lambda: key.gather(2, index[..., None].expand(-1, -1, -1, shape.head_dim)),
        },
    )


def pages(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """Quest's bound on pages of 16 entries."""
    query, key, other = qkv(shape, 1, max(1, n // 16), dtype)
    least, greatest = torch.minimum(key, other), torch.maximum(key, other)
    return Case(
        f"{key.shape[2]} pages",
        {
            OURS: lambda: page_scores(query, least, greatest),
            "reference": lambda: page_scores_reference(query, least, greatest),
        },
    )


def rope(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """Every key to another position."""
    _, key, _ = qkv(shape, 1, n, dtype)
    inv_freq = 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    shift = torch.arange(n).expand(1, shape.kv_heads, n)

    def complex_numbers() -> Tensor:
        """Pairs of channels as complex numbers."""
        pair = torch.complex(*key.float().chunk(2, dim=-1))
        turned = pair * torch.polar(torch.ones(()), shift[..., None] * inv_freq)
        return torch.cat((turned.real, turned.imag), dim=-1).to(dtype)

    return Case(
        f"{n} entries",
        {OURS: lambda: rope_shift(key, shift, inv_freq), "complex numbers": complex_numbers},
    )


def exponentials(shape: Shape, dtype: torch.dtype, n: int) -> Case:
    """Weights of blocks of 128 rows and entries, half of them masked or of scores far below the largest; float32 always."""
    near = random(shape.heads, max(1, n // 128), 128, 128, dtype=torch.float32)
    later = torch.ones(128, 128, dtype=torch.bool).triu(1)
    by_depth = {f"{depth:g}": near.masked_fill(later, depth) for depth in (-95.0, -200.0, float("-inf"))}
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: exp_(by_depth["-95"].clone())}
    for name, scores in {"near": near, **by_depth}.items():
        calls[f"exp, {name}"] = lambda scores=scores: scores.clone().exp_()
        calls[f"exp2, {name}"] = lambda scores=scores: exp_(scores.clone())
    return Case(f"{near.numel()} scores", calls)


# Name -> what makes the case, and its length.
CASES: dict[str, tuple[Callable[[Shape, torch.dtype, int], Case], int]] = {
    "decode": (decode, 32768),
    "decode_selected": (decode_selected, 32768),
    "decode_scores": (scores, 32768),
    "attention_mass": (mass, 4096),
    "block_sparse": (block_sparse, 16384),
    "topk_select": (topk, 32768),
    "gather_slots": (gather, 32768),
    "page_scores": (pages, 32768),
    "rope_shift": (rope, 8192),
    "exponentials": (exponentials, 8192),
}


def measure(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Name -> median ms, and the median ratio to ours of the same round.

    The warm-up says how long a call takes; so short calls get more rounds, as many as fit in `seconds`.
    """
    start = time.perf_counter()
    for call in calls.values():
        call()
    spent = time.perf_counter() - start
    rounds = max(rounds, min(200, int(seconds / spent)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: (
            statistics.median(values),
            statistics.median(value / ours for value, ours in zip(values, times[OURS], strict=True)),
        )
        for name, values in times.items()
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the chosen cases."""
    for kernel in options.only:
        make, length = CASES[kernel]
        for shape in options.shapes:
            for dtype in options.dtypes:
                case = make(SHAPES[shape], getattr(torch, dtype), max(64, length // options.shorter))
                for name, (ms, ratio) in measure(case.calls, options.rounds, options.seconds).items():
                    key = {"kernel": kernel, "shape": shape, "dtype": dtype, "size": case.size}
                    yield {**key, "implementation": name, "ms": f"{ms:.3f}", "ratio": f"{ratio:.2f}"}


def store(path: Path, new: list[dict[str, Any]]) -> None:
    """Write rows to the CSV in the place of those of the same cases."""

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["kernel"], row["shape"], row["dtype"]

    kept: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            measured = {case(row) for row in new}
            kept = [row for row in csv.DictReader(file) if case(row) not in measured]
    order = list(CASES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + new, key=lambda row: order.index(row["kernel"])))


def judged(new: list[dict[str, Any]]) -> Iterator[str]:
    """Each goal with what was measured, per shape and dtype."""
    for goal in GOALS:
        found = [row for row in new if (row["kernel"], row["implementation"]) == (goal.kernel, goal.implementation)]
        wanted = f"{goal.kernel}: '{goal.implementation}' takes at least {goal.times:.2f} x ours"
        if not found:
            yield f"not measured  {wanted}"
        for row in found:
            verdict = "met         " if float(row["ratio"]) >= goal.times else "missed      "
            yield f"{verdict}  {wanted}: {row['ratio']} ({row['shape']}, {row['dtype']}, {row['size']})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="KERNEL")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a case, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="rounds go on for so long where calls are short")
    parser.add_argument("--shorter", type=int, default=1, help="divide all lengths by this, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    new = []
    with torch.inference_mode():
        for row in rows(options):
            new.append(row)
            print(*row.values(), sep="\t", flush=True)
    store(options.out, new)
    print(f"\n{options.out} has these rows. Goals:", *judged(new), sep="\n")


if __name__ == "__main__":
    main()
