"""Interrupted runs: killed processes, torn lines, full disks, two processes at once."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import kvpress
from kvpress.evals.runner import run_plan
from kvpress.evals.store import RunStore, StoreError, append, find_runs, is_locked, read_rows, write_whole
from support.plans import plan, tree, write

SWEEP = {"policy": ["full", "h2o"], "budget": [0.5]}
MANY = {"name": "needle", "lengths": [400], "depths": [0.1, 0.3, 0.5, 0.7, 0.9], "repeats": 8}


def start(config, **options):
    """`kvpress ablate` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(kvpress.__file__).parents[1])}
    command = [sys.executable, "-c", "from kvpress.cli import main; main()", "ablate", str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def lines(out):
    return {path.parent.name: path.read_bytes().splitlines() for path in sorted(out.glob("*/samples.jsonl"))}


def wait_for(what, process, seconds=120):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_killed_run_goes_on_where_it_was(folder, loaded, tmp_path):
    out = tmp_path / "out"
    config = write(tmp_path / "a.yaml", tree(folder, out, defaults={"task": MANY}, sweep=SWEEP))
    process = start(config)
    wait_for(lambda: sum(map(len, lines(out).values())) >= 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = lines(out)
    assert len(before) == 2 and all(len(rows) < 40 for rows in before.values())
    assert not list(out.glob("*/finished.json"))
    # what a kill in the middle of a write leaves
    torn = out / next(iter(before)) / "samples.jsonl"
    with torn.open("ab") as file:
        file.write(b'{"index": 39, "prompt_ha')

    wanted = plan(folder, out, defaults={"task": MANY}, sweep=SWEEP)
    outcome = run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded)
    assert outcome.answered == 80 - sum(map(len, before.values()))
    after = lines(out)
    for name, rows in before.items():
        assert after[name][: len(rows)] == rows  # byte by byte, so nothing was answered anew
        assert [json.loads(row)["index"] for row in after[name]] == list(range(40))
        assert len((out / name / "environment.jsonl").read_text().splitlines()) == 2
    # the same as without the interruption
    whole = plan(folder, tmp_path / "whole", defaults={"task": MANY}, sweep=SWEEP)
    run_plan(whole, Console(quiet=True), loader=lambda *_: loaded)
    for run in whole.runs:
        ours, theirs = (read_rows(p.out / run.id) for p in (wanted, whole))
        assert [ours[i]["answer"] for i in range(40)] == [theirs[i]["answer"] for i in range(40)]


def test_two_processes_share_no_directory(folder, loaded, tmp_path):
    out = tmp_path / "out"
    config = write(tmp_path / "a.yaml", tree(folder, out, defaults={"task": MANY}))
    process = start(config)
    wait_for(lambda: lines(out), process)
    wanted = plan(folder, out, defaults={"task": MANY})
    assert is_locked(out / wanted.runs[0].id)
    outcome = run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded)
    assert (outcome.answered, outcome.left_to_others, outcome.exit_code) == (0, 1, 1)
    assert process.poll() is None, "the first process was done before the second began; give it more to do"
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "40 new answers" in said
    assert [json.loads(row)["index"] for row in lines(out)[wanted.runs[0].id]] == list(range(40))
    assert not is_locked(out / wanted.runs[0].id)


def test_a_full_disk_leaves_whole_lines(folder, loaded, tmp_path):
    """A limit on the size of files stands in for the disk; raised again, the run goes on."""
    out = tmp_path / "out"
    config = write(tmp_path / "a.yaml", tree(folder, out, defaults={"task": MANY}))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = start(config, preexec_fn=limit)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "cannot write" in said and "start it again" in said
    (rows,) = lines(out).values()
    assert 1 <= len(rows) < 40
    assert all(json.loads(row) for row in rows)
    (directory,) = out.iterdir()
    assert (directory / "samples.jsonl").read_bytes().endswith(b"}\n")
    assert not (directory / "finished.json").exists()
    outcome = run_plan(plan(folder, out, defaults={"task": MANY}), Console(quiet=True), loader=lambda *_: loaded)
    assert outcome.answered == 40 - len(rows)


def test_a_write_that_fails_takes_its_part_back(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    append(path, {"index": 0})
    truncated = []
    monkeypatch.setattr(
        os, "ftruncate", lambda file, size, real=os.ftruncate: truncated.append(size) or real(file, size)
    )
    with pytest.raises(StoreError, match="cannot write"):
        append(Path("/dev/full"), {"index": 1})
    with pytest.raises(ValueError):
        append(path, {"index": float("nan")})
    assert path.read_text() == '{"index": 0}\n'


def test_a_whole_file_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_a_torn_line_is_forgiven(tmp_path):
    rows = tmp_path / "samples.jsonl"
    rows.write_text('{"index": 0, "text": "a\u2028b"}\n{"index": 1}\n{"ind', encoding="utf-8")
    assert list(read_rows(tmp_path)) == [0, 1]
    rows.write_text('{"index": 0}\n{"ind\n{"index": 2}\n')
    with pytest.raises(StoreError, match="line 2"):
        read_rows(tmp_path)


def test_the_latest_row_of_a_sample_counts(tmp_path):
    for score in (None, 1.0):
        append(tmp_path / "samples.jsonl", {"index": 0, "score": score})
    assert read_rows(tmp_path)[0]["score"] == 1.0


def test_a_directory_of_another_run(tmp_path):
    store = RunStore(tmp_path)
    store.open({"id": "a", "definition": {"x": 1}}, {})
    store.open({"id": "a", "definition": {"x": 1}}, {})
    with pytest.raises(StoreError, match="another run"):
        store.open({"id": "a", "definition": {"x": 2}}, {})


def test_a_lock_is_free_again(tmp_path):
    one, two = RunStore(tmp_path), RunStore(tmp_path)
    with one.locked() as held:
        assert held
        with two.locked() as also:
            assert not also
    with two.locked() as held:
        assert held


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"), RunStore(tmp_path / "file" / "x").locked():
        pass


def test_no_results(tmp_path):
    with pytest.raises(StoreError, match="no folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(StoreError, match="no results"):
        find_runs([tmp_path])
