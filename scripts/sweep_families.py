"""Run every family of causal LMs that the installed transformers has under kvpress, and write what came out.

    python scripts/sweep_families.py --write docs/models.md   # all of them: about 15 minutes on 2 cores
    python scripts/sweep_families.py llama qwen3              # some, to the screen

Each family is a tiny random model (tests/support/tiny_families.py), run plain, padded and with its prompt in two passes, against
itself before it was patched (tests/support/family_checks.py). Each has a process and a time limit of its own.
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

SECONDS = 120


Row = dict[str, Any]  # kind of policy -> what became of the family under it


def in_process(name: str) -> Row:
    """`check_family` in a process of its own."""
    from support.family_checks import ROOMY, Verdict

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return dict.fromkeys(ROOMY, Verdict("crashed", f"no result after {SECONDS} s"))
        row: Row = ours.recv()
        return row
    except EOFError:
        process.join()
        return dict.fromkeys(ROOMY, Verdict("crashed", f"the process ended with {process.exitcode}"))
    finally:
        process.kill()
        process.join()


def _check(name: str, result: Any) -> None:
    import torch

    from support.family_checks import check_family

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    result.send(check_family(name))


def table(rows: dict[str, Row], kinds: dict[str, str], command: str) -> str:
    """The rows in Markdown: families that work, that are refused, that could not be tried."""
    from importlib.metadata import version

    lines = [
        "# Models",
        "",
        "What kvpress does with each family of causal LMs in transformers. Made by",
        f"`{command}` with transformers {version('transformers')}; do not edit.",
        "",
        "Each family is a tiny random model, under `Full` (exact), `H2O` (evicting), `StreamingLLM` and `TokenSelect`",
        "(re-indexing) with room for everything: a batch, a left-padded batch and a prompt in two passes, each with decode",
        "steps, against the same model before it was patched. Re-indexed positions are also tried with entries evicted, layer",
        "by layer, against the model on what is kept. Classes for images and sounds get text alone. *Right* is the dense result",
        "up to rounding. *Refused* is an error from `kvpress.patch` before anything is changed.",
        "",
    ]
    works = {name: row for name, row in rows.items() if any(one.outcome == "right" for one in row.values())}
    refused = {name: row for name, row in rows.items() if all(one.outcome == "refused" for one in row.values())}
    others = {name: row for name, row in rows.items() if name not in works and name not in refused}
    wholly = [name for name, row in works.items() if all(one.outcome == "right" for one in row.values())]
    lines += [f"{len(works)} families work, {len(wholly)} of them under all three kinds of policy.", ""]
    lines += ["| model type | class | exact | evicting | re-indexing | why |", "|---|---|---|---|---|---|"]
    for name, row in works.items():
        why = "; ".join(dict.fromkeys(one.why for one in row.values() if one.why))
        outcomes = " | ".join(one.outcome for one in row.values())
        lines.append(f"| {name} | {kinds[name]} | {outcomes} | {_cell(why)} |")
    lines += ["", f"{len(refused)} are refused.", "", "| model type | class | why |", "|---|---|---|"]
    for name, row in refused.items():
        lines.append(f"| {name} | {kinds[name]} | {_cell(row['exact'].why)} |")
    lines += ["", f"{len(others)} could not be tried.", "", "| model type | class | |", "|---|---|---|"]
    for name, row in others.items():
        one = next(iter(row.values()))
        lines.append(f"| {name} | {kinds[name]} | {one.outcome}: {_cell(one.why)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Sweep, print a line per family, and write the table if asked to. 1 if a family is wrong or crashes."""
    import transformers

    from support.family_checks import check_family
    from support.tiny_families import family_names

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
    rows: dict[str, Row] = {}
    for name in chosen:
        began = time.time()
        rows[name] = in_process(name)
        line = {kind: f"{one.outcome} {one.why}".strip() for kind, one in rows[name].items()}
        print(f"{name} ({names[name]}, {time.time() - began:.1f} s): {json.dumps(line)}", flush=True)
    bad = [name for name, row in rows.items() if any(one.outcome in ("wrong", "crashed") for one in row.values())]
    print(f"{len(rows)} families, {len(bad)} wrong or crashed: {' '.join(bad)}")
    if arguments.write:
        arguments.write.write_text(table(rows, names, f"python scripts/sweep_families.py --write {arguments.write}"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
