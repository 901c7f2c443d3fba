"""No offset into a tensor is computed in 32 bits: a million tokens of a few heads and layers have more than 2^31 numbers.

Read from Triton's intermediate form of each kernel, since nothing of that size is allocated here. The number of a row or of
an entry fits 32 bits; what it is multiplied with on the way to a pointer, a stride or a width, must be 64 bits by then.
Constants are block sizes and the like and count entries, but for the head dimension: 80, which nothing else is. So do a program's
entries, `chunk` and `per_split`.
"""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

from support import gpu_launches as launches

HEAD_DIM = 80
ENTRIES = {"chunk", "per_split"}


def narrow_products(form: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """The 32-bit products that an address is computed from, other than by a number of entries, in Triton's form."""
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
                # The kernel's arguments have their names, or in older versions their numbers.
                names = {arguments[int(x[4:])] if re.fullmatch(r"%arg\d+", x) else x[1:] for x in operands}
                if HEAD_DIM in values or not (values or names & ENTRIES):
                    found[rest] = None
            todo += operands
    return list(found)


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
