"""Calibration: the field's values are tried as they would be used, and the best one is written."""

from dataclasses import replace

import pytest
import torch
import yaml
from transformers import DynamicCache
from typer.testing import CliRunner

import kvpress
from kvpress.calibrate import TAIL, Example, Trial, best, calibrate, write_policy
from kvpress.cli import app
from kvpress.compat import CACHE
from kvpress.policies import H2O, TidalDecode
from support.matrix import prompt, sharp_llama

LAYERS = 5


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


def by_hand(model, policy, question):
    """Log-probabilities of the answer, with a prompt pass and decode steps of its own."""
    cache, fed = DynamicCache(config=model.config), question.prompt[-TAIL:] + question.answer[:-1]
    with torch.no_grad(), kvpress.patch(model, policy):
        model(torch.tensor([question.prompt[:-TAIL]]), **{CACHE: cache})
        logits = [model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1] for token in fed]
    rows = torch.stack(logits)[-len(question.answer) :].log_softmax(-1)
    right = [row.argmax().item() == token for row, token in zip(rows, question.answer, strict=True)]
    return [row[token].item() for row, token in zip(rows, question.answer, strict=True)], right


def test_every_value_is_tried_as_it_would_be_used(model):
    policy = TidalDecode(k=4, sparse_layer_start=1)
    questions = [Example(prompt(40, seed), prompt(3, seed + 10)) for seed in range(2)]
    trials = list(calibrate(model, policy, questions))
    assert [trial.value for trial in trials] == [2, 3, 4]
    for trial in trials:
        answers = [by_hand(model, replace(policy, correction_layer=trial.value), one) for one in questions]
        log_probabilities = [value for values, _ in answers for value in values]
        hits = [hit for _, row in answers for hit in row]
        assert trial.log_probability == pytest.approx(sum(log_probabilities) / 6, abs=1e-4)
        assert trial.right == pytest.approx(sum(hits) / 6)
    assert len({round(trial.log_probability, 4) for trial in trials}) == 3


def test_the_best_has_the_most_right_then_the_highest_probability():
    assert best([Trial(3, -1.0, 0.5), Trial(4, -9.0, 0.75), Trial(5, -2.0, 0.75)]).value == 5


def test_the_file_is_one_that_patch_takes(model, tmp_path):
    path = tmp_path / "tidal.yaml"
    write_policy(path, TidalDecode(k=4, sparse_layer_start=1, correction_layer=3))
    assert yaml.safe_load(path.read_text()) == {
        "name": "tidal_decode",
        "k": 4,
        "sparse_layer_start": 1,
        "correction_layer": 3,
    }
    with kvpress.patch(model, path) as handle:
        assert handle.describe() == "tidal_decode(k=4, sparse_layer_start=1, correction_layer=3)"


@pytest.mark.parametrize(
    ("policy", "question", "word"),
    [
        (H2O(budget=4), Example(prompt(40), [5]), "nothing to calibrate"),
        (TidalDecode(), Example(prompt(TAIL), [5]), "more than"),
        (TidalDecode(), Example(prompt(40), []), "at least 1"),
    ],
)
def test_what_cannot_be_calibrated(model, policy, question, word):
    with pytest.raises(kvpress.PolicyError, match=word):
        next(calibrate(model, policy, [question]))
    assert "generate" not in vars(model)


def test_command(model, tmp_path, monkeypatch):
    """From the options to the file, on a small model."""
    from support.tiny_saved import byte_tokenizer, tiny_model

    tokenizer = byte_tokenizer()
    small = tiny_model(tokenizer)
    monkeypatch.setattr("kvpress.cli.load", lambda *arguments: (small, tokenizer))
    out = tmp_path / "found.yaml"
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: tidal_decode\nk: 8\nsparse_layer_start: 2\n")
    arguments = ["calibrate", "--policy", str(policy), "--lengths", "400", "--samples", "1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1/1 correction_layer=3" in result.output
    assert kvpress.make_policy(str(out)).correction_layer == 3
    refused = CliRunner().invoke(app, ["calibrate", "--policy", "h2o", "--lengths", "400"])
    assert refused.exit_code == 2
    assert "nothing to calibrate" in refused.output
