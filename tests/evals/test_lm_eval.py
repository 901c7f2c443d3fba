"""lm-eval's model `kvpress`: lm-eval's own `hf` under full attention, a patched model fed by hand under a policy."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpress
from kvpress.compat import CACHE
from kvpress.errors import PolicyError, UnsupportedModelError
from support.models import build, tiny_bloom
from support.tiny_saved import byte_tokenizer

pytest.importorskip("lm_eval", reason="the model is one for lm-eval; pip install 'kvpress-toolkit[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from kvpress.evals.lm_eval import KVPressLM, main

TEXTS = ["The pass key of Anna is 4711. There and back again.", "Here we go: one, two, three", "A short one"]
CHOICES = [" four", " f", " the sky is blue", " four and more"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama over bytes with sharp attention, so that a policy shows."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    build(LlamaForCausalLM, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(folder, **options):
    return KVPressLM(folder, **{"device": "cpu", "dtype": "float32", "batch_size": 2, **options})


def hf(folder):
    return HFLM(folder, device="cpu", dtype="float32", batch_size=2)


def requests(kind, arguments):
    return [Instance(kind, {}, argument, at) for at, argument in enumerate(arguments)]


def pairs():
    """Each text with each continuation, and a continuation of nothing."""
    found = [(text, choice) for text in TEXTS for choice in CHOICES]
    return requests("loglikelihood", [*found, ("", "Here")])


def generations():
    return requests("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in TEXTS])


def rolling():
    return requests("loglikelihood_rolling", [(text * 3,) for text in TEXTS])


def close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


@torch.no_grad()
def by_hand(lm, context, text):
    """The text's log-probability, each of its tokens fed after a prompt pass over the context; and whether it is greedy."""
    found, greedy = 0.0, True
    output = lm.model(torch.tensor([context]), use_cache=True)
    for token in text:
        logits = output.logits[0, -1]
        found += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
        output = lm.model(torch.tensor([[token]]), **{CACHE: output[CACHE]})
    return found, greedy


# ------------------------------------------------------------------------------------------------ full attention


@pytest.mark.parametrize("scoring", ["one_pass", "decode", "sequential"])
def test_full_attention_is_lm_evals_own(folder, scoring):
    ours, theirs = make(folder, scoring=scoring), hf(folder)
    close(ours.loglikelihood(pairs()), theirs.loglikelihood(pairs()))
    assert ours.loglikelihood_rolling(rolling()) == pytest.approx(theirs.loglikelihood_rolling(rolling()), abs=1e-2)
    assert ours.generate_until(generations()) == theirs.generate_until(generations())


def test_greedy_continuations_are_seen_as_such(folder):
    """The model's own next letter is greedy; with a letter more that it would not write, or another one, it is not."""
    lm = make(folder, policy="h2o", budget=0.5, scoring="decode")
    contexts = [f"{a} is the letter {b}" for a in "abcdefghijklm" for b in "abcdefghijklm"]
    asked = [(context, {"until": [], "max_gen_toks": 2}) for context in contexts]
    written = lm.generate_until(requests("generate_until", asked))
    given = [(c, w) for c, w in zip(contexts, written, strict=True) if len(w) == 2 and w.isascii() and w[0] > " "]
    assert len(given) > 1  # this random model writes bytes that are no text, too
    wrong = [(c, w[0] + ("x" if w[1] != "x" else "y")) for c, w in given]
    other = [(c, ("x" if w[0] != "x" else "y") + w[1]) for c, w in given]
    for pairs, greedy in ((given, True), (wrong, False), (other, False)):
        assert all(found is greedy for _, found in lm.loglikelihood(requests("loglikelihood", pairs)))


def test_what_does_not_fit_is_cut_as_lm_eval_cuts_it(folder, caplog):
    """96 positions: a context of 150 loses its first tokens, and each choice leaves another room."""
    found = [("0123456789" * 15, choice) for choice in CHOICES]
    ours, theirs = make(folder, scoring="decode"), hf(folder)
    close(ours.loglikelihood(requests("", found)), theirs.loglikelihood(requests("", found)))
    with pytest.raises(PolicyError, match=r"continuation of 150 tokens does not fit.*max_length=96"):
        ours.loglikelihood(requests("", [("a", "0123456789" * 15)]))


# ---------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "quest"])
def test_a_policy_shows_in_the_scores(folder, policy):
    fields = {"window": 4} if policy == "snapkv" else {"page_size": 4, "dense_layers": 0} if policy == "quest" else {}
    lm = make(folder, policy=policy, budget=0.25, scoring="decode", **fields)
    found = lm.loglikelihood(pairs())
    expected = []
    for request in pairs()[:-1]:
        context, choice = (lm.tok_encode(text) for text in request.args)
        expected.append(by_hand(lm, context, choice))
    close(found[:-1], expected)
    full = hf(folder).loglikelihood(pairs())
    assert max(abs(one - other) for (one, _), (other, _) in zip(found, full, strict=True)) > 0.1


def test_a_policy_shows_in_rolling_texts(folder):
    """A text after the start token, decoded from its first token on; what is longer than the model begins anew."""
    lm = make(folder, policy="h2o", budget=8, scoring="decode")
    found = lm.loglikelihood_rolling(rolling())
    for request, value in zip(rolling(), found, strict=True):
        ids = [lm.prefix_token_id, *lm.tok_encode(request.args[0])]
        if len(ids) <= 97:
            assert value == pytest.approx(by_hand(lm, ids[:1], ids[1:])[0], abs=1e-3)
    assert sum(len(request.args[0]) <= 96 for request in rolling()) == 2  # the third has windows
    assert abs(sum(found) - sum(hf(folder).loglikelihood_rolling(rolling()))) > 1


def test_a_policy_shows_in_what_is_generated(folder):
    lm = make(folder, policy="h2o", budget=0.25)
    found = lm.generate_until(generations())
    for text, written in zip(TEXTS, found, strict=True):
        ids = torch.tensor([lm.tok_encode(text)])
        made = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        assert written == lm.tok_decode(made.tolist()).partition("\n")[0]
    assert found != hf(folder).generate_until(generations())


def test_the_results_say_what_the_cache_held(folder):
    lm = make(folder, policy="h2o", budget=16)
    lm.generate_until(generations()[:1])
    told = lm.get_model_info()["kvpress"]
    assert told["policy"] == "h2o(budget=16)"
    seen = [len(TEXTS[0]) + at for at in range(1, 12)]  # the first token is the prompt pass's
    assert told["read_share"] == pytest.approx(sum(min(16 + 1, n) for n in seen) / sum(seen), rel=0.1)
    assert 0 < told["cache_share"] < 1


# ---------------------------------------------------------------------------------------------------- refusals


def test_one_pass_is_refused_where_it_would_not_see_the_policy(folder):
    lm = make(folder, policy="h2o", budget=0.25)
    for ask in (lambda: lm.loglikelihood(pairs()), lambda: lm.loglikelihood_rolling(rolling())):
        with pytest.raises(PolicyError, match=r"one pass is the same under h2o\(budget=0.25\).*add scoring=decode"):
            ask()


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"policy": "h2o", "budget": 0.25}, "keeps a share of the prompt; give its budget as entries"),
        ({"policy": "snapkv", "budget": 64}, "evicts after prompts only"),
    ],
)
def test_a_rolling_text_needs_a_policy_that_acts_without_a_prompt(folder, fields, reason):
    lm = make(folder, scoring="decode", **fields)
    with pytest.raises(PolicyError, match=rf"loglikelihood_rolling has no context.*{reason}"):
        lm.loglikelihood_rolling(rolling())


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"policy": "h20"}, r"unknown policy 'h20'; did you mean 'h2o'\?"),
        ({"policy": "h2o", "budgett": 0.2}, r"no field 'budgett'; did you mean 'budget'\?"),
        ({"policy": "h2o", "budget": 1.5}, "budget=1.5 is above 1"),
        ({"policy": "full", "max_lenght": 5}, "full has no field 'max_lenght'"),
        ({"policy": ["snapkv", "quest"], "budget": 0.2}, "budget belong to no policy of the list"),
        ({"policy": ["snapkv", "h2o"]}, "both play the role"),
        ({"scoring": "fast"}, "scoring='fast' does not work"),
        ({"scoring": "decode", "batch_size": "auto:4"}, "batch_size='auto' is measured on one pass"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        KVPressLM("/no/such/folder", **fields)


def test_a_model_that_cannot_be_patched_is_refused():
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        KVPressLM(tiny_bloom(), tokenizer=byte_tokenizer(), policy="h2o", budget=8)


def test_policies_act_together_from_mappings(folder):
    lm = make(
        folder,
        policy=[{"name": "snapkv", "budget": 16, "window": 4}, {"name": "quest", "budget": 32, "dense_layers": 1}],
    )
    assert lm.get_model_info()["kvpress"]["policy"] == "snapkv(budget=16, window=4) + quest(budget=32, dense_layers=1)"


# ------------------------------------------------------------------------------------------------ from a shell

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
metadata: {{version: 1}}
{rest}
"""
GENERATED = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(folder, tmp_path):
    """Two tasks over local rows; `gold` is the most likely choice, `answer` what is written, both under H2O by hand."""
    lm = make(folder, policy="h2o", budget=0.25)
    rows = []
    for text in TEXTS:
        ids = lm.tok_encode(text)
        scores = [by_hand(lm, ids, lm.tok_encode(choice))[0] for choice in (" four", " five", " twenty")]
        made = lm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=1)[0, len(ids) :]
        answer = lm.tok_decode(made.tolist()).partition("\n")[0]
        gold = scores.index(max(scores))
        rows.append({"text": text, "choices": ["four", "five", "twenty"], "gold": gold, "answer": answer})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("written", GENERATED), ("chosen", CHOSEN)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"kvpress_{name}", data=data, rest=rest))
    return tmp_path


@pytest.mark.slow
def test_the_command_line(folder, tasks):
    """As a user types it: every answer is the one made by hand."""
    command = [sys.executable, "-m", "kvpress.evals.lm_eval", "run", "--model", "kvpress", "--device", "cpu"]
    arguments = f"pretrained={folder},policy=h2o,budget=0.25,scoring=decode,dtype=float32"
    offline = {"HF_HOME": str(tasks / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    options = ["--tasks", "kvpress_written,kvpress_chosen", "--include_path", ".", "--output_path", "out"]
    run = subprocess.run(
        [*command, "--model_args", arguments, *options],
        cwd=tasks,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "kvpress: under h2o(budget=0.25) the cache held" in run.stderr
    (path,) = tasks.glob("out/**/results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["kvpress"]["policy"] == "h2o(budget=0.25)"
    assert results["results"]["kvpress_written"]["exact_match,none"] == 1
    assert results["results"]["kvpress_chosen"]["acc,none"] == 1
    assert not math.isnan(results["config"]["kvpress"]["read_share"])


def test_an_error_is_one_line_and_exit_code_2(folder, tasks, monkeypatch, capsys):
    arguments = f"pretrained={folder},policy=h2o,budget=1.5"
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "run", "--model", "kvpress", "--model_args", arguments, "--tasks", f"{tasks}/chosen.yaml"],
    )
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval sets it; the test takes it back
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "error: model_args: budget=1.5 is above 1; a float is a share of the prompt in (0, 1]"


def test_a_model_from_python_is_free_again(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    lm = KVPressLM(model, tokenizer=byte_tokenizer(), policy="h2o", budget=8)
    with pytest.raises(PolicyError, match="already"):
        kvpress.patch(model, "full")
    lm.handle.unpatch()
    kvpress.patch(model, "full").unpatch()
    assert get_model("kvpress") is KVPressLM
