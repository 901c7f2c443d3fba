"""Put a function of a test in the place of one that the runtime calls."""

from kvpress import prompt, step
from kvpress.storage import base, slots


def replace_decode_attention(patcher, function):
    """In every module that attends one row per sequence."""
    for module in (step, prompt, base, slots):
        patcher.setattr(module, "decode_attention", function)
