"""Choose what of a policy depends on the model: a field by needles, heads by what attention loses, or by the policy's own `fit`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.patching import Handle, patch
from kvpress.policy import Attended, Policy, check_choice
from kvpress.registry import policy_spec
from kvpress.sharing import SharedPrompt, record_prompt
from kvpress.support import find_attention, find_decoder, input_device

TAIL = 16  # last tokens of a prompt that are fed one by one, so that the policy acts on the question, too


@dataclass(frozen=True)
class Example:
    """A prompt and its right continuation, token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class HeadChoice:
    """What was found for a query head.

    Attributes:
        value: the best of the policy's `head_values`.
        error, recall: those of this value, mean over the prompts.
    """

    value: Any
    error: float
    recall: float


@dataclass(frozen=True)
class Trial:
    """One value of the field.

    Attributes:
        log_probability: of the right answers under the policy, mean over their tokens.
        right: share of answer tokens that were the most likely ones.
    """

    value: Any
    log_probability: float
    right: float


def calibration_values(model: Any, policy: Policy) -> list[Any]:
    """The values that can be tried.

    Raises:
        PolicyError: the policy has nothing to calibrate.
    """
    if policy.calibrated is None:
        raise PolicyError(f"{policy.name} has no field that depends on the model; there is nothing to calibrate")
    return policy.calibration_values(len(find_attention(find_decoder(model))))


@torch.inference_mode()
def calibrate(model: Any, policy: Policy, examples: Sequence[Example]) -> Iterator[Trial]:
    """Try every value of the policy's calibrated field on the examples; one result per value, in order.

    Each example's prompt is run once and shared by all values; its last tokens and the answer are fed one by one, so that
    the policy acts on them.

    Args:
        model: a model that is not patched.
        policy: its other fields are kept.
        examples: prompts of more than `TAIL` tokens, with their answers.

    Raises:
        PolicyError: nothing to calibrate, a prompt that is too short, or a policy whose prompts cannot be shared.
    """
    values = calibration_values(model, policy)
    for example in examples:
        if len(example.prompt) <= TAIL + 1 or not example.answer:
            raise PolicyError(
                f"a prompt of {len(example.prompt)} tokens with {len(example.answer)} of answer cannot calibrate; give more than "
                f"{TAIL + 1} and at least 1"
            )
    device = input_device(model)
    prompts = [record_prompt(model, torch.tensor([example.prompt[:-TAIL]], device=device)) for example in examples]
    for value in values:
        with patch(model, replace(policy, **{str(policy.calibrated): value})) as handle:
            scores = [_answer(model, handle, prompt, one) for prompt, one in zip(prompts, examples, strict=True)]
        chosen = torch.cat([log_probability for log_probability, _ in scores])
        hits = torch.cat([hit for _, hit in scores])
        yield Trial(value, chosen.mean().item(), hits.float().mean().item())


METRICS = ("error", "recall")


@torch.inference_mode()
def calibrate_heads(
    model: Any, policy: Policy, prompts: Sequence[Sequence[int]], metric: str = "error"
) -> list[list[HeadChoice]]:
    """For each layer and query head the value that is best on the prompts: least error of the output, or most recall.

    Each prompt is run once, with full attention; its layers are compared one by one. Of equal values the first one is taken.

    Args:
        model: a model that is not patched.
        policy: one that has `head_values`; its other fields hold while they are compared.
        prompts: token ids.
        metric: "error" or "recall".

    Raises:
        PolicyError: the policy has no values of heads, the metric does not exist, or there is no prompt.
    """
    if not policy.head_values:
        raise PolicyError(f"{policy.name} has nothing to choose head by head; calibrate minference")
    check_choice(metric, "metric", METRICS)
    if not prompts:
        raise PolicyError("there is no prompt to calibrate on; give at least one")
    device = input_device(model)
    found: list[Tensor] = []  # of each layer [metrics, values, heads], summed over the prompts
    for ids in prompts:
        recorded = record_prompt(model, torch.tensor([list(ids)], device=device))
        for layer, (query, key, value, scores) in enumerate(recorded.layers):
            tried = torch.stack(policy.try_heads(query, key, value, **vars(scores))).double().cpu()
            if layer == len(found):
                found.append(torch.zeros_like(tried))
            found[layer] += tried / len(prompts)
    choices = []
    for error, recall in found:
        best = (error if metric == "error" else -recall).argmin(dim=0).tolist()
        choices.append(
            [
                HeadChoice(policy.head_values[at], error[at, head].item(), recall[at, head].item())
                for head, at in enumerate(best)
            ]
        )
    return choices


@torch.inference_mode()
def fit(model: Any, policy: Policy, prompts: Sequence[Sequence[int]]) -> Policy:
    """The policy with the fields that belong to this model, found by its own `fit`. Each prompt is run once, with full attention.

    Args:
        model: a model that is not patched.
        policy: one that `learns`; its other fields are kept.
        prompts: token ids.

    Raises:
        PolicyError: the policy learns nothing, there is no prompt, or one is too short.
    """
    if not policy.learns:
        raise PolicyError(f"{policy.name} is not fitted to a model; calibrate kascade, x_attention or skip_softmax")
    if not prompts:
        raise PolicyError("there is no prompt to calibrate on; give at least one")
    return policy.fit(_attended(model, ids) for ids in prompts)


def _attended(model: Any, ids: Sequence[int]) -> list[Attended]:
    with _turns(model) as turns:
        recorded = record_prompt(model, torch.tensor([list(ids)], device=input_device(model)))
    return [
        Attended(query, key, scores.scale, scores.softcap, turns[layer])
        for layer, (query, key, _, scores) in enumerate(recorded.layers)
    ]


@contextmanager
def _turns(model: Any) -> Iterator[dict[int, float]]:
    """Within the block a run leaves how far the attention of each layer turns the residual stream: `Attended.turn`."""
    decoder = find_decoder(model)
    parents = {id(child): parent for parent in decoder.modules() for child in parent.children()}
    turns: dict[int, float] = {}
    streams: dict[int, Tensor] = {}
    hooks = []
    for layer, module in enumerate(find_attention(decoder).values()):

        def enter(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            streams[layer] = args[0] if args else kwargs["hidden_states"]

        def leave(_: Any, __: Any, output: Any, layer: int = layer) -> None:
            before, added = streams.pop(layer).float(), (output[0] if isinstance(output, tuple) else output).float()
            turns[layer] = 1 - torch.cosine_similarity(before, before + added.to(before.device), dim=-1).mean().item()

        hooks.append(parents[id(module)].register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield turns
    finally:
        for hook in hooks:
            hook.remove()


def write_heads(path: Path, choices: Sequence[Sequence[HeadChoice]], metric: str = "error") -> None:
    """Write what was found as JSON: for each layer an object from the head's number to [value..., score]."""
    layers = [
        {str(head): [*one.value, round(getattr(one, metric), 6)] for head, one in enumerate(heads)} for heads in choices
    ]
    write_table(path, layers)


def write_table(path: Path, layers: Sequence[Any]) -> None:
    """Write what belongs to each layer as a JSON list, a line for each layer."""
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _answer(model: Any, handle: Handle, prompt: SharedPrompt, example: Example) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the answer, and whether it was the most likely one."""
    cache = handle.adopt_prompt(prompt)
    fed = example.prompt[-TAIL:] + example.answer[:-1]
    device = prompt.logits.device
    logits = [model(torch.tensor([[token]], device=device), **{CACHE: cache}).logits[0, -1] for token in fed]
    log_probabilities = torch.stack(logits[-len(example.answer) :]).float().log_softmax(-1)
    answer = torch.tensor(example.answer, device=device)
    return log_probabilities.gather(1, answer[:, None])[:, 0], log_probabilities.argmax(-1) == answer


def best(trials: Sequence[Trial]) -> Trial:
    """The value with the most right tokens; of equals the one that gives the answers the highest probability."""
    return max(trials, key=lambda trial: (trial.right, trial.log_probability))


def write_policy(path: Path, policy: Policy, **fields: Any) -> None:
    """Write a policy into a YAML file that `kvpress.patch` takes, every field that differs from its default.

    Args:
        fields: what to write for these instead, such as the path of a file that they were read from.
    """
    spec = yaml.dump({**policy_spec(policy), **fields}, Dumper=_ListsInLines, sort_keys=False)
    path.write_text(spec, encoding="utf-8")


class _ListsInLines(yaml.SafeDumper):
    """YAML with each list of plain values in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        nested = any(isinstance(one, list | tuple | dict) for one in sequence)
        return super().represent_sequence(tag, sequence, flow_style=not nested)
