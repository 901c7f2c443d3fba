"""What a user installs: the wheel's content, and where `kvpress` and `kernels` are imported from."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

import kvpress

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("kvpress", "kernels", "policies", "evals")

# Imports kvpress and everything under its mapped folders and prints module name -> file. Triton kernels need Triton,
# and the model for lm-evaluation-harness needs that.
IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
folder, *blocked = sys.argv[1:]
sys.path.insert(0, folder)
sys.modules.update(dict.fromkeys(blocked))
names = ["kvpress"]
packages = ["kvpress.kernels", "kvpress.policies", "kvpress.evals"]
if "triton" not in blocked and importlib.util.find_spec("triton"):
    packages.append("kvpress.kernels.gpu")
for package in packages:
    path = importlib.import_module(package).__path__
    names += [module.name for module in pkgutil.walk_packages(path, package + ".")]
if not importlib.util.find_spec("lm_eval"):
    names.remove("kvpress.evals.lm_eval")
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""

WHICH_KERNELS = """
import importlib.util, sys
assert sys.path[0] == ""
sys.path.append(sys.argv[1])
print(importlib.util.find_spec("kernels").origin)
"""


class Wheel(NamedTuple):
    """A built wheel and a folder that it is installed in."""

    file: Path
    installed: Path

    def read(self, name: str) -> str:
        """The text of a file in the wheel's .dist-info folder."""
        with ZipFile(self.file) as archive:
            (path,) = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
            return archive.read(path).decode()


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the caller's Python settings and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def imported_files(folder: Path, cwd: Path, *blocked: str) -> dict[str, Path]:
    """Import kvpress from `folder` in an isolated Python, with the modules `blocked` missing."""
    printed = json.loads(run(sys.executable, "-I", "-c", IMPORT_ALL, folder, *blocked, cwd=cwd))
    return {name: Path(file) for name, file in printed.items()}


def module_names(folder: str) -> set[str]:
    """The modules that `folder` of the repository holds, as imported; those that can be imported here."""
    package = "kvpress." + folder.replace("/", ".")
    left_out = {f"{package}.__init__"}
    if not importlib.util.find_spec("lm_eval"):
        left_out.add("kvpress.evals.lm_eval")
    return {f"{package}.{file.stem}" for file in ROOT.joinpath(folder).glob("*.py")} - left_out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The wheel of this source tree, built in a copy, and a folder that it alone is installed in."""
    source, built, installed = (tmp_path_factory.mktemp(name) for name in ("source", "built", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, ".", cwd=source)
    (file,) = built.glob("*.whl")
    run(*pip, "install", "--no-index", "--no-deps", "--target", installed, file, cwd=built)
    return Wheel(file, installed)


def test_wheel_holds_one_package(wheel: Wheel) -> None:
    with ZipFile(wheel.file) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvpress"}


@pytest.mark.parametrize("folder", PACKAGED)
def test_wheel_holds_every_file(wheel: Wheel, folder: str) -> None:
    target = wheel.installed / "kvpress" / ("" if folder == "kvpress" else folder)
    files = [file.relative_to(ROOT / folder) for file in ROOT.joinpath(folder).rglob("*") if file.is_file()]
    packaged = [file for file in files if "__pycache__" not in file.parts]
    missing = [str(file) for file in packaged if not target.joinpath(file).is_file()]
    assert packaged and not missing, "name new subpackages and data files in pyproject.toml"


def test_wheel_declares_the_command(wheel: Wheel) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read("entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"kvpress": "kvpress.cli:main"}


def test_wheel_needs_no_gpu_package(wheel: Wheel) -> None:
    requirements = message_from_string(wheel.read("METADATA")).get_all("Requires-Dist", [])
    always = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert any(requirement.startswith("torch") for requirement in always)
    assert not [requirement for requirement in always if requirement.startswith(("triton", "flash"))]


@pytest.mark.parametrize("blocked", [(), ("triton", "flash_attn")], ids=["all", "no-triton-no-flash-attn"])
def test_wheel_imports_from_one_folder(wheel: Wheel, tmp_path: Path, blocked: tuple[str, ...]) -> None:
    files = imported_files(wheel.installed, tmp_path, *blocked)
    assert set(files) >= {"kvpress"} | module_names("kernels") | module_names("policies") | module_names("evals")
    if importlib.util.find_spec("triton"):
        assert set(files) >= module_names("kernels/gpu") or "triton" in blocked
    assert [name for name, file in files.items() if not file.is_relative_to(wheel.installed)] == []


def test_versions_agree(wheel: Wheel) -> None:
    assert message_from_string(wheel.read("METADATA"))["Version"] == kvpress.__version__


def test_checkout_imports_its_own_folders(tmp_path: Path) -> None:
    files = imported_files(ROOT, tmp_path)
    folders = ["kernels", "policies", "evals"] + ["kernels/gpu"] * bool(importlib.util.find_spec("triton"))
    for folder in folders:
        for name in module_names(folder):
            assert files[name] == ROOT / folder / f"{name.rpartition('.')[2]}.py"


# Hugging Face's `kernels` package, which transformers imports, must win over the folder kernels/ when Python
# starts in the repository root, and over tests/kernels/ when pytest has put tests/ on the path.
@pytest.mark.parametrize("folder", ["kernels", "kernels/gpu", "tests/kernels", "tests/kernels/gpu"])
def test_kernels_folder_is_no_regular_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_a_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    assert run(sys.executable, "-c", WHICH_KERNELS, tmp_path, cwd=ROOT).strip() == str(package)


def test_hugging_face_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    command = ("install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "15", "--target", tmp_path)
    done = subprocess.run([sys.executable, "-m", "pip", *command, "kernels"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot install the package `kernels`: {done.stderr.strip().splitlines()[-1:]}")
    origin = run(sys.executable, "-c", WHICH_KERNELS, tmp_path, cwd=ROOT).strip()
    assert origin == str(tmp_path / "kernels" / "__init__.py")
