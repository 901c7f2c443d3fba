"""Samples under one policy: greedy decoding, what the cache held, and the time it took."""

import copy
import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.evals.task import Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LOOK_EVERY = 32
"""Decode steps from one look at how much the cache holds to the next."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids.

    Attributes:
        source: what it was made from.
        prompt: what runs as one prompt pass.
        steps: tokens that are fed one by one after it.
        scored: whether the steps' probability is what is measured, and nothing is generated.
        turns: tokens of each further question, fed one by one when the one before it is answered; of requests, after the
            prompt.
        spans: parts of the prompt by name, (start, end) of its tokens; rows say how much of each is held.
        compared: whether what full attention writes (of a scored text, its own words) is fed, and each token that is most
            likely under full attention is compared with what the policy would write.
    """

    source: Sample
    prompt: list[int]
    steps: list[int]
    scored: bool = False
    turns: list[list[int]] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    compared: bool = False

    @property
    def length(self) -> int:
        """Tokens of all, without the answers; of requests, those of the longest."""
        asked = [len(self.steps), *map(len, self.turns)]
        return len(self.prompt) + (max(asked) if self.source.requests else sum(asked))

    @property
    def longest(self) -> int:
        """Tokens that stand in the cache at once, with answers as long as they may be."""
        read, most = len(self.prompt), 0
        for tokens, one in zip([self.steps, *self.turns], self.source.each_turn, strict=True):
            most = max(most, read + len(tokens) + one.max_new_tokens)
            if not self.source.requests:
                read += len(tokens) + (0 if one.golden else one.max_new_tokens)
        return most

    @property
    def decode_steps(self) -> int:
        """How many tokens are fed one by one, at most."""
        fed = sum(map(len, [self.steps, *self.turns])) + sum(one.max_new_tokens for one in self.source.each_turn)
        return fed - (self.source.max_new_tokens > 0)  # the last one is never fed

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples of one shape can be answered as one batch, without padding. One with several turns has its own, as their
        answers end at different places; and so has one with spans, which are looked for in a cache of one sequence."""
        own = self.source.index if self.turns or self.spans else -1
        return len(self.prompt), len(self.steps), self.source.max_new_tokens, self.scored, own

    @property
    def hash(self) -> str:
        """Of the ids, and of how they are fed."""
        ids = [self.prompt, self.steps, *self.turns]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def encode_sample(sample: Sample, prompt: Prompt, query_aware: bool, compared: bool = False) -> EncodedSample:
    """The prompt with the question in it, or with the question as decode steps after it."""
    ids, steps = (prompt.ids, []) if query_aware or not prompt.context else (prompt.context, prompt.question)
    return EncodedSample(sample, ids, steps, sample.max_new_tokens == 0, prompt.turns, prompt.spans, compared)


@dataclass(frozen=True)
class Continuation:
    """What full attention writes at one turn of a batch, or the text that it reads where that is scored.

    Attributes:
        tokens: [sequence][token], the one that ends an answer included.
        log_probs: of every token of the vocabulary at each of them, float32 [tokens, batch, vocab].
    """

    tokens: list[list[int]]
    log_probs: torch.Tensor


@dataclass
class SharedPass:
    """What is computed once for several policies.

    Attributes:
        prompt: a prompt pass that was recorded; None for none.
        ms: how long it took, in milliseconds.
        continuations: what full attention writes at each turn, where that is compared.
    """

    prompt: kvpress.SharedPrompt | None
    ms: float = 0.0
    continuations: list[Continuation] = field(default_factory=list)

    def without_prompt(self) -> "SharedPass":
        """The same for a policy that has to run the prompt itself."""
        return SharedPass(None, 0.0, self.continuations)


@dataclass
class Answer:
    """What came out.

    Attributes:
        texts: the answer to each question.
        new_tokens: how many tokens they have, without the ones that ended them.
        log_probs: of each of `EncodedSample.steps`, where these are scored.
        same: at each token that was fed, whether the most likely one here is full attention's, where that is compared:
            [turn][token].
        divergences: there the Kullback-Leibler divergence from full attention's distribution to this one, in nats.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        token_ms: median decode step of the answer; None where there was none.
        shared: whether the prompt pass was shared.
        batch: how many samples were answered together; times are of the whole batch.
        totals: `kvpress.Handle.report()`'s totals after the answer; of a batch the mean over its sequences.
        cut: how many of the answers were ended by the limit of their tokens.
        turn_totals: the same after each of several answers.
        spans: "kept of" a span -> the share of its tokens that was held when the first answer began, mean over layers and kv
            heads.
    """

    texts: list[str] = field(default_factory=list)
    new_tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    same: list[list[bool]] = field(default_factory=list)
    divergences: list[list[float]] = field(default_factory=list)
    prompt_ms: float = math.nan
    token_ms: float | None = None
    shared: bool = False
    batch: int = 1
    totals: dict[str, Any] = field(default_factory=dict)
    cut: int = 0
    turn_totals: list[dict[str, Any]] = field(default_factory=list)
    spans: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def record(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[EncodedSample],
    share_prompt: bool,
) -> SharedPass:
    """What several policies need of one or more samples of the same shape: the prompt pass, and what full attention writes.

    Args:
        share_prompt: whether to record the prompt pass.
    """
    shared = SharedPass(None)
    if share_prompt:
        started = now(model)
        prompt = kvpress.record_prompt(model, _ids(model, samples))
        shared = SharedPass(prompt, (now(model) - started) * 1e3)
    if samples[0].compared:
        with kvpress.patch(model, "full") as handle:
            reader = Reader(model, handle, samples, shared)
            if samples[0].scored:
                log_probs = torch.stack(list(_read_along(reader, samples)))
                shared.continuations.append(Continuation([sample.steps for sample in samples], log_probs))
                return shared

            def write(turn: int) -> list[list[int]]:
                shared.continuations.append(_continue(reader, tokenizer, samples[0].source.max_new_tokens))
                return shared.continuations[turn].tokens

            converse(reader, tokenizer, samples, write)
    return shared


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
    is_shared = shared is not None and shared.prompt is not None
    found = [Answer(shared=is_shared, batch=len(samples)) for _ in samples]
    with kvpress.patch(model, list(policies)) as handle:
        reader = Reader(model, handle, samples, shared)
        if samples[0].scored:
            assert not samples[0].compared or shared is not None
            _score(reader, samples, found, shared.continuations[0] if shared and samples[0].compared else None)
        else:
            asked = list(zip(*(sample.source.each_turn for sample in samples), strict=True))
            ends = end_tokens(model, tokenizer)

            def answer(turn: int) -> list[list[int]]:
                if samples[0].spans and not turn:
                    found[0].spans = reader.held(samples[0].spans)
                if samples[0].compared:
                    assert shared is not None
                    written = shared.continuations[turn].tokens
                    _compare(reader, shared.continuations[turn], found)
                else:
                    written = _write(reader, tokenizer, asked[turn], found)
                for one, tokens in zip(found, written, strict=True):
                    words = [token for token in tokens if token not in ends]
                    one.new_tokens += len(words)
                    one.texts.append(str(tokenizer.decode(words, skip_special_tokens=True)))
                    if samples[0].turns:
                        one.turn_totals.append(reader.totals())
                return written

            converse(reader, tokenizer, samples, answer)
        for one in found:
            one.prompt_ms = reader.prompt_ms
            one.token_ms = statistics.median(reader.times) if reader.times else None
            one.totals = one.totals or reader.totals()
    return found


def questions_of(samples: Sequence[EncodedSample]) -> Iterator[list[tuple[int, ...]]]:
    """What is fed token by token before each turn's answers: [step][sequence]. Samples with several turns come alone."""
    yield list(zip(*(sample.steps for sample in samples), strict=True))
    for tokens in samples[0].turns:
        yield [(token,) for token in tokens]


def converse(
    reader: "Reader",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[EncodedSample],
    answer: Callable[[int], list[list[int]]],
) -> None:
    """Ask each question, have it answered, and leave the cache as the next question has to find it.

    Args:
        answer: called with each turn's number when its question is read; gives what is written then, [sequence][token].
    """
    asked, last = samples[0].source.each_turn, len(samples[0].turns)
    for turn, question in enumerate(questions_of(samples)):
        apart = turn < last and (asked[turn].requests or bool(asked[turn].golden))
        if not asked[turn].requests:
            reader.read(question)
        with reader.fork() if apart else nullcontext():
            if asked[turn].requests:
                reader.read(question)
            written = answer(turn)
        if turn < last and not apart:
            reader.read(_not_fed(reader, tokenizer, written))


class Reader:
    """A batch of samples as a patched model reads it.

    Attributes:
        logits: [batch, vocab] after what was read.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        times: milliseconds of each step by `feed`.
        peak: the most entries that the cache held after the prompt, as far as it was looked at: every `LOOK_EVERY` steps, and
            whenever `totals` are asked for.
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
        if shared is not None and shared.prompt is not None:
            self._cache, self.logits = handle.adopt_prompt(shared.prompt), shared.prompt.logits
        else:
            output = model(_ids(model, samples), use_cache=True, logits_to_keep=1)
            self._cache, self.logits = output[CACHE], output.logits[:, -1]
        self.prompt_ms = (now(model) - started) * 1e3 + (shared.ms if shared is not None else 0.0)
        self.times: list[float] = []
        self.peak, self._fed = 0.0, 0

    def feed(self, tokens: Sequence[int]) -> None:
        """Feed the next token of each sequence, as a decode step."""
        started = now(self.model)
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.logits = self.model(ids, **{CACHE: self._cache}, use_cache=True).logits[:, -1]
        self.times.append((now(self.model) - started) * 1e3)
        self._fed += 1
        if self._fed % LOOK_EVERY == 0:
            self.totals()

    def read(self, steps: Iterable[Sequence[int]]) -> None:
        """Feed tokens, [step][sequence], whose times do not count."""
        before = len(self.times)
        for tokens in steps:
            self.feed(tokens)
        del self.times[before:]

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is read within is forgotten afterwards. A copy of the cache reads it: one that evicts cannot take tokens back."""
        kept = self._cache, self.logits
        self._cache = copy.deepcopy(self._cache)
        yield
        self._cache, self.logits = kept

    def held(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """The share of each span's tokens that the cache holds, mean over layers and kv heads; nothing where a policy left
        tokens of the prompt out, so that entries do not tell which tokens they are of."""
        if self._handle.report(self._cache).kept_ids is not None:
            return {}
        positions = [layer.positions[0] for layer in self._cache.layers if hasattr(layer, "positions")]
        found = {}
        for name, (start, end) in spans.items():
            counts = [((layer >= start) & (layer < end)).sum(-1).float().mean() for layer in positions]
            found[f"kept of {name}"] = float(torch.stack(counts).mean()) / max(1, end - start)
        return found

    def totals(self) -> dict[str, Any]:
        """What the cache holds now; of a batch the mean over its sequences."""
        totals = self._handle.report(self._cache).to_dict()
        if self._batch > 1:  # the report sums over a batch's sequences
            totals |= {name: totals[name] // self._batch for name in ("seen", "bytes", "full_bytes")}
            totals["kept"] /= self._batch
        self.peak = max(self.peak, totals["kept"])
        totals["peak_kept"] = self.peak
        return {name: value for name, value in totals.items() if name not in ("policy", "layers")}


def _read_along(reader: Reader, samples: Sequence[EncodedSample]) -> Iterator[torch.Tensor]:
    """Feed the steps; the log-probabilities of every token before each of them, float32 [batch, vocab]."""
    steps = list(zip(*(sample.steps for sample in samples), strict=True))
    for at in range(len(steps)):
        if at:
            reader.feed(steps[at - 1])  # nothing comes after the last
        yield reader.logits.float().log_softmax(-1)


def _score(
    reader: Reader, samples: Sequence[EncodedSample], found: list[Answer], reference: Continuation | None
) -> None:
    """Feed the steps, note the probability of each before it is fed, and how like full attention's distribution that is."""
    if reference is not None:
        _begin_turn(found)
    for at, log_probs in enumerate(_read_along(reader, samples)):
        for row, sample in enumerate(samples):
            found[row].log_probs.append(float(log_probs[row, sample.steps[at]]))
        if reference is not None:
            _note_likeness(reference.log_probs[at], log_probs, found)


def _write(
    reader: Reader, tokenizer: "PreTrainedTokenizerBase", asked: Sequence[Sample], found: list[Answer]
) -> list[list[int]]:
    """Greedy answers, each until it ends: [sequence][token], with the token that ended it."""
    ends = end_tokens(reader.model, tokenizer)
    written: list[list[int]] = [[] for _ in asked]
    writing = set(range(len(asked)))
    while True:
        chosen = reader.logits.argmax(-1).tolist()
        for row in sorted(writing):
            sample, tokens = asked[row], written[row]
            stop = sample.meta.get("stop")
            tokens.append(chosen[row])
            ended = chosen[row] in ends or bool(stop and stop in tokenizer.decode(tokens, skip_special_tokens=True))
            if not ended and len(tokens) < sample.max_new_tokens:
                continue
            found[row].cut += not ended
            writing.remove(row)
            if writing:  # the cache goes on growing
                found[row].totals = reader.totals()
        if not writing:
            return written
        reader.feed(chosen)


def _continue(reader: Reader, tokenizer: "PreTrainedTokenizerBase", most: int) -> Continuation:
    """Greedy answers of at most so many tokens, with the distributions that they were chosen from."""
    ends = end_tokens(reader.model, tokenizer)
    chosen, log_probs = [reader.logits.argmax(-1)], [reader.logits.float().log_softmax(-1)]
    while len(chosen) < most and not all(set(row) & ends for row in torch.stack(chosen, 1).tolist()):
        reader.feed(chosen[-1].tolist())
        chosen.append(reader.logits.argmax(-1))
        log_probs.append(reader.logits.float().log_softmax(-1))
    tokens = []
    for row in torch.stack(chosen, 1).tolist():
        end = next((at for at, token in enumerate(row) if token in ends), most)
        tokens.append(row[: end + 1])
    return Continuation(tokens, torch.stack(log_probs))


def _compare(reader: Reader, reference: Continuation, found: list[Answer]) -> None:
    """Feed what full attention wrote, and note how like its distributions those of the policy are."""
    longest = max(map(len, reference.tokens))
    _begin_turn(found)
    for at in range(longest):
        if at:
            reader.feed([tokens[min(at, len(tokens)) - 1] for tokens in reference.tokens])
        writing = [one if at < len(tokens) else None for one, tokens in zip(found, reference.tokens, strict=True)]
        _note_likeness(reference.log_probs[at], reader.logits.float().log_softmax(-1), writing)
        for row, tokens in enumerate(reference.tokens):
            if at + 1 == len(tokens) < longest:  # the cache goes on growing
                found[row].totals = reader.totals()


def _begin_turn(found: Sequence[Answer]) -> None:
    for one in found:
        one.same.append([])
        one.divergences.append([])


def _note_likeness(reference: torch.Tensor, log_probs: torch.Tensor, found: Sequence[Answer | None]) -> None:
    """Whether the most likely token is the reference's, and the divergence from it, log-probabilities [batch, vocab]; None is
    a sequence that has ended."""
    same = (reference.argmax(-1) == log_probs.argmax(-1)).tolist()
    divergences = _divergence(reference, log_probs).tolist()
    for one, is_same, divergence in zip(found, same, divergences, strict=True):
        if one is not None:
            one.same[-1].append(is_same)
            one.divergences[-1].append(divergence)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last dimension; what p never chooses adds nothing. Rounding does not make it negative."""
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(-1, dtype=torch.float64).clamp(min=0.0)


def _not_fed(reader: Reader, tokenizer: "PreTrainedTokenizerBase", written: list[list[int]]) -> list[tuple[int, ...]]:
    """The last token of an answer, if it belongs to it: it was not fed, and more is to follow."""
    ends = end_tokens(reader.model, tokenizer)
    return [(tokens[-1],) for tokens in written if tokens[-1] not in ends]


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
