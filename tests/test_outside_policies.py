"""Policies outside of the package: in a file, in a module, registered by a distribution; found, recorded, and refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress import outside
from kvpress.cli import app
from kvpress.compat import CACHE
from kvpress.policies import H2O, SnapKV
from kvpress.registry import find_policy, import_all, origin, path_of, to_import
from support.matrix import prompt, sharp_llama
from support.refusals import refused
from support.tiny_saved import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
from dataclasses import dataclass
from kvpress.policies import SnapKV
from kvpress.policy import EvictionPolicy, Quota, entries_for
"""

# What it keeps is known without running it: of 20 tokens with a budget of 4 the positions 0, 1, 2 and 19.
KEEP_FIRST = '''
@dataclass(frozen=True, kw_only=True)
class KeepFirst(EvictionPolicy):
    """Keep the first tokens, and the newest one."""

    name = "keep_first"
    evict_every = None
    budget: float | int = 4

    def quota(self, tokens, layer, layers):
        return Quota(max(1, entries_for(self.budget, tokens)), 1)

    def score(self, entries):
        return -entries.positions.float()
'''
KEPT = [0, 1, 2, 19]


pytestmark = pytest.mark.usefixtures("without_traces")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the policy in my_policy.py and in the package mine.deep.module, importable, and the working directory."""
    (tmp_path / "my_policy.py").write_text(HEAD + KEEP_FIRST, encoding="utf-8")
    package = tmp_path / "packages" / "mine" / "deep"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "module.py").write_text(HEAD + KEEP_FIRST, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def kept(spec):
    """The positions that a prompt of 20 tokens leaves under a policy, of each layer and kv head."""
    model = sharp_llama()
    with torch.no_grad(), kvpress.patch(model, spec):
        cache = model(torch.tensor([prompt(20)]))[CACHE]
    heads = [head for layer in cache.layers for head in layer.positions[0]]
    return [sorted(position for position in head.tolist() if position >= 0) for head in heads]


def test_policies_are_an_attribute_of_the_package():
    code = "import sys, kvpress; assert 'torch' not in sys.modules; print(kvpress.policies.H2O.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "h2o\n"
    assert "policies" in dir(kvpress)


# ------------------------------------------------------------------ found


@pytest.mark.parametrize(
    "spec",
    [
        "./my_policy.py:KeepFirst",
        "my_policy.py:KeepFirst",
        "./my_policy.py",
        Path("my_policy.py"),
        "mine.deep.module:KeepFirst",
        "mine.deep.module.KeepFirst",
        {"name": "./my_policy.py:KeepFirst", "budget": 0.2},
        {"name": "mine.deep.module:KeepFirst", "budget": 4},
        ["./my_policy.py"],
        "other/there.yaml",
        "other/mapping.yaml",
        [{"name": "./my_policy.py"}, {"name": "tidal_decode", "k": 4, "sparse_layer_start": 0, "correction_layer": 1}],
    ],
    ids=str,
)
def test_patch_takes_it_wherever_a_name_may_stand(mine, spec):
    (mine / "other").mkdir()
    # files named in YAML are relative to it
    (mine / "other" / "there.yaml").write_text("../my_policy.py:KeepFirst\n", encoding="utf-8")
    (mine / "other" / "mapping.yaml").write_text("{name: ../my_policy.py, budget: 0.2}\n", encoding="utf-8")
    assert kept(spec) == [KEPT] * 4


def test_inside_another_policy(mine):
    """As what AdaKV wraps: with alpha=1 the budget is not shared, so that each head keeps what the inner policy says."""
    spec = {"name": "ada_kv", "inner": {"name": "./my_policy.py", "budget": 4}, "alpha": 1}
    assert kept(spec) == [KEPT] * 4
    policy = kvpress.make_policy(spec)
    assert policy.describe() == "ada_kv(inner=keep_first(budget=4), alpha=1)".replace(
        "keep_first(budget=4)", "keep_first()"
    )
    assert re.fullmatch(r"my_policy\.py:KeepFirst@[0-9a-f]{8}", origin(policy))
    (mine / "wrapped.yaml").write_text("{name: ada_kv, inner: ./my_policy.py, alpha: 1}\n", encoding="utf-8")
    assert kvpress.make_policy("wrapped.yaml") == policy


def test_an_imported_class_is_found_by_its_name_too(mine):
    with refused("unknown policy 'keep_first'", "package.module:MyPolicy", "./my_policy.py:MyPolicy"):
        kvpress.make_policy("keep_first")
    found = find_policy("mine.deep.module:KeepFirst")
    assert find_policy("keep_first") is found is kvpress.available()["keep_first"]


def test_the_path_of_a_class_finds_it_again(mine, monkeypatch):
    for spec in ("./my_policy.py", "mine.deep.module.KeepFirst"):
        cls = find_policy(spec)
        monkeypatch.chdir("/")
        assert find_policy(path_of(cls)) is cls
        monkeypatch.chdir(mine)
    assert path_of(H2O) == ""


def test_a_file_that_was_changed_is_read_again(mine):
    first = find_policy("./my_policy.py")
    assert find_policy(str(mine / "my_policy.py") + ":KeepFirst") is first
    (mine / "my_policy.py").write_text(
        (HEAD + KEEP_FIRST).replace("= 4", "= 3"), encoding="utf-8"
    )  # of the same length
    second = find_policy("./my_policy.py")
    assert (first().budget, second().budget) == (4, 3)
    assert origin(first()) != origin(second())
    assert find_policy("keep_first") is second
    assert not list(mine.glob("__pycache__"))


def test_a_cell_that_is_run_again_gives_the_new_class(monkeypatch):
    """As in a notebook, where the class of before lives on."""
    cells = type(sys)("mine_cells")
    monkeypatch.setitem(sys.modules, "mine_cells", cells)
    classes = []
    for _ in range(3):
        exec(HEAD + KEEP_FIRST, vars(cells))
        classes.append(cells.KeepFirst)
        assert find_policy("keep_first") is classes[-1]


def test_a_class_derived_from_a_policy_takes_no_name_away():
    class Unnamed(H2O):
        pass

    assert find_policy("h2o") is H2O
    assert Unnamed not in kvpress.available().values()


# ------------------------------------------------------------------ refused


TWO = HEAD + KEEP_FIRST + KEEP_FIRST.replace("KeepFirst", "Other").replace("keep_first", "other")


@pytest.mark.parametrize(
    ("content", "attribute", "words"),
    [
        (TWO, "", ("2 policy classes", "my_policy.py:KeepFirst or", "my_policy.py:Other")),
        (HEAD, "", ("defines no policy class", "EvictionPolicy")),
        (HEAD, ":KeepFirst", ("has no 'KeepFirst'", "defines no policy class")),
        (TWO, ":Keepfirst", ("has no 'Keepfirst'", "KeepFirst, Other")),
        (HEAD, ":dataclass", ("is a function", "no policy class")),
        (HEAD, ":Quota", ("is the class Quota", "no policy class")),
        (HEAD + KEEP_FIRST + "one = KeepFirst()\n", ":one", ("is a policy that is built already", "KeepFirst")),
        (HEAD + "class Half(EvictionPolicy):\n    name = 'half'\n", ":Half", ("defines no quota",)),
        (HEAD + "class New(SnapKV):\n    pass\n", "", ("'snapkv'", "both named", "New", "another name")),
        (HEAD + KEEP_FIRST.replace("keep_first", "h2o"), "", ("both named 'h2o'", "give your own class another name")),
        (HEAD + KEEP_FIRST.replace("keep_first", ""), "", ("has no name", "name =")),
        (HEAD + KEEP_FIRST.replace("@dataclass(frozen=True, kw_only=True)", ""), "", ("is no dataclass", "budget")),
        (
            HEAD + KEEP_FIRST.replace("@dataclass(frozen=True, kw_only=True)", "@dataclass"),
            "",
            ("frozen", "my_policy.py, line 5"),
        ),
        ("import no_such_package\n", "", ("ModuleNotFoundError", "no_such_package", "line 1", "PYTHONPATH")),
        ("x = 1\n\ny = 1 / 0\n", "", ("ZeroDivisionError", "my_policy.py, line 3")),
        ("class :\n", "", ("SyntaxError", "my_policy.py, line 1")),
    ],
)
def test_files_that_do_not_work(tmp_path, monkeypatch, content, attribute, words):
    monkeypatch.chdir(tmp_path)
    Path("my_policy.py").write_text(content, encoding="utf-8")
    before = set(sys.modules)
    with refused(f"my_policy.py{attribute}", *words):
        kvpress.make_policy(f"./my_policy.py{attribute}")
    with refused(*words):  # a second time, too
        kvpress.patch(sharp_llama(), {"name": f"./my_policy.py{attribute}"})
    if "cannot be imported" in str(words):
        assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./none.py:X", ("./none.py:X", "cannot read", "No such file")),
        ("./none.py", ("./none.py", "cannot read")),
        ("no_such_package.module:X", ("there is no module 'no_such_package'", "PYTHONPATH", "./my_policy.py:MyPolicy")),
        ("mine.deep.other:X", ("there is no module 'mine.deep.other'",)),
        ("mine.deep.module:X", ("mine.deep.module has no 'X'", "KeepFirst")),
        ("mine.deep.module", ("mine.deep has no 'module'", "package.module:MyPolicy")),
        ("os.path:join", ("is a function",)),
        ("mine.deep.module:KeepFirst.budget", ("is a int",)),
        ({"name": "./my_policy.py", "budgt": 3}, ("./my_policy.py has no field 'budgt'", "'budget'")),
        ({"name": "./my_policy.py:KeepFirst", "inner": 3}, ("no field 'inner'",)),
    ],
    ids=str,
)
def test_paths_that_do_not_work(mine, spec, words):
    with refused(*words):
        kvpress.make_policy(spec)


def test_a_name_of_two_classes(mine):
    """Nobody guesses which one was meant; the built-in ones are as before for everything else."""
    find_policy("mine.deep.module:KeepFirst"), find_policy("./my_policy.py")
    with refused("'keep_first'", "mine.deep.module:KeepFirst", f"{mine}/my_policy.py:KeepFirst", "instead of the name"):
        kvpress.make_policy("keep_first")
    assert find_policy("h2o") is H2O


# ------------------------------------------------------------------ registered by a distribution


def distribution(folder, name, **points):
    """A distribution as an installer leaves it, whose modules are those in `folder`."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[kvpress.policies]", *lines, ""]), encoding="utf-8")


@pytest.fixture
def packages(mine):
    """Where distributions are found; their entry points are looked up anew."""
    outside._registered.cache_clear()
    yield mine / "packages"
    outside._registered.cache_clear()


def test_an_entry_point_makes_a_policy_known(mine, packages):
    distribution(packages, "mine-of-test", keep_first="mine.deep.module:KeepFirst")
    assert find_policy("h2o") is H2O
    with refused("unknown policy 'keep_frist'", "did you mean 'keep_first'"):
        kvpress.make_policy("keep_frist")
    assert "mine.deep.module" not in sys.modules  # it was not asked for
    assert kept({"name": "keep_first", "budget": 0.2}) == [KEPT] * 4
    assert kvpress.available()["keep_first"] is find_policy("mine.deep.module:KeepFirst")
    listed = CliRunner().invoke(app, ["policies"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert listed.exit_code == 0
    for shown in ("keep_first", "Keep the first tokens", "mine.deep.module:KeepFirst", "snapkv"):
        assert shown in listed.output


@pytest.mark.parametrize(
    ("points", "asked", "words"),
    [
        ({"h2o": "mine.deep.module:KeepFirst"}, "h2o", ("'h2o'", "mine-of-test", "calls itself 'keep_first'")),
        ({"keep_first": "mine.none:X"}, "keep_first", ("'keep_first'", "mine-of-test", "no module 'mine.none'")),
        (
            {"first": "mine.deep.module:KeepFirst"},
            "first",
            ("'first'", "'keep_first'", "mine.deep.module:KeepFirst works"),
        ),
    ],
)
def test_entry_points_that_do_not_work(mine, packages, points, asked, words):
    distribution(packages, "mine-of-test", **points)
    with refused(*words):
        kvpress.make_policy(asked)
    assert find_policy("snapkv") is SnapKV  # the others go on working
    listed = CliRunner().invoke(app, ["policies"])
    assert listed.exit_code == 2 and "mine-of-test" in listed.stderr and listed.stderr.count("\n") == 1


def test_an_entry_point_with_the_name_of_a_policy_of_the_package(mine, packages):
    (packages / "mine" / "h2o.py").write_text(HEAD + KEEP_FIRST.replace("keep_first", "h2o"), encoding="utf-8")
    distribution(packages, "mine-of-test", h2o="mine.h2o:KeepFirst")
    with refused("'h2o'", "kvpress.policies.H2O and mine.h2o:KeepFirst", "another name"):
        kvpress.make_policy("h2o")


def test_two_distributions_with_one_name(mine, packages):
    distribution(packages, "mine-of-test", keep_first="mine.deep.module:KeepFirst")
    distribution(packages, "mine-too", keep_first="mine.other:Other")
    with refused("mine-of-test", "mine-too", "both registered as 'keep_first'"):
        kvpress.make_policy("keep_first")


# ------------------------------------------------------------------ on the command line, in evaluations


def test_generate(mine, folder):
    options = ("--model", folder, "--budget", "4", "--max-new-tokens", "2")
    for policy in ("./my_policy.py:KeepFirst", "./my_policy.py", "mine.deep.module:KeepFirst"):
        outcome = CliRunner().invoke(app, ["generate", "--policy", policy, *options, "The whale"], env={"TERM": "dumb"})
        assert outcome.exit_code == 0, outcome.output
        assert "keep_first(" in outcome.output
    outcome = CliRunner().invoke(app, ["generate", "--policy", "./none.py", *options, "The whale"])
    assert outcome.exit_code == 2 and "none.py" in outcome.stderr and outcome.stderr.count("\n") == 1


def test_ablate(mine, folder, monkeypatch):
    """Relative to the configuration, wherever it is run; rows say what ran, and changed code is another run."""
    task = {"name": "needle", "lengths": [400], "depths": [0.5]}
    inner = {"name": "ada_kv", "inner": "./my_policy.py:KeepFirst"}
    content = {
        "out": str(mine / "out"),
        "defaults": {"model": folder, "device": "cpu", "dtype": "float32", "task": task, "budget": 0.5},
        "sweep": {"policy": ["full", "./my_policy.py", "mine.deep.module:KeepFirst", inner]},
    }
    content["sweep"]["policy"].pop()  # AdaKV's budget is that of what it wraps: a grid of its own
    content["sweep"] = [content["sweep"], {"policy": [inner], "budget": [None]}]
    (mine / "a.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    elsewhere = mine / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def ablate():
        outcome = CliRunner().invoke(app, ["ablate", str(mine / "a.yaml"), "--export", "board.csv"])
        assert outcome.exit_code == 0, outcome.output
        return {json.loads(path.read_text())["policy"] for path in mine.glob("out/*/config.json")}

    first = ablate()
    (shown,) = [name for name in first if name.startswith("keep_first(budget=0.5) from my_policy.py")]
    digest = re.fullmatch(r"keep_first\(budget=0.5\) from my_policy\.py:KeepFirst@([0-9a-f]{8})", shown).group(1)
    assert first == {
        "full()",
        shown,
        f"keep_first(budget=0.5) from mine.deep.module:KeepFirst@{digest}",
        f"ada_kv(inner=keep_first()) from my_policy.py:KeepFirst@{digest}",
    }
    assert shown in Path("board.csv").read_text()
    assert ablate() == first
    (mine / "my_policy.py").write_text(HEAD + KEEP_FIRST + "# another version\n", encoding="utf-8")
    assert len(ablate() - first) == 2
    (mine / "my_policy.py").write_text(HEAD, encoding="utf-8")
    outcome = CliRunner().invoke(app, ["ablate", str(mine / "a.yaml")])
    assert outcome.exit_code == 2 and "a.yaml, line" in outcome.stderr and "no policy class" in outcome.stderr


def test_what_another_process_imports(mine):
    """Paths, and the hash by which it tells that its code is the same."""
    policies = [kvpress.make_policy(spec) for spec in ("h2o", "./my_policy.py", "mine.deep.module:KeepFirst")]
    wanted = to_import(policies)
    assert list(wanted) == [f"{mine}/my_policy.py:KeepFirst", "mine.deep.module:KeepFirst"]
    import_all(wanted)
    with refused("my_policy.py:KeepFirst@", "my_policy.py:KeepFirst@00000000", "the same file"):
        import_all({f"{mine}/my_policy.py:KeepFirst": "my_policy.py:KeepFirst@00000000"})


# ------------------------------------------------------------------ the example


def test_the_example_is_the_policy_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Write a policy") :]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL).group(1)
    example = ROOT / "examples" / "own_policy.py"
    assert code in example.read_text(encoding="utf-8")
    for positions in kept({"name": str(example), "budget": 5}):
        assert len(positions) == 5 and positions[-1] == 19
