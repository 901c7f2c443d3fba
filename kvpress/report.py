"""What a policy did: tokens seen and kept, bytes, share of entries read."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvpress.errors import PolicyError

if TYPE_CHECKING:  # only a printed report needs rich
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerReport:
    """One layer, or the total over layers.

    Attributes:
        seen: tokens seen, padding not counted, summed over the sequences of the batch (total: mean over layers).
        kept: entries held of them, summed over the sequences, mean over kv heads (total: mean over layers).
        bytes: bytes of all tensors that the layer holds for the cache, statistics and spare slots included (total: also what
            is remembered of the sequences themselves).
        full_bytes: bytes of K and V that transformers' DynamicCache would hold.
        read_share: entries that decode steps read, of those full attention would have read; before the first step, what
            the next one would read.
        density: of the pairs of a row and an entry not after it in a prompt's attention, those that were computed, of those
            that full attention would have computed among the entries that were held (total: over all layers).
    """

    seen: float
    kept: float
    bytes: int
    full_bytes: int
    read_share: float
    density: float = 1.0


@dataclass(frozen=True)
class Report:
    """The state of the cache that a patched model used last. Prints as a table."""

    policy: str
    total: LayerReport
    layers: dict[int, LayerReport]
    kept_ids: list[list[int]] | None = None
    """Of each sequence the ids that a route policy left of the prompts that it shortened."""

    def kept_text(self, tokenizer: Any) -> list[str]:
        """What a policy that shortens prompts left of them, as text, one for each sequence.

        Raises:
            PolicyError: no prompt was shortened, or they were embeddings.
        """
        if self.kept_ids is None:
            raise PolicyError(
                f"{self.policy} left no token ids out of a prompt: it was short enough, or given as embeddings, or no policy acts "
                "that shortens prompts (gem_filter)"
            )
        return [tokenizer.decode(ids) for ids in self.kept_ids]

    def to_dict(self) -> dict[str, Any]:
        """The totals under `seen`, `kept`, `bytes`, `full_bytes`, `read_share`, `density`; the same per layer under `layers`."""
        layers = [{"layer": index, **asdict(layer)} for index, layer in self.layers.items()]
        return {"policy": self.policy, **asdict(self.total), "layers": layers}

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table

        table = Table(title=self.policy)
        for heading in ("layer", "seen", "kept", "bytes", "full bytes", "of full", "read share", "density"):
            table.add_column(heading, justify="right")
        for name, layer in _alike(self.layers):
            table.add_row(name, *_cells(layer))
        table.add_section()
        table.add_row("total", *_cells(self.total))
        yield table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _alike(layers: dict[int, LayerReport]) -> list[tuple[str, LayerReport]]:
    """Rows of the table: neighbouring layers with the same figures share one."""
    rows: list[tuple[int, int, LayerReport]] = []
    for index, layer in layers.items():
        if rows and rows[-1][2] == layer and rows[-1][1] == index - 1:
            rows[-1] = rows[-1][0], index, layer
        else:
            rows.append((index, index, layer))
    return [(f"{first}" if first == last else f"{first}-{last}", layer) for first, last, layer in rows]


def _cells(layer: LayerReport) -> list[str]:
    share = layer.bytes / layer.full_bytes if layer.full_bytes else 0.0
    return [
        f"{layer.seen:g}",
        f"{layer.kept:g}",
        size(layer.bytes),
        size(layer.full_bytes),
        f"{share:.1%}",
        f"{layer.read_share:.1%}",
        f"{layer.density:.1%}",
    ]


def size(count: float) -> str:
    """A number of bytes as people read it: 5.6 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
