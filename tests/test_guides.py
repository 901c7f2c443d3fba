"""The guides' code runs as it stands there, with a tiny model in the place of the hub's."""

import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.compat import CACHE
from kvpress.policy import entries_for
from support.tiny_saved import byte_tokenizer, save_tiny_model

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}"
TEXT = "The keeper of the lighthouse wrote down the weather every evening. " * 6

pytestmark = pytest.mark.usefixtures("without_traces")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the files that guides read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text(TEXT)
    rows = [{"context": TEXT[i:], "question": "\nWho?", "answers": ["the keeper"]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def blocks(guide):
    """(language, code) of each block."""
    text = (GUIDES / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run_command(line, **options):
    result = CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "200", "TERM": "dumb"}, **options)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def run(guide, folder, place, replace=(), **options):
    """Runs a guide: commands, files that their first line names, and programs that share their names."""
    scope = {"__name__": guide}
    outputs = []
    for language, code in blocks(guide):
        for old, new in ((HUB_NAME, folder), *replace):
            code = code.replace(old, new)
        if language == "bash":
            outputs += [
                run_command(line, **options) for line in code.splitlines() if not line.startswith("kvpress serve")
            ]
        elif named := re.match(r"# (\w+\.(py|yaml))\n", code):
            (place / named[1]).write_text(code)
        elif language == "python":
            code = code.replace("cache=", f"{CACHE}=").replace(".cache", f".{CACHE}")  # before transformers 5.24
            exec(compile(code, f"{guide}.md", "exec"), scope)
    return scope, outputs


def totals(printed):
    """Tokens seen and entries kept, of a printed report's last line."""
    seen, kept = re.search(r"total │ +(\d+) │ +(\d+) │", printed).groups()
    return int(seen), int(kept)


def test_every_guide_is_tested_and_listed():
    names = {path.stem for path in GUIDES.glob("*.md")} - {"index"}
    assert all(f"def test_{name}(" in Path(__file__).read_text() for name in names)
    index = (GUIDES / "index.md").read_text()
    assert set(re.findall(r"\((\w+)\.md\)", index)) == names
    site = (GUIDES.parent.parent / "mkdocs.yml").read_text()
    assert set(re.findall(r"guides/(\w+)\.md", site)) == names | {"index"}


def test_chat(folder, place, capsys):
    shorter = ("kvpress chat", "kvpress chat --max-new-tokens 20")
    scope, (terminal,) = run("chat", folder, place, replace=[shorter], input="Hello\n/report\n")
    assert "snapkv(budget=256)" in terminal
    assert [turn["role"] for turn in scope["turns"]] == ["user", "assistant"] * 2
    assert "snapkv(budget=256)" in capsys.readouterr().out


def test_saved_conversation(folder, place, capsys):
    scope, _ = run("saved_conversation", folder, place)
    before, after = scope["saved"]["ids"].shape[1], scope["output"].sequences.shape[1]
    assert after == before + scope["more"].shape[1] + 20
    seen, kept = totals(capsys.readouterr().out)
    assert seen == after - 1 > 2 * kept


def test_many_questions(folder, place, capsys):
    scope, _ = run("many_questions", folder, place)
    assert len(scope["answers"]) == 2
    # the copies went on, and the document's own cache did not
    assert scope["read"].get_seq_length() == scope["document"].shape[1] == len(TEXT)
    assert totals(capsys.readouterr().out) == (len(TEXT), len(TEXT) // 2)


def test_own_policy(folder, place, capsys):
    _, (shell,) = run("own_policy", folder, place)
    program = capsys.readouterr().out
    assert totals(program)[0] == len(TEXT) + 9  # of 10 new tokens the last is not fed
    for said in (program, shell):  # the command writes the text as a turn of a chat
        seen, kept = totals(said)
        assert kept == entries_for(0.25, seen - 9) + 9


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra eval is not installed")
def test_own_task(folder, place):
    run("own_task", folder, place)
    report = (place / "mine" / "report.csv").read_text()
    assert "h2o" in report and "full" in report and "last_word" in report


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra eval is not installed")
def test_tune(folder, place, capsys):
    _, (said,) = run("tune", folder, place)
    assert "tuned.yaml is for kvpress.patch" in said
    assert (place / "tuned.html").exists()
    assert "total" in capsys.readouterr().out


def test_ray(folder, place, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    _, (said, _) = run("ray", folder, place)
    assert "3 runs finished with 6 new answers" in said
    report = (place / "results" / "needles" / "report.csv").read_text()
    assert all(policy in report for policy in ("full()", "snapkv(budget=0.25)", "quest(budget=0.25)"))


def test_serve(folder, place):
    for package in ("fastapi", "openai", "prometheus_client", "uvicorn"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (line,) = (code for language, code in blocks("serve") if language == "bash")
    words = shlex.split(line.replace(HUB_NAME, folder).replace("8000", port))
    # a process of its own: uvicorn's handlers would hold this one's streams, which pytest exchanges
    with subprocess.Popen(
        [sys.executable, "-m", "kvpress.cli", *words[1:]], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert any("base_url" in said for said in server.stdout)
            scope, _ = run("serve", folder, place, replace=(("8000", port),))
        finally:
            server.kill()
    assert 'kvpress_requests_total{outcome="finished"} 1.0' in scope["figures"]
    table = dict(re.findall(r"^\| (`kvpress.*?) \| (.*?) \|$", (GUIDES / "serve.md").read_text(), re.MULTILINE))
    for name in re.findall(r"`(kvpress_\w+)", " ".join(table)):
        assert f"\n{name}" in scope["figures"], name
