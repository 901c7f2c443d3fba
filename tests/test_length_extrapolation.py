"""The example: prompts of exact length with the key where it should be, and a whole run on a tiny model."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from support.tiny_saved import byte_tokenizer, save_tiny_model

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "length_extrapolation.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("length_extrapolation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt(example: Any, depth: float) -> None:
    tokenizer = byte_tokenizer()
    ids, key = example.passkey_prompt(tokenizer, 3000, depth, seed=7)
    text = tokenizer.decode(ids)
    assert len(ids) == 3000 and text.endswith("The pass key is") and len(key) == 5
    said = example.KEY.format(key=key)
    assert text.count(said) == 1 and text.count(key) == 2
    room = 3000 - len(example.INTRODUCTION) - len(said) - len(example.QUESTION)
    at = text.index(said) - len(example.INTRODUCTION)
    assert abs(at - depth * room) <= len(example.NOISE)
    assert example.passkey_prompt(tokenizer, 3000, depth, seed=7) == (ids, key)
    assert example.passkey_prompt(tokenizer, 3000, depth, seed=8)[1] != key


def test_short_prompt_is_refused(example: Any) -> None:
    with pytest.raises(SystemExit, match="--tokens 50 is too short"):
        example.passkey_prompt(byte_tokenizer(), 50, 0.5, 0)


def test_run(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    save_tiny_model(tmp_path)
    arguments = ["--model", str(tmp_path), "--tokens", "700", "--seeds", "2", "--policies", "token_select"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    example.main()
    printed = capfd.readouterr()
    assert "0/2" in printed.out and "MiB" in printed.out
    assert "seed 1:" in printed.err


def test_unknown_policy(example: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--policies", "tokenselect"])
    with pytest.raises(SystemExit):
        example.main()
    assert "unknown policies tokenselect" in capsys.readouterr().err
