"""Policies that keep entries by their keys alone."""

from oracles.common.llama import Oracle, rotate


class ByKeys(Oracle):
    """The rules see each entry's key as it is cached, rotated at the entry's position, and the layer."""

    def evict(self, layer, prompt_seen, decode=False):
        for head in self.heads[layer]:
            keys = [rotate(entry.key, entry.position, self.theta).tolist() for entry in head.entries]
            head.entries = [head.entries[index] for index in self.policy.keep_keys(keys, layer, prompt_seen)]
            head.rows = []
