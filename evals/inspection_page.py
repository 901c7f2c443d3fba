"""The page of an inspection: density and recall of every head, and where some heads read and where their attention is."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import kvpress
from kvpress.evals.charts import head_grid, head_map
from kvpress.evals.page import Pictures, Row, Table, number, render, text
from kvpress.evals.store import write_whole

CAPTION = (
    "Left: what is read, darker for more of a cell. Right: where the exact attention of the rows is (the square root of its share, "
    "so that small ones show), blue where it is read and orange where it is lost."
)
SHOWN = 24  # maps on a page, unless layers are named


def write_page(path: Path, found: "kvpress.Inspection", source: str, layers: Collection[int] = ()) -> None:
    """Write the page.

    Args:
        found: what was found.
        source: model and text, in words.
        layers: those whose maps are shown, all heads; by default the heads that hold least of their attention.

    Raises:
        StoreError: it cannot be written.
    """
    parts = []
    for title, reads in found.parts().items():
        maps = rows_maps(found, layers) if reads is found.prompt else entries_maps(found, layers)
        parts.append(
            {
                "title": title.capitalize(),
                "overview": overview(reads),
                "table": layers_table(reads),
                "maps": maps,
            }
        )
    write_whole(path, render("inspection.html", found.policy, source=source, parts=parts))


def overview(reads: Mapping[int, Any]) -> Pictures:
    """Density and recall, layers down and heads across."""
    charts = {
        f"{name}, in percent": head_grid({layer: getattr(one, name).tolist() for layer, one in reads.items()}, name)
        for name in ("density", "recall")
    }
    return Pictures("All heads", "Layers down, heads across.", charts)


def layers_table(reads: Mapping[int, Any]) -> Table:
    """A row for each layer."""
    columns = ("layer", "density, %", "least recall, %", "of head", "recall, %")
    rows = []
    for layer, one in reads.items():
        least = int(one.recall.argmin())
        cells = [
            text(layer),
            number(one.density.mean().item(), "{:.1f}", (), 100),
            number(one.recall.min().item(), "{:.1f}", (), 100),
            number(least, "{:.0f}"),
            number(one.recall.mean().item(), "{:.1f}", (), 100),
        ]
        rows.append(Row(cells))
    return Table("Layers", columns, rows)


def rows_maps(found: "kvpress.Inspection", layers: Collection[int]) -> Pictures:
    """A map of rows and entries for each head that is shown."""
    heads = [(layer, head) for layer, one in found.prompt.items() for head in range(len(one.recall))]
    shown = [at for at in heads if at[0] in layers]
    if not layers:
        shown = sorted(sorted(heads, key=lambda at: found.prompt[at[0]].recall[at[1]].item())[:SHOWN])
    charts = {}
    for layer, head in shown:
        one = found.prompt[layer]
        title = f"layer {layer}, head {head}: reads {one.density[head]:.1%}, which holds {one.recall[head]:.1%}"
        maps = [x[head].tolist() for x in (one.kept, one.mass, one.held)]
        charts[title] = head_map(maps, "row", found.tokens, found.tokens, (found.cell, found.cell), tall=190)
    which = "All heads" if len(shown) == len(heads) else "The heads that hold least of their attention"
    return Pictures(which if not layers else f"Layers {_listed(layers)}", CAPTION, charts)


def entries_maps(found: "kvpress.Inspection", layers: Collection[int]) -> Pictures:
    """A map of heads and entries for each layer that is shown."""
    shown = [layer for layer in found.after if layer in layers]
    if not layers:
        shown = sorted(sorted(found.after, key=lambda layer: found.after[layer].recall.mean().item())[:SHOWN])
    charts = {}
    for layer in shown:
        one = found.after[layer]
        title = f"layer {layer}: keeps {one.density.mean():.1%}, which holds {one.recall.mean():.1%}"
        maps, heads = [x[:, 0].tolist() for x in (one.kept, one.mass, one.held)], len(one.recall)
        charts[title] = head_map(maps, "head", heads, found.tokens, (1, found.cell), tall=max(60, 12 * heads))
    which = "All layers" if len(shown) == len(found.after) else "The layers that hold least of their attention"
    return Pictures(which if not layers else f"Layers {_listed(layers)}", CAPTION, charts)


def _listed(layers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
