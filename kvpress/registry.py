"""Policies by name: from a string, a mapping, a YAML file, or as they are."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvpress.errors import PolicyError, nearest
from kvpress.policy import Budget, Policy, check_budget, entries_for

PolicySpec = Policy | str | Path | Mapping[str, Any] | Sequence[Any]


def available() -> dict[str, type[Policy]]:
    """Name -> policy class, of the package's policies and of every imported subclass of `Policy` that has a name."""
    import kvpress.policies  # noqa: F401  (defines the subclasses)

    found: dict[str, type[Policy]] = {}
    pending = [Policy]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.name and not inspect.isabstract(cls):
            found[cls.name] = cls
    return dict(sorted(found.items()))


def make_policy(spec: Policy | str | Path | Mapping[str, Any], **overrides: Any) -> Policy:
    """Build one policy.

    Args:
        spec: a policy (returned as it is), a name such as "h2o", a mapping {"name": "h2o", "budget": 0.2}, or the path of
            a YAML file that holds such a mapping. A `budget` is understood by every policy that takes one, whatever its
            paper calls it.
        overrides: fields that win over those of `spec`.

    Raises:
        PolicyError: an unknown name or field (with the nearest one), or a value out of range.
    """
    if isinstance(spec, Policy):
        if overrides:
            raise PolicyError(
                f"{spec.describe()} is a finished policy; build it with {overrides} instead of overriding"
            )
        return spec
    source, mapping = _read_spec(spec)
    values = {**mapping, **overrides}
    name = values.pop("name", None)
    if name is None:
        raise PolicyError(f"{source}: {dict(mapping)!r} has no name; add name: one of {', '.join(available())}")
    cls = available().get(name) if isinstance(name, str) else None
    if cls is None:
        raise PolicyError(f"{source}: unknown policy {name!r}{nearest(str(name), list(available()))}")
    known = [field.name for field in cls.parameters()]
    if "budget" not in known and cls.takes_budget:
        known.append("budget")  # under another name in its paper; see `Policy.at_budget`
    for key in values:
        if key not in known:
            raise PolicyError(f"{source}: {name} has no field {key!r}{nearest(str(key), known)}")
    if cls.wraps in values:
        values[cls.wraps] = make_policy(values[cls.wraps])
    if "budget" not in values:
        return cls(**values)
    budget = values.pop("budget")
    try:
        return cls.at_budget(budget, **values)
    except TypeError as error:  # a field that the budget itself sets
        raise PolicyError(f"budget={budget!r} does not go with {values} for {name}; keep one of them") from error


def make_policies(spec: PolicySpec, budget: Budget | None = None, tokens: int | None = None) -> list[Policy]:
    """One policy, or a list of policies that play different roles.

    Args:
        spec: what `make_policy` takes, or a list of such.
        budget: for the policy among them that takes one of this form; the others, and those that take none, are as `spec`
            says. None leaves all of them so.
        tokens: length of a prompt. With it a policy that takes only entries gets as many as a share of that prompt has.

    Raises:
        PolicyError: as `make_policy`; also for an empty list, two policies of the same role, two that cannot act together,
            two that take the budget, or one that has a budget already.
    """
    specs = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not specs:
        raise PolicyError(f"an empty list of policies; give one of {', '.join(available())}")
    if budget is not None:
        specs = _with_budget(specs, budget, tokens)
    policies = [make_policy(item) for item in specs]
    taken: dict[str, Policy] = {}
    for policy in policies:
        if policy.role in taken:
            raise PolicyError(
                f"{taken[policy.role].describe()} and {policy.describe()} both play the role {policy.role!r}; keep one of them"
            )
        if policy.role is not None:
            taken[policy.role] = policy
    for policy in policies:
        policy.check_company([other for other in policies if other is not policy])
    return policies


def _with_budget(specs: Sequence[Any], budget: Budget, tokens: int | None) -> list[Any]:
    """The specs, with the budget in the one whose policy takes it."""
    check_budget(budget)
    found: list[Any] = []
    takers = []
    for spec in specs:
        if isinstance(spec, Policy):
            raise PolicyError(f"{spec.describe()} is a finished policy; build it with budget={budget!r}")
        source, mapping = _read_spec(spec)
        name = mapping.get("name")
        cls = available().get(name) if isinstance(name, str) else None
        own = budget
        if cls is not None and cls.takes_budget and not cls.accepts_budget(budget) and tokens is not None:
            own = entries_for(budget, tokens)
        if cls is None or not cls.accepts_budget(own):
            found.append(spec)
            continue
        wrapped = mapping.get(str(cls.wraps))
        for place, fields in ((source, mapping), (f"{source}.{cls.wraps}", wrapped)):
            if isinstance(fields, Mapping) and "budget" in fields:
                raise PolicyError(f"budget={budget!r} and {place}.budget={fields['budget']!r}; keep one of them")
        takers.append(cls.name)
        found.append({**mapping, "budget": own})
    if len(takers) > 1:
        raise PolicyError(
            f"budget={budget!r} is unclear, for {' and '.join(takers)} take one each; set it in the policies' own fields"
        )
    return found


def _read_spec(spec: Any) -> tuple[str, Mapping[str, Any]]:
    """Where a spec comes from, for messages, and its mapping.

    Raises:
        PolicyError: it is none, or its file cannot be read.
    """
    source = "policy"
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        source, spec = str(spec), _read_yaml(Path(spec))
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        built = f"{spec.__name__}(...)" if isinstance(spec, type) else "a policy"
        raise PolicyError(f"{source}: {spec!r} is no policy; give {built}, a name, a mapping or a YAML path")
    return source, spec


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file with a policy"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: not valid YAML: {error}") from error
