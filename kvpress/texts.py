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
    """

    columns: int = 0
    seen: list[int] | None = None
    seen_tensor: Tensor | None = None
    offset: Tensor | None = None
    inputs: Tensor | None = None
    places: Tensor | None = None

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
        held = [tensor for tensor in (self.inputs, self.places) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)
