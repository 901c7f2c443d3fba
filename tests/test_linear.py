"""Linear layers of few rows: each form gives torch's own result, and the choice among them is sound and lasts."""

import copy
import pickle
import time
from typing import Any

import pytest
import torch

import kvpress
from kvpress import linear
from kvpress.compat import CACHE
from support.models import tiny_llama, token_ids

OTHERS = sorted(set(linear.FORMS) - {"linear"})
SHAPES = [(1, 1), (3, 1), (1, 32), (1, 33), (7,), (), (0, 1), (2, 0)]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_measured", {})


def layer_of(inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype)


def run(layer: torch.nn.Linear, rows: torch.Tensor, *names: str) -> torch.Tensor:
    """The layer with a form for one row, for a few, and for more."""
    return linear.make_forward(layer.weight.dtype, names)(layer, rows)


FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
CHOICES = [
    (FLOAT32, ("bmm", "bmm", "mm")),
    (FLOAT32, ("mv", "mm", "bmm")),
    (FLOAT32, ("linear", "mm", "linear")),
    (BFLOAT16, ("mv", "linear", "linear")),
    (FLOAT16, ("mv", "linear", "linear")),
]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "names"), CHOICES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1024), (700, 100), (1100, 77), (130, 576)])
def test_few_rows_are_multiplied_as_in_float64(
    inputs: int, outputs: int, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    layer = layer_of(inputs, outputs, bias, dtype)
    rows = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.nn.functional.linear(
        *(None if x is None else x.double() for x in (rows, layer.weight, layer.bias))
    )
    found = run(layer, rows, *names)
    assert found.shape == expected.shape and found.dtype == dtype and found.is_contiguous()
    error = {FLOAT32: 1e-5, BFLOAT16: 1e-2, FLOAT16: 2e-3}[dtype]
    assert torch.allclose(found.double(), expected, atol=100 * error, rtol=error)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_fixed_form_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setitem(linear.FORMS, name, lambda input, *others: called.append(len(input)))
    linear.make_forward.cache_clear()
    monkeypatch.setenv(linear.VARIABLE, name)
    layer, tiny, low = layer_of(256, 512), layer_of(16, 16), layer_of(256, 512, dtype=torch.bfloat16)
    forwards = linear.choose_forwards([layer, tiny, low])
    assert set(forwards) == ({layer, low} if name == "mv" else {layer})
    for rows in (0, 1, 8, 32, 33):
        forwards[layer](layer, torch.zeros(rows, 256))
    assert called == {"bmm": [1, 8, 32], "mm": [8, 32], "mv": [1]}[name]
    linear.make_forward.cache_clear()


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_became_others_are_torchs_matter(name: str) -> None:
    rows = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0))
    names = (name if name != "mm" else "linear", name if name != "mv" else "linear", "linear")
    forward = linear.make_forward(torch.float32, names)
    low = torch.nn.Linear(256, 512).to(torch.bfloat16)
    turned = torch.nn.Linear(256, 512)
    turned.weight = torch.nn.Parameter(turned.weight.detach().T.contiguous().T)
    for layer in (low, turned):
        given = rows.to(layer.weight.dtype)
        assert torch.equal(forward(layer, given), layer(given))
    layer = torch.nn.Linear(256, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(layer, rows), layer(rows))


@pytest.mark.parametrize("name", OTHERS)
def test_an_input_of_the_wrong_width_is_refused(name: str) -> None:
    """As torch does: two rows of 128 are not four of 64."""
    layer = torch.nn.Linear(64, 1024, bias=False)
    for shape in ((2, 128), (4, 32), (32,), (1, 1, 128)):
        with pytest.raises(RuntimeError, match=r"shape|size"):
            run(layer, torch.zeros(shape), name if name != "mm" else "bmm", name if name != "mv" else "bmm", "linear")


def times(**rounds: list[float]) -> dict[str, list[float]]:
    return rounds


ROUNDS = linear.ROUNDS


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (times(linear=[2.0] * ROUNDS, bmm=[1.0] * ROUNDS), "bmm"),
        (times(linear=[2.0] * ROUNDS, bmm=[1.85] * ROUNDS), "linear"),  # not clearly better
        (times(linear=[2.0] * ROUNDS, bmm=[1.0] * ROUNDS, mv=[0.9] * ROUNDS), "mv"),
        (times(linear=[2.0] * ROUNDS, bmm=[1.0] * (ROUNDS - 1) + [9.0]), "bmm"),  # disturbed once
        (times(linear=[2.0] * ROUNDS, bmm=[1.0] * (ROUNDS - 2) + [9.0] * 2), "linear"),  # luck, perhaps
        (times(linear=[2.0] * (ROUNDS - 1), bmm=[1.0] * (ROUNDS - 1)), "linear"),  # the time was up
        (times(linear=[], bmm=[]), "linear"),
    ],
)
def test_another_form_is_chosen_where_it_is_clearly_faster(measured: dict[str, list[float]], chosen: str) -> None:
    assert linear.fastest(measured) == chosen


def test_a_choice_is_measured_once_and_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(weights: Any, rows: int, names: Any, deadline: float) -> dict[str, list[float]]:
        asked.append((tuple(weights[0].shape), rows))
        return {name: [1.0 if name == "bmm" and len(asked) <= 3 else 2.0] * ROUNDS for name in names}

    monkeypatch.setattr(linear, "measure", measured)
    monkeypatch.setenv(linear.VARIABLE, linear.MEASURED)
    layers = [layer_of(256, 512), layer_of(256, 512), layer_of(512, 256)]
    first = linear.choose_forwards(layers)
    assert asked == [
        ((512, 256), 1),
        ((256, 512), 1),
        ((512, 256), 4),
        ((256, 512), 4),
        ((512, 256), 16),
        ((256, 512), 16),
    ]
    assert first[layers[0]] is first[layers[1]] is linear.make_forward(torch.float32, ("bmm", "bmm", "linear"))
    assert first[layers[2]] is linear.make_forward(torch.float32, ("bmm", "linear", "linear"))
    assert linear.choose_forwards(layers) == first
    assert len(asked) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_takes_little_time_and_ends(dtype: torch.dtype) -> None:
    layer = layer_of(256, 512, dtype=dtype)
    names = linear.possible(dtype, 1)
    found = linear.measure([layer.weight], 1, names)
    assert list(found) == names and all(len(taken) == ROUNDS and min(taken) > 0 for taken in found.values())
    assert all(not taken for taken in linear.measure([layer.weight], 1, names, time.perf_counter()).values())


@torch.no_grad()
def test_where_torchs_own_is_chosen_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=2048)
    monkeypatch.setenv(linear.VARIABLE, "linear")
    with kvpress.patch(model, "full"):
        assert not any("forward" in vars(m) for m in model.modules() if type(m) is torch.nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_every_form_in_a_model_eager_compiled_copied_and_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=2048)
    batch = 3 if name == "mm" else 1
    prompt, step = token_ids(batch, 40), token_ids(batch, 1)
    dense = model(step, **{CACHE: model(prompt)[CACHE]}).logits
    monkeypatch.setenv(linear.VARIABLE, name)

    def logits() -> torch.Tensor:
        return model(step, **{CACHE: model(prompt)[CACHE]}).logits

    with kvpress.patch(model, "full"):
        changed = [m for m in model.modules() if "forward" in vars(m) and type(m) is torch.nn.Linear]
        assert len(changed) == 3 * model.config.num_hidden_layers
        assert torch.allclose(logits(), dense, atol=1e-4)
        own = copy.deepcopy(model.model.layers[0].mlp.up_proj)
        assert linear.is_chosen(own.forward.__func__) and own.forward.__self__ is own
        written = pickle.loads(pickle.dumps(model.model.layers[0].mlp.up_proj))
        assert written.forward == torch.nn.Linear.forward.__get__(written)
    assert not any("forward" in vars(m) for m in changed)
    torch.compiler.reset()
    with kvpress.patch(model, "full") as handle:
        handle.compile("eager")  # one graph, or an error
        assert torch.allclose(logits(), dense, atol=1e-4)
    torch.compiler.reset()


def test_an_unknown_form_is_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setenv(linear.VARIABLE, "matmul")
    with pytest.raises(kvpress.PolicyError, match="KVPRESS_LINEAR='matmul': not one of measured, linear, bmm, mm, mv"):
        kvpress.patch(model, "full")
    with pytest.raises(kvpress.PolicyError, match="not patched"):
        kvpress.unpatch(model)
