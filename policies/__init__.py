"""Policies from the literature, one file each."""

from kvpress.policies.a2sf import A2SF
from kvpress.policies.a2sf_prefill import A2SFPrefill
from kvpress.policies.ada_kv import AdaKV
from kvpress.policies.dual_chunk import DualChunkAttention
from kvpress.policies.ems import EMS
from kvpress.policies.finch import Finch
from kvpress.policies.flex_prefill import FlexPrefill
from kvpress.policies.full import Full
from kvpress.policies.gem_filter import GemFilter
from kvpress.policies.h2o import H2O
from kvpress.policies.h2o_prefill import H2OPrefill
from kvpress.policies.hip import HiP
from kvpress.policies.infinite_hip import InfiniteHiP
from kvpress.policies.kascade import Kascade
from kvpress.policies.key_diff import KeyDiff
from kvpress.policies.keyformer import Keyformer
from kvpress.policies.knorm import Knorm
from kvpress.policies.lazy_llm import LazyLLM
from kvpress.policies.minference import MInference
from kvpress.policies.observed_attention import ObservedAttention
from kvpress.policies.packed import Packed
from kvpress.policies.pyramid_kv import PyramidKV
from kvpress.policies.quest import Quest
from kvpress.policies.recycled import RecycledAttention
from kvpress.policies.skip_softmax import SkipSoftmax
from kvpress.policies.snapkv import SnapKV
from kvpress.policies.streaming_llm import StreamingLLM
from kvpress.policies.tidal_decode import TidalDecode
from kvpress.policies.token_select import TokenSelect
from kvpress.policies.tova import TOVA
from kvpress.policies.x_attention import XAttention

__all__ = [
    "A2SF",
    "EMS",
    "H2O",
    "TOVA",
    "A2SFPrefill",
    "AdaKV",
    "DualChunkAttention",
    "Finch",
    "FlexPrefill",
    "Full",
    "GemFilter",
    "H2OPrefill",
    "HiP",
    "InfiniteHiP",
    "Kascade",
    "KeyDiff",
    "Keyformer",
    "Knorm",
    "LazyLLM",
    "MInference",
    "ObservedAttention",
    "Packed",
    "PyramidKV",
    "Quest",
    "RecycledAttention",
    "SkipSoftmax",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "XAttention",
]
