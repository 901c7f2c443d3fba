"""The Triton top-k in one launch and in many chunks, against the torch path; ../test_topk_select.py has what both paths do."""

import math

import pytest
import torch

from kvpress.kernels.gpu import topk_select as gpu
from kvpress.kernels.topk_select import topk_select
from support.accelerator import DEVICE

NAN, INF = float("nan"), float("inf")


def random(n, generator):
    return torch.randn(2, 2, n, generator=generator)


def constant(n, generator):
    return torch.full((2, 2, n), 0.25)


def ascending(n, generator):
    return torch.arange(n).expand(2, 2, n).float()


def descending(n, generator):
    return -torch.arange(n).expand(2, 2, n).float()


def one_bucket(n, generator):
    """All scores agree in their first three digits: only the last 8 bits tell them apart."""
    return (0x3F800000 + torch.randint(256, (2, 2, n), generator=generator)).int().view(torch.float32)


def few_levels(n, generator):
    return torch.randint(-2, 3, (2, 2, n), generator=generator).float()


def specials(n, generator):
    """A third are NaN, -inf, +inf, zeros of both signs, the largest numbers and denormals."""
    limit = torch.finfo(torch.float32).max
    values = torch.tensor([NAN, -INF, INF, 0.0, -0.0, limit, -limit, 1e-45, -1e-45])
    picks = values[torch.randint(len(values), (2, 2, n), generator=generator)]
    return torch.where(torch.rand(2, 2, n, generator=generator) < 0.3, picks, random(n, generator))


def mostly_minus_inf(n, generator):
    """Fewer candidates than are wanted."""
    return random(n, generator).masked_fill(torch.rand(2, 2, n, generator=generator) < 0.95, -INF)


INPUTS = [random, constant, ascending, descending, one_bucket, few_levels, specials, mostly_minus_inf]
ALL_INPUTS = pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)


def check(scores, counts, k):
    """The Triton result, after comparing it with the torch path's."""
    expected = topk_select(scores, counts, k, backend="torch")
    found = topk_select(scores.to(DEVICE), counts.to(DEVICE), k, backend="triton")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.cpu().equal(theirs)
    return found


@ALL_INPUTS
@pytest.mark.parametrize("one_tile", [8192, 0], ids=["one-launch", "five-launches"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 16), (111, 111), (3000, 512)], ids=str)
def test_equals_torch(make, n, k, one_tile, monkeypatch):
    """Counts from none to all of k, each row another; in one tile, and in chunks as a long row."""
    monkeypatch.setattr(gpu, "ONE_TILE", one_tile)
    scores = make(n, torch.Generator().manual_seed(n))
    counts = torch.tensor([[0, k], [math.ceil(k / 2), max(0, k - 1)]])
    check(scores, counts, k)


@pytest.mark.parametrize(
    ("make", "most"),
    [*((make, 3) for make in INPUTS), (few_levels, gpu.MOST_CHUNKS)],
    ids=lambda x: f"{x}-chunks" if isinstance(x, int) else x.__name__,
)
def test_several_chunks(make, most, monkeypatch):
    """More chunks than are added at a time, the last one short; ties go on from chunk to chunk."""
    n, k = 5 * 128 + 77, 300
    monkeypatch.setattr(gpu, "ONE_TILE", 0)
    monkeypatch.setattr(gpu, "BLOCK", 128)
    monkeypatch.setattr(gpu, "BLOCK_CHUNKS", 2)
    monkeypatch.setattr(gpu, "MOST_CHUNKS", most)
    scores = make(n, torch.Generator().manual_seed(1))[:1]
    check(scores, torch.tensor([[k, 17]]), k)
    assert -(-n // gpu.chunk_size(n, 2, 128, torch.device("cpu"))) == min(6, most)


@ALL_INPUTS
@pytest.mark.parametrize(("n", "k"), [(8192, 128), (8193, 128), (5000, 4096)], ids=str)
def test_pages(make, n, k):
    """Pages of a long context: the last length of one launch, and the first of five."""
    check(make(n, torch.Generator().manual_seed(6))[:1], torch.tensor([[k, k // 2]]), k)


def test_launches(monkeypatch):
    """A row that fits a tile takes one launch, a longer one five."""
    launched = []

    def noting(kernel):
        class Noting:
            def __getitem__(self, grid):
                launched.append(kernel)
                return lambda *args, **options: None

        return Noting()

    for name in ("tile_kernel", "count_kernel", "collect_kernel"):
        monkeypatch.setattr(gpu, name, noting(name))
    for n in (gpu.ONE_TILE, gpu.ONE_TILE + 1):
        gpu.topk_select(torch.zeros(1, 2, n, device=DEVICE), torch.ones(1, 2, dtype=torch.int64, device=DEVICE), 4)
    assert launched == ["tile_kernel"] + ["count_kernel"] * 4 + ["collect_kernel"]


@ALL_INPUTS
def test_a_million(make, monkeypatch):
    """In the interpreter in few large tiles: what costs there is their number."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gpu, "BLOCK", 1 << 17)
    scores = make(1 << 20, torch.Generator().manual_seed(2))[:1, :1]
    check(scores, torch.tensor([[8192]]), 8192)


@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=["i32", "i64"])
@pytest.mark.parametrize("one_tile", [8192, 0], ids=["one-launch", "five-launches"])
def test_views(counts, one_tile, monkeypatch):
    """Rows of a larger buffer, one count for all heads, and a score dimension that is strided."""
    monkeypatch.setattr(gpu, "ONE_TILE", one_tile)
    buffer = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(4))
    wanted = torch.tensor([[7], [30]], dtype=counts)
    check(buffer[:, 1:4, 30:300], wanted, 30)
    check(buffer.transpose(1, 2)[:, :5], wanted.clamp(max=5), 5)


def test_runs_again_the_same():
    scores = few_levels(600, torch.Generator().manual_seed(5))
    first, again = (check(scores, torch.full((2, 2), 100), 100) for _ in range(2))
    assert first[0].equal(again[0])


def test_chunks_follow_shapes():
    """At most `MOST_CHUNKS` of whole tiles; many rows leave a row to one program."""
    for n in (1, 63, 8192, 1 << 20):
        for rows in (1, 8, 4096):
            chunk = gpu.chunk_size(n, rows, gpu.BLOCK, torch.device("cpu"))
            assert chunk % gpu.BLOCK == 0 and -(-n // chunk) <= gpu.MOST_CHUNKS
            assert rows < 4096 or chunk >= n
