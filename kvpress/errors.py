"""What kvpress raises when it is asked for something it cannot do."""

import difflib
from collections.abc import Sequence


class PolicyError(ValueError):
    """A policy, a budget, a cache or a call that cannot work; the message names the value, the limit and the remedy."""


class UnsupportedModelError(TypeError):
    """A model that kvpress cannot patch; raised before anything on the model is changed."""


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message about a word that is not known: the nearest one, and all there are."""
    if not known:
        return "; there are none to set"
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (there are: {', '.join(known)})"
