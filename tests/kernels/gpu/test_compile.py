"""Every Triton kernel, in every launch configuration it has, compiles for the supported GPUs and fits on them.

No GPU is needed: Triton brings its own assembler. The interpreter must be off, so the compiler runs in a process of
its own, one per module and architecture; what each kernel takes is printed (`pytest -s`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvpress

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

MODULES = sorted(file.stem for folder in kvpress.__path__ for file in Path(folder).glob("kernels/gpu/*.py"))
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block of threads can have

# Reads a module's compile_cases(): (kernel, signature, constexprs, num_warps, num_stages). The signature gives the type
# of every argument that is no constexpr, as "*bf16" or "i32", with ":16" behind it where a launch usually gets a
# multiple of 16 (Triton compiles another variant then, whose wide loads take the most shared memory).
COMPILE = """
import importlib, json, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, architecture = importlib.import_module(sys.argv[1]), int(sys.argv[2])
target, rows = GPUTarget("cuda", architecture, 32), []
for kernel, signature, constexprs, num_warps, num_stages in module.compile_cases():
    names = kernel.arg_names
    assert set(names) == {*signature, *constexprs}, set(names) ^ {*signature, *constexprs}
    types = {name: "constexpr" if name in constexprs else signature[name].partition(":")[0] for name in names}
    wide = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if ":16" in kind}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(ASTSource(kernel, types, constexprs, wide), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    resources = dict(part.split(":")[:2] for part in usage.split() if part.count(":") == 1 and part[-1].isdigit())
    rows.append({
        "kernel": kernel.__name__,
        "settings": {**{k: str(v) for k, v in constexprs.items()}, **options},
        "types": sorted({kind.partition(":")[0] for kind in signature.values() if kind.startswith("*")}),
        "shared": compiled.metadata.shared,
        "registers": int(resources["REG"]),
        "spilled": int(resources["STACK"]) + int(resources["LOCAL"]),
    })
print(json.dumps(rows))
"""


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm-{}".format)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_and_fits(module: str, architecture: int, tmp_path: Path) -> None:
    """Each case compiles, and its shared memory fits the architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, f"kvpress.kernels.gpu.{module}", str(architecture)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        print(
            f"sm_{architecture} {row['kernel']} {' '.join(row['types'])} {settings}: {row['shared']} bytes shared, "
            f"{row['registers']} registers, {row['spilled']} bytes spilled"
        )
    assert rows, "compile_cases() is empty"
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
