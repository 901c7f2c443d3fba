"""The 32-bit products that a kernel's addresses are computed from, read from Triton's intermediate form of it.

No offset into a tensor may be computed in 32 bits: a million tokens of a few heads and layers have more than 2^31 numbers, and
nothing of that size is allocated in tests. The number of a row or of an entry fits 32 bits; what it is multiplied with on the
way to a pointer, a stride or a width, must be 64 bits by then. Constants are block sizes and the like and count entries, but
for the head dimension: 80, which nothing else is. So do a program's entries, `chunk` and `per_split`.
"""

import re

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
