"""How much of a prompt's exact attention policies for sparse prompts read, over how much they read: a table and a picture.

    python benchmarks/recall.py --text novel.txt             # SmolLM2, 4000 tokens, some minutes for each policy on a CPU
    python benchmarks/recall.py --draw                       # the picture once more, from the CSV

Density is the share of causal pairs that is read, recall the share of the exact attention's probability mass that lies in it (mean
over rows, heads and layers), and the least recall is that of the worst head of any layer: `kvpress inspect` shows where it is.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, Rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import kvpress
from kvpress.models import load_model

POLICIES = (
    *(f"{{name: x_attention, threshold: {share}}}" for share in (0.4, 0.6, 0.8, 0.9, 0.95)),
    *(f"{{name: flex_prefill, gamma: {share}, min_budget: 128}}" for share in (0.6, 0.8, 0.9, 0.95, 0.99)),
    *(f"{{name: minference, default: [vertical_slash, {v}, {s}]}}" for v, s in ((50, 150), (200, 600), (500, 1000))),
    *(f"{{name: minference, default: [block_sparse, {count}]}}" for count in (8, 16, 32)),
    *(f"{{name: kascade, k: {share}}}" for share in (0.02, 0.05, 0.1, 0.2)),
    *(f"{{name: hip, budget: {budget}}}" for budget in (210, 840)),
    *(f"{{name: skip_softmax, scale: {scale}}}" for scale in (20, 100, 500)),
)


def measure(model: Any, spec: str, ids: list[int]) -> dict[str, Any]:
    """A row of one policy."""
    policy = kvpress.make_policy(yaml.safe_load(spec))
    start = time.perf_counter()
    found = kvpress.inspect(model, policy, ids)
    layers = found.prompt.values()
    return {
        "policy": policy.describe(),
        "density": round(statistics.fmean(float(layer.density.mean()) for layer in layers), 4),
        "recall": round(statistics.fmean(float(layer.recall.mean()) for layer in layers), 4),
        "least_recall": round(min(float(layer.recall.min()) for layer in layers), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Two panels over density: the mean recall and the worst head's, a line for each policy."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = row["policy"].partition("(")[0]
        if kind == "minference":
            kind += ", block-sparse" if "block_sparse" in row["policy"] else ", vertical-slash"
        series.setdefault(kind, []).append(row)
    for panel, key, title in zip(
        figure.subplots(1, 2), ("recall", "least_recall"), ("mean over heads", "worst head of any layer"), strict=True
    ):
        for marker, (name, points) in zip("osD^vP*Xd", series.items(), strict=False):
            points = sorted(points, key=lambda row: float(row["density"]))
            panel.plot(
                [100 * float(row["density"]) for row in points],
                [100 * float(row[key]) for row in points],
                marker=marker,
                markersize=5,
                label=name,
            )
        panel.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle=(0, (3, 2)), label="chance")
        panel.set_title(f"{title}, {rows[0]['tokens']} tokens", fontsize=10)
        panel.set_xlabel("density: % of causal pairs read")
        panel.set_ylabel("recall: % of the attention's mass")
        panel.set_xlim(0, 100)
        panel.set_ylim(0, 101)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub name or folder of a causal LM")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, help="a text file, its first tokens are read")
    parser.add_argument("--length", type=int, default=4000, help="tokens")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="names, or YAML mappings with fields")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "recall.csv")
    options = parser.parse_args()
    if not options.draw:
        if options.text is None:
            parser.error("--text is missing: give a text file, a novel of Project Gutenberg for instance")
        model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
        text = options.text.read_text(encoding="utf-8")[: 10 * options.length]
        ids = tokenizer(text).input_ids[: options.length]
        rows = Rows(options.out)
        for spec in options.policies:
            rows.add({"model": options.model, "tokens": len(ids), **measure(model, spec, ids)})
    with options.out.open(encoding="utf-8", newline="") as file:
        draw(options.out.with_suffix(".png"), list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
