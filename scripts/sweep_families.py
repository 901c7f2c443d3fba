"""Run every family of causal LMs that the installed transformers has under kvpress, and write what came out.

    python scripts/sweep_families.py --write docs/models.md   # all of them: about 15 minutes on 2 cores
    python scripts/sweep_families.py llama qwen3              # some, to the screen

Each family is a tiny random model (tests/tiny_families.py), run plain, padded and with its prompt in two passes, against
itself before it was patched (tests/family_checks.py). Each has a process and a time limit of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from family_checks import ROOMY, Verdict, check_family
from tiny_families import family_names

SECONDS = 120


def in_process(name: str) -> dict[str, Verdict]:
    """`check_family` in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return dict.fromkeys(ROOMY, Verdict("crashed", f"no result after {SECONDS} s"))
        return ours.recv()
    except EOFError:
        process.join()
        return dict.fromkeys(ROOMY, Verdict("crashed", f"the process ended with {process.exitcode}"))
    finally:
        process.kill()
        process.join()


def _check(name: str, result: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    result.send(check_family(name))


def main() -> int:
    """Sweep, print a line per family, and write the table if asked to. 1 if a family is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table in Markdown")
    arguments = parser.parse_args()
    names = family_names()
    chosen = arguments.families or list(names)
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)}")
    check_family("llama")  # loads what all of them need before the processes are forked
    rows: dict[str, dict[str, Verdict]] = {}
    for name in chosen:
        began = time.time()
        rows[name] = in_process(name)
        line = {kind: f"{one.outcome} {one.why}".strip() for kind, one in rows[name].items()}
        print(f"{name} ({names[name]}, {time.time() - began:.1f} s): {json.dumps(line)}", flush=True)
    bad = [name for name, row in rows.items() if any(one.outcome in ("wrong", "crashed") for one in row.values())]
    print(f"{len(rows)} families, {len(bad)} wrong or crashed: {' '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
