"""Slow, plain re-implementations that the product is tested against. They share no code with it.

Each policy has a file of its own name; `common/` has what several of them need.
"""

from importlib import import_module


def oracle_of(policy: type) -> type:
    """The oracle of a policy's class: the class of the same name in oracles/<the policy's name>.py."""
    return getattr(import_module(f"oracles.{policy.name}"), policy.__name__)
