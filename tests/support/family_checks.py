"""What a patched model of a family computes with room for everything, against the same model before it was patched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvpress
from kvpress.compat import CACHE
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.policies import H2O, Full, StreamingLLM, TokenSelect
from support.tiny_families import tiny_family

ROOMY = {
    "exact": [Full()],
    "evicting": [H2O(budget=500)],
    "re-indexing": [StreamingLLM(recent=500), TokenSelect(k=500)],
}
TIGHT = [StreamingLLM(sink=2, recent=6), H2O(budget=8, rope="reindex")]
CLOSE = 2e-3
"""The largest difference of logits that is rounding, as a share of the largest logit."""


@dataclass(frozen=True)
class Verdict:
    """What became of a family under a policy: "right", "refused", "wrong", "crashed" or "not tried", and why."""

    outcome: str
    why: str = ""


def check_family(name: str, make: Callable[..., PreTrainedModel] = tiny_family) -> dict[str, Verdict]:
    """The verdict on a family under each kind of policy."""
    try:
        model = make(name)
    except Exception as error:
        return dict.fromkeys(ROOMY, Verdict("not tried", f"no model: {_line(error)}"))
    model.requires_grad_(False)
    verdicts, dense = {}, None
    for kind, policies in ROOMY.items():
        found = [_refusal(model, policy) for policy in policies]
        if all(one is not None for one in found):
            verdicts[kind] = found[0]
            continue
        if dense is None:
            dense = _results(model)
            if not any(isinstance(result, torch.Tensor) for result in dense.values()):
                return dict.fromkeys(
                    ROOMY, Verdict("not tried", f"does not run on text alone: {next(iter(dense.values()))}")
                )
        found = [_compare(model, policy, dense) for policy in policies]
        if kind == "re-indexing":
            found += [_moves(name, make, policy) for policy in TIGHT]
        verdicts[kind] = max(found, key=lambda one: ("right", "refused", "wrong", "crashed").index(one.outcome))
    return verdicts


def _refusal(model: PreTrainedModel, policy: Any) -> Verdict | None:
    try:
        kvpress.patch(model, policy).unpatch()
    except (UnsupportedModelError, PolicyError) as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("crashed", f"patch: {_line(error)}")
    return None


def _compare(model: PreTrainedModel, policy: Any, dense: dict[str, Any]) -> Verdict:
    refused = _refusal(model, policy)
    if refused is not None:
        return refused
    with kvpress.patch(model, policy):
        ours = _results(model)
    for run, expected in dense.items():
        got = ours[run]
        if not isinstance(expected, torch.Tensor):
            continue
        if not isinstance(got, torch.Tensor):
            return Verdict("crashed", f"{policy.describe()}, {run}: {got}")
        error = _difference(got, expected)
        if not error < CLOSE:
            return Verdict("wrong", f"{policy.describe()}, {run}: {error:.1g} of the largest logit")
    return Verdict("right")


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def token_ids(batch: int, count: int) -> torch.Tensor:
    """Ids [batch, count] that stand for text in every tiny family."""
    return torch.randint(3, 90, (batch, count), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def _results(model: PreTrainedModel) -> dict[str, Any]:
    """Logits of each way to run a model: [steps, batch, vocabulary], or what went wrong."""
    found: dict[str, Any] = {}
    for run in (_plain, _padded, _chunked):
        try:
            found[run.__name__.strip("_")] = run(model).float()
        except Exception as error:
            found[run.__name__.strip("_")] = _line(error)
    return found


def _generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of greedy steps."""
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits)


def _plain(model: PreTrainedModel) -> torch.Tensor:
    ids = token_ids(2, 21)
    return _generate(model, ids, torch.ones_like(ids))


def _padded(model: PreTrainedModel) -> torch.Tensor:
    ids = token_ids(2, 21)
    mask = torch.ones_like(ids)
    ids[0, :9] = mask[0, :9] = 0
    return _generate(model, ids, mask)


def _chunked(model: PreTrainedModel) -> torch.Tensor:
    """A prompt in two passes, then steps, with a cache of the caller's."""
    ids, cache = token_ids(1, 24), DynamicCache(config=model.config)
    logits = []
    for part in ids.split([12, 9, 1, 1, 1], dim=1):
        output = model(input_ids=part, **{CACHE: cache}, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits)


@torch.no_grad()
def _moves(name: str, make: Callable[..., PreTrainedModel], policy: Any) -> Verdict:
    """Whether decode steps are the dense result on what is kept, at consecutive places.

    With one layer and one kv head, keys and values depend on their token alone. So the model itself, given just the
    tokens that are kept, gives the right result. Each layer that the family's rule keeps is tried alone.
    """
    for layer in range(4):
        try:
            model = make(name, one_layer=layer)
            with torch.no_grad():
                model(input_ids=token_ids(1, 4), use_cache=True)
        except IndexError:
            break
        except Exception:
            continue  # no model of this layer alone, or none that runs
        if _refusal(model, policy) is not None:
            continue
        try:
            verdict = _one_layer_moves(model, policy)
        except Exception as error:
            return Verdict("crashed", f"{policy.describe()}, layer {layer} alone: {_line(error)}")
        if verdict.outcome != "right":
            return Verdict(verdict.outcome, f"{verdict.why}, layer {layer} alone")
    return Verdict("right")


def _one_layer_moves(model: PreTrainedModel, policy: Any) -> Verdict:
    ids = token_ids(1, 27)
    with kvpress.patch(model, policy):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :24], **{CACHE: cache}, use_cache=True)
        kept, ours = [], []
        for step in (24, 25, 26):
            positions = cache.layers[0].positions
            if len(cache.layers) > 1 or (positions.shape[1] > 1 and policy.name != "streaming_llm"):
                return Verdict("right")
            kept.append([*sorted({place for place in positions[0, 0].tolist() if 0 <= place < step}), step])
            ours.append(model(input_ids=ids[:, step : step + 1], **{CACHE: cache}, use_cache=True).logits[:, -1])
    for step, (places, got) in enumerate(zip(kept, ours, strict=True)):
        expected = model(input_ids=ids[:, places], use_cache=False).logits[:, -1]
        error = _difference(got, expected)
        if not error < CLOSE:
            return Verdict("wrong", f"{policy.describe()}, step {step}: {error:.1g} of the largest logit")
    return Verdict("right")
