"""Policies by name: from a string, a mapping, a YAML file, a class elsewhere, or as they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from kvpress import outside
from kvpress.errors import PolicyError, nearest
from kvpress.outside import absolute
from kvpress.policy import Policy

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
    built_in = _built_in()
    if not isinstance(name, str):
        raise PolicyError(f"unknown policy {name!r}{nearest(str(name), _names())}")
    classes = [cls for cls in [*built_in.values(), *outside.imported()] if cls.name == name]
    if name in outside.registered():
        classes.append(outside.load_registered(name))
    if not classes and outside.is_reference(name):
        found = outside.load_class(name)
        classes = [cls for cls in (built_in.get(found.name), found) if cls is not None]
    classes = list(dict.fromkeys(classes))
    if not classes:
        raise PolicyError(
            f"unknown policy {name!r}{nearest(name, _names())}; one of your own is named as {outside.FORMS}"
        )
    if len(classes) > 1:
        called = classes[0].name
        paths = " and ".join(path_of(cls) or f"kvpress.policies.{cls.__name__}" for cls in classes)
        remedy = (
            "give your own class another name"
            if called in built_in
            else "write the path of the one that you mean instead of the name"
        )
        raise PolicyError(f"the policy {name!r}: {paths} are both named {called!r}; {remedy}")
    return classes[0]


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
    classes = [cls for policy in policies for cls in _outside(policy) if outside.travels_by_name(cls)]
    return {outside.reference(cls): outside.identity(cls) for cls in classes}


def import_all(wanted: Mapping[str, str]) -> None:
    """Import the classes that another process found with `to_import`.

    Raises:
        PolicyError: one cannot be imported here, or is defined by other code than there.
    """
    for path, there in wanted.items():
        here = outside.identity(find_policy(path))
        if here != there:
            raise PolicyError(f"{path}: this process found {here}, another one {there}; all need the same file")


def make_policy(spec: Policy | str | Path | Mapping[str, Any], **overrides: Any) -> Policy:
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
    source = "policy"
    if isinstance(spec, Path) and spec.suffix == ".py":
        spec = str(spec)
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        source, spec = str(spec), absolute(_read_yaml(Path(spec)), Path(spec).parent)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        built = f"{spec.__name__}(...)" if isinstance(spec, type) else "a policy"
        raise PolicyError(f"{source}: {spec!r} is no policy; give {built}, a name, a mapping or a YAML path")
    values = {**spec, **overrides}
    name = values.pop("name", None)
    if name is None:
        raise PolicyError(f"{source}: {dict(spec)!r} has no name; add name: one of {', '.join(_names())}")
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
    return cls.at_budget(**values) if "budget" in values else cls(**values)


def make_policies(spec: PolicySpec) -> list[Policy]:
    """One policy, or a list of policies that play different roles.

    Raises:
        PolicyError: as `make_policy`; also for an empty list, two policies of the same role, or two that cannot act together.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise PolicyError(f"an empty list of policies; give one of {', '.join(_names())}")
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


def _built_in() -> dict[str, type[Policy]]:
    import kvpress.policies as package

    classes = [getattr(package, name) for name in package.__all__]
    return {cls.name: cls for cls in classes}


def _names() -> list[str]:
    """All names that there are; nothing is imported for it."""
    return sorted({*_built_in(), *outside.registered(), *(cls.name for cls in outside.imported())})


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
