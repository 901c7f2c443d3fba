"""The command line on a tiny model: what it prints, and how it fails."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app, encode, number
from support.tiny_saved import byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})


def test_policies_lists_all():
    result = run("policies")
    assert result.exit_code == 0
    for name, policy in kvpress.available().items():
        assert name in result.output
        assert policy.kind in result.output
    assert "2404.14469" in result.output
    assert "window=32" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['kvpress', '--help']\n"
        "from kvpress.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("demo", "generate", "policies"):
        assert command in done.stdout


def test_generate_streams_and_reports(folder):
    result = run(
        "generate", "--model", folder, "--policy", "h2o", "--budget", "8", "--max-new-tokens", "5", "The whale"
    )
    assert result.exit_code == 0, result.output
    assert "h2o(budget=8)" in result.output
    assert "total" in result.output


def test_generate_reads_a_file_and_sets_fields(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Call me Ishmael. " * 10, encoding="utf-8")
    fields = ("--policy", "snapkv", "--budget", "0.5", "--set", "window=4", "--set", "pooling=max")
    result = run("generate", "--model", folder, *fields, "--max-new-tokens", "2", f"@{tmp_path / 'prompt.txt'}")
    assert result.exit_code == 0, result.output
    assert "window=4" in result.output
    assert "pooling='max'" in result.output


def test_the_same_text_as_without_kvpress(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**tokenizer("The whale", return_tensors="pt"), max_new_tokens=12)
    result = run("generate", "--model", folder, "--dtype", "float32", "--max-new-tokens", "12", "The whale")
    expected = tokenizer.decode(ids[0, 9:], skip_special_tokens=True)
    assert result.output.encode().startswith(expected.encode())


def test_demo(folder, tmp_path):
    small = ["--policies", "h2o,snapkv", "--budgets", "25%,64", "--lengths", "360,400", "--depths", "2", "--seed", "1"]
    out = tmp_path / "new" / "out"
    command = ["demo", "--model", folder, *small, "--device", "cpu", "--out", str(out)]
    result = run(*command)
    assert result.exit_code == 0, result.output
    for shown in ("full", "h2o(0.25)", "h2o(64)", "snapkv(0.25)", "snapkv(64)", "0/4", "at 400 tokens", "threads"):
        assert shown in result.output
    assert "h2o" in (out / "report.html").read_text(encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("samples.jsonl")}
    again = run(*command)
    assert (again.exit_code, "snapkv(64)" in again.output) == (0, True)
    assert before == {path: path.read_bytes() for path in out.rglob("samples.jsonl")} and len(before) == 5


def test_the_defaults_that_the_help_of_the_demo_shows():
    tree = yaml.safe_load((files("kvpress.evals") / "data" / "demo.yaml").read_text(encoding="utf-8"))
    (command,) = (c for c in typer.main.get_command(app).commands.values() if c.name == "demo")
    shown = {parameter.name: parameter.default or parameter.show_default for parameter in command.params}
    task, compared = tree["defaults"]["task"], tree["sweep"][-1]
    assert shown["policies"].split(",") == compared["policy"]
    assert [float(text) for text in shown["budgets"].split(",")] == compared["budget"]
    assert [int(text) for text in shown["lengths"].split(",")] == task["lengths"]
    assert (int(shown["depths"]), int(shown["samples"]), int(shown["seed"])) == (
        len(task["depths"]),
        task["repeats"],
        task["seed"],
    )
    assert (shown["model"], str(shown["out"])) == (tree["defaults"]["model"], tree["out"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--policy", "h20", "hi"], "did you mean 'h2o'"),
        (["generate", "--policy", "snapkv", "--set", "windw=3", "hi"], "did you mean 'window'"),
        (["generate", "--policy", "snapkv", "--set", "window", "hi"], "FIELD=VALUE"),
        (["generate", "--policy", "snapkv", "--set", "window=[", "hi"], "FIELD=VALUE"),
        (["generate", "--policy", "h2o", "--budget", "1.5", "hi"], "budget=1.5"),
        (["generate", "--policy", "h2o", "--budget", "x", "hi"], "--budget 'x'"),
        (["generate", "--policy", "full", "--budget", "0.5", "hi"], "no field 'budget'"),
        (["generate", "--model", "/none/such", "hi"], "no folder /none/such"),
        (["generate", "--model", "{folder}", "--device", "warp", "hi"], "device 'warp'"),
        (["generate", "--model", "{folder}", "--dtype", "f", "hi"], "dtype 'f'"),
        (["generate", "--model", "{folder}", "--chat", "hi"], "no chat template"),
        (["generate", "@/none/such.txt"], "/none/such.txt"),
        (["generate", "@/"], "cannot read the prompt"),
        (["generate", ""], "prompt is empty"),
        (["generate", " \n"], "prompt is empty"),
        (["demo", "--policies", "h20"], "did you mean 'h2o'"),
        (["demo", "--budgets", "0.1,x"], "--budgets 'x'"),
        (["demo", "--lengths", "1e3"], "--lengths '1e3'"),
        (["demo", "--budgets", "1.5"], "budget=1.5"),
        (["demo", "--lengths", "-3"], "--lengths: lengths=-3 is no count"),
        (["demo", "--policies", "minference", "--budgets", "64"], "none of the policies takes one"),
        (["demo", "--out", "{file}/out"], "cannot make the folder {file}/out"),
        (["demo", "--model", "{folder}", "--lengths", "50", "--out", "{out}"], "length=50 is too short"),
        (["demo", "--model", "{folder}", "--lengths", "1020", "--out", "{out}"], "was made for 1024"),
        (["demo", "--model", "{folder}", "--lengths", "400", "--minutes", "1e-9", "--out", "{out}"], "--minutes more"),
        (["demo", "--model", "{file}/none", "--out", "{out}"], "no folder"),
    ],
)
def test_a_user_error_is_one_line(folder, tmp_path, arguments, said):
    (tmp_path / "file").write_text("")
    places = {"folder": folder, "file": tmp_path / "file", "out": tmp_path / "out"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said.format(**places) in result.stderr


def test_an_unsupported_model_is_one_line(folder, monkeypatch):
    def refuse(model, policy):
        raise kvpress.UnsupportedModelError("an encoder, which has no cache;\nuse a decoder")

    monkeypatch.setattr(kvpress, "patch", refuse, raising=False)
    result = run("generate", "--model", folder, "hi")
    assert (result.exit_code, result.stderr) == (2, "error: an encoder, which has no cache; use a decoder\n")


def test_chat_is_used_where_there_is_a_template():
    tokenizer = byte_tokenizer()
    plain = encode(tokenizer, "hi", None).input_ids
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    assert tokenizer.decode(encode(tokenizer, "hi", None).input_ids[0]) == "<user>hi:"
    assert encode(tokenizer, "hi", False).input_ids.tolist() == plain.tolist()


def test_number():
    assert [number(text) for text in ("64", "0.5", "1.0", "-3")] == [64, 0.5, 1.0, -3]
    assert isinstance(number("1.0"), float) and isinstance(number("1"), int)


def test_inspect_says_what_is_read(folder):
    text = "Call me Ishmael. Some years ago, never mind how long precisely. " * 3
    fields = ("--set", "block_size=16", "--set", "stride=4", "--set", "threshold=0.5")
    result = run("inspect", "--model", folder, "--policy", "x_attention", *fields, "--length", "100", text)
    assert result.exit_code == 0, result.output
    assert "read by the 100 rows of the prompt" in result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    assert [row[0].strip() for row in rows] == [*map(str, range(layers)), "all"]
    densities = [float(row[1].strip().removesuffix("%")) for row in rows]
    assert max(densities) < 100
    assert densities[-1] == pytest.approx(sum(densities[:-1]) / layers, abs=0.1)


def test_inspect_draws_a_page(folder, tmp_path):
    page = tmp_path / "new" / "inspect.html"
    options = ("--policy", "h2o", "--budget", "30", "--length", "90", "--layers", "1", "--out", str(page))
    result = run("inspect", "--model", folder, *options)
    assert result.exit_code == 0, result.output
    assert str(page) in result.output
    assert "layer 1: keeps 33.3%" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--policy", "quest", "a whale"), "nothing to inspect"),
        (("--policy", "h2o", "--length", "99", "a whale"), "--length 99"),
        (("--policy", "h2o", "--layers", "7", "a whale"), "--layers '7'"),
        (("--policy", "h2o", "--layers", "one", "a whale"), "--layers 'one'"),
        (("--policy", "x_attention", "--set", "min_len=50", "a whale"), "min_len=50"),
        (("--policy", "h2o", "--out", __file__ + "/a.html", "a whale"), "--out: cannot make the folder"),
        (("@no-such-file",), "no-such-file"),
    ],
)
def test_inspect_bad_input(folder, arguments, word):
    result = run("inspect", "--model", folder, *arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert result.stderr.count("\n") == 1
