"""The search on a tiny model: what it finds against the whole grid, resuming, limits, and what it refuses."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app
from kvpress.evals import tune as tuning
from kvpress.evals.candidates import Candidate, interval
from kvpress.evals.config import ConfigError, make_plan
from kvpress.evals.runner import RunError
from kvpress.evals.statistics import Estimate
from kvpress.evals.task import TaskError
from kvpress.evals.tune import Limits, TuneError, read_share, read_size, tune
from support.pages import pictures, shown, words

WORDS = (
    "the",
    "whale",
    "swam",
    "past",
    "a",
    "red",
    "ship",
    "while",
    "nobody",
    "on",
    "deck",
    "looked",
    "up",
    "from",
    "cards",
)


@pytest.fixture
def rows(tmp_path):
    """Writes rows that differ, and gives their file."""

    def write(count=10, length=120, **fields):
        path = tmp_path / "mine.jsonl"
        texts = [" ".join(WORDS[(i * k + i) % len(WORDS)] for k in range(length))[:length] for i in range(count)]
        lines = [
            {"context": text, **{name: value[i] for name, value in fields.items()}} for i, text in enumerate(texts)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def search(folder, loaded, rows, tmp_path):
    def go(data=None, out="found/tuned.yaml", **options):
        given = {
            "policies": ("h2o", "streaming_llm"),
            "budgets": (0.25, 0.9),
            "agreement": 4,
            "device": "cpu",
            "dtype": "float32",
        }
        return tune(folder, data or rows(), out=tmp_path / out, loader=lambda *_: loaded, **{**given, **options})

    return go


def by_label(found):
    return {candidate.label: candidate for candidate in found.candidates}


def test_the_least_loss_within_memory(search, loaded, tmp_path):
    """Over the whole grid; the file is what `patch` takes, and its cache fits when it is measured afresh."""
    everything = search(max_loss=0.99, out="a/all.yaml")
    full = by_label(everything)["full()"]
    limit = by_label(everything)["h2o(budget=0.25)"].bytes
    assert limit < full.bytes
    found = search(memory=limit, out="b/tuned.yaml")
    assert found.meets and found.chosen.bytes <= limit
    fitting = [c for c in everything.candidates if c.bytes <= limit]
    assert len(fitting) == 2
    assert found.chosen.label in {c.label for c in fitting}
    assert found.chosen.loss == min(c.loss for c in found.candidates if c.losses and c.bytes <= limit)
    assert not found.reasons["h2o(budget=0.9)"].startswith("not") and "the limit is" in found.reasons["h2o(budget=0.9)"]
    policy = kvpress.make_policy(found.path)
    assert policy == found.policy
    (run,) = make_plan(
        {"out": "x", "defaults": {"policy": str(found.path)}}
    ).runs  # and what `kvpress eval --policy` takes
    assert run.policies == (policy,)
    model, tokenizer = loaded
    text = (found.request.runs / "joined.txt").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, 1 : found.context + 1]
    with kvpress.patch(model, found.path) as handle:
        model.generate(ids[:, : found.context - 32], max_new_tokens=32, min_new_tokens=32, do_sample=False)
        assert handle.report().total.bytes <= limit
    page = found.page.read_text(encoding="utf-8")
    assert found.sentence.split(":")[0] in page and "kvpress tune --model" in page
    drawn = pictures(found.page)
    assert len(drawn) == 2 and all("full" in words(chart) for chart in drawn)
    assert found.chosen.label.replace("budget=", "").removesuffix("()") in shown(drawn[0])
    assert "fewer than 6 samples differ" in page


def test_the_least_memory_within_a_loss(search):
    found = search(max_loss="50%", budgets=(0.25, 0.5, 0.9))
    known = [c for c in found.candidates if c.losses and c.rows == found.chosen.rows and c.loss <= 0.5]
    assert found.meets and found.chosen.bytes == min(c.bytes for c in known)
    assert all(loss.low < loss.high for c in found.candidates if not c.is_full for loss in c.losses.values())


def test_full_attention_where_it_fits(search):
    found = search(memory="1GiB")
    assert found.meets and found.chosen.is_full
    assert found.sentence.startswith("Full attention itself meets the limits, no policy is needed")
    assert yaml.safe_load(found.path.read_text()) == {"name": "full"}


def test_nothing_meets_the_limits(search):
    found = search(memory=1000)
    assert not found.meets and found.path is None and found.policy is None
    assert found.chosen.bytes == min(c.bytes for c in found.candidates) and found.chosen.losses
    assert "Nothing meets the limits" in found.sentence and "comes nearest, and misses memory 1000 B" in found.sentence
    assert not found.request.out.exists() and found.page.exists()
    found = search(max_loss=0.0, policies=("streaming_llm",), budgets=(0.1,), memory="20KB", out="c/tuned.yaml")
    assert not found.meets and "misses a loss of 0.00%" in found.sentence


def test_started_again_it_measures_nothing_twice(search, monkeypatch):
    """And another order of the rows, which then all count, gives the same recommendation."""
    first = search(max_loss=0.3)
    real, asked = tuning.run_plan, []
    monkeypatch.setattr(tuning, "run_plan", lambda *a, **o: asked.append(real(*a, **o)) or asked[-1])
    again = search(max_loss=0.3)
    assert sum(outcome.answered for outcome in asked) == 0 and asked
    assert again.sentence == first.sentence
    other = search(max_loss=0.3, seed=7, out="other/tuned.yaml")
    assert other.chosen.label == first.chosen.label


def test_rounds_use_half_of_the_rows_first(search, rows, monkeypatch):
    real, asked = tuning.run_plan, []

    def noted(plan, *a, **o):
        asked.append((len(plan.runs), o["portion"].indices))
        return real(plan, *a, **o)

    monkeypatch.setattr(tuning, "run_plan", noted)
    found = search(rows(20), max_loss=0.98)
    sizes = [len(indices) for _, indices in asked if indices is not None]
    assert sizes[0] == 8 and sizes == sorted(sizes) and found.chosen.rows == sizes[-1]
    first, *later = [indices for _, indices in asked if indices is not None]
    assert all(first <= indices for indices in later)  # the same rows and more


def test_time_that_is_over(search, monkeypatch):
    with pytest.raises(TuneError, match="was over before a row was measured; give more, or fewer policies"):
        search(max_loss=0.5, minutes=1e-9)
    real = tuning.run_plan
    monkeypatch.setattr(
        tuning, "run_plan", lambda *a, portion, **o: real(*a, **o, portion=replace(portion, until=math.inf))
    )
    clock = iter([0.0])
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))
    found = search(max_loss=0.5, minutes=1)
    assert found.chosen.rows == 8 and "The time (1 minutes) was over before all 10 rows were used." in found.notes


def test_labels_count_too(search, rows):
    data = rows(10, question=["Who?"] * 10, answers=["whale"] * 10, max_new_tokens=[4] * 10)
    found = search(data, max_loss=0.5, metric="words_found")
    chosen = by_label(found)["h2o(budget=0.25)"]
    assert set(chosen.losses) == {"agreement", "metric"}
    assert "metric lost, %" in found.page.read_text(encoding="utf-8")


def test_two_at_once_on_one_directory(search, tmp_path):
    (tmp_path / "found" / "tuned.runs").mkdir(parents=True)
    with (
        FileLock(str(tmp_path / "found" / "tuned.runs" / ".tune.lock")),
        pytest.raises(TuneError, match=r"another kvpress tune is writing .*choose another --out"),
    ):
        search(max_loss=0.5)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, TuneError, "no limit to search within; give memory"),
        ({"memory": "two"}, TuneError, "memory='two' is no size; write 2GiB"),
        ({"memory": 0}, TuneError, "memory=0 leaves room for nothing"),
        ({"ms_per_token": -1.0}, TuneError, "ms_per_token=-1.0"),
        ({"max_loss": "x%"}, TuneError, "max_loss='x%' is no share"),
        ({"max_loss": 2}, TuneError, "max_loss=2.0 is no share"),
        ({"memory": 9, "prefer": "memory"}, TuneError, "prefer='memory' without max_loss"),
        ({"memory": 9, "prefer": "speed"}, TuneError, "prefer='speed' is not known"),
        ({"memory": 9, "context": 2000}, TuneError, "--context 2000, but .* was made for 1024"),
        ({"memory": 9, "context": 50}, TuneError, "line 1 has 12[0-9] tokens with its answer, and --context says 50"),
        ({"memory": 9, "policies": ("h3o",)}, ValueError, "did you mean 'h2o'"),
        ({"memory": 9, "policies": ("token_select",)}, ConfigError, "token_select takes entries only"),
        ({"memory": 9, "budgets": (7.5,)}, ConfigError, "budget=7.5"),
        ({"memory": 9, "metric": "rogue"}, ConfigError, "did you mean 'rouge'"),
        ({"memory": 9, "metric": "rouge"}, TaskError, "line 1: no right answer"),
        ({"memory": 9, "columns": {"context": "text"}}, TaskError, "line 1: no column 'text'"),
        ({"memory": 9, "minutes": 0}, TuneError, "minutes=0"),
        ({"memory": 9, "out": "tuned"}, TuneError, "no YAML file"),
        ({"memory": 9, "data": "no/such/file.jsonl"}, TaskError, "there is no file no/such/file.jsonl"),
    ],
)
def test_what_cannot_work_is_named_before_anything_runs(search, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        search(**options)
    assert not list(tmp_path.rglob("samples.jsonl"))


def test_a_row_longer_than_the_model(search, rows):
    with pytest.raises((RunError, TuneError), match=r"line 1 has 1[0-9]{3} tokens|was made for 1024"):
        search(rows(3, 1500), max_loss=0.5)


def test_sizes_and_shares():
    assert [read_size(text) for text in ("2GiB", "1.5 MB", "10k", "7", 9)] == [2**31, 1_500_000, 10_000, 7, 9]
    assert (read_share("1%"), read_share("0.2"), read_share(None)) == (0.01, 0.2, None)
    with pytest.raises(TuneError):
        Limits()


def test_the_command_line(folder, rows, tmp_path):
    path = tmp_path / "t.yaml"
    arguments = ["tune", "--model", folder, "--data", str(rows(3)), "--dtype", "float32", "--device", "cpu"]
    arguments += ["--policies", "h2o", "--budgets", "50%", "--agreement", "3", "--out", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--memory", "1GiB"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert "no policy is needed" in result.output and path.exists()
    result = CliRunner().invoke(app, [*arguments, "--memory", "1kB"], env={"COLUMNS": "100"})
    assert result.exit_code == 1 and "Nothing meets the limits" in result.output
    result = CliRunner().invoke(app, [*arguments, "--memory", "1kB", "--columns", "context"])
    assert result.exit_code == 2 and "write context=document" in result.stderr


def test_no_zero_has_a_sign():
    assert interval(Candidate({}, losses={"agreement": Estimate(-0.0, -0.0, 0.6576, 2)})) == "0.00% (0.00% to 65.76%)"
