"""Results below docs/ come from a commit: a work tree that differs from it is refused before any work."""

import subprocess

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals import environment, runner
from kvpress.evals.cluster import run_on_ray
from kvpress.evals.runner import RunError, check_clean, run_plan
from support.plans import plan, tree, write


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def work_tree(tmp_path, monkeypatch):
    """A work tree as its one commit has it; kvpress itself runs from an install."""
    folder = tmp_path / "tree"
    (folder / "docs").mkdir(parents=True)
    for name in ("code.py", "other.py", "docs/guide.md", ".gitignore"):
        (folder / name).write_text("ignored/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    monkeypatch.setattr(runner, "checkout", lambda: None)
    return folder


def refused(out):
    with pytest.raises(RunError) as error:
        check_clean(out)
    return str(error.value)


def test_a_clean_tree_may_write_everywhere(work_tree):
    for out in ("docs", "docs/results/a", "results"):
        check_clean(work_tree / out)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "code.py").write_text("changed"),
        lambda tree: (tree / "code.py").unlink(),
        lambda tree: ((tree / "code.py").write_text("changed"), git(tree, "add", "code.py")),
        lambda tree: git(tree, "mv", "code.py", "a name.py"),
        lambda tree: (tree / "new.py").write_text(""),
    ],
    ids=["changed", "deleted", "staged", "moved", "new"],
)
def test_a_file_that_differs_is_named(work_tree, change):
    change(work_tree)
    said = refused(work_tree / "docs" / "results" / "a")
    assert f"in {work_tree} these files differ from the commit: " in said
    assert any(name in said for name in ("code.py", "new.py", "a name.py"))
    assert "other.py" not in said
    assert said.endswith("commit or stash them, or choose an out elsewhere")
    check_clean(work_tree / "results" / "a")  # only kept results have to be made again


def test_many_files_are_counted(work_tree):
    for number in range(8):
        (work_tree / f"new{number}.py").write_text("")
    assert "new0.py, new1.py, new2.py, new3.py, new4.py and 3 more;" in refused(work_tree / "docs")


def test_the_results_themselves_do_not_count(work_tree):
    """Nor what git ignores: a run can go on, be packed and be made again."""
    for name in ("docs/results/a/runs.jsonl", "docs/results/a/0123/.lock", "ignored/cache"):
        (work_tree / name).parent.mkdir(parents=True, exist_ok=True)
        (work_tree / name).write_text("")
    (work_tree / "docs" / "guide.md").unlink()
    check_clean(work_tree / "docs" / "results" / "a")


def test_links_and_nested_trees(work_tree, tmp_path):
    (work_tree / "code.py").write_text("changed")
    (tmp_path / "link").symlink_to(work_tree / "docs")
    assert "code.py" in refused(tmp_path / "link" / "a")
    inner = work_tree / "docs" / "inner"
    (inner / "docs").mkdir(parents=True)
    (inner / "file").write_text("")
    git(inner, "init", "-q")
    git(inner, "add", ".")
    git(inner, "commit", "-q", "-m", "all")
    check_clean(inner / "docs")  # a tree of its own
    check_clean(tmp_path / "docs")  # no tree


def test_the_code_that_runs_counts(work_tree, tmp_path, monkeypatch):
    """Results may lie in another work tree than kvpress."""
    other = tmp_path / "other"
    (other / "docs").mkdir(parents=True)
    git(other, "init", "-q")
    git(other, "commit", "-q", "-m", "none", "--allow-empty")
    check_clean(other / "docs")
    monkeypatch.setattr(runner, "checkout", lambda: work_tree)
    check_clean(other / "docs")
    (work_tree / "code.py").write_text("changed")
    assert f"in {work_tree} these files differ from the commit: code.py;" in refused(other / "docs")


def test_git_that_cannot_say(work_tree):
    (work_tree / ".git" / "index").write_bytes(b"broken")
    said = refused(work_tree / "docs")
    assert f"git cannot say whether {work_tree} is as its commit has it" in said and "choose an out elsewhere" in said


def test_before_any_work(work_tree, tmp_path):
    """No model is loaded, no cluster is looked for, nothing is written; a run that is complete is no work."""
    (work_tree / "code.py").write_text("changed")
    out = work_tree / "docs" / "results"

    def never(*_):
        raise AssertionError("loaded a model for nothing")

    wanted = plan("tiny", out)
    with pytest.raises(RunError, match=r"code\.py"):
        run_plan(wanted, Console(quiet=True), loader=never)
    with pytest.raises(RunError, match=r"code\.py"):
        run_on_ray(wanted, Console(quiet=True))
    result = CliRunner().invoke(app, ["ablate", str(write(tmp_path / "a.yaml", tree("./none", out)))])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "code.py" in result.stderr
    result = CliRunner().invoke(app, ["eval", "--model", "./none", "--out", str(out)])
    assert result.exit_code == 2 and "code.py" in result.stderr
    assert not out.exists()


def test_the_recorded_commit(work_tree, monkeypatch):
    monkeypatch.setattr(environment, "checkout", lambda: work_tree)

    def recorded():
        environment.commit.cache_clear()
        return environment.commit()

    try:
        clean = recorded()
        assert len(clean) == 12
        (work_tree / "docs" / "guide.md").write_text("changed")
        (work_tree / "results").mkdir()
        (work_tree / "results" / "row").write_text("")
        assert recorded() == clean  # no answer depends on these
        (work_tree / "code.py").write_text("changed")
        assert recorded() == f"{clean}-dirty"
        monkeypatch.setattr(environment, "checkout", lambda: None)
        assert recorded() is None
    finally:
        environment.commit.cache_clear()
