"""GemFilter in plain Python: which tokens of a prompt a layer picks, one product and one sum at a time."""

from dataclasses import dataclass, field
from typing import Any

from oracles.common.llama import Head, Oracle, linear, rms_norm, rotate
from oracles.common.numbers import dot
from oracles.common.rules import resolve
from oracles.full import Full


def smoothed(sums, width):
    """The mean over `width` neighbours, where what lies past the ends counts as zeros."""
    half = width // 2
    return [sum(sums[max(0, at - half) : at + half + 1]) / width for at in range(len(sums))]


def picked(sums, k, width, first, last):
    """The places of the k tokens that are picked, ascending."""
    n, means = len(sums), smoothed(sums, width)
    always = [at for at in range(n) if at < first or at >= n - last]
    others = sorted((at for at in range(n) if at not in always), key=lambda at: (-means[at], at))
    return sorted((always + others)[:k])


class Filter(Oracle):
    """Passes of several tokens, and the first, are cut to what the look at them picks; `log` collects the places picked."""

    def __init__(self, model, policy):
        super().__init__(model, policy.over)
        self.model, self.rules, self.log = model, policy, []

    def run(self, passes):
        self.log = []
        return super().run([self.cut(tokens) if len(tokens) > 1 else tokens for tokens in passes])

    def cut(self, tokens):
        k = resolve(self.rules.k, len(tokens))
        places = list(range(len(tokens)))
        if k < len(tokens):
            rules = self.rules
            places = picked(self.look(tokens), k, rules.kernel_size, rules.keep_first, rules.keep_last)
        self.log.append(places)
        return [tokens[place] for place in places]

    def look(self, tokens):
        """What the last token's query heads give each token together in the layer that picks, the tokens alone."""
        config, layers = self.config, self.config.num_hidden_layers
        picks = self.rules.r
        if picks is None:
            picks = 19 if layers == 40 else int(0.42 * layers)
        alone = Oracle(self.model, Full())
        alone.heads = [[Head() for _ in range(config.num_key_value_heads)] for _ in range(layers)]
        positions = list(range(len(tokens)))
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(picks):
            hidden = alone.block(layer, hidden, positions, False)
        name = f"model.layers.{picks}"
        x = rms_norm(hidden, self.weights[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
        queries = linear(self.weights, f"{name}.self_attn.q_proj", x).view(len(tokens), -1, config.head_dim)
        keys = linear(self.weights, f"{name}.self_attn.k_proj", x).view(len(tokens), -1, config.head_dim)
        group = config.num_attention_heads // config.num_key_value_heads
        last, sums = len(tokens) - 1, []
        for at in positions:
            total = 0.0
            for head in range(config.num_attention_heads):
                query = rotate(queries[last, head], last, self.theta).tolist()
                total += dot(query, rotate(keys[at, head // group], at, self.theta).tolist())
            sums.append(total)
        return sums


@dataclass(frozen=True)
class GemFilter:
    """The rules' numbers; what is kept of the short prompt says `over`."""

    k: Any = 1024
    r: int | None = None
    kernel_size: int = 5
    keep_first: int = 0
    keep_last: int = 0
    over: Any = field(default_factory=Full)
    runner = Filter
