"""Tasks from outside of the package: in a file or a registered distribution, with a hash of their code in the results."""

import json

import pytest
from rich.console import Console

from kvpress import outside
from kvpress.evals import TaskError, make_task
from kvpress.evals.config import read_plan
from kvpress.evals.runner import run_plan
from kvpress.evals.tasks import find_task, import_tasks, task_origin, tasks_to_import
from support.plans import tree, write

pytestmark = pytest.mark.usefixtures("without_traces")

ECHO = '''
from dataclasses import dataclass

from kvpress.evals import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Say the last word again."""

    name = "echo_of_test"
    metric = "echoed"
    words: int = 5

    def samples(self, tokenizer):
        for index in range(2):
            context = " ".join(["word"] * self.words) + f" {index}"
            yield Sample(index, context, " Again:", (str(index),), 4)

    def score(self, sample, answer):
        return 0.25 if answer else 0.75
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the task in my_task.py and in the package mine_tasks; entry points are looked up anew."""
    (tmp_path / "my_task.py").write_text(ECHO, encoding="utf-8")
    packages = tmp_path / "packages"
    (packages / "mine_tasks").mkdir(parents=True)
    (packages / "mine_tasks" / "__init__.py").write_text(ECHO, encoding="utf-8")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(tmp_path)
    outside._registered.cache_clear()
    yield tmp_path
    outside._registered.cache_clear()


def test_a_run_of_a_task_in_a_file_relative_to_the_configuration(mine, folder, loaded, monkeypatch):
    content = tree(
        folder, mine / "out", defaults={"task": {"name": "./my_task.py:Echo", "words": 9}, "budget": 4, "policy": "h2o"}
    )
    config = write(mine / "a.yaml", content)
    monkeypatch.chdir("/")
    wanted = read_plan(config)
    assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
    (run,) = wanted.runs
    (first, _) = (json.loads(line) for line in (wanted.out / run.id / "samples.jsonl").read_text().splitlines())
    assert first["score"] in (0.25, 0.75) and first["answers"] == ["0"]
    saved = json.loads((wanted.out / run.id / "config.json").read_text())
    assert saved["task"] == "echo_of_test" and saved["metric"] == "echoed"
    assert saved["definition"]["task"]["from"] == task_origin(run.task)
    # changed code is another run; what another process imports is the same file or nothing
    paths = tasks_to_import([run.task])
    import_tasks(paths)
    (mine / "my_task.py").write_text(ECHO.replace("0.25", "0.5"), encoding="utf-8")
    assert read_plan(config).runs[0].id != run.id
    with pytest.raises(TaskError, match="all need the same file"):
        import_tasks(paths)


def test_a_module_and_an_entry_point(mine):
    info = mine / "packages" / "mine_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-of-test\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[kvpress.tasks]\necho_of_test = mine_tasks:Echo\n", encoding="utf-8")
    with pytest.raises(TaskError, match="unknown task 'echo_of_tst'; did you mean 'echo_of_test'"):
        make_task("echo_of_tst")
    task = make_task({"name": "echo_of_test", "words": 2})
    assert type(task) is find_task("mine_tasks:Echo") is find_task("mine_tasks.Echo")
    assert task_origin(task).startswith("mine_tasks:Echo@")
    assert task_origin(make_task("needle")) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no_task.py:Echo", "cannot read .*no_task.py"),
        ("./my_task.py:Ecko", "has no 'Ecko'; its task classes are Echo"),
        ("mine_tasks.nothing:Echo", r"there is no module 'mine_tasks.nothing'.*my_task.py:MyTask"),
        ("kvpress.policies:H2O", "the class H2O, and no task class; name one that derives from kvpress.evals.Task"),
        ("no/file", r"one of your own is named as package.module:MyTask or ./my_task.py:MyTask"),
    ],
)
def test_what_is_no_task_is_named(mine, name, said):
    with pytest.raises(TaskError, match=said):
        make_task(name)
