"""The hooks that somebody has put on the modules inside a module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_inside(module: nn.Module) -> list[Mapping[int, Callable[..., Any]]]:
    """Where the hooks of the modules inside a module are kept (not its own), and those of all modules there are.

    What is there later is found in the same places, as long as no module is replaced.
    """
    inner = [child for child in module.modules() if child is not module]
    own = [getattr(child, kind) for child in inner for kind in KINDS]
    return own + [getattr(nn.modules.module, f"_global{kind}") for kind in KINDS]


def watching(places: list[Mapping[int, Callable[..., Any]]]) -> list[Callable[..., Any]]:
    """The hooks in `places`, without those that transformers leaves on a model that once gave its hidden states."""
    if not any(places):
        return []
    hooks = [hook for place in places for hook in place.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]


@contextmanager
def suspended(places: list[Mapping[int, Callable[..., Any]]]) -> Iterator[None]:
    """Within the block there are no hooks in `places`."""
    held = [(place, dict(place)) for place in places if place]
    for place, _ in held:
        place.clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, hooks in held:
            place.update(hooks)  # type: ignore[attr-defined]
