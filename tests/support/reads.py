"""What selecting policies read: recorded from the product, to be compared with an oracle or by hand."""

import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE


def watch(monkeypatch, policy_type, row=0):
    """(position of the row, layer) -> for each query head the positions it reads, of all decode steps from now on."""
    log, original = {}, policy_type.select

    def select(self, view):
        selected = original(self, view)
        log[int(view.seen[row]) - 1, view.layer] = positions_read(view, selected, row)
        return selected

    monkeypatch.setattr(policy_type, "select", select)
    return log


def positions_read(view, selected, row=0):
    """For each query head of a sequence the positions that it reads, ascending."""
    heads, group = view.query.shape[1], view.query.shape[1] // view.keys.shape[1]
    read = []
    for head in range(heads):
        held = view.positions[row, head // group].tolist()
        slots = range(len(held)) if selected.index is None else selected.index[row, head // group].tolist()
        member = [True] * len(slots)
        if selected.index is not None and selected.member is not None:
            wide = selected.member.shape[1] == heads
            member = selected.member[row, head if wide else head // group].tolist()
        positions = [held[slot] for slot, reads in zip(slots, member, strict=True) if reads]
        positions = [at for at in positions if at >= 0]
        assert len(set(positions)) == len(positions), f"a slot is read twice: {positions}"
        read.append(sorted(positions))
    return read


@torch.no_grad()
def run(model, policies, passes, mask=None):
    """The logits of each pass [batch, q, vocab], the cache, and the report."""
    cache, logits, seen = DynamicCache(config=model.config), [], 0
    with kvpress.patch(model, policies) as handle:
        for ids in passes:
            rows = torch.tensor([ids] if isinstance(ids[0], int) else ids)
            seen += rows.shape[1]
            extra = {}
            if mask is not None:
                places = (mask[:, :seen].cumsum(1) - 1).clamp(min=0)[:, -rows.shape[1] :]
                extra = {"attention_mask": mask[:, :seen], "position_ids": places}
            logits.append(model(rows, **{CACHE: cache}, **extra).logits)
        return logits, cache, handle.report()


def check_oracle(oracle, passes, logits, log):
    """The last row's logits of each pass, and what every decode step of a sequence reads, are the oracle's."""
    for got, step in zip(logits, oracle.run(passes), strict=True):
        torch.testing.assert_close(got[0, -1], step.logits[-1], atol=1e-4, rtol=1e-4)
    assert log == oracle.log


@torch.no_grad()
def dense(model, passes):
    """Logits [1, all, vocab] and the K and V of an unpatched run, token by token after the first pass."""
    cache = DynamicCache(config=model.config)
    logits = [model(torch.tensor([ids]), **{CACHE: cache}).logits for ids in passes]
    return torch.cat(logits, dim=1), cache
