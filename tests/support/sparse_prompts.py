"""What tests of several prefill policies do: a prompt in chunks, and padded sequences of several turns, against an oracle."""

import torch

from support.matrix import kept, prompt
from support.reads import run


def check_rows(logits, steps, row=0):
    """Every row of a sequence's passes has the oracle's logits."""
    for got, step in zip(logits, steps, strict=True):
        torch.testing.assert_close(got[row, -len(step.logits) :], step.logits, atol=1e-4, rtol=1e-4)


def check_chunks(model, policy, oracle, cuts):
    """A prompt of 26 tokens in passes of so many; gives their logits."""
    ids = prompt(26)
    passes = [ids[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
    logits, _, _ = run(model, policy, passes)
    check_rows(logits, oracle.run(passes))
    return logits


def check_padded_turns(model, policies, oracle):
    """Two sequences, one of them padded, over a prompt, steps, a second turn and steps: each as it is alone."""
    texts, mask = [[0] * 8 + prompt(16, 4), prompt(24, 5)], torch.ones(2, 42, dtype=torch.long)
    mask[0, :8] = 0
    turn = [prompt(14, 6), prompt(14, 7)]
    later = [[[token], [token + 1]] for token in prompt(2, 6)]
    logits, cache, _ = run(model, policies, [texts, *later, turn, *later], mask)
    for row in range(2):
        own = [step[row] for step in later]
        steps = oracle.run([texts[row][8 * (row == 0) :], *own, turn[row], *own])
        check_rows(logits, steps, row)
        assert kept(cache, row) == steps[-1].kept
