"""Samples under one policy: greedy decoding, what the cache held, and the time it took."""

import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.evals.task import Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids.

    Attributes:
        source: what it was made from.
        prompt: what runs as one prompt pass.
        steps: tokens that are fed one by one after it.
        scored: whether the steps' probability is what is measured, and nothing is generated.
    """

    source: Sample
    prompt: list[int]
    steps: list[int]
    scored: bool = False

    @property
    def length(self) -> int:
        """Tokens of all."""
        return len(self.prompt) + len(self.steps)

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """Samples of one shape can be answered as one batch, without padding."""
        return len(self.prompt), len(self.steps), self.source.max_new_tokens, self.scored

    @property
    def hash(self) -> str:
        """Of the ids, and of how they are fed."""
        return hashlib.sha256(json.dumps([self.prompt, self.steps]).encode()).hexdigest()[:16]


def encode_sample(sample: Sample, prompt: Prompt, query_aware: bool) -> EncodedSample:
    """The prompt with the question in it, or with the question as decode steps after it."""
    scored = sample.max_new_tokens == 0
    if query_aware or not prompt.context:
        return EncodedSample(sample, prompt.context + prompt.question, [], scored)
    return EncodedSample(sample, prompt.context, prompt.question, scored)


@dataclass
class SharedPass:
    """A prompt pass that was recorded, and how long it took in milliseconds."""

    prompt: kvpress.SharedPrompt
    ms: float


@dataclass
class Answer:
    """What came out.

    Attributes:
        text: the answer.
        new_tokens: how many tokens it has, without the one that ended it.
        log_probs: of each of `EncodedSample.steps`, where these are scored.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        token_ms: median decode step of the answer; None where there was none.
        shared: whether the prompt pass was shared.
        batch: how many samples were answered together; times are of the whole batch.
        totals: `kvpress.Handle.report()`'s totals after the answer; of a batch the mean over its sequences.
    """

    text: str = ""
    new_tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    prompt_ms: float = math.nan
    token_ms: float | None = None
    shared: bool = False
    batch: int = 1
    totals: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def record(model: "PreTrainedModel", *samples: EncodedSample) -> SharedPass:
    """Run the prompt of one or more samples of the same shape once for several policies."""
    started = now(model)
    prompt = kvpress.record_prompt(model, _ids(model, samples))
    return SharedPass(prompt, (now(model) - started) * 1e3)


@torch.inference_mode()
def answer_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policies: Sequence[kvpress.Policy],
    samples: Sequence[EncodedSample],
    shared: SharedPass | None = None,
) -> list[Answer]:
    """Answer samples of the same shape together under policies, on a model that is not patched.

    Without padding each sequence of a batch is treated as it is alone. One whose answer has ended is fed on until all
    have, and what it held is noted when it ended.

    Args:
        shared: the samples' recorded prompt pass, for policies that can share one; None runs it.
    """
    found = [Answer(shared=shared is not None, batch=len(samples)) for _ in samples]
    with kvpress.patch(model, list(policies)) as handle:
        started = now(model)
        if shared is not None:
            cache, logits = handle.adopt_prompt(shared.prompt), shared.prompt.logits
        else:
            output = model(_ids(model, samples), use_cache=True, logits_to_keep=1)
            cache, logits = output[CACHE], output.logits[:, -1]
        prompt_ms = (now(model) - started) * 1e3 + (shared.ms if shared is not None else 0.0)
        times: list[float] = []

        def step(tokens: list[int]) -> torch.Tensor:
            started = now(model)
            ids = torch.tensor(tokens, device=model.device)[:, None]
            logits: torch.Tensor = model(ids, **{CACHE: cache}, use_cache=True).logits[:, -1]
            times.append((now(model) - started) * 1e3)
            return logits

        def cache_totals() -> dict[str, Any]:
            totals = handle.report().to_dict()
            if len(samples) > 1:  # the report sums over a batch's sequences
                totals |= {name: totals[name] // len(samples) for name in ("seen", "bytes", "full_bytes")}
                totals["kept"] /= len(samples)
            return {name: value for name, value in totals.items() if name not in ("policy", "layers")}

        for at, tokens in enumerate(zip(*(sample.steps for sample in samples), strict=True)):
            if samples[0].scored:
                log_probs = logits.float().log_softmax(-1)
                for row, token in enumerate(tokens):
                    found[row].log_probs.append(float(log_probs[row, token]))
                if at + 1 == len(samples[0].steps):
                    break  # nothing comes after it
            logits = step(list(tokens))
        if not samples[0].scored:
            times.clear()
            _write(model, tokenizer, samples, found, logits, step, cache_totals)
        for one in found:
            one.prompt_ms, one.token_ms = prompt_ms, statistics.median(times) if times else None
            one.totals = one.totals or cache_totals()
    return found


def _write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[EncodedSample],
    found: list[Answer],
    logits: torch.Tensor,
    step: Callable[[list[int]], torch.Tensor],
    cache_totals: Callable[[], dict[str, Any]],
) -> None:
    """Greedy answers, each until it ends; `step` feeds a token per sequence, `cache_totals` says what the cache holds now."""
    ends = end_tokens(model, tokenizer)
    written: list[list[int]] = [[] for _ in samples]
    writing = set(range(len(samples)))
    while True:
        chosen = logits.argmax(-1).tolist()
        for row in sorted(writing):
            sample, tokens = samples[row].source, written[row]
            stop = sample.meta.get("stop")
            if chosen[row] not in ends:
                tokens.append(chosen[row])
                if len(tokens) < sample.max_new_tokens and not (
                    stop and stop in tokenizer.decode(tokens, skip_special_tokens=True)
                ):
                    continue
            writing.remove(row)
            found[row].new_tokens = len(tokens)
            found[row].text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            if writing:  # the cache goes on growing
                found[row].totals = cache_totals()
        if not writing:
            return
        logits = step(chosen)


def _ids(model: "PreTrainedModel", samples: Sequence[EncodedSample]) -> torch.Tensor:
    return torch.tensor([sample.prompt for sample in samples], device=model.device)


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens at which the model's answers end."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = set(known) if isinstance(known, list | tuple) else {known}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}


def now(model: "PreTrainedModel") -> float:
    """Seconds, when everything queued on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What the work gives, or None and the reason why it failed, in one line."""
    try:
        return work(), None
    except Exception as error:  # one sample must not end the run, whatever goes wrong in it
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        reason = f"{type(error).__name__}: {first}"
    free_memory()  # outside the block: the error no longer holds the tensors
    return None, reason


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
