"""Runs packed into one file: every row is kept, and all that reads runs reads it as it reads directories."""

import csv
import json
import shutil

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals.config import make_plan
from kvpress.evals.leaderboard import write_leaderboard
from kvpress.evals.results import load_results
from kvpress.evals.runner import run_plan
from kvpress.evals.store import RunStore, StoreError, append, pack
from support.plans import plan, tree, write
from support.saved import SESSION, row, save

TASK = {"name": "needle", "lengths": [1000], "depths": [0.1, 0.5, 0.9]}
FAILED = row(1, None, error="OutOfMemoryError: no", shared_prompt=None)


@pytest.fixture
def out(tmp_path):
    """Three runs: one finished, one with a sample that failed, was retried and has odd characters, one unfinished."""
    folder = tmp_path / "runs"
    save(folder, {"task": TASK}, [row(i, 1.0) for i in range(3)])
    odd = row(1, 0.5, answer="a\u2028b \ud83d \N{SNOWMAN}", share=1 / 3)
    save(folder, {"task": TASK, "policy": "h2o", "budget": 0.25}, [row(0, 0.1 + 0.2), FAILED, row(2, 1.0), odd])
    save(folder, {"task": TASK, "policy": "snapkv", "budget": 64}, [row(0, 1.0)], finished=False)
    return folder


def contents(folder):
    """File -> bytes of each run's directory."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def lines(folder):
    """Id -> content of each line; only a line feed ends one."""
    found = map(json.loads, (folder / "runs.jsonl").read_bytes().split(b"\n")[:-1])
    return {content["config"]["id"]: content for content in found}


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def test_everything_is_in_the_file(out):
    before = contents(out)
    assert pack(out) == 3
    assert [path.name for path in out.iterdir()] == ["runs.jsonl"]
    packed = lines(out)
    assert len(packed) == 3
    for run, content in packed.items():
        files = {path.name: data for path, data in before.items() if path.parts[0] == run}
        assert content["config"] == json.loads(files["config.json"])
        assert content["sessions"] == [json.loads(line) for line in files["environment.jsonl"].splitlines()]
        assert content["samples"] == [json.loads(line) for line in files["samples.jsonl"].split(b"\n")[:-1]]
        mark = files.get("finished.json")
        assert content["finished"] == (None if mark is None else json.loads(mark))
    assert sorted(len(content["samples"]) for content in packed.values()) == [1, 3, 4]


def test_a_run_goes_back_into_the_same_files(out):
    before = contents(out)
    pack(out)
    for run, content in lines(out).items():
        store = RunStore(out / run)
        with store.locked():
            store.open(content["config"], SESSION)
        for name in ("config.json", "samples.jsonl"):
            assert (out / run / name).read_bytes() == before[(out / run / name).relative_to(out)]
        sessions = (out / run / "environment.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in sessions] == [*content["sessions"], SESSION]
        assert not (out / run / "finished.json").exists()  # it is when it has been looked through again


def test_the_readers_see_no_difference(out, tmp_path):
    def seen(folder):
        invoke("report", folder, "--export", tmp_path / "leaderboard.csv")
        with (folder / "report.csv").open() as file:
            rows = [{name: cell for name, cell in line.items() if name != "path"} for line in csv.DictReader(file)]
        texts = [(folder / "report.md").read_text(), (tmp_path / "leaderboard.csv").read_text(), invoke("ls", folder)]
        return rows, texts

    before = seen(out)
    assert "3 runs moved into runs.jsonl" in invoke("report", out, "--pack")
    assert seen(out) == before
    page = (out / "report.html").read_text()
    assert page.count('<a href="runs.jsonl">') == 3
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert "0 runs moved" in invoke("report", out, "--pack")


def test_each_run_goes_into_the_file_beside_it(out, tmp_path):
    """So that a plan that wrote to that folder finds it there."""
    shutil.move(out, tmp_path / "all" / "one")
    save(tmp_path / "all" / "two", {"task": TASK}, [row(0, 1.0)])
    assert pack(tmp_path / "all") == 4
    found = sorted(path.relative_to(tmp_path / "all") for path in (tmp_path / "all").rglob("*") if path.is_file())
    assert [path.as_posix() for path in found] == ["one/runs.jsonl", "two/runs.jsonl"]


def test_a_second_pack_adds(out):
    pack(out)
    before = lines(out)
    new = save(out, {"task": TASK, "policy": "tova", "budget": 0.5}, [row(0, 1.0)])
    (unfinished,) = (run for run, content in before.items() if content["finished"] is None)
    store = RunStore(out / unfinished)
    with store.locked():
        store.open(before[unfinished]["config"], SESSION)
        for index in (1, 2):
            store.add(row(index, 0.0))
        store.finish(3)
    assert pack(out) == 2
    after = lines(out)
    assert set(after) == {*before, new} and list(after) == sorted(after)
    assert [one["index"] for one in after[unfinished]["samples"]] == [0, 1, 2]
    assert after[unfinished]["finished"]["samples"] == 3
    assert {run: after[run] for run in before if run != unfinished} == {
        run: before[run] for run in before if run != unfinished
    }


def test_a_directory_that_lacks_packed_rows(out):
    pack(out)
    run = save(out / "elsewhere", {"task": TASK}, [row(0, 0.0)])
    shutil.move(out / "elsewhere" / run, out / run)
    before = (out / "runs.jsonl").read_bytes()
    with pytest.raises(StoreError, match=f"{run} and its line in .*runs.jsonl have different rows; move the directory"):
        pack(out)
    assert (out / "runs.jsonl").read_bytes() == before and (out / run / "samples.jsonl").is_file()


def test_what_is_written_now_and_what_is_no_run_stays(out):
    run = next(path for path in sorted(out.iterdir()))
    (run / "notes.txt").write_text("mine")
    (out / "report.md").write_text("")
    busy = sorted(out.glob("*/config.json"))[-1].parent
    with RunStore(busy).locked() as held:
        assert held and pack(out) == 2
    assert (busy / "samples.jsonl").is_file() and busy.name not in lines(out)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert (out / "report.md").is_file()
    assert len(load_results([out])) == 3


def test_a_copy_under_another_name_stays(out):
    """It has the id of another directory: one of the two would be lost."""
    run = next(path.parent for path in sorted(out.glob("*/config.json")))
    shutil.copytree(run, out / "copy")
    assert pack(out) == 3
    assert (out / "copy" / "samples.jsonl").is_file()


def test_a_full_disk_removes_nothing(out, monkeypatch):
    before = contents(out)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        pack(out)
    assert contents(out) == before


@pytest.mark.parametrize("line", ["{", "[]", '{"config": {"id": "a"}}'])
def test_a_broken_line(out, line):
    pack(out)
    with (out / "runs.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=r"runs.jsonl, line 4: no run; restore the file"):
        load_results([out])


def test_the_directory_counts_where_both_are_there(out):
    before = {result.id: result for result in load_results([out])}
    pack(out)
    (failed,) = (run for run, content in lines(out).items() if len(content["samples"]) == 4)
    store = RunStore(out / failed)
    with store.locked():
        store.open(before[failed].config, SESSION)
        store.add(row(2, 0.0))
    (now,) = (result for result in load_results([out]) if result.id == failed)
    assert now.path == out / failed and now.rows[2]["score"] == 0.0 and before[failed].rows[2]["score"] == 1.0


def test_a_leaderboard_of_some_runs(out, tmp_path):
    """`ablate --export` has the runs of its plan, not what else is in the file."""
    pack(out)
    (run,) = make_plan({"out": str(out), "defaults": {"task": TASK}}).runs
    assert write_leaderboard([out], tmp_path / "a.csv", only={run.id}) == 1
    assert write_leaderboard([out], tmp_path / "a.csv") == 3


def test_a_plan_goes_on_from_the_file(folder, loaded, tmp_path):
    """Finished runs are done, an unfinished one goes on in a directory, a failed sample is retried; nothing twice."""
    parts = {"sweep": {"policy": ["full", "h2o", "snapkv"], "budget": [0.5]}}
    wanted = plan(folder, tmp_path / "out", **parts)
    config = write(tmp_path / "a.yaml", tree(folder, tmp_path / "out", **parts))

    def go(**options):
        return run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded, **options)

    assert go().answered == 6
    full, h2o, snapkv = (wanted.out / run.id for run in wanted.runs)
    first, second = (h2o / "samples.jsonl").read_text().splitlines(keepends=True)
    (h2o / "samples.jsonl").write_text(first)
    (h2o / "finished.json").unlink()
    failure = json.loads((snapkv / "samples.jsonl").read_text().splitlines()[1]) | {"error": "no", "score": None}
    append(snapkv / "samples.jsonl", failure)
    (snapkv / "finished.json").write_text('{"samples": 2, "failed": 1, "score": 0.0}\n')
    assert pack(wanted.out) == 3

    shown = invoke("ablate", config, "--dry-run")
    assert "1 runs, 1 answers" in shown and shown.count("finished") == 2 and "1 answered" in shown

    outcome = go()
    assert (outcome.answered, outcome.finished, outcome.finished_before, outcome.failed) == (1, 1, 2, 1)
    assert not full.exists() and not snapkv.exists()
    kept, new = (h2o / "samples.jsonl").read_text().splitlines(keepends=True)
    assert kept == first and json.loads(new)["answer"] == json.loads(second)["answer"]

    outcome = go(retry=True)
    assert (outcome.answered, outcome.finished_before, outcome.failed) == (1, 2, 0)
    assert len((snapkv / "samples.jsonl").read_text().splitlines()) == 4
    assert go().exit_code == 0

    assert pack(wanted.out) == 2 and go().finished_before == 3
    assert [path.name for path in wanted.out.iterdir()] == ["runs.jsonl"]
