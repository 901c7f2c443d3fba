"""Answer the same needles with unpatched transformers and with every policy, and time their decode steps in turns."""

import copy
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.demo.needle import Needle, is_found
from kvpress.demo.results import Record
from kvpress.registry import make_policies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = "transformers"
BLOCKS, BLOCK_STEPS = 2, 4
ANSWER_STEPS = 1 + BLOCKS * BLOCK_STEPS  # the first is not timed: it may still tidy up after the prompt


@dataclass(frozen=True)
class Variant:
    """One thing to compare: the model under a policy, or without one.

    Attributes:
        policy: a policy's name; `PLAIN` for the unpatched model.
        budget: as it is shown; empty where the policy takes none.
        instance: the policy itself; None for the unpatched model.
    """

    policy: str
    budget: str = ""
    instance: "kvpress.Policy | None" = None

    @property
    def label(self) -> str:
        return f"{self.policy} {self.budget}".strip()


def make_variants(names: Sequence[str], budgets: Sequence[int | float], length: int) -> list[Variant]:
    """The unpatched model, full attention under kvpress, and each named policy at each budget.

    A policy that takes entries only gets as many as the share of a prompt of `length` tokens.

    Raises:
        PolicyError: a name or a budget that does not work.
    """
    variants = [Variant(PLAIN)]
    for name in dict.fromkeys(["full", *names]):
        for budget in dict.fromkeys(budgets) if type(kvpress.make_policy(name)).takes_budget else (None,):
            (policy,) = make_policies(name, budget, tokens=length)
            variants.append(Variant(name, "" if budget is None else str(budget), policy))
    return variants


class Answer:
    """Greedy decoding of one prompt over one cache."""

    def __init__(self, model: "PreTrainedModel", cache: Any, first: torch.Tensor, seconds: float = math.nan) -> None:
        self.model, self.cache, self.tokens, self.prompt_seconds = model, cache, [first], seconds

    @classmethod
    def begin(cls, model: "PreTrainedModel", input_ids: list[int]) -> "Answer":
        """Run the prompt."""
        started = _now(model)
        ids = torch.tensor([input_ids], device=model.device)
        output = model(ids, use_cache=True, logits_to_keep=1)
        first = output.logits[:, -1:].argmax(-1)
        return cls(model, output[CACHE], first, _now(model) - started)

    def copy(self) -> "Answer":
        """The same prompt with a cache of its own."""
        other = copy.copy(self)
        other.cache, other.tokens = copy.deepcopy(self.cache), list(self.tokens)
        return other

    def extend(self, steps: int) -> float:
        """Append one token per step; milliseconds per step."""
        started = _now(self.model)
        for _ in range(steps):
            logits = self.model(self.tokens[-1], **{CACHE: self.cache}, use_cache=True).logits
            self.tokens.append(logits[:, -1:].argmax(-1))
        return (_now(self.model) - started) / steps * 1e3

    def text(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        return str(tokenizer.decode(torch.cat(self.tokens, dim=1)[0], skip_special_tokens=True))


class Comparison:
    """A model that can be patched beside an unpatched twin that shares its weights, so that both can decode in turns."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", variants: Sequence[Variant]
    ) -> None:
        self.model, self.tokenizer, self.variants = model, tokenizer, variants
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.twin = copy.deepcopy(model, shared)

    @torch.inference_mode()
    def run(self, needle: Needle, timed: bool) -> Iterator[Record]:
        """One record per variant, as each is done.

        Args:
            timed: decode steps are timed in blocks that alternate with blocks of the twin's, and the first variant of each
                policy runs the prompt itself. One prompt pass serves all other variants that leave it exact.
        """
        prompt = Answer.begin(self.twin, needle.input_ids)
        ids = torch.tensor([needle.input_ids], device=self.model.device)
        reused = not timed or len({variant.policy for variant in self.variants}) < len(self.variants)
        shared = kvpress.record_prompt(self.model, ids) if reused else None
        run_prompts = set()
        plain = prompt.copy()
        (plain_ms,) = _blocks(plain)
        plain_bytes = sum(t.nbytes for layer in plain.cache.layers for t in (layer.keys, layer.values))
        for variant in self.variants:
            if variant.instance is None:
                answer, held, step_ms, beside_ms = plain, {"bytes": plain_bytes, "read_share": 1.0}, plain_ms, plain_ms
            else:
                with kvpress.patch(self.model, variant.instance) as handle:
                    own = timed and variant.policy not in run_prompts
                    run_prompts.add(variant.policy)
                    if shared is not None and handle.shares_prompts and not own:
                        first = shared.logits.argmax(-1, keepdim=True)
                        answer = Answer(self.model, handle.adopt_prompt(shared), first)
                    else:
                        answer = Answer.begin(self.model, needle.input_ids)
                    step_ms, beside_ms = _blocks(answer, prompt.copy()) if timed else (*_blocks(answer), ())
                    held = handle.report().to_dict()
            text = answer.text(self.tokenizer)
            yield Record(
                variant=variant.label,
                policy=variant.policy,
                budget=variant.budget,
                length=needle.length,
                depth=needle.depth,
                seed=needle.seed,
                number=needle.number,
                answer=text,
                found=is_found(needle, text),
                cache_bytes=held["bytes"],
                plain_bytes=plain_bytes,
                read_share=held["read_share"],
                prompt_seconds=answer.prompt_seconds if timed else math.nan,
                plain_prompt_seconds=prompt.prompt_seconds,
                step_ms=step_ms if timed else (),
                plain_step_ms=beside_ms if timed else (),
            )


def _blocks(*answers: Answer) -> tuple[tuple[float, ...], ...]:
    """Finish the answers by blocks of steps, taking turns and changing who begins; ms per step, [answer][block]."""
    for answer in answers:
        answer.extend(1)
    times: list[list[float]] = [[] for _ in answers]
    for block in range(BLOCKS):
        order = range(len(answers)) if block % 2 == 0 else reversed(range(len(answers)))
        for i in order:
            times[i].append(answers[i].extend(BLOCK_STEPS))
    return tuple(tuple(t) for t in times)


def _now(model: "PreTrainedModel") -> float:
    """Seconds, when everything queued on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
