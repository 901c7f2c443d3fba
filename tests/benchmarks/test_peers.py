"""benchmarks/peers: what it makes of rows (ratios, table, goals, picture), and its workers on a tiny model, offline."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.tiny_saved import save_tiny_model

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
PLAIN, SNAPKV, OURS = "transformers DynamicCache", "NVIDIA SnapKV", "ours snapkv"
# The tiny model: 4 layers, 2 kv heads of 8 channels; K and V in float32.
BYTES_PER_TOKEN = 4 * 2 * 2 * 8 * 4


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import results

    return results


def row(name, round_=0, context=2048, **cells):
    """A row of the CSV as text; `cells` win."""
    usual = {
        "run": "a", "round": round_, "model": "m", "dtype": "float32", "context": context, "batch": 1, "new_tokens": 8,
        "share": 0.1, "contestant": name, "transformers": "5", "prompt_s": 4.0, "ms_per_token": 100.0, "peak_mib": 50.0,
        "cache_mib": 20.0, "kept": 204.0, "needles_found": 1, "needles_asked": 1, "failed": "",
    }  # fmt: skip
    return {**usual, **cells}


@pytest.fixture
def rows(results, tmp_path):
    """Two rounds, in which ours takes 0.5 and 0.7 of SnapKV's time per token, and a third without SnapKV."""
    path = tmp_path / "some-peers.csv"
    for round_, (plain, theirs, ours) in enumerate([(100, 80, 40), (200, 100, 70), (400, None, 10)]):
        results.append(path, row(PLAIN, round_, ms_per_token=plain, kept=2048))
        if theirs:
            results.append(path, row(SNAPKV, round_, ms_per_token=theirs, peak_mib=40))
        results.append(path, row(OURS, round_, ms_per_token=ours, peak_mib=40, prompt_s=3, needles_found=round_ % 2))
    return results.read(path)


def test_ratios_pair_the_figures_of_one_round(results, rows):
    """Hand-computed: medians of (40/80, 70/100) and of (40/100, 70/200, 10/400)."""
    assert results.ratio(rows, "ms_per_token", OURS, SNAPKV) == pytest.approx(0.6)
    assert results.ratio(rows, "ms_per_token", OURS, PLAIN) == pytest.approx(0.35)
    assert results.ratio(rows, "ms_per_token", OURS, "NVIDIA Knorm") is None


def test_rounds_of_other_runs_do_not_pair(results):
    rows = [row(SNAPKV, run="a"), row(OURS, run="b")]
    assert results.ratio(rows, "prompt_s", OURS, SNAPKV) is None


def test_table(results, rows):
    failed = row("NVIDIA Knorm", failed="no memory", **dict.fromkeys([*results.METRICS, "kept"], None))
    lines = results.table([*rows, failed]).splitlines()
    (ours,) = (line for line in lines if line.startswith(f"| {OURS} "))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:5] == ["3.00 (3.00-3.00)", "0.75 / 0.75", "40 (10-70)", "0.35 / 0.60"]
    assert cells[-2:] == ["204", "1/3"]
    assert any("failed: no memory" in line for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_goals(results, rows):
    found = {line.split(":")[0]: line for line in results.goals(rows)}
    assert "0.60, goal 0.8" in found[f"met          time per token of {OURS} against {SNAPKV}"]
    assert "0.75, goal 0.9" in found[f"met          prompt of {OURS} against {SNAPKV}"]
    assert "1.00, goal 0.8" in found[f"missed       peak memory of {OURS} against {SNAPKV}"]
    assert [line for line in found if line.startswith("not measured")] == [
        "not measured H2O against ObservedAttention at 4096 tokens",
        "not measured a token against transformers at 8192 tokens",
    ]


def test_goals_of_other_kept_entries_are_not_judged(results):
    rows = [row(SNAPKV, kept=204.0), row(OURS, kept=230.0)]
    assert any(line.startswith("not judged") for line in results.goals(rows))
    assert not any(line.startswith(("met", "missed")) for line in results.goals(rows))
    assert results.same_kept([row(SNAPKV, kept=51.0), row(OURS, kept=52.0)], OURS, SNAPKV)  # one entry: rounding


@pytest.mark.parametrize(("batch", "limit"), [(1, 0.35), (4, 0.25)])
def test_goals_at_8k(results, batch, limit):
    """At the limit it is met, above it missed; a cache that keeps everything has no such goal."""
    for ms, verdict in ((100 * limit, "met"), (100 * limit + 1, "missed")):
        rows = [row(PLAIN, context=8192, batch=batch), row(OURS, context=8192, batch=batch, ms_per_token=ms)]
        rows.append(row("ours full", context=8192, batch=batch))
        (line,) = (line for line in results.goals(rows) if "time per token" in line)
        assert line.startswith(f"{verdict} ") and f"goal {limit} " in line and OURS in line


def test_goals_at_4k(results):
    rows = [row(PLAIN, context=4096), row("NVIDIA ObservedAttention", context=4096, prompt_s=40)]
    rows.append(row("ours h2o", context=4096, prompt_s=7, peak_mib=56))
    lines = results.goals(rows)
    assert any(line.startswith("met          prompt of ours h2o") and "0.17, goal 0.2" in line for line in lines)
    assert any(line.startswith("missed       peak memory of ours h2o") and "1.12, goal 1.1" in line for line in lines)


@pytest.mark.parametrize(("cells", "said"), [({"contestant": "nobody"}, "nobody"), ({"kept": "many"}, "kept.*many")])
def test_a_bad_row_is_named_by_its_line(results, tmp_path, cells, said):
    path = tmp_path / "peers.csv"
    results.append(path, row(PLAIN))
    results.append(path, row(PLAIN, **cells))
    with pytest.raises(ValueError, match=f"line 3.*{said}"):
        results.read(path)


def test_picture(results, rows, tmp_path, monkeypatch):
    """Bars are the medians, one for each contestant in each of the four panels of each setting."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (extra dev)")
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    path = tmp_path / "peers.png"
    results.picture([*rows, row(PLAIN, context=8192)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = figures[0].axes
    close(figures[0])
    assert [len(panel.patches) for panel in panels] == [3] * 4 + [1] * 4
    assert [bar.get_width() for bar in panels[1].patches] == [200, 90, 40]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        f"{PLAIN}, 3/3", f"{SNAPKV}, 2/2", f"{OURS}, 1/3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def work(tiny, folder, name, prompts, new_tokens=6):
    """One worker's answer, started as run.py starts it."""
    job = {"contestant": name, "model": str(tiny), "dtype": "float32", "prompts": prompts, "new_tokens": new_tokens}
    (folder / "job.json").write_text(json.dumps({**job, "budget": 0.1}))
    command = [sys.executable, str(PEERS / "worker.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_workers(tiny, tmp_path):
    """Those that keep everything answer alike; H2O keeps a tenth; bytes and kept entries are as computed by hand."""
    prompts = [[(7 * i + row) % 250 + 2 for i in range(345)] for row in range(2)]
    plain = work(tiny, tmp_path, PLAIN, prompts)
    assert [len(answer) for answer in plain["answers"]] == [6, 6]
    assert plain["kept"] == 345
    assert plain["cache_mib"] * 2**20 == 2 * (345 + 5) * BYTES_PER_TOKEN  # the last token is not fed
    static = work(tiny, tmp_path, "transformers StaticCache", prompts)
    assert static["answers"] == plain["answers"]
    assert static["cache_mib"] * 2**20 == 2 * (345 + 6) * BYTES_PER_TOKEN
    full = work(tiny, tmp_path, "ours full", prompts)
    assert full["answers"] == plain["answers"] and full["kept"] == 345
    h2o = work(tiny, tmp_path, "ours h2o", prompts)
    assert h2o["kept"] == 34
    assert 34 * 2 * BYTES_PER_TOKEN < h2o["cache_mib"] * 2**20 < 2 * 80 * BYTES_PER_TOKEN
    for answer in (plain, static, full, h2o):
        assert answer["prompt_s"] > 0 and answer["ms_per_token"] > 0


def run(*arguments):
    command = [sys.executable, str(PEERS / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(tiny, tmp_path):
    """As it is started, with the contestants that need no other environment: rows, table, picture; a failure is told."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra dev)")
    out = tmp_path / "2000-01-01-peers.csv"
    options = ["--model", tiny, "--contexts", 400, "--new-tokens", 3, "--contestants", PLAIN, OURS, "--out", out]
    done = run(*options, "--rounds", 2)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(line["round"], line["contestant"]) for line in written] == [
        ("0", PLAIN), ("0", OURS), ("1", PLAIN), ("1", OURS),
    ]  # fmt: skip
    assert [float(line["kept"]) for line in written] == [400, 40, 400, 40]
    assert all(line["needles_asked"] == "1" for line in written)
    assert f"| {OURS} |" in out.with_suffix(".md").read_text() and "Goals:" in done.stdout
    assert out.with_suffix(".png").stat().st_size > 1000
    failing = run(*options[:-5], "--contestants", OURS, "--out", out, "--rounds", 1, "--limit", 0.01)
    assert failing.returncode == 1
    assert out.read_text().count("longer than 0.01 s") == 1  # added to the other rows
    assert "1.00 / -" in failing.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", 0], "--rounds 0: at least 1"),
        (["--new-tokens", 1], "--new-tokens 1: at least 2"),
        (["--contexts", 2048, 100], "--contexts 100: at least 256"),
        (["--share", 1.5], "--share 1.5: between 0 and 1"),
        (["--contestants", "nobody"], "nobody"),
        (["--dtypes", "float31"], "float31"),
        (["--only-report", "--out", "/nowhere.csv"], "there is no /nowhere.csv"),
    ],
)
def test_bad_options_are_refused_before_any_work(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_prompt_too_short_for_the_tokenizer(tiny, tmp_path):
    done = run("--model", tiny, "--contexts", 256, "--contestants", PLAIN, "--out", tmp_path / "x.csv")
    assert done.returncode == 1 and "--contexts 256: length=256 is too short for needle" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "x.csv").exists()


def test_the_random_model_is_always_the_same(results):
    import run as script

    before = torch.get_rng_state()
    (one, tokenizer), (other, _) = script.load("random-llama"), script.load("random-llama")
    assert torch.equal(torch.get_rng_state(), before)
    assert one.config.vocab_size == len(tokenizer) and one.config.max_position_embeddings == 131072
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_environment_is_made_once(results, tmp_path, monkeypatch):
    """Made with the pinned torch, kept while nothing changed, made again when the pins did, and not kept half-made."""
    import run as script

    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\ntorch==1  # via kvpress\ntransformers==1\n")
    calls = []

    def fake(command, check):
        (tmp_path / "env").mkdir(exist_ok=True)
        calls.append(list(map(str, command)))
        if len(calls) == 2:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(script, "CONSTRAINTS", pins)
    monkeypatch.setattr(script.subprocess, "run", fake)
    with pytest.raises(subprocess.CalledProcessError):
        script.environment(tmp_path / "env")
    assert script.environment(tmp_path / "env") == tmp_path / "env" / "bin" / "python"
    assert len(calls) == 4
    assert calls[-1][-3:] == ["--quiet", "torch==1", "kvpress==0.5.5"]
    script.environment(tmp_path / "env")
    assert len(calls) == 4
    pins.write_text("torch==2\ntransformers==1\n")
    script.environment(tmp_path / "env")
    assert len(calls) == 6
