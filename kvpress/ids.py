"""Token ids that a caller gives: as lists, and what is wrong with them."""

from typing import Any

from torch import Tensor

from kvpress.errors import PolicyError


def as_lists(ids: Any) -> Any:
    """Tensors and tuples as lists, at any depth."""
    if isinstance(ids, Tensor):
        return ids.tolist()
    return [as_lists(item) for item in ids] if isinstance(ids, list | tuple) else ids


def check_ids(model: Any, name: str, sequences: list[list[int]], remedy: str = "") -> None:
    """Raise `PolicyError` unless each of some sequences is a list of ids of the model, and none is empty.

    Args:
        name: what a sequence is called.
        remedy: what to do about an empty one.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    for ids in sequences:
        if not isinstance(ids, list) or not ids:
            raise PolicyError(f"a {name} is empty{remedy}" if ids == [] else f"a {name} is {ids!r}; give a list of ids")
        wrong = [at for at in ids if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < vocab]
        if wrong:
            raise PolicyError(f"a {name} has the token {wrong[0]!r}; give ids from 0 to {vocab - 1}")


START = "; give at least a start token (tokenizer.bos_token_id)"
