"""What belongs to a whole cache: its sequences, and what is known of them without asking a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Texts:
    """The sequences of one cache, shared by its layers; the first of them changes it as it changes itself.

    So what transformers does layer by layer (beams, taking tokens back) is done here once. The layers of a copied or saved
    cache share a copy.

    Attributes:
        columns: fed so far, padding included.
        seen: real tokens per sequence, if the host knows.
        seen_tensor: int32 [batch], the same on the device; None before the first pass.
        offset: int64 [batch], how much the caller's position ids are ahead of `seen`; None if there were none.
        inputs: the input of the latest decode steps, ids [batch, steps] or embeddings [batch, steps, hidden], for a policy
            that feeds them once more; None for none.
        places: int64 [batch, steps], the position ids of these.
        left_out: int64 [batch], real tokens that a route policy left out of prompts: `seen` does not count them, and the
            caller's position ids do. None before anything was left out.
        skipped: columns less than `columns` that the layers were fed.
        fixed: columns that cannot be taken back, those of a prompt some of which was left out.
        prepacked: whether prompts are run with the sequences end to end in one row, see `kvpress.prepack`.
        unfinished: a pass has begun and not ended in which tokens may stop: layers may lack some of them.
        kept_ids: int64 [batch, n], the ids that stayed of such prompts, -1 for none; None if there were none, or embeddings.
    """

    columns: int = 0
    seen: list[int] | None = None
    seen_tensor: Tensor | None = None
    offset: Tensor | None = None
    inputs: Tensor | None = None
    places: Tensor | None = None
    left_out: Tensor | None = None
    skipped: int = 0
    fixed: int = 0
    prepacked: bool = False
    unfinished: bool = False
    kept_ids: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Real tokens of each sequence, what was left out included: int [batch]."""
        assert self.seen_tensor is not None
        return self.seen_tensor if self.left_out is None else self.seen_tensor + self.left_out

    def leave_out(self, columns: int, real: Tensor, kept: Tensor | None) -> None:
        """Count `columns` more that no layer was fed, with so many real tokens of each sequence in them, int64 [batch].

        Args:
            kept: int64 [batch, n], the ids that stayed of the prompt, -1 for none; None for embeddings.
        """
        self.columns += columns
        self.skipped += columns
        self.fixed = self.columns
        self.left_out = real if self.left_out is None else self.left_out + real.to(self.left_out.device)
        if kept is not None:
            before = [] if self.kept_ids is None else [self.kept_ids.to(kept.device)]
            self.kept_ids = torch.cat((*before, kept), dim=1)

    def advance(self, count: int, seen: list[int] | None, seen_tensor: Tensor) -> None:
        """Count `count` new columns, after which so many real tokens were seen."""
        self.columns += count
        self.seen, self.seen_tensor = seen, seen_tensor

    def take_back(self, removed: int, real: Tensor | None) -> None:
        """Take back the last `removed` columns; `real` int32 [batch], real tokens in them, None if all are."""
        assert self.seen_tensor is not None
        self.columns -= removed
        if real is None:
            self.seen_tensor = self.seen_tensor - removed
            self.seen = None if self.seen is None else [seen - removed for seen in self.seen]
        else:
            self.seen_tensor, self.seen = self.seen_tensor - real, None
        if self.inputs is not None and self.places is not None:
            left = max(0, self.inputs.shape[1] - removed)
            self.inputs = self.inputs[:, :left].clone() if left else None
            self.places = self.places[:, :left].clone() if left else None

    def behind_inputs(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The remembered inputs with these behind, and all their position ids.

        Args:
            tokens: [batch, count] ids or [batch, count, hidden] embeddings. Ids after embeddings start anew.
            places: int64 [batch, count].
        """
        if self.inputs is None or self.places is None or self.inputs.ndim != tokens.ndim:
            return tokens, places
        before, before_places = self.inputs.to(tokens.device), self.places.to(places.device)
        return torch.cat((before, tokens), dim=1), torch.cat((before_places, places), dim=1)

    def forget_inputs(self) -> None:
        """No decode step is to be fed once more."""
        self.inputs = self.places = None

    def change_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, change(value))

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Repeat, reorder or choose among the sequences, as `change` does with a tensor that has the batch first."""
        self.change_tensors(change)
        if self.seen is not None and self.seen_tensor is not None:
            same = len(set(self.seen)) == 1
            self.seen = self.seen[:1] * len(self.seen_tensor) if same else None

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that are remembered."""
        held = [tensor for tensor in (self.inputs, self.places, self.kept_ids) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)
