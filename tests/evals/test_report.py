"""Reports: figures by hand, every number traceable, and a page that works in a browser."""

import csv
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals.charts import COLOURS, Mark, apart, library, scatter
from kvpress.evals.config import read_plan
from kvpress.evals.page import Pictures, Table, render
from kvpress.evals.report import write_report
from kvpress.evals.results import load_results, settings
from kvpress.evals.store import StoreError
from support.pages import own_text, pictures, shown, words
from support.plans import tree, write
from support.saved import MIB, SESSION, row, save


@pytest.fixture
def out(tmp_path):
    """Full attention finds all of 12; h2o loses 8 of them at a quarter of the bytes; snapkv loses 2 at half."""
    folder = tmp_path / "runs"
    grid = [(length, depth) for length in (1000, 2000) for depth in (0.1, 0.5, 0.9) for _ in range(2)]

    def rows(scores, **fields):
        return [row(i, s, length=n, depth=d, **fields) for i, (s, (n, d)) in enumerate(zip(scores, grid, strict=True))]

    task = {"name": "needle", "lengths": [1000, 2000], "depths": [0.1, 0.5, 0.9], "repeats": 2}
    save(folder, {"task": task}, rows([1.0] * 12))
    save(folder, {"task": task, "policy": "h2o", "budget": 0.25}, rows([0.0] * 8 + [1.0] * 4, share=0.25, ms=5.0))
    save(folder, {"task": task, "policy": "snapkv", "budget": 0.5}, rows([0.0] * 2 + [1.0] * 10, share=0.5, ms=6.0))
    return folder


def table_rows(out):
    with (out / "report.csv").open() as file:
        return {line["policy"]: line for line in csv.DictReader(file)}


class Page(HTMLParser):
    """The page's links, tables and texts."""

    def __init__(self, path):
        super().__init__()
        self.links, self.runs, self.sources, self.open_tags = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "a":
            self.links.append(values["href"])
        self.runs |= set((values.get("data-runs") or "").split())
        self.sources += [values[name] for name in ("src", "srcset", "data") if name in values]
        if tag not in ("meta", "link", "br", "wbr"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def test_the_numbers(out):
    write_report([out], out)
    found = table_rows(out)
    h2o, snapkv, full = (found[name] for name in ("h2o(budget=0.25)", "snapkv(budget=0.5)", "full()"))
    assert float(h2o["score"]) == pytest.approx(4 / 12)
    assert float(h2o["to_full"]) == pytest.approx(-8 / 12)
    assert (h2o["to_full_significant"], snapkv["to_full_significant"]) == ("True", "False")
    assert (full["to_full"], full["score"], full["n"]) == ("", "1.0", "12")
    assert float(full["score_low"]) < 0.8  # twelve of twelve is no certainty
    assert float(h2o["bytes"]) == MIB
    assert float(h2o["bytes_of_full"]) == 0.25
    assert float(snapkv["tokens_kept"]) == 750  # half of 1000 and 2000, on average
    assert float(h2o["token_ms"]) == 5.0
    assert float(h2o["score_low"]) < 4 / 12 < float(h2o["score_high"])


def test_markdown(out):
    write_report([out], out)
    text = (out / "report.md").read_text()
    line, by_length = [line for line in text.splitlines() if line.startswith("| h2o(0.25)")]
    assert by_length == "| h2o(0.25) | 0.0 | 66.7 |"  # all six of 1000 tokens lost, two of 2000
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["12", "33.3"]
    assert (cells[4], cells[5], cells[6], cells[8]) == ("-66.7", "1.00", "25.0%", "5.0")
    assert "n.s." in next(line for line in text.splitlines() if line.startswith("| snapkv"))


def test_every_number_leads_to_its_run(out):
    write_report([out], out)
    page = Page(out / "report.html")
    ids = {path.name for path in out.iterdir() if path.is_dir()}
    assert page.runs == ids
    directories = {link for link in page.links if not link.startswith("#")}
    assert directories == {f"{name}/" for name in ids}
    assert set(page.links) - directories == {"#runs"}
    for line in table_rows(out).values():
        assert (out / line["path"] / "samples.jsonl").is_file()


def test_a_report_elsewhere_still_leads_there(out, tmp_path):
    write_report([out], tmp_path / "far" / "away")
    for line in table_rows(tmp_path / "far" / "away").values():
        assert (tmp_path / "far" / "away" / line["path"] / "config.json").is_file()


def test_the_page_needs_nothing_else(out):
    write_report([out], out)
    text, page = own_text(out / "report.html"), Page(out / "report.html")
    assert page.open_tags == []
    assert page.sources == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", text))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "n.s. (not significant)" in text and "fewer than 6 samples differ" in text


def test_heat_maps(out):
    write_report([out], out)
    charts = [chart for chart in pictures(out / "report.html") if "step" in str(chart["width"])]
    assert len(charts) == 3 and all(len(chart["data"]["values"]) == 6 for chart in charts)
    found = {
        (c["label"], c["depth"], c["length"]): (c["shown"], c["samples"]) for m in charts for c in m["data"]["values"]
    }
    assert found["h2o(0.25)", "50%", "1000"] == ("0", 2)
    assert found["h2o(0.25)", "90%", "2000"] == ("100", 2)
    (h2o,) = [words(chart) for chart in charts if chart["data"]["values"][0]["label"] == "h2o(0.25)"]
    assert sorted(h2o) == sorted(["1000", "2000", "10%", "50%", "90%", "0", "0", "0", "0", "100", "100"])


def test_density_where_some_policy_reads_less(out, tmp_path):
    """A column and a picture; a report in which every prompt was read whole has neither."""
    task = {"name": "needle", "lengths": [1000]}
    save(tmp_path / "some", {"task": task}, [row(i, 1.0, density=1.0) for i in range(2)])
    sparse = {"name": "x_attention", "threshold": 0.6}
    save(tmp_path / "some", {"task": task, "policy": sparse}, [row(i, 0.5, density=0.2 + i / 10) for i in range(2)])
    write_report([tmp_path / "some"], tmp_path / "some")
    page = tmp_path / "some" / "report.html"
    drawn = [chart for chart in pictures(page) if "density" in json.dumps(chart)]
    marks = {mark["label"]: mark["x"] for mark in drawn[0]["data"]["values"]}
    assert marks == {"full()": 100.0, "x_attention(threshold=0.6)": pytest.approx(25.0)}
    assert "density, %" in own_text(page)
    lines = (tmp_path / "some" / "report.md").read_text().splitlines()
    column = next(line for line in lines if "density" in line).split("|").index(" density, % ")
    assert next(line.split("|")[column].strip() for line in lines if "x_attention" in line) == "25.0"
    write_report([out], out)
    assert "density, %" not in own_text(out / "report.html")


def test_the_front(out):
    """h2o is cheapest, snapkv dearer and better, full best; a policy that is dearer and worse is not on it."""
    task = {"name": "needle", "lengths": [1000, 2000], "depths": [0.1, 0.5, 0.9], "repeats": 2}
    rows = [row(i, 0.0, share=0.6, ms=20.0) for i in range(12)]
    save(out, {"task": task, "policy": "tova", "budget": 0.6}, rows)
    write_report([out], out)
    charts = [chart for chart in pictures(out / "report.html") if chart["width"] == "container"]
    assert len(charts) == 2
    for chart in charts:
        front = {point["policy"] for point in chart["data"]["values"] if point["front"]}
        assert front == {"full", "h2o", "snapkv"}
        assert {"full", "h2o(0.25)", "snapkv(0.5)", "tova(0.6)", "100%"} <= set(words(chart))
    (tova,) = [point for point in charts[0]["data"]["values"] if point["policy"] == "tova"]
    assert (tova["x"], tova["y"], tova["cost"]) == (pytest.approx(2.4), 0, "2.4")
    assert tova["score"].startswith("0.0% (0.0% to ") and tova["score"].endswith("n=12")


def test_what_lacks_samples_is_marked(out):
    task = {"name": "needle", "lengths": [1000, 2000], "depths": [0.1, 0.5, 0.9], "repeats": 2}
    rows = [row(i, 1.0, share=0.1) for i in range(3)] + [row(3, None, error="OutOfMemoryError: no", shared_prompt=None)]
    save(out, {"task": task, "policy": "tova", "budget": 0.1}, rows, finished=False)
    write_report([out], out)
    text = (out / "report.html").read_text()
    assert "tova(0.1) *" in text and "3 +1 failed" in text
    assert "1 sample(s) failed" in text and "1 of 4 runs are not finished" in text
    points = [
        point
        for chart in pictures(out / "report.html")
        for point in chart["data"]["values"]
        if "front" in point and point["policy"] == "tova"
    ]
    assert [(point["whole"], point["front"]) for point in points] == [(False, False)] * 2  # though it is cheapest
    line = table_rows(out)["tova(budget=0.1)"]
    assert (line["n"], line["failed"], line["to_full_n"], line["to_full"]) == ("3", "1", "3", "0.0")


def test_settings_are_kept_apart(tmp_path):
    task = {"name": "needle", "lengths": [1000]}
    for query_aware in (True, False):
        for model in ("one", "two"):
            save(tmp_path, {"task": task, "model": model, "query_aware": query_aware}, [row(0, 1.0)])
    save(tmp_path, {"task": "passkey", "model": "one"}, [row(0, 1.0)])
    found = settings(load_results([tmp_path]))
    assert len(found) == 5
    assert all(len(setting.policies) == 1 for setting in found)
    write_report([tmp_path], tmp_path)
    assert "compressed before the question is known" in (tmp_path / "report.html").read_text()


def test_differences_pair_the_same_samples_only(tmp_path):
    """Another seed makes other samples, which are not compared."""
    task = {"name": "needle", "lengths": [1000]}
    save(tmp_path, {"task": task, "seed": 0}, [row(0, 1.0)])
    save(tmp_path, {"task": task, "seed": 1, "policy": "h2o", "budget": 0.5}, [row(0, 0.0)])
    write_report([tmp_path], tmp_path)
    assert table_rows(tmp_path)["h2o(budget=0.5)"]["to_full"] == ""


def test_strange_names_do_no_harm(tmp_path):
    save(
        tmp_path, {"task": {"name": "needle", "lengths": [1000]}, "model": "<script>alert(1)</script>|x"}, [row(0, 1.0)]
    )
    write_report([tmp_path], tmp_path, title="a <b> & c")
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in text
    assert "a &lt;b&gt; &amp; c" in text


def mark(policy, x=1.0, y=0.5, kind="evicting"):
    return Mark(policy, f"{policy}(0.5)", kind, x, y, y, y, "half", "one", front=True, whole=True, runs=["run"])


def test_strange_names_do_no_harm_in_pictures():
    name = "</script><img>'\"&"
    charts = scatter([mark(name)], "cost", "score", percent=True)
    section = {
        **{"title": name, "machine": name, "warnings": [name], "policies": {name: name}, "tables": []},
        "pictures": [Pictures(name, name, charts)],
        "maps": [{"title": name, "width": 150, "charts": [(name, name, charts[""])]}],
    }
    text = render("report.html", name, notes=[name], settings=[section], runs=Table("Runs", ("policy",), []))
    text = text.replace(library(), "")
    assert "<img" not in text and text.count("<script") == text.count("</script") == 2 + 3
    assert f"{name}(0.5)" in words(charts[""])


def test_many_policies_are_parted_by_kind():
    """Each has its colour and its name in one picture and is grey in the others; full attention is in all."""
    names = {"evicting": [f"e{i}" for i in range(13)], "selecting": ["s0", "s1"], "exact": ["full"]}
    marks = [mark(name, x, kind=kind) for kind, some in names.items() for name in some for x in (1.0, 2.0)]
    charts = scatter(marks, "cost", "score", percent=False)
    assert list(charts) == ["evicting, 1 of 3", "evicting, 2 of 3", "evicting, 3 of 3", "selecting"]
    own = [set(shown(chart, "policy")) for chart in charts.values()]
    assert all("full" in some and len(some) <= COLOURS + 1 for some in own)
    assert sorted(name for some in own for name in some - {"full"}) == sorted(names["evicting"] + names["selecting"])
    for chart, some in zip(charts.values(), own, strict=True):
        assert some <= set(words(chart)) and not set(words(chart)) & (set(names["evicting"]) - some)
        colours = {point["policy"]: point["color"] for point in chart["data"]["values"] if point["own"]}
        assert len(set(colours.values())) == len(some)
    few = scatter([one for one in marks if one.kind != "evicting"], "cost", "score", percent=False)
    assert list(few) == [""]


@pytest.mark.parametrize("wanted", [[], [50.0], [10.0] * 5, [99.0, 98.0, 100.0], [0.0, 0.0, 100.0, 20.0, 25.0, 7.0]])
def test_names_stay_apart(wanted):
    places = apart(wanted, 15, 100)
    assert all(7.5 <= place <= 92.5 for place in places)
    together = sorted(zip(wanted, places, strict=True))
    assert all(b[1] - a[1] >= 15 - 1e-9 for a, b in itertools.pairwise(together))
    alone = [p for i, (w, p) in enumerate(zip(wanted, places, strict=True)) if 7.5 <= w <= 92.5 and len(wanted) == 1]
    assert alone == [w for w in wanted if len(wanted) == 1]


def test_the_library_is_made_once(tmp_path, monkeypatch):
    made = []

    def bundle(snippet, vl_version):
        made.append(vl_version)
        return "a script"

    monkeypatch.setattr("vl_convert.javascript_bundle", bundle)
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "cache"))
    assert library.__wrapped__() == library.__wrapped__() == "a script"
    assert len(made) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "file"))  # no folder, and none can be made
    assert library.__wrapped__() == "a script" and len(made) == 2


def test_several_versions_are_said(tmp_path):
    task = {"name": "needle", "lengths": [1000]}
    for commit, policy in (("abc", "full"), ("def", "h2o")):
        save(tmp_path, {"task": task, "policy": policy}, [row(0, 1.0)], session={**SESSION, "commit": commit})
    write_report([tmp_path], tmp_path)
    assert "2 versions of kvpress: abc, def" in (tmp_path / "report.html").read_text()


def test_a_copied_directory_counts_once(out, tmp_path):
    shutil.copytree(out, tmp_path / "again")
    assert len(load_results([out, tmp_path / "again"])) == 3


def test_nothing_to_report(tmp_path):
    save(tmp_path, {"task": {"name": "needle", "lengths": [1000]}}, [])
    with pytest.raises(StoreError, match="no sample has an answer yet"):
        write_report([tmp_path], tmp_path)


PROBE = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const found = {};
  found.drawn = document.querySelectorAll("[data-chart] svg").length;
  found.loaded = performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:"));
  const faint = () => document.querySelectorAll('[data-chart] [opacity="0.1"]').length;
  found.usual = faint();
  const table = document.querySelector("section table");
  const scores = () => [...table.tBodies[0].rows].map((row) => row.cells[3].dataset.v);
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  const buttons = table.querySelectorAll("thead button");
  buttons[3].click(); found.down = scores();
  buttons[3].click(); found.up = scores();
  found.sorted = buttons[3].closest("th").getAttribute("aria-sort");
  buttons[0].click(); found.names = names();
  buttons[4].click(); buttons[4].click(); found.missing_last = names().at(-1);
  const shown = () => [...document.querySelectorAll("#runs tbody tr")].filter((row) => !row.hidden).length;
  found.before = shown();
  document.querySelector("td [data-runs]").dispatchEvent(new MouseEvent("click", {bubbles: true}));
  found.filtered = shown();
  document.querySelector("#filter button").click(); found.after = shown();
  const chip = document.querySelector('.chips button[data-policy="h2o"]');
  chip.focus();
  found.focused = document.querySelectorAll("tr.lit").length;
  chip.blur();
  found.left = document.querySelectorAll("tr.lit").length;
  chip.click();
  found.maps = [...document.querySelectorAll("figure[data-map]")].filter((map) => !map.hidden).length;
  found.wide = document.documentElement.scrollWidth > window.innerWidth;
  setTimeout(() => {
    found.lit = document.querySelectorAll("tr.lit").length; found.faint = faint();
    found.errors = window.failures;
    document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
  }, 500);
}, 2000));
</script>"""


@pytest.mark.parametrize("width", [390, 1300])
def test_in_a_browser(out, tmp_path, width):
    """It sorts, filters and lights up, with no script error and nothing wider than the window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium; install it to look at the report")
    write_report([out], out)
    text = (out / "report.html").read_text(encoding="utf-8")
    watch = (
        "<script>window.failures = []; window.onerror = (message) => { window.failures.push(message); };"
        "window.onunhandledrejection = (event) => { window.failures.push(String(event.reason)); };</script>"
    )
    probe = tmp_path / "probe.html"
    before, _, after = text.rpartition("</body>")  # the library has one of its own
    probe.write_text(before.replace("<head>", f"<head>{watch}", 1) + f"{PROBE}</body>{after}", encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="found">(.*)</pre>', done.stdout)[1])
    assert found["errors"] == []
    assert [float(score) for score in found["down"]] == pytest.approx([1, 10 / 12, 4 / 12])
    assert found["up"] == found["down"][::-1]
    assert found["sorted"] == "ascending"
    assert found["names"] == sorted(found["names"])
    assert found["missing_last"] == "full()"
    assert (found["before"], found["filtered"], found["after"]) == (3, 1, 3)
    assert (found["drawn"], found["loaded"]) == (2 + 3, [])
    assert (found["focused"], found["left"], found["lit"]) == (2, 0, 2)  # its rows by policy and by length
    assert found["usual"] == 0 and found["faint"] >= 4
    assert found["maps"] == 1
    assert not found["wide"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150", "TERM": "dumb"})


def test_the_commands(folder, tmp_path):
    out = tmp_path / "out"
    config = write(tmp_path / "a.yaml", tree(folder, out, sweep={"policy": ["full", "h2o", "snapkv"], "budget": [0.5]}))
    shown = invoke("ablate", config, "--dry-run")
    assert shown.exit_code == 0, shown.output
    # 3 runs x 2 samples of 400 tokens, 15 steps after an answer's first token
    assert (
        "3 runs, 6 answers: 2 prompt passes of 800 tokens (without sharing: 6 of 2,400), at most 90 decode steps"
        in shown.output
    )
    assert not out.exists()
    done = invoke("ablate", config)
    assert (done.exit_code, "3 runs finished with 6 new answers" in done.output) == (0, True)
    assert "nothing to do" in invoke("ablate", config, "--dry-run").output
    listed = invoke("ls", out).output
    assert listed.count("finished") == 3 and "h2o(0.5)" in listed
    made = invoke("report", out, "--title", "A title")
    assert made.exit_code == 0
    assert [Path(line).name for line in made.output.split()] == ["report.html", "report.md", "report.csv"]
    assert "<h1>A title</h1>" in (out / "report.html").read_text()
    # the same run, whether it is named in a file or by options
    options = [
        "--model",
        folder,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--policy",
        "h2o",
        "--budget",
        "0.5",
        "--out",
        out,
    ]
    again = invoke("eval", *options, "--set", "task.lengths=[400]", "--set", "task.depths=[0.2, 0.8]")
    assert "1 finished before" in again.output
    # what is answered is not counted again
    _, h2o, _ = (run.id for run in read_plan(config).runs)
    first, _ = (out / h2o / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / h2o / "samples.jsonl").write_text(first)
    (out / h2o / "finished.json").unlink()
    shown = invoke("ablate", config, "--dry-run").output
    assert "1 runs, 1 answers: 1 prompt passes of 400 tokens, at most 15 decode steps\nabout 0 minutes" in shown
    assert "1 answered" in shown and shown.count("finished") == 2


def test_a_table_in_a_pipe(tmp_path):
    """Names stay whole, and a column that says nothing is left out."""
    task = {"name": "longbench", "dataset": "multifieldqa_en"}
    for model in ("a-model", "another-model"):
        for policy in ({"name": "full"}, {"name": "streaming_llm", "budget": 0.25}):
            save(tmp_path / model, {"model": model, "task": task, "policy": policy}, [row(0, 1.0)])
    named = [["full()", "longbench/multifieldqa_en"], ["streaming_llm(0.25)", "longbench/multifieldqa_en"]]
    for folder, columns in (
        (tmp_path / "a-model", ["run", "policy", "task", "question", "n", "score", "state"]),
        (tmp_path, ["run", "policy", "model", "task", "question", "n", "score", "state"]),
    ):
        listed = CliRunner().invoke(app, ["ls", str(folder)], env={"COLUMNS": "40", "TERM": "dumb"})
        lines = [line.split() for line in listed.output.splitlines() if line.strip() and "─" not in line]
        assert lines[0] == columns
        found = [[line[columns.index("policy")], line[columns.index("task")]] for line in lines[1:]]
        assert sorted(found) == sorted(named * (2 if "model" in columns else 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--policy", "h20"], "did you mean 'h2o'"),
        (["eval", "--task", "needel"], "did you mean 'needle'"),
        (["eval", "--budget", "x"], "--budget 'x'"),
        (["eval", "--set", "lenght=3"], "did you mean 'length'"),
        (["eval", "--model", "/none/such", "--out", "{tmp}/out"], "no folder /none/such"),
        (["report", "{tmp}/none"], "there is no folder"),
        (["ls", "{tmp}"], "no results"),
    ],
)
def test_a_user_error_is_one_line(tmp_path, arguments, said):
    result = invoke(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
