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
    """The commit of the checkout that kvpress runs from, with -dirty if its tracked files differ; None for an install.

    Files below docs/ do not count: no answer depends on them, and kept results are among them.
    """
    tree = checkout()
    if tree is None:
        return None
    try:
        name = _git(tree, "describe", "--always", "--abbrev=12", "--exclude=*").strip()
        return name + "-dirty" * bool(changed_files(tree, untracked=False))
    except GitError:
        return None


class GitError(RuntimeError):
    """git does not say what was asked; the message has its reason."""


def checkout() -> Path | None:
    """The git work tree that kvpress runs from; None for an install."""
    folder = Path(kvpress.__file__).resolve().parent.parent
    return folder if (folder / ".git").exists() else None


def documentation_tree(path: Path) -> Path | None:
    """The git work tree that `path`, which need not exist, is in, if it is in or below its docs/; else None."""
    path = path.resolve()
    tree = next((folder for folder in (path, *path.parents) if (folder / ".git").exists()), None)
    return tree if tree is not None and path.is_relative_to(tree / "docs") else None


def changed_files(tree: Path, *, untracked: bool = True) -> list[str]:
    """Files of a git work tree, outside of its docs/, that are not as its commit has them.

    Args:
        untracked: whether files that git neither tracks nor ignores are among them.

    Raises:
        GitError: git cannot be asked.
    """
    kind = "--untracked-files=all" if untracked else "--untracked-files=no"
    said = _git(tree, "status", "--porcelain", "-z", "--no-renames", kind, "--", ".", ":(exclude,top)docs")
    return [entry[3:] for entry in said.split("\0") if entry]


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitError(str(error)) from error
    if done.returncode:
        raise GitError(" ".join(done.stderr.split()) or f"git ended with {done.returncode}")
    return done.stdout


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
