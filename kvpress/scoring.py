"""Log-probabilities of given texts, token by token through the cache, so that they show what a policy does.

One forward pass over a whole text is exact under every policy that evicts or selects after a prompt's own attention, and
says nothing about it. Here the continuation is decoded: each of its tokens reads what the policy left.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.ids import START, as_lists, check_ids
from kvpress.patching import handle_of
from kvpress.policy import EvictionPolicy, check_choice
from kvpress.prepacking import left_padded, prepacked_cache, why_not
from kvpress.support import input_device, unwrapped


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_probs: natural log-probability of each of its tokens after all before it.
        is_greedy: whether each of its tokens is the most likely one (of equal ones the first), so that greedy decoding gives it.
    """

    log_probs: tuple[float, ...]
    is_greedy: bool

    @property
    def sum(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.log_probs)

    @property
    def count(self) -> int:
        """Its number of tokens."""
        return len(self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp(-sum / count)."""
        return math.exp(-self.sum / self.count)


@torch.no_grad()
def score(
    model: Any, context_ids: Any, continuation_ids: Any, *, mode: Literal["decode", "sequential"] = "decode"
) -> Any:
    """Log-probabilities of continuations after contexts, the given tokens fed one by one.

    All contexts run in one batch (prepacked where their lengths differ, or padded on the left if the model cannot have that),
    and each one's cache is copied for each of its continuations, so that a context is computed once.

    Args:
        model: a causal LM (or a PEFT model of one), patched or not.
        context_ids: token ids of one context, or a list of several. Lists or tensors.
        continuation_ids: for one context the ids of one continuation, or a list of several; for several contexts a list
            with the continuation, or the list of continuations, of each. Multiple choice is one context with several.
        mode: "decode" runs a context in one pass and decodes the continuation; "sequential" also feeds the context token
            by token, so that the policy acts from the first token on (slow; for budgets in entries).

    Returns:
        A `Score` for one continuation, else a list as `continuation_ids` is one.

    Raises:
        PolicyError: no or empty contexts or continuations, ids that are none of the model's, lists that do not match, or
            with "sequential" a policy to which a prompt of one token means nothing.

    Example:
        >>> with kvpress.patch(model, H2O(budget=0.2)):
        ...     kvpress.score(model, context, text).perplexity
        ...     best = max(kvpress.score(model, question, answers), key=lambda answer: answer.sum)
    """
    check_choice(mode, "mode", ("decode", "sequential"))
    context_ids, continuation_ids = as_lists(context_ids), as_lists(continuation_ids)
    contexts, groups = _pair(context_ids, continuation_ids)
    texts = [text for group in groups for text in group]
    _check_ids(model, contexts, texts)
    if mode == "sequential":
        _check_sequential(model)

    reader = _Reader(model, contexts)
    logits = reader.read_context(by_token=mode == "sequential")
    owners = [row for row, group in enumerate(groups) for _ in group]
    if owners != list(range(len(contexts))):
        logits = logits[owners]
        reader.fork(torch.tensor(owners, device=logits.device))
    # What follows a text that has ended is not looked at, and no other sequence sees it.
    width = max(map(len, texts))
    ids = torch.tensor([text + text[-1:] * (width - len(text)) for text in texts], device=logits.device)
    log_probs, greedy = [], []
    for at in range(width):
        log_probs.append(logits.float().log_softmax(-1).gather(1, ids[:, at : at + 1]))
        greedy.append(logits.argmax(-1, keepdim=True) == ids[:, at : at + 1])
        if at + 1 < width:
            logits = reader.feed(ids[:, at : at + 1])
    rows = zip(torch.cat(log_probs, dim=1).tolist(), torch.cat(greedy, dim=1).tolist(), texts, strict=True)
    scores = iter(Score(tuple(row[: len(text)]), all(best[: len(text)])) for row, best, text in rows)
    return _like(continuation_ids, scores)


class _Reader:
    """A batch of sequences that a model reads through one cache.

    Args:
        model: the model.
        contexts: what is read first, each not empty.
    """

    def __init__(self, model: Any, contexts: list[list[int]]) -> None:
        self.model, self.cache = model, None
        self.ids, mask = left_padded(contexts, input_device(model))
        self.pads = None if bool(mask.all()) else (mask == 0).sum(1, keepdim=True)
        handle = handle_of(model)
        if self.pads is not None and handle is not None and why_not(model, handle) is None:
            self.cache = prepacked_cache(model)
        self.seen = 0
        known = inspect.signature(unwrapped(model).forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known

    def read_context(self, by_token: bool) -> Tensor:
        """Feed the contexts; the logits after them, [batch, vocab]."""
        if not by_token:
            return self.feed(self.ids)
        return [self.feed(column) for column in self.ids.split(1, dim=1)][-1]

    def feed(self, ids: Tensor) -> Tensor:
        """Feed tokens, int [batch, count]; the logits after the last, [batch, vocab]."""
        options = dict(self.options)
        stop = self.seen + ids.shape[1]
        if self.pads is not None:
            columns = torch.arange(stop, device=ids.device)
            options["attention_mask"] = (columns >= self.pads).long()
            if self.takes_positions:
                options["position_ids"] = (columns - self.pads).clamp(min=0)[:, self.seen :]
        output = self.model(ids, **{CACHE: self.cache}, use_cache=True, **options)
        self.cache, self.seen = output.get(CACHE), stop
        if self.cache is None:
            raise PolicyError(f"{type(self.model).__name__} returned no cache; score() needs a causal LM with one")
        logits: Tensor = output.logits[:, -1]
        return logits

    def fork(self, rows: Tensor) -> None:
        """Go on with these sequences, int64 [sequences]; one may come several times."""
        assert self.cache is not None
        self.cache.batch_select_indices(rows)
        self.pads = None if self.pads is None else self.pads[rows]


def _depth(ids: Any) -> int:
    return 1 + max(map(_depth, ids), default=0) if isinstance(ids, list) else 0


def _pair(context_ids: Any, continuation_ids: Any) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The contexts, and a list of continuations for each."""
    depths = _depth(context_ids), _depth(continuation_ids)
    if depths == (1, 1):
        return [context_ids], [[continuation_ids]]
    if depths == (1, 2):
        return [context_ids], [continuation_ids]
    if depths not in ((2, 2), (2, 3)):
        raise PolicyError(
            f"context_ids and continuation_ids are nested {depths[0]} and {depths[1]} deep; give one context with ids of one "
            "continuation or a list of them, or a list of contexts with a list as long of either"
        )
    if len(context_ids) != len(continuation_ids):
        raise PolicyError(
            f"{len(context_ids)} contexts and {len(continuation_ids)} entries of continuations; give one entry for each context"
        )
    groups = [[group] for group in continuation_ids] if depths[1] == 2 else continuation_ids
    return context_ids, groups


def _check_ids(model: Any, contexts: list[list[int]], texts: list[list[int]]) -> None:
    if not texts:
        raise PolicyError("no continuation to score; give at least one")
    check_ids(model, "context", contexts, START)
    check_ids(model, "continuation", texts)


def _check_sequential(model: Any) -> None:
    handle = handle_of(model)
    for policy in () if handle is None else handle.policies:
        if not isinstance(policy, EvictionPolicy):
            continue
        if policy.evict_every is None:
            raise PolicyError(
                f"mode='sequential' feeds a prompt of one token, and {policy.describe()} evicts after prompts only, so that it "
                "would never act; use mode='decode', or a policy that evicts at every step"
            )
        if policy.keeps_a_share:
            raise PolicyError(
                f"mode='sequential' feeds a prompt of one token, and {policy.describe()} keeps a share of the prompt; give its "
                "budget as entries (int)"
            )


def _like(continuation_ids: Any, scores: Any) -> Any:
    """The scores, nested as the continuations are."""
    if _depth(continuation_ids) == 1:
        return next(scores)
    return [_like(ids, scores) for ids in continuation_ids]
