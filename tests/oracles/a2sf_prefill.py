"""A2SF for a prompt alone, in plain Python."""

from dataclasses import dataclass

from oracles.a2sf import A2SF


@dataclass(frozen=True)
class A2SFPrefill(A2SF):
    """The same choice; decode appends."""

    prompt_only = True
