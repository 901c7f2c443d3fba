"""Samples under one policy: greedy decoding, what the cache held, and the time it took."""

import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
        turns: tokens of each further question, fed one by one when the one before it is answered.
    """

    source: Sample
    prompt: list[int]
    steps: list[int]
    scored: bool = False
    turns: list[list[int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of all, without the answers."""
        return len(self.prompt) + len(self.steps) + sum(map(len, self.turns))

    @property
    def longest(self) -> int:
        """Tokens of all, with answers as long as they may be."""
        return self.length + sum(one.max_new_tokens for one in self.source.each_turn)

    @property
    def decode_steps(self) -> int:
        """How many tokens are fed one by one, at most."""
        return self.longest - len(self.prompt) - (self.source.max_new_tokens > 0)  # the last one is never fed

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples of one shape can be answered as one batch, without padding. One with several turns has its own: their
        answers end at different places."""
        own = self.source.index if self.turns else -1
        return len(self.prompt), len(self.steps), self.source.max_new_tokens, self.scored, own

    @property
    def hash(self) -> str:
        """Of the ids, and of how they are fed."""
        ids = [self.prompt, self.steps, *self.turns]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def encode_sample(sample: Sample, prompt: Prompt, query_aware: bool) -> EncodedSample:
    """The prompt with the question in it, or with the question as decode steps after it."""
    scored = sample.max_new_tokens == 0
    if query_aware or not prompt.context:
        return EncodedSample(sample, prompt.context + prompt.question, [], scored, prompt.turns)
    return EncodedSample(sample, prompt.context, prompt.question, scored, prompt.turns)


@dataclass
class SharedPass:
    """A prompt pass that was recorded, and how long it took in milliseconds."""

    prompt: kvpress.SharedPrompt
    ms: float


@dataclass
class Answer:
    """What came out.

    Attributes:
        texts: the answer to each question.
        new_tokens: how many tokens they have, without the ones that ended them.
        log_probs: of each of `EncodedSample.steps`, where these are scored.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        token_ms: median decode step of the answer; None where there was none.
        shared: whether the prompt pass was shared.
        batch: how many samples were answered together; times are of the whole batch.
        totals: `kvpress.Handle.report()`'s totals after the answer; of a batch the mean over its sequences.
    """

    texts: list[str] = field(default_factory=list)
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
        reader = Reader(model, handle, samples, shared)
        steps = list(zip(*(sample.steps for sample in samples), strict=True))
        if samples[0].scored:
            for at, tokens in enumerate(steps):
                log_probs = reader.logits.float().log_softmax(-1)
                for row, token in enumerate(tokens):
                    found[row].log_probs.append(float(log_probs[row, token]))
                if at + 1 < len(steps):  # nothing comes after the last
                    reader.feed(tokens)
        else:
            reader.read(steps)
            asked = [sample.source.each_turn for sample in samples]
            last = _write(reader, tokenizer, [turns[0] for turns in asked], found)
            for tokens, question in zip(samples[0].turns, asked[0][1:], strict=True):  # a batch of one
                reader.read([(token,) for token in (*last, *tokens)])
                last = _write(reader, tokenizer, [question], found)
        for one in found:
            one.prompt_ms = reader.prompt_ms
            one.token_ms = statistics.median(reader.times) if reader.times else None
            one.totals = one.totals or reader.totals()
    return found


class Reader:
    """A batch of samples as a patched model reads it.

    Attributes:
        logits: [batch, vocab] after what was read.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        times: milliseconds of each step by `feed`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        handle: kvpress.Handle,
        samples: Sequence[EncodedSample],
        shared: SharedPass | None,
    ) -> None:
        self.model, self._handle, self._batch = model, handle, len(samples)
        started = now(model)
        if shared is not None:
            self._cache, self.logits = handle.adopt_prompt(shared.prompt), shared.prompt.logits
        else:
            output = model(_ids(model, samples), use_cache=True, logits_to_keep=1)
            self._cache, self.logits = output[CACHE], output.logits[:, -1]
        self.prompt_ms = (now(model) - started) * 1e3 + (shared.ms if shared is not None else 0.0)
        self.times: list[float] = []

    def feed(self, tokens: Sequence[int]) -> None:
        """Feed the next token of each sequence, as a decode step."""
        started = now(self.model)
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.logits = self.model(ids, **{CACHE: self._cache}, use_cache=True).logits[:, -1]
        self.times.append((now(self.model) - started) * 1e3)

    def read(self, steps: Iterable[Sequence[int]]) -> None:
        """Feed tokens, [step][sequence], whose times do not count."""
        before = len(self.times)
        for tokens in steps:
            self.feed(tokens)
        del self.times[before:]

    def totals(self) -> dict[str, Any]:
        """What the cache holds now; of a batch the mean over its sequences."""
        totals = self._handle.report().to_dict()
        if self._batch > 1:  # the report sums over a batch's sequences
            totals |= {name: totals[name] // self._batch for name in ("seen", "bytes", "full_bytes")}
            totals["kept"] /= self._batch
        return {name: value for name, value in totals.items() if name not in ("policy", "layers")}


def _write(
    reader: Reader, tokenizer: "PreTrainedTokenizerBase", asked: Sequence[Sample], found: list[Answer]
) -> list[int]:
    """Greedy answers, each until it ends; the last token of the last of them, unless it ended the answer: it is not fed yet."""
    ends = end_tokens(reader.model, tokenizer)
    written: list[list[int]] = [[] for _ in asked]
    writing = set(range(len(asked)))
    while True:
        chosen = reader.logits.argmax(-1).tolist()
        for row in sorted(writing):
            sample, tokens = asked[row], written[row]
            stop = sample.meta.get("stop")
            if chosen[row] not in ends:
                tokens.append(chosen[row])
                if len(tokens) < sample.max_new_tokens and not (
                    stop and stop in tokenizer.decode(tokens, skip_special_tokens=True)
                ):
                    continue
            writing.remove(row)
            found[row].new_tokens += len(tokens)
            found[row].texts.append(str(tokenizer.decode(tokens, skip_special_tokens=True)))
            if writing:  # the cache goes on growing
                found[row].totals = reader.totals()
        if not writing:
            return [token for token in chosen[-1:] if token not in ends]
        reader.feed(chosen)


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
