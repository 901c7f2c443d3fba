"""A Llama forward in float64 whose cache is a Python list per layer and kv head, for one sequence."""

from dataclasses import dataclass, field

import torch


@dataclass
class Entry:
    """One cached token of one kv head: `key` is not rotated; `score` is the softmax mass it has received."""

    position: int
    key: torch.Tensor
    value: torch.Tensor
    score: float = 0.0


@dataclass
class Head:
    """What one kv head holds: entries in position order, and the prompt rows since the last eviction point."""

    entries: list = field(default_factory=list)
    rows: list = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One pass: `logits` [q, vocab] float32; `kept[layer][kv_head]` sorted positions after its eviction."""

    logits: torch.Tensor
    kept: list


def linear(weights, name, x):
    """x [q, in] -> [q, out]."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(vector, position, theta):
    """RoPE of one head's vector [d]: dimension i and i + d/2 turn by position * theta ** (-2i / d)."""
    half = len(vector) // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def rope_positions(positions, rope):
    """Where entries held at `positions` are rotated: there ("original") or at 0..m-1 ("reindex")."""
    return list(range(len(positions))) if rope == "reindex" else list(positions)


class Oracle:
    """`Oracle(model, policy).run(passes)`: what a LlamaForCausalLM says and keeps under a policy.

    A pass is a list of token ids. The first pass and every pass of several tokens is a prompt pass; a later pass
    of one token is a decode step. After a run `heads[layer][kv_head].entries` are the entries held at its end.
    """

    def __init__(self, model, policy):
        self.config = model.config
        self.theta = model.config.rope_parameters["rope_theta"]
        assert model.config.rope_parameters["rope_type"] == "default"
        assert model.config.hidden_act == "silu"
        self.weights = {name: tensor.detach().double().cpu() for name, tensor in model.state_dict().items()}
        self.policy = policy

    @torch.no_grad()
    def run(self, passes):
        config = self.config
        self.heads = [[Head() for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        seen = prompt_seen = 0
        eviction_waits = False
        steps = []
        for index, tokens in enumerate(passes):
            assert tokens
            decode = index > 0 and len(tokens) == 1
            if decode and eviction_waits:
                for layer in range(config.num_hidden_layers):
                    self.evict(layer, prompt_seen)
                eviction_waits = False

            again = self.again(tokens, decode)
            if again:
                seen, decode = seen - len(again), False
                for head in [head for layer in self.heads for head in layer]:
                    head.entries = [entry for entry in head.entries if entry.position < seen]
            positions = list(range(seen, seen + len(again) + len(tokens)))
            seen += len(positions)
            if decode:
                evicts = not self.policy.prompt_only
            else:
                prompt_seen = seen
                evicts = self.policy.evict == "each_pass"
                eviction_waits = self.policy.evict == "after_prompt"

            hidden = self.weights["model.embed_tokens.weight"][again + tokens]
            for layer in range(config.num_hidden_layers):
                self.layer, self.prompt_seen = layer, prompt_seen
                hidden = self.block(layer, hidden, positions, decode)
                if evicts:
                    self.evict(layer, prompt_seen, decode)
            hidden = rms_norm(hidden[len(again) :], self.weights["model.norm.weight"], config.rms_norm_eps)
            kept = [[[entry.position for entry in head.entries] for head in layer] for layer in self.heads]
            steps.append(Step(linear(self.weights, "lm_head", hidden).float(), kept))
        return steps

    def again(self, tokens, decode):
        """The tokens of earlier decode steps, the last ones, that are taken back and fed once more with these."""
        return []

    def evict(self, layer, prompt_seen, decode=False):
        """Let every kv head of a layer keep what the policy says, and forget its query rows."""
        for head in self.heads[layer]:
            kept = set(self.policy.keep(head.entries, head.rows, prompt_seen))
            head.entries = [entry for entry in head.entries if entry.position in kept]
            head.rows = []

    def block(self, layer, hidden, positions, decode):
        """One decoder layer. hidden [q, hidden] -> [q, hidden]."""
        weights, eps, name = self.weights, self.config.rms_norm_eps, f"model.layers.{layer}"
        x = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], eps)
        hidden = hidden + self.attention(layer, x, positions, decode)
        x = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate = linear(weights, f"{name}.mlp.gate_proj", x)
        up = linear(weights, f"{name}.mlp.up_proj", x)
        return hidden + linear(weights, f"{name}.mlp.down_proj", gate * torch.sigmoid(gate) * up)

    def attention(self, layer, x, positions, decode):
        """Append this pass's tokens, attend causally to what is held. x [q, hidden] -> [q, hidden]."""
        config, name = self.config, f"model.layers.{layer}.self_attn"
        tokens = len(positions)
        queries = linear(self.weights, f"{name}.q_proj", x).view(tokens, -1, config.head_dim)
        keys = linear(self.weights, f"{name}.k_proj", x).view(tokens, -1, config.head_dim)
        values = linear(self.weights, f"{name}.v_proj", x).view(tokens, -1, config.head_dim)
        output = torch.zeros_like(queries)
        one_by_one = self.policy.evict == "each_row" and not decode
        for rows in [[row] for row in range(tokens)] if one_by_one else [list(range(tokens))]:
            for kv_head, head in enumerate(self.heads[layer]):
                head.entries += [Entry(positions[row], keys[row, kv_head], values[row, kv_head]) for row in rows]
            for row in rows:
                output[row] = self.row(layer, queries, row, positions, decode)
            if one_by_one:
                self.evict(layer, self.prompt_seen, decode=True)
        return linear(self.weights, f"{name}.o_proj", output.flatten(1))

    def row(self, layer, queries, row, positions, decode):
        """One query row of all heads over what it reads. queries [q, H, d], not rotated -> [H, d]."""
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        output = torch.zeros_like(queries[row])
        reads = self.reads(layer, queries, row, positions, decode)
        for kv_head, head in enumerate(self.heads[layer]):
            mass = {entry.position: 0.0 for entry in head.entries if entry.position <= positions[row]}
            logits = []
            for query_head in range(kv_head * group, (kv_head + 1) * group):
                entries, places, place = reads[query_head]
                query = rotate(queries[row, query_head], place, self.theta)
                keys = torch.stack([rotate(e.key, at, self.theta) for e, at in zip(entries, places, strict=True)])
                scores = keys @ query / config.head_dim**0.5
                probabilities = torch.softmax(scores, dim=0)
                output[query_head] = probabilities @ torch.stack([entry.value for entry in entries])
                for entry, probability in zip(entries, probabilities.tolist(), strict=True):
                    mass[entry.position] += probability
                logits.append({e.position: score for e, score in zip(entries, scores.tolist(), strict=True)})
            self.observe(layer, kv_head, positions[row], mass, logits, decode)
        return output

    def reads(self, layer, queries, row, positions, decode):
        """For each query head: the entries it reads, where each is rotated, and where the query is."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        reads = []
        for head in self.heads[layer]:
            # A query is rotated where its own token's key is.
            places = rope_positions([entry.position for entry in head.entries], self.policy.rope)
            visible = [i for i, entry in enumerate(head.entries) if entry.position <= positions[row]]
            entries = [head.entries[i] for i in visible]
            reads += [(entries, [places[i] for i in visible], places[visible[-1]])] * group
        return reads

    def observe(self, layer, kv_head, position, mass, logits, decode):
        """See one row: `mass` {position: softmax weight summed over the group}, `logits` the same per query head."""
        head = self.heads[layer][kv_head]
        for entry in head.entries:
            entry.score += mass.get(entry.position, 0.0)
        if not decode:
            head.rows.append(mass)
