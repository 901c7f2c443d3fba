"""Policies from the literature, one file each."""

from kvpress.policies.full import Full
from kvpress.policies.h2o import H2O
from kvpress.policies.snapkv import SnapKV
from kvpress.policies.streaming_llm import StreamingLLM

__all__ = ["H2O", "Full", "SnapKV", "StreamingLLM"]
