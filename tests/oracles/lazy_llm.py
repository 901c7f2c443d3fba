"""LazyLLM in plain Python: dictionaries say which tokens each layer has run on, and what waits between two layers."""

from dataclasses import dataclass
from math import floor, inf
from typing import Any

import torch

from oracles.common.llama import Oracle, Step, linear, rms_norm, rotate
from oracles.common.rules import share, top


class Lazy(Oracle):
    """`held[layer]` {position: [(key, value) of each kv head]}, keys rotated; `aux[layer]` {position: what the layer put out}.

    `log` collects for each pass which tokens each layer ran on.
    """

    @torch.no_grad()
    def run(self, passes):
        config = self.config
        layers = config.num_hidden_layers
        self.held, self.aux, self.log = [{} for _ in range(layers)], [{} for _ in range(layers)], []
        seen, steps = 0, []
        for tokens in passes:
            new = range(seen, seen + len(tokens))
            seen += len(tokens)
            play = list(range(seen))
            hidden = dict(zip(new, self.weights["model.embed_tokens.weight"][tokens], strict=True))
            self.log.append([])
            for layer in range(layers):
                missing = [at for at in play if at not in self.held[layer]]
                self.log[-1].append(missing)
                given = {at: hidden[at] if at in hidden else self.aux[layer - 1].pop(at) for at in missing}
                hidden, row = self.layer(layer, given, play)
                stopping = floor(share(self.rate(layer, layers), len(play)))
                if stopping and layer < layers - 1:
                    scores = [row[at] for at in play]
                    scores[-1] = inf
                    kept = [play[index] for index in top(scores, max(1, len(play) - stopping))]
                    for at in play:
                        if at not in kept and at in hidden:
                            self.aux[layer][at] = hidden.pop(at)
                    play = kept
            last = rms_norm(hidden[seen - 1][None], self.weights["model.norm.weight"], config.rms_norm_eps)
            if len(hidden) == len(tokens) and min(hidden) == new[0]:  # all that came reached the end
                whole = torch.stack([hidden[at] for at in new])
                last = rms_norm(whole, self.weights["model.norm.weight"], config.rms_norm_eps)
            kept = [[sorted(one)] * config.num_key_value_heads for one in self.held]
            steps.append(Step(linear(self.weights, "lm_head", last).float(), kept))
        return steps

    def rate(self, layer, layers):
        rules = self.policy
        where = rules.layers
        if where is None:
            where = sorted({max(0, floor(share(depth, layers)) - 1) for depth in (0.3, 0.6, 0.9)})
        if layer not in where:
            return 0.0
        return float(rules.rate if isinstance(rules.rate, int | float) else rules.rate[list(where).index(layer)])

    def layer(self, layer, given, play):
        """One decoder layer over the tokens given: their hidden states, and the last one's mean attention to each in play."""
        config, name, weights, eps = self.config, f"model.layers.{layer}", self.weights, self.config.rms_norm_eps
        group = config.num_attention_heads // config.num_key_value_heads
        queries, states, row = {}, {}, dict.fromkeys(play, 0.0)
        for at, x in given.items():
            x = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
            heads = {
                kind: linear(weights, f"{name}.self_attn.{kind}_proj", x).view(-1, config.head_dim) for kind in "qkv"
            }
            queries[at] = [rotate(query, at, self.theta) for query in heads["q"]]
            keys = [rotate(key, at, self.theta) for key in heads["k"]]
            self.held[layer][at] = list(zip(keys, heads["v"], strict=True))
        for at, x in given.items():
            outputs, reads = [], [other for other in play if other <= at]
            for head, query in enumerate(queries[at]):
                own = [self.held[layer][other][head // group] for other in reads]
                scores = torch.stack([key @ query for key, _ in own]) / config.head_dim**0.5
                weight = scores.softmax(0)
                outputs.append(weight @ torch.stack([value for _, value in own]))
                if at == play[-1]:
                    for other, one in zip(reads, weight.tolist(), strict=True):
                        row[other] += one / config.num_attention_heads
            x = x + linear(weights, f"{name}.self_attn.o_proj", torch.cat(outputs))
            inner = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
            gate = linear(weights, f"{name}.mlp.gate_proj", inner)
            up = linear(weights, f"{name}.mlp.up_proj", inner)
            states[at] = x + linear(weights, f"{name}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return states, row


@dataclass(frozen=True)
class LazyLLM:
    """The rules' numbers."""

    layers: Any = None
    rate: Any = 0.3
    runner = Lazy
