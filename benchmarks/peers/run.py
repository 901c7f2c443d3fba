"""This toolkit beside what people would use instead: transformers' own caches and NVIDIA's kvpress.

    python benchmarks/peers/run.py                                    # SmolLM2-135M, 2k, float32, batch 1; under 10 minutes
    python benchmarks/peers/run.py --contexts 8192 --dtypes bfloat16 --batches 1 4 --rounds 1
    python benchmarks/peers/run.py --contestants "transformers DynamicCache" "ours h2o" "NVIDIA ObservedAttention"
    python benchmarks/peers/run.py --contestants "transformers StaticCache compiled" "ours h2o compiled"   # they compile first
    python benchmarks/peers/run.py --model random-llama --contexts 32768   # 6 layers, random weights: sizes are what counts
    python benchmarks/peers/run.py --only-report --out benchmarks/results/2026-11-21-peers.csv

NVIDIA's package has the same import name as this one, so it gets an environment of its own (in the cache folder, made once,
with the torch of constraints.txt and the newest transformers that it allows). Every measurement is a process of its own that
loads the same weights, warms up, and calls `model.generate` on the same prompt, a needle in a haystack; a round is every
contestant once, with a prompt of its own. Ratios are medians over rounds of the two figures of one round. Memory is the
process's peak (VmHWM, Linux) over the loaded model, with malloc as it comes.

Rows are added to the CSV; beside it a table (.md) and a picture (.png) of all its rows are written.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
import torch
from contestants import BY_NAME, COMPILED, CONTESTANTS, Contestant
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import kvpress
from kvpress.evals import Sample, TaskError
from kvpress.evals.tasks import Needle
from kvpress.haystack import has_word
from kvpress.models import cache_folder, load_model

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
NVIDIA = "kvpress==0.5.5"
RANDOM = "random-llama"
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
# The warm-up's length. NVIDIA's SnapKV refuses prompts that its window of 64 covers.
SHORTEST = 256


def environment(folder: Path) -> Path:
    """The Python of an environment with NVIDIA's package, made if it is not there as it should be."""
    python, stamp = folder / "bin" / "python", folder / "made-with.txt"
    torch_pin = next(line.split()[0] for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    wanted = f"{NVIDIA}\n{sys.version}\n{torch_pin}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making an environment with {NVIDIA} in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", torch_pin, NVIDIA], check=True)
    stamp.write_text(wanted)
    return python


def measure(python: str | Path, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run one worker; a failed one gives its last line under `failed`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [str(python), str(Path(__file__).with_name("worker.py")), file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=clean)
        except subprocess.TimeoutExpired:
            return {"failed": f"longer than {limit_s:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode} (-9: killed, out of memory?)"]
        return {"failed": said[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer; the random model gets SmolLM2's."""
    if name != RANDOM:
        return load_model(name, device="cpu", dtype="float32")
    _, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)), tokenizer


def prompts(tokenizer: Any, context: int, batch: int, round_: int) -> list[tuple[Sample, list[int]]]:
    """The needles of one round with their token ids: other texts, numbers and depths in every round and sequence."""
    seeds = [round_ * batch + row for row in range(batch)]
    tasks = [Needle(lengths=(context,), depths=((0.2 + 0.3 * seed) % 1,), seed=seed, chat=False) for seed in seeds]
    return [(one, task.prompt(one, tokenizer).ids) for task in tasks for one in task.samples(tokenizer)]


def row_of(answer: dict[str, Any], needles: list[tuple[Sample, list[int]]], tokenizer: Any) -> dict[str, Any]:
    """A worker's answer as cells."""
    if "failed" in answer:
        return {"failed": answer["failed"]}
    texts = [tokenizer.decode(ids) for ids in answer["answers"]]
    found = [has_word(text, one.answers[0]) for (one, _), text in zip(needles, texts, strict=True)]
    figures = {name: round(answer[name], 3) for name in (*results.METRICS, "kept")}
    version = answer["transformers"]
    return {**figures, "transformers": version, "needles_found": sum(found), "needles_asked": len(found)}


def report(path: Path) -> None:
    """Write the table and the picture of all rows, and print table and goals."""
    rows = results.read(path)
    judged = "\n".join(results.goals(rows))
    shown = f"{results.table(rows)}\nGoals:\n\n```\n{judged}\n```\n"
    path.with_suffix(".md").write_text(f"# {path.stem}\n{shown}", encoding="utf-8")
    if any(row["kept"] is not None for row in rows):
        results.picture(rows, path.with_suffix(".png"))
    print(shown)


def chosen(names: list[str]) -> list[Contestant]:
    """The named contestants; ours only where this version has the policy."""
    known = kvpress.available()
    return [BY_NAME[name] for name in names if (BY_NAME[name].policy or {}).get("name", "full") in known]


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [one.name for one in CONTESTANTS if one.name != COMPILED and not one.compiled]
    today = datetime.date.today().isoformat()
    parser.add_argument("--model", default="smollm2", help=f"hub name or folder of a causal LM, or {RANDOM}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048], help=f"tokens, at least {SHORTEST}")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--contestants", nargs="+", default=usual, choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME)
    )
    parser.add_argument("--share", type=float, default=0.1, help="entries that stay, a share of the prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{today}-peers.csv")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, read --out")
    given = parser.parse_args()
    for name, limit in (("rounds", 1), ("new_tokens", 2)):
        if getattr(given, name) < limit:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: at least {limit}")
    if min(given.contexts) < SHORTEST:
        parser.error(f"--contexts {min(given.contexts)}: at least {SHORTEST}")
    if min(given.batches) < 1:
        parser.error(f"--batches {min(given.batches)}: at least 1")
    if not 0 < given.share < 1:
        parser.error(f"--share {given.share:g}: between 0 and 1")
    if given.only_report and not given.out.exists():
        parser.error(f"--only-report: there is no {given.out}")
    return given


def main() -> int:
    """Measure, write, print; 1 if a measurement failed."""
    given = options()
    if given.only_report:
        report(given.out)
        return 0
    contestants = chosen(given.contestants)
    pythons: dict[str, str | Path] = {"transformers": sys.executable, "ours": sys.executable}
    if any(contestant.side == "nvidia" for contestant in contestants):
        pythons["nvidia"] = environment(cache_folder() / "peers" / "nvidia")
    started, failures = datetime.datetime.now().isoformat(timespec="seconds"), 0
    with tempfile.TemporaryDirectory() as folder:
        # Saved once, so that both environments read the same weights.
        model, tokenizer = load(given.model)
        disable_progress_bar()
        model.save_pretrained(folder)
        del model
        try:
            prompts(tokenizer, min(given.contexts), 1, 0)
        except TaskError as error:
            sys.exit(f"--contexts {min(given.contexts)}: {error}")
        for dtype in given.dtypes:
            for context in given.contexts:
                for batch in given.batches:
                    for round_ in range(given.rounds):
                        needles = prompts(tokenizer, context, batch, round_)
                        for contestant in contestants:
                            job = {
                                "contestant": contestant.name,
                                "model": folder,
                                "dtype": dtype,
                                "prompts": [ids for _, ids in needles],
                                "new_tokens": given.new_tokens,
                                "budget": given.share,
                            }
                            cells = row_of(measure(pythons[contestant.side], job, given.limit), needles, tokenizer)
                            row = {
                                "run": started,
                                "round": round_,
                                "model": given.model,
                                "dtype": dtype,
                                "context": context,
                                "batch": batch,
                                "new_tokens": given.new_tokens,
                                "share": given.share,
                                "contestant": contestant.name,
                                **cells,
                            }
                            results.append(given.out, row)
                            failures += "failed" in cells
                            print(*row.values(), sep="\t", flush=True)
    report(given.out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
