"""Keyformer in plain Python: H2O's rule on the sums of a noisy softmax."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch

from kvpress.kernels.gumbel_noise import gumbel_noise  # the noise is an input; everything else is computed here
from oracles.common.llama import Oracle
from oracles.common.numbers import softmax
from oracles.common.rules import Rules, heavy_and_recent, resolve


def noisy_softmax(logits, noise, temperature):
    """softmax((logits + noise) / temperature) of a list."""
    exponents = [(logit + extra) / temperature for logit, extra in zip(logits, noise, strict=True)]
    return softmax(exponents)


class KeyformerOracle(Oracle):
    def evict(self, layer, prompt_seen, decode=False):
        total, _ = self.policy.parts(prompt_seen)
        if decode and len(self.heads[layer][0].entries) < total + self.policy.evict_every:
            return
        super().evict(layer, prompt_seen, decode)

    def observe(self, layer, kv_head, position, mass, logits, decode):
        temperature = self.policy.temperature(position - self.prompt_seen + 1 if decode else 0)
        perturbed = dict.fromkeys(mass, 0.0)
        group = len(logits)
        for offset, scores in enumerate(logits):
            places = list(scores)
            noise = self.noise(layer, kv_head * group + offset, position, places)
            shares = noisy_softmax([scores[place] for place in places], noise, temperature)
            for place, share in zip(places, shares, strict=True):
                perturbed[place] += share
        super().observe(layer, kv_head, position, perturbed, logits, decode)

    def noise(self, layer, head, position, places):
        if self.policy.noise == "none":
            return [0.0] * len(places)
        row = position if self.policy.noise == "fresh" else 0
        heads = self.config.num_attention_heads
        numbers = gumbel_noise(
            self.policy.seed, layer, torch.tensor([[row]]), torch.tensor([[places]]).expand(1, heads, -1), heads
        )
        return numbers[0, head, 0].tolist()


@dataclass(frozen=True)
class Keyformer(Rules):
    """The last `recent_ratio` of the budget, and of the others those with the largest noisy sums (spec section 3.3)."""

    budget: int | float = 0.6
    recent_ratio: float = 0.3
    tau_init: float = 1
    tau_end: float = 2
    new_tokens: int = 128
    noise: str = "fresh"
    seed: int = 0
    evict_every: int = 1
    runner = KeyformerOracle

    def temperature(self, step):
        """tau_init in the prompt, tau_end after `new_tokens` steps and from then on."""
        return self.tau_init + min(step, self.new_tokens) * (self.tau_end - self.tau_init) / self.new_tokens

    def parts(self, seen):
        """(all, recent) in entries."""
        total = resolve(self.budget, seen)
        return total, floor(Fraction(str(self.recent_ratio)) * total)

    def keep(self, entries, rows, seen):
        total, recent = self.parts(seen)
        chosen = heavy_and_recent([entry.score for entry in entries], total - recent, recent)
        return [entries[index].position for index in chosen]
