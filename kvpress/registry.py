"""Policies by name: from a string, a mapping, a YAML file, a class elsewhere, or as they are."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from kvpress import outside
from kvpress.errors import PolicyError, nearest
from kvpress.outside import POLICIES, absolute
from kvpress.policy import Budget, Policy, check_budget, entries_for

PolicySpec = Policy | str | Path | Mapping[str, Any] | Sequence[Any]


def available() -> dict[str, type[Policy]]:
    """Name -> policy class: the package's, those that installed distributions registered as entry points of the group
    `kvpress.policies`, and every imported subclass of `Policy` that has a name.

    Raises:
        PolicyError: a name that means two classes, or a registered class that does not work.
    """
    return {name: find_policy(name) for name in _names()}


def find_policy(name: Any) -> type[Policy]:
    """The class that is meant by a name, a dotted path (package.module:MyPolicy) or a file (./my_policy.py:MyPolicy).

    Raises:
        PolicyError: there is none, or the name means two.
    """
    found: type[Policy] = outside.find_class(name, _built_in())
    return found


def path_of(cls: type[Policy]) -> str:
    """The path by which `find_policy` finds a class again, whatever names there are; empty for the package's own."""
    return outside.reference(cls) if outside.is_outside(cls) else ""


def origin(policy: Policy) -> str:
    """Where a policy, or what it wraps, comes from if that is not the package: class and hash of the file that defines it."""
    return ", ".join(dict.fromkeys(outside.identity(cls) for cls in _outside(policy)))


def to_import(policies: Iterable[Policy]) -> dict[str, str]:
    """What another process has to import (see `import_all`) before it can unpickle these policies: path -> origin.

    Classes of the main script, or of a function, are not among them: Ray sends them along.
    """
    return outside.to_import(cls for policy in policies for cls in _outside(policy))


def import_all(wanted: Mapping[str, str]) -> None:
    """Import the classes that another process found with `to_import`.

    Raises:
        PolicyError: one cannot be imported here, or is defined by other code than there.
    """
    outside.import_all(wanted)


def make_policy(spec: PolicySpec, **overrides: Any) -> Policy:
    """Build one policy.

    Args:
        spec: a policy (returned as it is), a name such as "h2o", a class of your own as "package.module:MyPolicy" or
            "./my_policy.py:MyPolicy", a mapping {"name": "h2o", "budget": 0.2} with such a name, or the path of a YAML file
            that holds one of these (files that it names are relative to its folder). A `budget` is understood by every policy
            that takes one, whatever its paper calls it.
        overrides: fields that win over those of `spec`.

    Raises:
        PolicyError: an unknown name or field (with the nearest one), a class that cannot be imported, or a value out of range.
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
        raise PolicyError(f"{source}: {dict(mapping)!r} has no name; add name: one of {', '.join(_names())}")
    try:
        cls = find_policy(name)
    except PolicyError as error:
        raise PolicyError(f"{source}: {error}") from error
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
    budget = read_budget(values.pop("budget"))
    try:
        return cls.at_budget(budget, **values)
    except TypeError as error:  # a field that the budget itself sets
        raise PolicyError(f"budget={budget!r} does not go with {values} for {name}; keep one of them") from error


def policy_spec(policy: Policy) -> dict[str, Any]:
    """The mapping from which `make_policy` builds a policy again: its name and every field that differs from its default."""
    values: dict[str, Any] = {"name": path_of(type(policy)) or policy.name}
    for field in policy.parameters():
        value = getattr(policy, field.name)
        if value != field.default:
            values[field.name] = policy_spec(value) if isinstance(value, Policy) else value
    return values


def read_budget(value: Any) -> Any:
    """A budget as it may be written: the text "20%" is the share 0.2; anything else stays as it is."""
    written = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return value if written is None else float(written[1]) / 100


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
        raise PolicyError(f"an empty list of policies; give one of {', '.join(_names())}")
    if budget is not None:
        specs = _with_budget(specs, read_budget(budget), tokens)
    policies = [make_policy(item) for item in specs]
    taken: dict[str, Policy] = {}
    for policy in policies:
        for role in policy.roles:
            if role in taken:
                raise PolicyError(
                    f"{taken[role].describe()} and {policy.describe()} both play the role {role!r}; keep one of them"
                )
            taken[role] = policy
    for policy in policies:
        policy.check_company([other for other in policies if other is not policy])
    moving = [policy.describe() for policy in policies if policy.places.moved]
    if len(moving) > 1:
        raise PolicyError(f"{' and '.join(moving)} both have tokens attended at other positions; keep one of them")
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
        cls = _find_or_none(mapping.get("name"))
        own = budget
        if cls is not None and cls.takes_budget and not cls.accepts_budget(budget) and tokens is not None:
            own = entries_for(budget, tokens)
        if cls is None or not cls.accepts_budget(own):
            found.append(spec)
            continue
        wrapped = mapping.get(str(cls.wraps))
        for place, values in ((source, mapping), (f"{source}.{cls.wraps}", wrapped)):
            if isinstance(values, Mapping) and "budget" in values:
                raise PolicyError(f"budget={budget!r} and {place}.budget={values['budget']!r}; keep one of them")
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
    if isinstance(spec, Path) and spec.suffix == ".py":
        spec = str(spec)
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        source, spec = str(spec), absolute(_read_yaml(Path(spec)), Path(spec).parent, POLICIES)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        built = f"{spec.__name__}(...)" if isinstance(spec, type) else "a policy"
        raise PolicyError(f"{source}: {spec!r} is no policy; give {built}, a name, a mapping or a YAML path")
    return source, spec


def _find_or_none(name: Any) -> type[Policy] | None:
    """The class of a policy; None if there is none, which `make_policy` says."""
    try:
        return find_policy(name)
    except PolicyError:
        return None


def _built_in() -> dict[str, type[Policy]]:
    import kvpress.policies as package

    classes = [getattr(package, name) for name in package.__all__]
    return {cls.name: cls for cls in classes}


def _names() -> list[str]:
    """All names that there are; nothing is imported for it."""
    return outside.names(_built_in())


def _outside(policy: Policy) -> Iterator[type[Policy]]:
    """The classes outside of the package that a policy is made of: its own, and those of policies that it wraps."""
    if outside.is_outside(type(policy)):
        yield type(policy)
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            yield from _outside(value)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file with a policy"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: not valid YAML: {error}") from error
