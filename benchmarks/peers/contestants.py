"""Who is compared: transformers' own caches, NVIDIA's presses, and this toolkit's policies, each with its nearest equal.

This file and worker.py run in NVIDIA's environment too, so they import nothing of this toolkit at the top.
"""

from dataclasses import dataclass
from typing import Any, Literal

PLAIN = "transformers DynamicCache"
COMPILED = "transformers StaticCache compiled"
OBSERVED = "NVIDIA ObservedAttention"
# NVIDIA's window and pooling, so that both score with the same rows.
WINDOW = {"window": 64, "kernel_size": 5, "pooling": "avg"}


@dataclass(frozen=True)
class Contestant:
    """One way to hold the cache.

    Attributes:
        name: in the CSV and the tables.
        side: whose code runs: it chooses the environment.
        nearest: the NVIDIA contestant that does the same, for one of ours.
        attention: transformers' attention implementation that the model is loaded with.
        compresses: whether it keeps the budget, or everything.
        policy: ours: what `kvpress.patch` takes, without its budget.
        compiled: ours: with compiled decode steps. What compiling leaves in memory is in the peak then.
    """

    name: str
    side: Literal["transformers", "nvidia", "ours"]
    nearest: str | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    compresses: bool = True
    policy: dict[str, Any] | None = None
    compiled: bool = False


def _ours(name: str, nearest: str, compiled: bool = False, **fields: Any) -> Contestant:
    label = f"ours {name}{' compiled' if compiled else ''}"
    return Contestant(label, "ours", nearest, policy={"name": name, **fields}, compiled=compiled)


CONTESTANTS = (
    Contestant(PLAIN, "transformers", compresses=False),
    Contestant("transformers StaticCache", "transformers", compresses=False),
    Contestant(COMPILED, "transformers", compresses=False),
    # What is transformers' own doing there: NVIDIA's package needs an older one.
    Contestant("DynamicCache beside NVIDIA's", "nvidia", compresses=False),
    Contestant("NVIDIA StreamingLLM", "nvidia"),
    Contestant("NVIDIA SnapKV", "nvidia"),
    Contestant("NVIDIA PyramidKV", "nvidia"),
    Contestant("NVIDIA Knorm", "nvidia"),
    Contestant("NVIDIA AdaKV(SnapKV)", "nvidia"),
    Contestant(OBSERVED, "nvidia", attention="eager"),
    # Nearest to H2O, which keeps its budget in decode: a press of each step after that of the prompt.
    Contestant("NVIDIA ObservedAttention+decoding", "nvidia", attention="eager"),
    Contestant("ours full", "ours", compresses=False, policy={"name": "full"}),
    # NVIDIA's does not re-index rotary positions, which is this toolkit's default.
    _ours("streaming_llm", "NVIDIA StreamingLLM", rope="original"),
    _ours("snapkv", "NVIDIA SnapKV", **WINDOW),
    _ours("pyramid_kv", "NVIDIA PyramidKV", **WINDOW),
    _ours("ada_kv", "NVIDIA AdaKV(SnapKV)", inner={"name": "snapkv", **WINDOW}, normalize=False),
    _ours("observed_attention", OBSERVED),
    _ours("h2o", "NVIDIA ObservedAttention+decoding"),
    _ours("snapkv", "NVIDIA SnapKV", compiled=True, **WINDOW),
    _ours("h2o", "NVIDIA ObservedAttention+decoding", compiled=True),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
