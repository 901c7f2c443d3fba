"""What the figures of a session depend on."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kvpress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton", "flash-attn", "datasets", "rouge-score", "jieba")


def describe(model: "PreTrainedModel", seed: int) -> dict[str, Any]:
    """Versions, commit, hardware, the model as it was loaded, the seed, and the time."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kvpress": kvpress.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "model_class": type(model).__name__,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "hardware": hardware(model.device, devices(model)),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


@cache
def packages() -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The commit of the checkout that kvpress runs from, with -dirty if files differ from it; None for an install."""
    folder = Path(kvpress.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def devices(model: "PreTrainedModel") -> int:
    """How many GPUs hold the model, or processes that it is split over."""
    split = getattr(model, "tp_size", None) or 1
    held = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return max(split, len(held))


def hardware(device: torch.device, count: int = 1) -> str:
    """The processor's name, of the GPU where the model is on one; with how many, if it is on several."""
    several = f"{count} x " if count > 1 else ""
    if device.type == "cuda":
        return several + torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{several}{name}, {os.cpu_count()} cores"
