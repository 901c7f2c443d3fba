"""The README's code runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch

import kvpress
from kvpress.compat import CACHE
from support.matrix import prompt, sharp_llama

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_policy_of_the_readme() -> None:
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(blocks("python")[-1], scope)
    model = sharp_llama()
    with torch.no_grad(), kvpress.patch(model, {"name": "last_row", "budget": 0.25}):
        cache = model(torch.tensor([prompt(40)]))[CACHE]
    assert [(layer.positions >= 0).sum(-1).tolist() for layer in cache.layers] == [[[10, 10]]] * 2
    assert all((layer.positions == 39).any(-1).all() for layer in cache.layers)


def test_the_ten_lines_of_the_readme(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """With a tiny model in the hub's place."""
    import transformers

    model = sharp_llama()
    (tmp_path / "long.txt").write_text("word " * 50)
    monkeypatch.chdir(tmp_path)

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([prompt(len(text.split()))])}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: Tokenizer())
    scope: dict[str, Any] = {}
    exec(blocks("python")[0], scope)
    assert scope["output"].shape == (1, 152)
    assert "h2o(budget=0.2)" in capsys.readouterr().out


def test_the_scoring_of_the_readme(capsys: Any) -> None:
    from kvpress.policies import H2O

    scope: dict[str, Any] = {
        "kvpress": kvpress,
        "H2O": H2O,
        "model": sharp_llama(),
        "context_ids": prompt(30),
        "continuation_ids": prompt(5, 1),
        "question_ids": prompt(20, 2),
        "answers_ids": [prompt(3, 3), prompt(4, 4)],
    }
    exec(blocks("python")[1], scope)
    assert float(capsys.readouterr().out) > 1
    assert scope["best"].count in (3, 4)
