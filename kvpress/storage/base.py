"""What a layer wants of the storage that holds its keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.decode_scores import Moved
from kvpress.observe import Scores
from kvpress.tokens import Tokens

NewStats = Callable[[tuple[int, int, int], torch.device], dict[str, Tensor]]
"""Makes empty statistics of [batch, kv_heads, capacity] slots."""


def spare_slots(length: int) -> int:
    """Slots to spare in a buffer of `length` entries that grows in decode: few, and copied seldom enough not to matter."""
    return max(8, length // 32)


class Storage(ABC):
    """Keys, values and what is counted of each entry, in slots whose order means nothing.

    Each slot carries the original position of its entry. So padding is an empty slot, evicting one entry and storing the
    next is one write into the freed slot, and compaction after a prompt is one gather.

    What the host knows is kept beside the tensors; what runs in a decode step (`write`, `read`, `attend`) looks at the
    tensors alone, so that it can be compiled or replayed.

    Attributes:
        keys, values: [batch, kv_heads, capacity, head_dim] as the model made them, or copies where they are held otherwise.
        positions: int32 [batch, kv_heads, capacity], original position of each entry, -1 for an empty slot.
        stats: name -> [batch, kv_heads, ..., capacity], numbers that go with the entries; a new entry starts at 0.
        length: slots in use, some perhaps empty.
        uniform: every sequence and kv head holds the same number of entries.
        entries: that number, while uniform.
        ordered: slots in use are in position order.
        made: what `make` has made, until the pass ends.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    stats: dict[str, Tensor]

    def __init__(self) -> None:
        self.stats = {}
        self.length = 0
        self.uniform = True
        self.entries = 0
        self.ordered = True
        self.made: Any = None

    # ------------------------------------------------------------------ storing

    @abstractmethod
    def put(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store the entries of a prompt pass behind those in use; there is room (`reserve`).

        Args:
            key, value: [batch, kv_heads, count, head_dim] with the count of `tokens`.
            tokens: the tokens of the pass.
        """

    @abstractmethod
    def write(self, slot: int | Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Store one more entry per sequence and kv head, in place, with nothing counted of it.

        Args:
            slot: where: a slot of all kv heads, an int or int64 [1]; or int64 [batch, kv_heads].
            key, value: [batch, kv_heads, 1, head_dim].
            positions: int32 [batch or 1, 1].
        """

    @abstractmethod
    def reserve(self, capacity: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Have `capacity` slots; never fewer than before.

        Args:
            like: key and value [batch, kv_heads, n, head_dim] as they will come; needed while there is no slot at all.
        """

    @abstractmethod
    def keep(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        """Keep the slots at index, int64 [batch, kv_heads, k], in position order; those not `chosen` become empty."""

    def make(self, key: Tensor, value: Tensor, capacity: int) -> None:  # noqa: B027 (a storage may do without)
        """Make what `keep` fills before the pass of key and value [batch, kv_heads, count, head_dim] needs its memory.

        A layer that makes lasting tensors, however small, in the midst of a pass has malloc cut them off the memory that the
        pass's hidden states were in. What is left is just too small for the next layer's, which take new memory: after
        30 layers the process holds several times what is in use.
        """

    def end_prompt(self) -> None:
        """Let go of what was held for a prompt pass alone: it has attended, and what it drops is dropped."""
        self.made = None

    def for_prompt(self, empty: "Storage", new: int) -> "Storage":
        """What takes a prompt pass: this storage, or what it holds put into an empty one with room for `new` entries more."""
        return self

    def share(self, index: Tensor, chosen: Tensor) -> "Storage":
        """What holds the chosen slots at index, int64 and bool [batch, kv_heads, k], where kv heads keep different numbers."""
        raise NotImplementedError(f"{type(self).__name__} cannot hold a different number of entries in each kv head")

    @property
    def next_slot(self) -> int:
        """Where `write` puts the next entries that are appended."""
        return self.length

    def note_written(self) -> None:
        """Count one more slot in use, which a decode step has filled."""
        self.length += 1

    # ------------------------------------------------------------------ reading

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Slots that there are of a kv head."""

    def valid(self, stop: int | None) -> Tensor | None:
        """Bool [batch, kv_heads, stop], which of the first slots hold an entry; None where `attend` knows."""
        return self.positions[:, :, :stop] >= 0

    @property
    def all_positions(self) -> Tensor:
        """The positions of all entries, -1 for an empty slot, the batch first; `positions` or what needs no copy."""
        return self.positions

    @abstractmethod
    def read(
        self, rows: slice = slice(None), stop: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `stop` slots (of some sequences), or of those listed: [batch, kv_heads, n, head_dim].

        They are the storage's own tensors or copies: only where a policy that merges is let in may they be written into.

        Args:
            index: int64 [batch, kv_heads, n].
        """

    def attend(
        self,
        query: Tensor,
        scores: Scores,
        *,
        stop: int | None,
        valid: Tensor | None,
        index: Tensor | None = None,
        rows: slice = slice(None),
        moved: Moved = (),
        perturbed: tuple[Perturbation, Tensor, Tensor] | None = None,
        with_mass: bool = False,
        per_head: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One row per sequence, query [batch, heads, 1, head_dim], over the first `stop` slots or those listed.

        Args:
            scores: how the model scores.
            index, valid, moved, perturbed, with_mass, per_head: as in `decode_attention`.

        Returns:
            output [batch, heads, 1, head_dim] and, if it is asked for, the mass of each slot that was read.
        """
        keys, values = self.read(rows, stop, index)
        output, mass, _ = decode_attention(
            query,
            keys,
            values,
            valid,
            **vars(scores),
            moved=moved,
            perturbed=perturbed,
            with_mass=with_mass,
            per_head=per_head,
        )
        return output, mass

    # ------------------------------------------------------------------ bookkeeping

    def holders(self) -> list[dict[str, Any]]:
        """The mappings that hold tensors with the batch as first dimension."""
        return [self.__dict__, self.stats]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it holds."""
        yield from (tensor for holder in self.holders() for tensor in holder.values() if isinstance(tensor, Tensor))

    def change_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor: reorder, repeat or choose among the sequences, or copy."""
        for holder in self.holders():
            for name, tensor in list(holder.items()):
                if isinstance(tensor, Tensor):
                    holder[name] = change(tensor)

    @abstractmethod
    def slot_dims(self) -> list[tuple[Tensor, int]]:
        """The buffers of slots, and which of their dimensions is that of the slots."""

    @property
    @abstractmethod
    def entry_bytes(self) -> int:
        """Bytes of K and V of one column in the model's dtype, over the batch and all kv heads."""

    @property
    def kv_heads(self) -> int:
        """Number of kv heads."""
        return self.positions.shape[1]

    @property
    def row_length(self) -> float:
        """Slots that a decode step would read now, of a kv head on average."""
        return float(self.length)

    def note_put(self, new: int, padded: bool) -> None:
        """Count the entries of a prompt pass: `new` slots more."""
        if padded:
            self.uniform = False
        if self.length and not self.uniform:
            self.ordered = False
        self.length += new
        self.entries += new


def gather_stats(stats: dict[str, Tensor], index: Tensor, out: dict[str, Tensor]) -> None:
    """Copy what is counted of the slots at index, int64 [batch, kv_heads, k], to the first k slots of other statistics."""
    k = index.shape[2]
    for name, stat in stats.items():
        where = index.view(*index.shape[:2], *(1,) * (stat.ndim - 3), k).expand(*stat.shape[:-1], k)
        out[name][..., :k] = stat.gather(-1, where)


def marked_first(marks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Slots in ascending order, the marked ones before the others: the first k, and which of them are marked."""
    slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return slots, marks.gather(2, slots)
