"""Linear layers of few rows and MLPs of long prompts: the same results as torch's and transformers', by other work."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import kvpress
from kvpress import forwards, linear
from kvpress.compat import CACHE
from support.kernel_calls import Largest
from support.models import tiny_llama, token_ids
from test_families import FAMILIES, build

HIDDEN, INTERMEDIATE = 64, 2048


class Calls(TorchDispatchMode):
    """Counts the products, by name and shape of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "linear"):
            self.seen[name, tuple(result.shape)] += 1
        return result


@pytest.fixture
def model() -> Any:
    """MLPs that are worth splitting, attention that is not."""
    return tiny_llama(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, max_position_embeddings=2048)


class Opaque(torch.Tensor):
    """A weight, as a quantised one, that knows one thing: how a linear layer multiplies by it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, Opaque) else arg for arg in args]
        if func is torch.nn.functional.linear:
            return func(*plain, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("__get__", "numel", "size", "dim", "__repr__", "element_size"):
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"{func} of an opaque weight")


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def opaque(layer: torch.nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    vars(layer)["weight"] = weight.as_subclass(Opaque)


def sparse(layer: torch.nn.Linear) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)


UNUSUAL = {
    "opaque": opaque,
    "sparse": sparse,
    "parametrized": lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight-norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "bfloat16-then-back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "not-a-parameter": lambda layer: layer.__dict__.update(weight=layer._parameters.pop("weight").detach()),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_weights_before_and_after_patching(model: Any, change: Any, when: str) -> None:
    """Where a layer's weight is not a plain matrix any more, the layer does what it does without a patch."""
    layer = model.model.layers[0].mlp.up_proj

    def logits() -> list[torch.Tensor]:
        first = model(token_ids(1, 40))
        return [first.logits, model(token_ids(1, 1), **{CACHE: first[CACHE]}).logits]

    if when == "before":
        change(layer)
    with kvpress.patch(model, "full"):
        if when == "after":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                change(layer)
        found = logits()
    dense = logits()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, dense, strict=True))


@torch.no_grad()
def test_a_step_splits_large_weights_over_threads(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of 2048 outputs in 64 parts, down of 64 outputs in 2; the small attention projections are torch's."""
    monkeypatch.setenv("KVPRESS_LINEAR", "bmm")
    with kvpress.patch(model, "full"), Calls() as calls:
        cache = model(token_ids(1, 50))[CACHE]
        calls.seen.clear()
        model(token_ids(1, 1), **{CACHE: cache})
    layers = model.config.num_hidden_layers
    assert calls.seen["bmm", (64, 1, INTERMEDIATE // 64)] == 2 * layers
    assert calls.seen["bmm", (2, 1, HIDDEN // 2)] == layers
    whole = [shape for name, shape in calls.seen if name != "bmm"]
    assert whole and all(shape[-1] != INTERMEDIATE for shape in whole)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_long_prompt_goes_through_the_mlp_in_tiles(model: Any, batch: int) -> None:
    ids = token_ids(batch, 1300)
    with Largest() as unpatched:
        dense = model(ids, logits_to_keep=1).logits
    with kvpress.patch(model, "full"), Largest() as patched:
        logits = model(ids, logits_to_keep=1).logits
    assert unpatched.numbers == batch * 1300 * INTERMEDIATE
    assert patched.numbers <= 512 * INTERMEDIATE
    assert torch.allclose(logits, dense, atol=1e-4)


@torch.no_grad()
def test_a_hook_of_all_modules_sees_all_tokens_at_once(model: Any) -> None:
    widths = set()
    inside = [module for layer in model.model.layers for module in layer.mlp.modules()]
    with kvpress.patch(model, "full"):
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: widths.add(args[0].shape[1]) if module in inside else None
        )
        model(token_ids(1, 1300))
        hook.remove()
    assert widths == {1300}


@torch.no_grad()
def test_who_looks_inside_an_mlp_sees_all_tokens_at_once(model: Any) -> None:
    widths = []
    mlp = model.model.layers[0].mlp
    with kvpress.patch(model, "full"):
        model(token_ids(1, 1300))
        hook = mlp.act_fn.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
        model(token_ids(1, 1300))
        hook.remove()
    assert widths == [1300]


def test_training_sees_whole_mlps_and_gets_its_gradients(model: Any) -> None:
    ids = token_ids(1, 600)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with kvpress.patch(model, "full"):
        found = gradients()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, expected, strict=True))


def test_a_forward_that_somebody_wrapped_stays(model: Any) -> None:
    mlp = model.model.layers[0].mlp

    def wrapped(hidden: torch.Tensor) -> torch.Tensor:
        return type(mlp).forward(mlp, hidden)

    mlp.forward = wrapped
    with kvpress.patch(model, "full"):
        assert mlp.forward is wrapped
        assert model.model.layers[1].mlp.forward.__func__ is forwards.mlp_in_tiles
    assert mlp.forward is wrapped
    assert "forward" not in vars(model.model.layers[1].mlp)


TILED = {"qwen3-moe": 0, "gpt-oss-sinks": 0, "opt": 0}
"""How many layers of a family have an MLP that acts on each token, where not all three: experts, and OPT has no module."""


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_small_tiles_and_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_LINEAR", "bmm")
    monkeypatch.setattr(linear, "SMALLEST", 1)
    monkeypatch.setattr(linear, "PART_OUTPUTS", 4)
    monkeypatch.setattr(forwards, "MLP_TOKENS", {"cpu": 7})
    model = build(family)
    ids = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(2))

    def logits() -> list[torch.Tensor]:
        first = model(ids[:, :40])
        return [first.logits, model(ids[:, 40:], **{CACHE: first[CACHE]}).logits]

    dense = logits()
    with kvpress.patch(model, "full"):
        functions = [getattr(vars(module).get("forward"), "__func__", None) for module in model.modules()]
        assert functions.count(forwards.mlp_in_tiles) == TILED.get(family, 3)
        assert sum(map(linear.is_chosen, functions)) > 3
        found = logits()
    assert all(torch.allclose(one, other, atol=2e-5) for one, other in zip(found, dense, strict=True))
