"""One sample under one policy: greedy decoding, what the cache held, and the time it took."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import kvpress
from kvpress.evals.task import Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A sample as token ids.

    Attributes:
        sample: what it was made from.
        prompt: what runs as one prompt pass.
        steps: tokens that are fed one by one after it.
        scored: whether the steps' probability is what is measured, and nothing is generated.
    """

    sample: Sample
    prompt: list[int]
    steps: list[int]
    scored: bool = False

    @property
    def length(self) -> int:
        """Tokens of all."""
        return len(self.prompt) + len(self.steps)

    @property
    def hash(self) -> str:
        """Of the ids, and of how they are fed."""
        return hashlib.sha256(json.dumps([self.prompt, self.steps]).encode()).hexdigest()[:16]


def make_question(sample: Sample, prompt: Prompt, query_aware: bool) -> Question:
    """The prompt with the question in it, or with the question as decode steps after it."""
    scored = sample.max_new_tokens == 0
    if query_aware or not prompt.context:
        return Question(sample, prompt.context + prompt.question, [], scored)
    return Question(sample, prompt.context, prompt.question, scored)


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
        log_probs: of each of `Question.steps`, where these are scored.
        prompt_ms: the prompt pass; with a shared one, that pass and making the policy's cache from it.
        token_ms: median decode step of the answer; None where there was none.
        shared: whether the prompt pass was shared.
        held: `kvpress.Handle.report()`'s totals after the answer.
    """

    text: str = ""
    new_tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    prompt_ms: float = math.nan
    token_ms: float | None = None
    shared: bool = False
    held: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def record(model: "PreTrainedModel", question: Question) -> SharedPass:
    """Run a question's prompt once for several policies."""
    started = now(model)
    prompt = kvpress.record_prompt(model, torch.tensor([question.prompt], device=model.device))
    return SharedPass(prompt, (now(model) - started) * 1e3)


@torch.inference_mode()
def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policies: Sequence[kvpress.Policy],
    question: Question,
    shared: SharedPass | None = None,
) -> Answer:
    """Answer one question under policies, on a model that is not patched.

    Args:
        shared: the question's recorded prompt pass, for policies that can share one; None runs it.
    """
    found = Answer(shared=shared is not None)
    with kvpress.patch(model, list(policies)) as handle:
        started = now(model)
        if shared is not None:
            cache, logits = handle.adopt_prompt(shared.prompt), shared.prompt.logits
        else:
            ids = torch.tensor([question.prompt], device=model.device)
            output = model(ids, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
        found.prompt_ms = (now(model) - started) * 1e3 + (shared.ms if shared is not None else 0.0)

        def step(token: int) -> torch.Tensor:
            ids = torch.tensor([[token]], device=model.device)
            logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            return logits

        times: list[float] = []
        for at, token in enumerate(question.steps):
            if question.scored:
                found.log_probs.append(float(logits.float().log_softmax(-1)[0, token]))
                if at + 1 == len(question.steps):
                    break  # nothing comes after it
            started = now(model)
            logits = step(token)
            times.append((now(model) - started) * 1e3)
        if not question.scored:
            times.clear()
            tokens: list[int] = []
            stop = question.sample.meta.get("stop")
            ends = end_tokens(model, tokenizer)
            while (token := int(logits.argmax(-1))) not in ends:
                tokens.append(token)
                if len(tokens) == question.sample.max_new_tokens:
                    break
                if stop and stop in tokenizer.decode(tokens, skip_special_tokens=True):
                    break
                started = now(model)
                logits = step(token)
                times.append((now(model) - started) * 1e3)
            found.new_tokens = len(tokens)
            found.text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        found.token_ms = statistics.median(times) if times else None
        found.held = {key: value for key, value in handle.report().to_dict().items() if key not in ("policy", "layers")}
    return found


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
