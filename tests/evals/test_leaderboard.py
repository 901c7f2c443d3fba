"""The exported leaderboard: a line per policy, family and length, its figures by hand."""

import csv

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals.leaderboard import write_leaderboard
from kvpress.evals.store import StoreError
from support.plans import tree, write
from support.saved import MIB, row, save


def ruler(task, length=4096, **fields):
    return {"task": {"name": "ruler", "task": task}, "length": length, "model": "m", **fields}


@pytest.fixture
def results(tmp_path):
    """Full attention and H2O at a half, on two tasks of one family at one length, and full attention on another length."""
    h2o = {"policy": "h2o", "budget": 0.5}
    save(tmp_path, ruler("vt"), [row(i, score) for i, score in enumerate([1.0, 1.0, 1.0, 0.0])])
    save(tmp_path, ruler("cwe"), [row(i, 0.5) for i in range(4)])
    ours = {"share": 0.5, "ms": 8.0, "batch": 2}
    save(tmp_path, ruler("vt", **h2o), [row(i, score, **ours) for i, score in enumerate([1.0, 1.0, 0.0, 0.0])])
    failed = row(4, None, error="OutOfMemoryError: no room")
    save(tmp_path, ruler("cwe", **h2o), [*(row(i, 0.5, **ours) for i in range(4)), failed])
    save(tmp_path, ruler("vt", 8192), [row(0, 1.0)])
    return tmp_path


def lines(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_by_hand(results, tmp_path):
    path = tmp_path / "new" / "leaderboard.csv"
    assert write_leaderboard([results], path) == 3
    full, h2o, longer = lines(path)
    assert [one["policy"] for one in (full, h2o, longer)] == ["full()", "h2o(budget=0.5)", "full()"]
    assert [one["length"] for one in (full, h2o, longer)] == ["4096", "4096", "8192"]
    assert {one["dataset"] for one in lines(path)} == {"ruler"}
    # the mean of the two tasks' means, in points of a hundred
    assert (full["score"], full["tasks"], full["n"], full["failed"]) == ("62.5", "2", "8", "0")
    assert (h2o["score"], h2o["tasks"], h2o["n"], h2o["failed"]) == ("50.0", "2", "8", "1")
    assert (full["to_full"], h2o["to_full"]) == ("", "-12.5")
    assert (full["budget"], h2o["budget"]) == ("", "0.5")
    assert (full["compression_ratio"], h2o["compression_ratio"]) == ("0.0", "0.5")
    assert (h2o["kept_bytes"], h2o["kept_of_full"], h2o["read_share"]) == (str(2 * MIB), "0.5", "0.5")
    assert (full["ms_per_token"], h2o["ms_per_token"], h2o["prompt_ms"]) == ("10.0", "8.0", "100.0")
    assert (full["batch"], h2o["batch"]) == ("", "2")
    assert (h2o["model"], h2o["kind"], h2o["query_aware"]) == ("m", "evicting", "True")
    assert h2o["dtype_hardware"] == "float32 on a machine" and h2o["commit"] == "abc"
    assert float(h2o["score_low"]) <= 50 <= float(h2o["score_high"])
    assert all((results / run / "samples.jsonl").is_file() for run in h2o["runs"].split())


def test_the_best_is_first_and_seen_questions_are_apart(results, tmp_path):
    save(results, ruler("vt", policy="snapkv", budget=64), [row(i, 1.0, share=0.1) for i in range(4)])
    save(results, ruler("vt", query_aware=False), [row(i, 0.9) for i in range(4)])
    write_leaderboard([results], tmp_path / "a.csv")
    found = [(one["policy"], one["query_aware"], one["score"]) for one in lines(tmp_path / "a.csv")]
    assert found[:4] == [
        ("snapkv(budget=64)", "True", "100.0"),
        ("full()", "True", "62.5"),
        ("h2o(budget=0.5)", "True", "50.0"),
        ("full()", "False", "90.0"),
    ]


def test_nothing_to_write(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="no sample has an answer yet"):
            write_leaderboard([folder], tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_a_place_that_cannot_be_written(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot make the folder .*file"):
        write_leaderboard([results], tmp_path / "file" / "a.csv")


def test_each_command_exports(folder, tmp_path):
    """eval and ablate what they ran, not what else lies in the folder; report all."""
    out = tmp_path / "out"

    def call(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    sizes = ("--length", 400, "--samples", 1)
    model = ("--model", folder, "--device", "cpu", "--dtype", "float32")
    call("eval", *model, *sizes, "--policy", "h2o", "--budget", 0.5, "--out", out, "--export", tmp_path / "eval.csv")
    assert [one["policy"] for one in lines(tmp_path / "eval.csv")] == ["h2o(budget=0.5)"]
    sweep = {"policy": ["full", "snapkv"], "budget": [0.5]}
    config = write(tmp_path / "a.yaml", tree(folder, out, defaults={"samples": 1}, sweep=sweep))
    call("ablate", config, "--export", tmp_path / "ablate.csv")
    assert {one["policy"] for one in lines(tmp_path / "ablate.csv")} == {"full()", "snapkv(budget=0.5)"}
    said = call("report", out, "--export", tmp_path / "all.csv")
    assert str(tmp_path / "all.csv") in said
    assert len(lines(tmp_path / "all.csv")) == 3
