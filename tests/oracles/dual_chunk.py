"""Dual chunk attention in plain Python: the distance of every pair of tokens, by the paper's formula."""

from dataclasses import dataclass

import torch

from oracles.common.llama import Oracle, rotate
from oracles.common.rules import Rules


def distance(i, j, piece, limit):
    """How far key j is from query i >= j, where the text is cut into pieces of `piece` tokens."""
    own, other = i // piece, j // piece
    if own == other:
        return i % piece - j % piece
    if own == other + 1:
        return min(i % piece + piece, limit) - j % piece
    return limit - j % piece


class Distances(Oracle):
    """Every token is kept and read; a row's query is rotated for each key by the pair's distance, the keys not at all."""

    def row(self, layer, queries, row, positions, decode):
        rules, config = self.policy, self.config
        trained = config.max_position_embeddings
        chunk = rules.chunk_size if rules.chunk_size is not None else 3 * trained // 4
        piece = chunk - (rules.local_size if rules.local_size is not None else trained // 8)
        limit = max(piece, min(chunk, trained - 1))
        group = config.num_attention_heads // config.num_key_value_heads
        output = torch.zeros_like(queries[row])
        for query_head in range(config.num_attention_heads):
            head = self.heads[layer][query_head // group]
            entries = [entry for entry in head.entries if entry.position <= positions[row]]
            scores = []
            for entry in entries:
                away = distance(positions[row], entry.position, piece, limit)
                scores.append(rotate(queries[row, query_head], away, self.theta) @ entry.key / config.head_dim**0.5)
            weights = torch.softmax(torch.stack(scores), dim=0)
            output[query_head] = weights @ torch.stack([entry.value for entry in entries])
            for entry, weight in zip(entries, weights.tolist(), strict=True):
                entry.score += weight
        return output


@dataclass(frozen=True)
class DualChunkAttention(Rules):
    """The rules' numbers; everything is kept."""

    chunk_size: int | None = None
    local_size: int | None = None
    runner = Distances
