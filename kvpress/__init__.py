"""KV-cache compression and sparse attention for Hugging Face models: one call patches a model, a policy does the rest.

>>> import kvpress
>>> from kvpress.policies import H2O
>>> with kvpress.patch(model, H2O(budget=0.2)) as handle:
...     model.generate(**inputs)
...     print(handle.report())
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpress.errors import PolicyError, UnsupportedModelError
    from kvpress.inspection import Inspection, inspect
    from kvpress.patching import Handle, patch, unpatch
    from kvpress.policy import EvictionPolicy, Policy
    from kvpress.prepacking import prepack
    from kvpress.registry import available, make_policy
    from kvpress.scoring import Score, score
    from kvpress.sharing import SharedPrompt, record_prompt

__version__ = "0.1.0"

# In a checkout (an editable install, or Python started in the repository root) kernels/ and policies/ lie beside this
# folder. A wheel has them inside it. setuptools' editable finder cannot see a namespace folder below a package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels" / "decode_attention.py").is_file():
    __path__.append(str(_checkout))

# Loaded when first used: `import kvpress` stays light, and a kernel can be imported without transformers.
_HOMES = {
    "EvictionPolicy": "kvpress.policy",
    "Handle": "kvpress.patching",
    "Inspection": "kvpress.inspection",
    "Policy": "kvpress.policy",
    "PolicyError": "kvpress.errors",
    "Score": "kvpress.scoring",
    "SharedPrompt": "kvpress.sharing",
    "UnsupportedModelError": "kvpress.errors",
    "available": "kvpress.registry",
    "inspect": "kvpress.inspection",
    "make_policy": "kvpress.registry",
    "patch": "kvpress.patching",
    "prepack": "kvpress.prepacking",
    "record_prompt": "kvpress.sharing",
    "score": "kvpress.scoring",
    "tune": "kvpress.evals.tune",
    "unpatch": "kvpress.patching",
}

__all__ = [
    "EvictionPolicy",
    "Handle",
    "Inspection",
    "Policy",
    "PolicyError",
    "Score",
    "SharedPrompt",
    "UnsupportedModelError",
    "available",
    "inspect",
    "make_policy",
    "patch",
    "policies",
    "prepack",
    "record_prompt",
    "score",
    "tune",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "policies":
        return importlib.import_module("kvpress.policies")
    raise AttributeError(f"module 'kvpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
