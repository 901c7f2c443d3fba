"""The grids of a sweep over policies and budgets, each policy with the budgets that it can take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpress.evals.locations import ConfigError
from kvpress.policy import Policy, entries_for
from kvpress.registry import find_policy, read_budget


def grids(policies: Sequence[Any], budgets: Sequence[Any], tokens: int | None) -> list[dict[str, list[Any]]]:
    """Full attention, then a grid for each policy: with the budgets, if it takes one and does not name it itself.

    Args:
        policies: names, mappings, YAML files, or classes of one's own.
        budgets: shares, or entries.
        tokens: of the prompt that a policy which takes entries only gets a share of; None where that is not known.

    Raises:
        PolicyError: an unknown policy, or no budget.
        ConfigError: a policy that takes entries only, and a share of what is not known.
    """
    found: list[dict[str, list[Any]]] = [{"policy": ["full"]}]
    for spec in policies:
        name = str(spec.get("name") if isinstance(spec, dict) else spec)
        cls = None if Path(name).suffix in (".yaml", ".yml") else find_policy(name)
        named = isinstance(spec, dict) and "budget" in spec
        taken = {"budget": _taken(cls, budgets, tokens)} if cls is not None and cls.takes_budget and not named else {}
        found.append({"policy": [spec], **taken})
    return found


def _taken(cls: type[Policy], budgets: Sequence[Any], tokens: int | None) -> list[Any]:
    """The budgets as a policy takes them."""
    read = [read_budget(budget) for budget in budgets]
    if cls.takes_share:
        return read
    if tokens is None and any(isinstance(budget, float) for budget in read):
        raise ConfigError(
            f"{cls.name} takes entries only, and a share of which context is not said; give --context, or budgets in entries"
        )
    return [max(1, entries_for(budget, tokens or 0)) for budget in read]
