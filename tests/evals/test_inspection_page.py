"""The page of an inspection: its maps are what was found, and Vega-Lite draws them."""

import json

import pytest
import torch
import vl_convert

import kvpress
from kvpress.evals.charts import VERSION
from kvpress.evals.inspection_page import write_page
from kvpress.policies import SnapKV, XAttention
from support.matrix import prompt, sharp_llama
from support.pages import own_text, pictures

N = 53


@pytest.fixture(scope="module")
def found():
    policies = [XAttention(block_size=4, stride=2, threshold=0.5), SnapKV(budget=0.4, window=4, kernel_size=3)]
    return kvpress.inspect(sharp_llama(layers=2), policies, prompt(N), cells=7)


def test_every_cell_is_on_the_page(found, tmp_path):
    path = tmp_path / "a.html"
    write_page(path, found, "a model <b>", [1])
    charts = pictures(path)
    heads = len(found.prompt[1].recall)
    assert (
        len(charts) == 2 + heads + 2 + 1
    )  # two overviews with the maps of a layer: of each head, and of all heads together
    for chart in charts:
        vl_convert.vegalite_to_svg(json.dumps(chart), vl_version=VERSION)
    for name, chart in zip(("density", "recall"), charts[:2], strict=True):
        values = {(one["layer"], one["head"]): one["value"] for one in chart["data"]["values"]}
        for layer, reads in found.prompt.items():
            for head, value in enumerate(getattr(reads, name).tolist()):
                assert values[layer, head] == pytest.approx(value, rel=1e-3)
    after = found.after[1]
    shown = [*charts[2 : 2 + heads], charts[-1]]
    wanted = [
        [x[head] for x in (found.prompt[1].kept, found.prompt[1].mass, found.prompt[1].held)] for head in range(heads)
    ]
    wanted.append([x[:, 0] for x in (after.kept, after.mass, after.held)])
    for chart, maps in zip(shown, wanted, strict=True):
        tall = 8 if len(maps[0]) == 7 else 1
        drawn = torch.zeros(3, *maps[0].shape)
        for one in chart["data"]["values"]:
            drawn[:, one["y1"] // tall, one["x"] // 8] = torch.tensor([one["kept"], one["mass"], one["held"]])
        torch.testing.assert_close(drawn, torch.stack(maps), rtol=1e-3, atol=1e-4)
    text = own_text(path)
    assert "a model &lt;b&gt;" in text
    assert f"layer 1, head 2: reads {found.prompt[1].density[2]:.1%}" in text
    assert "layer 0, head" not in text


def test_without_layers_the_heads_that_lose_most_are_drawn(found, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpress.evals.inspection_page.SHOWN", 3)
    path = tmp_path / "a.html"
    write_page(path, found, "a model")
    recalls = {
        (layer, head): value for layer, one in found.prompt.items() for head, value in enumerate(one.recall.tolist())
    }
    least = sorted(recalls, key=recalls.get)[:3]
    text = own_text(path)
    for layer, head in recalls:
        assert (f"layer {layer}, head {head}: reads" in text) == ((layer, head) in least)
