"""Directories of runs as if they had been made."""

from kvpress.evals.config import make_plan
from kvpress.evals.store import RunStore

SESSION = {"dtype": "float32", "hardware": "a machine", "commit": "abc", "kvpress": "0.1.0"}
MIB = 2**20


def row(index, score, *, depth=0.5, length=1000, share=1.0, ms=10.0, **fields):
    values = {
        "index": index,
        "prompt_hash": f"{index}",
        "prompt_tokens": length,
        "meta": {"length": length, "depth": depth},
        "score": score,
        "seen": length,
        "kept": length * share,
        "bytes": int(4 * MIB * share),
        "full_bytes": 4 * MIB,
        "read_share": share,
        "prompt_ms": 100.0,
        "token_ms": ms,
        "shared_prompt": False,
        "error": None,
    }
    return values | fields


def save(out, fields, rows, finished=True, session=SESSION):
    """A run's directory as a run would leave it."""
    (run,) = make_plan({"out": str(out), "defaults": fields}).runs
    store = RunStore(out / run.id)
    with store.locked():
        store.open(run.to_dict(), session)
        for one in rows:
            store.add(one)
        if finished:
            store.finish(len(rows))
    return run.id
