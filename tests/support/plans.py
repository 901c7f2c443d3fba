"""A tiny saved model and configurations over it."""

import yaml

from kvpress.evals.config import make_plan
from support.tiny_saved import save_tiny_model

TASK = {"name": "needle", "lengths": [400], "depths": [0.2, 0.8]}


def tiny_folder(folder):
    """A folder with a random Llama of two layers and a byte tokenizer."""
    return str(save_tiny_model(folder))


def tree(model, out, **parts):
    """A configuration on that model; `parts` are its top-level keys."""
    defaults = {"model": model, "device": "cpu", "dtype": "float32", "task": TASK, **parts.pop("defaults", {})}
    return {"out": str(out), "defaults": defaults, **parts}


def plan(model, out, **parts):
    return make_plan(tree(model, out, **parts))


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
