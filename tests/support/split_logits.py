"""Run by torchrun in two processes: the largest difference of logits between a split and a whole model, policy by policy.

    torchrun --standalone --nproc-per-node 2 split_logits.py MODEL_FOLDER

Prints one JSON object, policy -> difference, or the error's text.
"""

import json
import sys

import torch
import torch.distributed as distributed

import kvpress
from kvpress.compat import CACHE
from kvpress.models import load_model

POLICIES = [
    "full",
    {"name": "h2o", "budget": 0.4},
    {"name": "a2sf", "budget": 0.3, "evict": "each_row"},
    {"name": "ems", "budget": 20, "window": 4, "recent": 4},
    {"name": "snapkv", "budget": 20, "window": 4},
    {"name": "pyramid_kv", "budget": 20, "window": 4},
    {"name": "streaming_llm", "recent": 10},
    {"name": "quest", "budget": 20, "page_size": 4},
    {"name": "tidal_decode", "k": 8},
    {"name": "recycled", "budget": 8, "stride": 4},
    "tova",
]


@torch.no_grad()
def logits(model, policy, ids, steps):
    """Of the prompt's last token and of each step, [1 + steps, vocab]."""
    with kvpress.patch(model, policy):
        output = model(ids, use_cache=True)
        found = [output.logits[0, -1]]
        for token in range(5, 5 + steps):
            step = torch.tensor([[token]])
            found.append(model(step, **{CACHE: output[CACHE]}, use_cache=True).logits[0, -1])
    return torch.stack(found)


def main():
    torch.set_num_threads(1)
    split = load_model(sys.argv[1], dtype="float32", tp_plan="auto")[0]
    whole = load_model(sys.argv[1], "cpu", "float32")[0]
    heads = split.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    assert heads * 2 == whole.model.layers[0].self_attn.q_proj.weight.shape[0]
    ids = torch.randint(2, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    found = {}
    for policy in POLICIES:
        name = kvpress.make_policy(policy).describe()
        try:
            found[name] = float((logits(split, policy, ids, 20) - logits(whole, policy, ids, 20)).abs().max())
        except kvpress.UnsupportedModelError as error:
            found[name] = str(error)
    if distributed.get_rank() == 0:
        print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
