"""Dual chunk attention: texts beyond the trained length, with every token kept and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvpress.errors import PolicyError
from kvpress.policy import DualChunk, EvictionPolicy, Nothing, Places, Policy, check_count


@dataclass(frozen=True, kw_only=True)
class DualChunkAttention(Policy):
    """Attend every token, none of them further than the model was trained for.

    The text is cut into pieces of `chunk_size - local_size` tokens, and a key is rotated to its place in its piece. A row has
    three queries: one at its own place, for its own piece; one that stands a piece later, for the piece before, which keeps
    the distances of near tokens; and one at the largest distance, for all older pieces. One softmax goes over all of them. A
    text of one piece is attended exactly. Nothing is evicted and nothing left out: it costs what full attention costs.

    Source: An et al., "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463 (DCA), also in "Qwen2.5-1M
    Technical Report", arXiv 2501.15383; formulas and defaults as in the authors' ChunkLlama. Deviations:

    - The largest distance is `chunk_size`, as in the code of both, but never more than the model was trained for. Where
      `chunk_size` is the trained length, the code is one beyond it.
    - The temperature on long texts (YaRN's, in the second report) is not part of it, and neither are sparse prompts.
    - The model's own rotation is taken off a key or query before it is rotated anew, which in half precision rounds once more.
    - A pass without a cache is plain attention, as under every policy.

    Args:
        chunk_size: positions that are told apart, and the largest distance. None for three quarters of the length that the
            model was trained for (`max_position_embeddings`).
        local_size: how many of the newest tokens always stand at their true distance, less than `chunk_size`; more than a piece
            (`chunk_size - local_size`) is as many as a piece. None for an eighth of that length.

    Raises:
        PolicyError: a value out of range; when a model is patched, pieces longer than it was trained for.
    """

    name: ClassVar[str] = "dual_chunk"
    kind: ClassVar[str] = "extrapolating"
    paper: ClassVar[str] = "arXiv 2402.17463"

    chunk_size: int | None = None
    local_size: int | None = None

    @property
    def places(self) -> Places:
        return DualChunk(self.chunk_size, self.local_size)

    @property
    def leaves_prompts_exact(self) -> bool:
        return False

    def check_company(self, others: Sequence[Policy]) -> None:
        for other in others:
            if not isinstance(other, EvictionPolicy):
                continue
            if other.heads == "shared":
                raise PolicyError(
                    f"{other.describe()} keeps different numbers of entries in a layer's kv heads, whose attention has one query "
                    f"for each row, and {self.describe()} needs three; use a policy that keeps as many in each"
                )
            if not isinstance(other.observes, Nothing) and not other.observes.takes_mass:
                raise PolicyError(
                    f"{other.describe()} ranks tokens by what rows would give them at their own positions, and {self.describe()} "
                    "has them attended elsewhere; use a policy that adds up the attention itself, as h2o, or that looks at "
                    "keys, as key_diff"
                )

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count(self.chunk_size, "chunk_size", 2)
        if self.local_size is not None:
            check_count(self.local_size, "local_size", 0)
            if self.chunk_size is not None and self.local_size >= self.chunk_size:
                raise PolicyError(
                    f"local_size={self.local_size} leaves no piece of chunk_size={self.chunk_size}; give at most "
                    f"{self.chunk_size - 1}"
                )
