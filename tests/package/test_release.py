"""What a release rests on: versions that agree, a site that builds, settings of tools that are the lock's."""

import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kvpress

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    citation, project = yaml.safe_load(read("CITATION.cff")), importlib.metadata.metadata("kvpress-toolkit")
    assert {project["Version"], citation["version"]} == {kvpress.__version__}
    assert citation["license"] == project["License-Expression"]
    assert f"## [{kvpress.__version__}]" in read("CHANGELOG.md")


def test_pre_commit_has_the_ruff_of_the_lock() -> None:
    repos = {repo["repo"].rsplit("/", 1)[-1]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    (locked,) = re.findall(r"^ruff==(\S+)", read("constraints.txt"), flags=re.MULTILINE)
    assert repos["ruff-pre-commit"]["rev"] == f"v{locked}"


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "griffe")),
    reason="the extra docs is not installed",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, policy in kvpress.available().items():
        if policy.__module__.startswith("kvpress.policies."):
            page = (tmp_path / "policies" / name / "index.html").read_text(encoding="utf-8")
            assert all(f">{field.name}<" in page for field in policy.parameters()), name
    assert "which-policy-at-which-budget" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "source" / "configs" / "smollm2_needle.yaml").read_text() == read("configs/smollm2_needle.yaml")


@pytest.mark.parametrize("policy", kvpress.available().values(), ids=lambda policy: policy.name)
def test_a_docstring_names_one_parameter_a_line(policy: type[kvpress.Policy]) -> None:
    """Or the site cannot tell which is meant."""
    arguments = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.getdoc(policy) or "", flags=re.MULTILINE)
    named = re.findall(r"^    (\S[^:\n]*):", arguments[1] if arguments else "", flags=re.MULTILINE)
    assert set(named) <= {field.name for field in policy.parameters()}
