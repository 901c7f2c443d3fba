"""Policies by name: from a string, a mapping, a YAML file, or as they are."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvpress.errors import PolicyError, nearest
from kvpress.policy import Policy

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
    source = "policy"
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        source, spec = str(spec), _read_yaml(Path(spec))
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        built = f"{spec.__name__}(...)" if isinstance(spec, type) else "a policy"
        raise PolicyError(f"{source}: {spec!r} is no policy; give {built}, a name, a mapping or a YAML path")
    values = {**spec, **overrides}
    name = values.pop("name", None)
    if name is None:
        raise PolicyError(f"{source}: {dict(spec)!r} has no name; add name: one of {', '.join(available())}")
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
    return cls.at_budget(**values) if "budget" in values else cls(**values)


def make_policies(spec: PolicySpec) -> list[Policy]:
    """One policy, or a list of policies that play different roles.

    Raises:
        PolicyError: as `make_policy`; also for an empty list, two policies of the same role, or two that cannot act together.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise PolicyError(f"an empty list of policies; give one of {', '.join(available())}")
        policies = [make_policy(item) for item in spec]
    else:
        policies = [make_policy(spec)]
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


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file with a policy"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: not valid YAML: {error}") from error
