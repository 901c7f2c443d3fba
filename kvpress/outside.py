"""Policy classes outside of the package: in a module, in a file, or registered by an installed distribution.

Nothing is imported unless it was named: a module or a file by whoever asks for the policy, a distribution's class by its name.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from kvpress.errors import PolicyError
from kvpress.policy import Policy

GROUP = "kvpress.policies"
"""The entry points by which a distribution registers policies: name = "package.module:MyPolicy"."""

FORMS = "package.module:MyPolicy or ./my_policy.py:MyPolicy"

_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<attribute>[\w.]+))?")
_DOTTED = re.compile(r"(?P<module>\w+(?:\.\w+)*):(?P<attribute>\w+(?:\.\w+)*)")
_DOTS_ONLY = re.compile(r"(?P<module>\w+(?:\.\w+)*)\.(?P<attribute>\w+)")

_files: dict[str, tuple[str, ModuleType]] = {}
"""Absolute path -> digest of the content that was run, and the module that it made."""
_digests: WeakKeyDictionary[type[Policy], str] = WeakKeyDictionary()
"""Class -> digest of the file that defines it, as it was when the class was first asked for."""


def is_reference(text: str) -> bool:
    """Whether a text is a dotted path or a file, not a plain name."""
    return any(form.fullmatch(text) for form in (_FILE, _DOTTED, _DOTS_ONLY))


def absolute(spec: Any, folder: Path) -> Any:
    """What describes a policy (a text, a mapping, a list), with the files in it that are relative to `folder` made absolute."""
    if isinstance(spec, dict):
        return {key: absolute(value, folder) for key, value in spec.items()}
    if isinstance(spec, list):
        return [absolute(item, folder) for item in spec]
    file = _FILE.fullmatch(spec) if isinstance(spec, str) else None
    if file is None:
        return spec
    path = os.path.abspath(folder / Path(file["file"]).expanduser())
    return f"{path}:{file['attribute']}" if file["attribute"] else path


def load_class(reference: str) -> type[Policy]:
    """The class that a dotted path (package.module:MyPolicy, package.module.MyPolicy) or a file (./my_policy.py:MyPolicy, or
    ./my_policy.py if it defines one policy class) means. A file that has changed is run again.

    Raises:
        PolicyError: there is no such module, file or class, it cannot be imported, or it is no policy class.
    """
    form = _FILE.fullmatch(reference) or _DOTTED.fullmatch(reference) or _DOTS_ONLY.fullmatch(reference)
    if form is None:
        raise PolicyError(f"{reference!r} names no policy class; write {FORMS}")
    parts = form.groupdict()
    if "file" in parts:
        module = _run_file(Path(absolute(parts["file"], Path.cwd())), reference)
    else:
        with _importing(reference, parts["module"]):
            module = importlib.import_module(parts["module"])
    own = [name for name, value in vars(module).items() if _is_policy(value) and value.__module__ == module.__name__]
    own = [name for name in own if not inspect.isabstract(getattr(module, name))]
    if parts["attribute"] is None and len(own) != 1:
        if not own:
            raise PolicyError(f"{reference}: the file defines no policy class; derive one from kvpress.EvictionPolicy")
        choices = " or ".join(f"{reference}:{name}" for name in own)
        raise PolicyError(f"{reference}: the file defines {len(own)} policy classes; write {choices}")
    found: Any = module
    for name in (parts["attribute"] or own[0]).split("."):
        if not hasattr(found, name):
            there = f"its policy classes are {', '.join(own)}" if own else f"it defines no policy class; write {FORMS}"
            raise PolicyError(f"{reference}: {parts.get('module') or 'the file'} has no {name!r}; {there}")
        found = getattr(found, name)
    return _checked(found, reference)


def registered() -> list[str]:
    """The names that installed distributions have registered policies under; nothing is imported for it."""
    return sorted(_registered(tuple(sys.path)))


def load_registered(name: str) -> type[Policy]:
    """The class that a distribution registered under `name`.

    Raises:
        PolicyError: two distributions have this name, or the class does not work; names the distribution.
    """
    points = _registered(tuple(sys.path))[name]
    where = [f"{point.value} of {point.dist.name if point.dist else 'an unknown distribution'}" for point in points]
    if len(points) > 1:
        raise PolicyError(
            f"{' and '.join(where)} are both registered as {name!r}; name the module of the one that you mean, as {points[0].value}"
        )
    try:
        found = load_class(points[0].value)
    except PolicyError as error:
        raise PolicyError(f"the policy {name!r} ({where[0]}) does not work: {error}") from error
    if found.name != name:
        raise PolicyError(
            f"{where[0]} is registered as {name!r} and calls itself {found.name!r}; its authors should give both one name, and "
            f"{points[0].value} works until then"
        )
    return found


@lru_cache(maxsize=1)
def _registered(search_path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Name -> entry points, each value once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in found.items()}


def imported() -> list[type[Policy]]:
    """Every imported policy class that has a name of its own and can be built."""
    found: dict[tuple[str, str], type[Policy]] = {}
    pending: list[type[Policy]] = [Policy]
    while pending:
        cls = pending.pop()
        pending.extend(reversed(cls.__subclasses__()))  # so that a later class of the same name comes later
        if vars(cls).get("name") and not inspect.isabstract(cls) and _is_current(cls):
            found[cls.__module__, cls.__qualname__] = cls
    return list(found.values())


def _is_current(cls: type) -> bool:
    """False for what a notebook's cell, or a file, defined before it was run again."""
    found: Any = sys.modules.get(cls.__module__)
    if found is None or "<locals>" in cls.__qualname__:
        return True
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def is_outside(cls: type[Policy]) -> bool:
    """Whether a class is none of the package's own policies."""
    return not cls.__module__.startswith("kvpress.policies.")


def travels_by_name(cls: type[Policy]) -> bool:
    """Whether another process can find the class by `reference`: not if it is the main script's, or defined in a function."""
    return cls.__module__ in sys.modules and cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def reference(cls: type[Policy]) -> str:
    """The text by which `load_class` finds a class again; files are absolute."""
    path = _path_of(cls)
    return f"{cls.__module__ if path is None else path}:{cls.__qualname__}"


def identity(cls: type[Policy]) -> str:
    """What a result says of a class: module or file's name, class, and eight digits of the hash of the file that defines it.

    The same wherever the file lies, and another one as soon as the file is changed.
    """
    if cls not in _digests:
        source = getattr(sys.modules.get(cls.__module__), "__file__", None)
        _digests[cls] = _digest(Path(source).read_bytes()) if source and Path(source).is_file() else ""
    path, digest = _path_of(cls), _digests[cls]
    return f"{cls.__module__ if path is None else path.name}:{cls.__qualname__}{f'@{digest}' if digest else ''}"


def _path_of(cls: type[Policy]) -> Path | None:
    """The file of a class that is in no module which could be imported: one that was named as a file, or the main script."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file and (cls.__module__ == "__main__" or file in _files):
        return Path(os.path.abspath(file))
    return None


def _run_file(path: Path, reference: str) -> ModuleType:
    """The module that a file makes, in `sys.modules` under a name of its path: pickles and dataclasses look there."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"{reference}: cannot read {path} ({error.strerror}); give a Python file's path") from error
    digest, known = _digest(content), _files.get(str(path))
    if known is not None and known[0] == digest:
        return known[1]
    name = f"kvpress_policy_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{_digest(str(path).encode())}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    module = module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with _importing(reference, name):
            # Not by the loader: that may take compiled code of a moment ago, and leaves a __pycache__ in the user's folder.
            exec(compile(content, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    _files[str(path)] = digest, module
    for value in vars(module).values():
        if _is_policy(value) and value.__module__ == name:
            _digests[value] = digest
    return module


@contextmanager
def _importing(reference: str, module: str) -> Iterator[None]:
    """Make what goes wrong while a module is imported an error that names the reference, the reason and the line."""
    try:
        yield
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise PolicyError(
                f"{reference}: there is no module {missing!r}; install its package, put its folder on PYTHONPATH, or give the "
                "file: ./my_policy.py:MyPolicy"
            ) from error
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        remedy = "install it, or put its folder on PYTHONPATH" if missing else "put that right"
        said = " ".join(str(error).split())
        raise PolicyError(f"{reference} cannot be imported: {type(error).__name__}: {said}{place}; {remedy}") from error


def _is_users(file: str) -> bool:
    """Whether a line of this file may be at fault: not ours, and not Python's own library."""
    library = file.startswith((sysconfig.get_path("stdlib"), "<frozen")) and "site-packages" not in file
    return file != __file__ and not library


def _is_policy(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Policy)


def _checked(found: Any, reference: str) -> type[Policy]:
    """The class, if it is one that can be built by name."""
    if isinstance(found, Policy):
        raise PolicyError(f"{reference} is a policy that is built already; name its class, {type(found).__name__}")
    if not _is_policy(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise PolicyError(
            f"{reference} is {what}, and no policy class; name one that derives from kvpress.EvictionPolicy or another role"
        )
    cls: type[Policy] = found
    if inspect.isabstract(cls):
        raise PolicyError(f"{reference} defines no {' and no '.join(sorted(cls.__abstractmethods__))}; add it")
    # Without the decorator a subclass has its parent's fields only, and its own would be ignored.
    annotated = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if annotated and "__dataclass_fields__" not in vars(cls):
        raise PolicyError(
            f"{reference} is no dataclass, so that {', '.join(annotated)} cannot be set; put @dataclass(frozen=True, kw_only=True) "
            "above the class"
        )
    if not cls.name:
        raise PolicyError(f'{reference} has no name, which reports and results need; add name = "..." to the class')
    identity(cls)  # now, while the file is most likely what was imported
    return cls


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
