"""Every Triton kernel, in every launch configuration it has, compiles for the supported GPUs and fits on them.

No GPU is needed: Triton brings its own assembler. What each kernel takes is printed as a table (`pytest -s`).
"""

from functools import partial
from itertools import product

import pytest
import torch

from kvpress.kernels.skip_attention import largest_tile
from support import gpu_launches as launches
from support.addresses import HEAD_DIM, narrow_products

triton = pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block of threads can have
# Bytes of a thread that registers do not hold, at most: a few numbers that a loop does not change, or the table of sine and
# cosine. More in float32, whose products on tensor cores are three and take the registers of three, and for more than 64 heads.
# The compilers of Triton before 3.6 spill twice as much.
SPILLED, SPILLED_BY_LARGE = (144, 576) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else (256, 1200)


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm-{}".format)
def test_compiles_and_fits(architecture: int) -> None:
    """Each launch compiles, fits the shared memory and nearly fits the registers, and has wide loads of K."""
    rows = launches.compiled_for(architecture)
    print("\n" + launches.heading(architecture))
    too_large, spilling, narrow = [], [], []
    for row in rows:
        dtypes, _ = launches.described(row["launch"])
        line = launches.line(row)
        print(line)
        if row["shared"] > SHARED_MEMORY[architecture]:
            too_large.append(line)
        types, constexprs = dict(row["launch"]["types"]), dict(row["launch"]["constexprs"])
        half = {"bf16", "fp16", "i16"} & set(dtypes.split("/"))
        if row["spilled"] > (SPILLED if half and constexprs.get("BLOCK_M", 0) <= 64 else SPILLED_BY_LARGE):
            spilling.append(line)
        # K is read 16 bytes at a time, except in pairs of channels; one new entry is a row for one warp.
        reads_k = {"stride_kn", "stride_km", "stride_xt"} & set(types) or row["launch"]["kernel"] == "pages_kernel"
        alone = constexprs.get("INTERLEAVED") or row["launch"]["kernel"] == "write_kernel"
        if reads_k and not row["wide"] and not alone:
            narrow.append(line)
    assert len(rows) > 100
    assert too_large == []
    assert spilling == []
    assert narrow == []


def test_every_kernel_is_compiled() -> None:
    """No kernel in the folder is without a launch that is compiled."""
    found = {(launch.module, launch.kernel) for calls in launches.CALLS.values() for launch in launches.noted(calls)}
    kernels = {
        (module, name)
        for module in launches.MODULES
        for name, kernel in vars(launches.gpu(module)).items()
        if name.endswith("_kernel") and kernel.fn.__module__.endswith(f".{module}")
    }
    assert found == kernels and len(kernels) > 10


def test_shapes_lead_to_nothing_else() -> None:
    """A sweep over head dimensions, groups, rows, lengths and page sizes leads to compiled settings alone."""
    calls = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for head_dim, dtype in product(launches.HEAD_DIMS, dtypes):
        groups = [*range(1, 17), *(group for width, group in launches.MANY_HEADS if width == head_dim)]
        for group, n in product(groups, (1, 100, 131072)):
            calls += [partial(launches.decode, head_dim, dtype, group, form, n=n) for form in ("plain", "slots")]
            calls += [partial(launches.paged, head_dim, dtype, group, True, n=n)]
            calls += [partial(launches.scores, head_dim, dtype, group, form, n=n) for form in ("pages", "votes")]
        for group, rows in product((1, 3, 8), (1, 2, 7, 32, 100, 4096)):
            calls += [partial(launches.mass, head_dim, dtype, group, rows, full) for full in (False, True)]
            calls.append(partial(launches.slashes, head_dim, dtype, group, rows, None))
            calls += [
                partial(launches.antidiagonals, head_dim, dtype, group, stride, rows) for stride in (1, 8, 16, 128)
            ]
        for block_size, full in product((64, 128), (False, True)):
            calls.append(partial(launches.sparse, head_dim, dtype, 3, block_size, full))
            tile = min(block_size, largest_tile(head_dim, dtype.itemsize))
            calls.append(partial(launches.skipping, head_dim, dtype, 3, tile, full))
        for form in ("all", "one"):
            calls.append(partial(launches.gather, head_dim, dtype, form, n=100))
        calls += [partial(launches.rope, head_dim, dtype, head_dim // 2, mixed) for mixed in (False, True)]
        calls += [partial(launches.bounds, head_dim, dtype, size, True) for size in (1, 2, 4, 8, 16, 32, 64, 100)]
        calls += [partial(launches.merge, head_dim, dtype, norms) for norms in (False, True)]
    calls += [partial(launches.topk, n, dtype) for n in (1, 63, 257, 8192, 8193, 1 << 20) for dtype in dtypes]
    calls += [partial(launches.union, n, group) for n in (1, 5000) for group in (1, 3)]
    compiled = {launch.settings for calls in launches.CALLS.values() for launch in launches.noted(calls)}
    found = {launch.settings for launch in launches.noted(calls)}
    assert len(found) > 50
    assert found - compiled == set()


def test_offsets_have_64_bits() -> None:
    """In every kernel, as launched for a head dimension of 80 or without one."""
    seen = set()
    for row in launches.compiled_for(90):
        launch, form = row["launch"], row["form"]
        if dict(launch["constexprs"]).get("HEAD_DIM", HEAD_DIM) == HEAD_DIM:
            seen.add((launch["module"], launch["kernel"]))
            assert form.count("tt.addptr") > 1
            assert narrow_products(form, tuple(name for name, _ in launch["types"])) == [], launch
    assert seen == {(row["launch"]["module"], row["launch"]["kernel"]) for row in launches.compiled_for(90)}


def test_a_narrow_product_is_found() -> None:
    """Control: by a stride or a head dimension in 32 bits, also if it is widened after; not by a block size."""
    form = """
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %cst = arith.constant dense<80> : tensor<64x1xi32> loc(#loc1)
    %start = arith.muli %pid, %c64_i32 : i32 loc(#loc2)
    %row = tt.splat %start : i32 -> tensor<64x1xi32> loc(#loc2)
    %wide = arith.extsi %row : tensor<64x1xi32> to tensor<64x1xi64> loc(#loc2)
    %good = arith.muli %wide, %stride : tensor<64x1xi64> loc(#loc3)
    %0 = tt.addptr %p, %good : tensor<64x1x!tt.ptr<bf16>>, tensor<64x1xi64> loc(#loc4)
    """
    assert narrow_products(form) == []
    for name, found in (("%chunk", 0), ("%arg1", 0), ("%arg0", 1), ("%stride", 1)):
        argument = form.replace("%c64_i32 =", "%unused =").replace("%c64_i32", name)
        assert len(narrow_products(argument, ("n", "chunk"))) == found
    bad = """
    %a = arith.muli %row, %s : tensor<64x1xi32> loc(#loc3)
    %b = arith.extsi %a : tensor<64x1xi32> to tensor<64x1xi64> loc(#loc3)
    """
    assert len(narrow_products(form + bad + "    %1 = tt.addptr %p, %b : tensor<64x1x!tt.ptr<bf16>>\n")) == 1
    bad = "    %c = arith.muli %row, %cst : tensor<64x1xi32> loc(#loc3)\n"
    assert len(narrow_products(form + bad + "    %2 = tt.addptr %p, %c : tensor<64x1x!tt.ptr<bf16>>\n")) == 1
