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
from kvpress.errors import nearest
from kvpress.registry import make_policies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = "transformers"
BLOCKS, BLOCK_STEPS = 2, 4
ANSWER_STEPS = 1 + BLOCKS * BLOCK_STEPS  # the first is not timed: it may still tidy up after the prompt
COMPILE_STEPS = 3  # a kind of step runs as it is when it first comes, and is compiled when it comes again


@dataclass(frozen=True)
class Variant:
    """One thing to compare: the model under a policy, or without one.

    Attributes:
        policy: a policy's name; `PLAIN` for the unpatched model.
        budget: as it is shown; empty where the policy takes none.
        instance: the policy itself; None for the unpatched model.
        compiled: whether its compiled steps are timed, too.
    """

    policy: str
    budget: str = ""
    instance: "kvpress.Policy | None" = None
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.policy} {self.budget}".strip()


def make_variants(
    names: Sequence[str], budgets: Sequence[int | float], length: int, compiled: Sequence[str] = ()
) -> list[Variant]:
    """The unpatched model, full attention under kvpress, and each named policy at each budget.

    A policy that takes entries only gets as many as the share of a prompt of `length` tokens. Those named in `compiled` have
    their compiled steps timed at their first budget.

    Raises:
        PolicyError: a name or a budget that does not work, or a name in `compiled` that is not compared.
    """
    variants = [Variant(PLAIN)]
    compared = list(dict.fromkeys(["full", *names]))
    for name in compiled:
        if name not in compared:
            raise kvpress.PolicyError(
                f"cannot time compiled steps of {name!r}, which is not compared{nearest(name, compared)}"
            )
    for name in compared:
        choices = list(dict.fromkeys(budgets)) if type(kvpress.make_policy(name)).takes_budget else [None]
        for budget in choices:
            (policy,) = make_policies(name, budget, tokens=length)
            first = budget == choices[0]
            variants.append(Variant(name, "" if budget is None else str(budget), policy, first and name in compiled))
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
                    answer = self._answer(handle, needle, None if own else shared)
                    step_ms, beside_ms = _blocks(answer, prompt.copy()) if timed else (*_blocks(answer), ())
                    held = handle.report().to_dict()
            compiled = self._compiled(variant, needle, shared, prompt) if timed and variant.compiled else {}
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
                **compiled,
            )

    def _answer(self, handle: "kvpress.Handle", needle: Needle, shared: "kvpress.SharedPrompt | None") -> Answer:
        """The prompt as the handle's policy leaves it: from the pass that was recorded, where that is the same, or run."""
        if shared is None or not handle.shares_prompts:
            return Answer.begin(self.model, needle.input_ids)
        return Answer(self.model, handle.adopt_prompt(shared), shared.logits.argmax(-1, keepdim=True))

    def _compiled(
        self, variant: Variant, needle: Needle, shared: "kvpress.SharedPrompt | None", prompt: Answer
    ) -> dict[str, Any]:
        """The fields of a record that are about compiled steps; the reason where there are none."""
        assert variant.instance is not None
        try:
            with kvpress.patch(self.model, variant.instance, compile=True) as handle:
                answer = self._answer(handle, needle, shared)
                seconds = answer.extend(COMPILE_STEPS) * COMPILE_STEPS / 1e3
                own, plain = _blocks(answer, prompt.copy())
        except (kvpress.PolicyError, kvpress.UnsupportedModelError) as error:
            return {"not_compiled": str(error)}
        return {"compile_seconds": seconds, "compiled_ms": own, "plain_compiled_ms": plain}


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
