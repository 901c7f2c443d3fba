"""No offset into a tensor is computed in 32 bits: a million tokens of a few heads and layers have more than 2^31 numbers.

Read from Triton's intermediate form of each kernel, since nothing of that size is allocated here. The number of a row or of
an entry fits 32 bits; what it is multiplied with on the way to a pointer, a stride or a width, must be 64 bits by then.
Constants are block sizes and the like and count entries, but for the head dimension: 80, which nothing else is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvpress

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

HEAD_DIM = 80
MODULES = sorted(file.stem for folder in kvpress.__path__ for file in Path(folder).glob("kernels/gpu/*.py"))

# Compiles as test_compile.py does, and so finds most of it in Triton's cache.
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

target, forms = GPUTarget("cuda", 90, 32), []
for kernel, signature, constexprs, num_warps, num_stages in importlib.import_module(sys.argv[1]).compile_cases():
    if constexprs.get("HEAD_DIM", 80) != 80:
        continue
    names = kernel.arg_names
    types = {name: "constexpr" if name in constexprs else signature[name].partition(":")[0] for name in names}
    wide = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if ":16" in kind}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(ASTSource(kernel, types, constexprs, wide), target=target, options=options)
    forms.append((kernel.__name__, compiled.asm["ttir"]))
print(json.dumps(forms))
"""


def narrow_products(form: str) -> list[str]:
    """The 32-bit products that an address is computed from, other than by a block size, in Triton's form."""
    made = {}  # name -> operation, operands, line
    found = {}
    for line in form.splitlines():
        match = re.match(r"\s*(%[\w-]+) = ([\w.]+) (.*)", line.partition(" loc(")[0])
        if match is None:
            continue
        name, operation, rest = match.groups()
        made[name] = operation, re.findall(r"%[\w-]+", rest.partition(" : ")[0]), rest
        if operation != "tt.addptr":
            continue
        todo = [made[name][1][1]]
        while todo:
            operation, operands, rest = made.get(todo.pop(), ("", [], ""))
            if operation in ("tt.load", "arith.constant"):
                continue  # numbers, not places
            if operation == "arith.muli" and re.search(r"i32>?$", rest):
                constants = [made[x][2] for x in operands if x in made and made[x][0] == "arith.constant"]
                values = [int(re.search(r"-?\d+", text)[0]) for text in constants]
                if not values or HEAD_DIM in values:
                    found[rest] = None
            todo += operands
    return list(found)


@pytest.mark.parametrize("module", MODULES)
def test_offsets_have_64_bits(module: str, tmp_path: Path) -> None:
    """In every kernel, as launched for a head dimension of 80 or without one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, f"kvpress.kernels.gpu.{module}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    forms = json.loads(done.stdout.splitlines()[-1])
    assert forms
    for kernel, form in forms:
        assert form.count("tt.addptr") > 1
        assert narrow_products(form) == [], kernel


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
    bad = """
    %a = arith.muli %row, %s : tensor<64x1xi32> loc(#loc3)
    %b = arith.extsi %a : tensor<64x1xi32> to tensor<64x1xi64> loc(#loc3)
    """
    assert len(narrow_products(form + bad + "    %1 = tt.addptr %p, %b : tensor<64x1x!tt.ptr<bf16>>\n")) == 1
    bad = "    %c = arith.muli %row, %cst : tensor<64x1xi32> loc(#loc3)\n"
    assert len(narrow_products(form + bad + "    %2 = tt.addptr %p, %c : tensor<64x1x!tt.ptr<bf16>>\n")) == 1
