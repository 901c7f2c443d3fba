"""What the Triton kernels' host functions allocate beside their results, for a context of 131,072 entries.

All of it is added up, freed or not, on tensors without numbers. Eight kv heads of four query heads, 128 channels, bfloat16: K of
one layer is 256 MiB.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

from kvpress.kernels.gpu import topk_select as topk
from support import gpu_launches as launches

N, HEADS, KV_HEADS, HEAD_DIM = 131072, 32, 8, 128
SPLITS = 33  # two waves of programs on 132 multiprocessors
CHUNKS = 9  # the same, of 32 heads
BF16 = torch.bfloat16


class Allocated(TorchDispatchMode):
    """Adds up the memory behind every operation's result, in bytes; a view adds none."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.storages[tensor.untyped_storage()._cdata] = (
                    tensor.untyped_storage()
                )  # kept, so that it stays unique
        return result

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def workspace(call):
    """Bytes that a call allocates for what it does not take or return."""
    with launches.noting() as noted, FakeTensorMode(allow_non_fake_inputs=True):
        made = []
        original = launches.gpu

        class Watched:
            """A module of kernels, whose functions are called under the recorder."""

            def __init__(self, name):
                self.module = original(name)

            def __getattr__(self, name):
                def called(*args, **options):
                    with Allocated() as allocated:
                        result = getattr(self.module, name)(*args, **options)
                    returned = {
                        x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(result) if x is not None
                    }
                    made.append(allocated.bytes - sum(storage.nbytes() for storage in returned.values()))
                    return result

                return called

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "gpu", Watched)
            call()
    assert noted and made
    return sum(made)


PARTS = HEADS * SPLITS * (HEAD_DIM + 1) * 4  # of splits: output and LSE
SCORES = HEADS * N * 4
ROWS = KV_HEADS * N // 2  # entries that leave
CASES = {
    # Plain decode returns no LSE, so that counts as workspace.
    "decode": (partial(launches.decode, HEAD_DIM, BF16, 4, "plain"), PARTS + HEADS * 4),
    "decode with mass": (partial(launches.decode, HEAD_DIM, BF16, 4, "slots"), PARTS + SCORES + HEADS * 4),
    "decode over pages, weights per head": (partial(launches.decode, HEAD_DIM, BF16, 4, "pages"), PARTS + HEADS * 4),
    # Noise: offsets and their hash per head, and a second LSE in parts and whole.
    "decode with noise": (
        partial(launches.decode, HEAD_DIM, BF16, 4, "listed"),
        PARTS + SCORES + HEADS * (SPLITS * 4 + 15 * 8),
    ),
    "decode, the first moved": (partial(launches.decode, HEAD_DIM, BF16, 4, "first moved"), PARTS + HEADS * 4),
    # Numbers of pages and where a head's begin; a split of a head may hold less than the others.
    "write a slot": (partial(launches.write, HEAD_DIM, BF16, True), 0),
    "evict a slot": (lambda n: launches.evict(n, BF16, True), 0),
    "paged": (
        partial(launches.paged, HEAD_DIM, BF16, 4, True),
        (2 * 132 + KV_HEADS) * 4 * (HEAD_DIM + 1) * 4
        + SCORES
        + KV_HEADS * N // 32 * 4
        + (KV_HEADS + 1) * 4
        + HEADS * 4,
    ),
    "decode scores": (partial(launches.scores, HEAD_DIM, BF16, 4, "plain"), 0),
    "page scores": (partial(launches.scores, HEAD_DIM, BF16, 4, "pages"), 0),
    "soft vote": (partial(launches.scores, HEAD_DIM, BF16, 4, "votes"), SCORES + HEADS * (SPLITS + 1) * 4),
    "page bounds": (partial(launches.bounds, HEAD_DIM, BF16, 16, True), 0),
    # The rows' LSE, in parts and whole.
    "mass of a window": (partial(launches.mass, HEAD_DIM, BF16, 4, 32, False), HEADS * 32 * (SPLITS + 1) * 4),
    "mass of a prompt": (partial(launches.mass, HEAD_DIM, BF16, 4, N, False), HEADS * N * 4),
    "vertical and slash mass": (
        partial(launches.slashes, HEAD_DIM, BF16, 4, 64, None),
        HEADS * 64 * (SPLITS // 2 + 2) * 4,
    ),
    # The LSE of each cell; the result itself is larger than it.
    "antidiagonals of a prompt": (partial(launches.antidiagonals, HEAD_DIM, BF16, 4, 16, N), HEADS * N // 16 * 4),
    "antidiagonals of a chunk": (
        partial(launches.antidiagonals, HEAD_DIM, BF16, 4, 16, 2048),
        HEADS * 2048 // 16 * (SPLITS // 2 + 2) * 4,
    ),
    # Tables of n numbers and lists per kv head; never rows times entries.
    "block sparse": (partial(launches.sparse, HEAD_DIM, BF16, 4, 64, True), KV_HEADS * N * 20),
    "gather": (partial(launches.gather, HEAD_DIM, BF16, "all"), 0),
    "rope shift": (partial(launches.rope, HEAD_DIM, BF16, 64, False), 0),
    # Targets sorted, their order, and the entries in it, 8 bytes each; 12 bytes of each centre, and their numbers once.
    "merge": (partial(launches.merge, HEAD_DIM, BF16, False), 36 * ROWS + 8 * N // 2 + 1024),
    "top-k": (partial(launches.topk, N, BF16), HEADS * topk.DIGITS * (CHUNKS * 256 + 2) * 4),
    "top-k of pages": (partial(launches.topk, N // 16, BF16), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_workspace(name):
    """At most what the operation needs, which is always much less than K."""
    call, allowed = CASES[name]
    found = workspace(call if name.startswith("top-k") else partial(call, n=N))
    print(f"{name}: {found:,} bytes, allowed {allowed:,}")
    assert 0 <= found <= allowed
    assert allowed < KV_HEADS * N * HEAD_DIM * 2 / 3


def test_grids_of_eight_million_entries():
    """CUDA has at most 65,535 programs along a grid's second and third axis; `noting` holds every launch against that."""
    n = 1 << 23
    calls = [
        *(partial(launches.decode, HEAD_DIM, BF16, 4, form, n=n) for form in ("slots", "listed", "pages")),
        *(partial(launches.scores, HEAD_DIM, BF16, 4, form, n=n) for form in ("plain", "votes", "pages")),
        *(partial(launches.gather, HEAD_DIM, BF16, form, n=n) for form in ("all", "one")),
        partial(launches.paged, HEAD_DIM, BF16, 4, True, n=n),
        partial(launches.bounds, HEAD_DIM, BF16, 16, True, n=n),
        partial(launches.rope, HEAD_DIM, BF16, 64, False, n=n),
        partial(launches.mass, HEAD_DIM, BF16, 4, 32, True, n=n),
        partial(launches.mass, HEAD_DIM, BF16, 4, n, False, n=n),
        partial(launches.slashes, HEAD_DIM, BF16, 4, 64, None, n=n),
        partial(launches.antidiagonals, HEAD_DIM, BF16, 4, 16, n, n=n),
        partial(launches.merge, HEAD_DIM, BF16, False, n=n),
        partial(launches.sparse, HEAD_DIM, BF16, 4, 64, False, n=n),
        partial(launches.topk, n, BF16),
        partial(launches.union, n, 4),
        partial(launches.evict, n, BF16, True),
        partial(launches.write, HEAD_DIM, BF16, True, n=n),
    ]
    assert len({launch.kernel for launch in launches.noted(calls)}) > 15


def test_the_recorder_sees_a_temporary():
    """Control: a float32 copy of K is found."""

    def call():
        launches.gpu("decode_scores").decode_scores(
            torch.empty(1, HEADS, 1, HEAD_DIM), torch.empty(1, KV_HEADS, HEAD_DIM, 4096, dtype=BF16).mT, scale=1.0
        )

    assert workspace(call) == KV_HEADS * 4096 * HEAD_DIM * 2  # keys whose channels are strided are copied
