"""Classes outside of the package, of policies or evaluation tasks: in a module, in a file, or registered by an installed
distribution.

Nothing is imported unless it was named: a module or a file by whoever asks for the class, a distribution's class by its name.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from kvpress.errors import PolicyError, nearest
from kvpress.policy import Policy


@dataclass(frozen=True)
class Kind:
    """What classes are looked for.

    Attributes:
        noun: what one is called.
        base: what they derive from; a subclass that can be built has a `name`.
        group: the entry points by which a distribution registers them: name = "package.module:MyPolicy".
        package: the package of kvpress that holds its own.
        parent: what messages say to derive from.
        error: what is raised.
        files: endings of the files that a description may name, besides those of classes.
    """

    noun: str
    base: type[Any]
    group: str
    package: str
    parent: str
    error: type[Exception]
    files: tuple[str, ...] = (".yaml", ".yml")

    @property
    def forms(self) -> str:
        """How a class is named."""
        return f"package.module:My{self.noun.title()} or ./my_{self.noun}.py:My{self.noun.title()}"


# A JSON file holds what was calibrated. Those of tasks are data, and not looked for beside the description.
POLICIES = Kind(
    "policy",
    Policy,
    "kvpress.policies",
    "kvpress.policies",
    "kvpress.EvictionPolicy",
    PolicyError,
    files=(".yaml", ".yml", ".json"),
)

_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<attribute>[\w.]+))?")
_DOTTED = re.compile(r"(?P<module>\w+(?:\.\w+)*):(?P<attribute>\w+(?:\.\w+)*)")
_DOTS_ONLY = re.compile(r"(?P<module>\w+(?:\.\w+)*)\.(?P<attribute>\w+)")

_files: dict[str, tuple[str, ModuleType]] = {}
"""Absolute path -> digest of the content that was run, and the module that it made."""
_digests: WeakKeyDictionary[type[Any], str] = WeakKeyDictionary()
"""Class -> digest of the file that defines it, as it was when the class was first asked for."""


def is_reference(text: str) -> bool:
    """Whether a text is a dotted path or a file, not a plain name."""
    return any(form.fullmatch(text) for form in (_FILE, _DOTTED, _DOTS_ONLY))


def absolute(spec: Any, folder: Path, kind: Kind) -> Any:
    """What describes a policy or a task (a text, a mapping, a list), with files in it that are relative to `folder` made
    absolute: those of classes, and of the kind's `files`."""
    if isinstance(spec, dict):
        return {key: absolute(value, folder, kind) for key, value in spec.items()}
    if isinstance(spec, list):
        return [absolute(item, folder, kind) for item in spec]
    if isinstance(spec, str) and spec.endswith(kind.files):
        return os.path.abspath(folder / Path(spec).expanduser())
    file = _FILE.fullmatch(spec) if isinstance(spec, str) else None
    if file is None:
        return spec
    path = os.path.abspath(folder / Path(file["file"]).expanduser())
    return f"{path}:{file['attribute']}" if file["attribute"] else path


def find_class(name: Any, built_in: Mapping[str, type[Any]], kind: Kind = POLICIES) -> type[Any]:
    """The class that is meant by a name, a dotted path (package.module:MyPolicy) or a file (./my_policy.py:MyPolicy).

    Args:
        name: the text.
        built_in: name -> class of the package's own.
        kind: what is looked for.

    Raises:
        PolicyError (`kind.error`): there is none, or the name means two.
    """
    if not isinstance(name, str):
        raise kind.error(f"unknown {kind.noun} {name!r}{nearest(str(name), names(built_in, kind))}")
    classes = [cls for cls in [*built_in.values(), *imported(kind)] if cls.name == name]
    if name in registered(kind):
        classes.append(load_registered(name, kind))
    if not classes and is_reference(name):
        found = load_class(name, kind)
        classes = [cls for cls in (built_in.get(found.name), found) if cls is not None]
    classes = list(dict.fromkeys(classes))
    if not classes:
        raise kind.error(
            f"unknown {kind.noun} {name!r}{nearest(name, names(built_in, kind))}; one of your own is named as {kind.forms}"
        )
    if len(classes) > 1:
        called = classes[0].name
        paths = " and ".join(
            reference(cls) if is_outside(cls, kind) else f"{kind.package}.{cls.__name__}" for cls in classes
        )
        remedy = (
            "give your own class another name"
            if called in built_in
            else "write the path of the one that you mean instead of the name"
        )
        raise kind.error(f"the {kind.noun} {name!r}: {paths} are both named {called!r}; {remedy}")
    return classes[0]


def names(built_in: Mapping[str, type[Any]], kind: Kind = POLICIES) -> list[str]:
    """All names that there are; nothing is imported for it."""
    return sorted({*built_in, *registered(kind), *(cls.name for cls in imported(kind))})


def load_class(reference: str, kind: Kind = POLICIES) -> type[Any]:
    """The class that a dotted path (package.module:MyPolicy, package.module.MyPolicy) or a file (./my_policy.py:MyPolicy, or
    ./my_policy.py if it defines one policy class) means. A file that has changed is run again.

    Raises:
        PolicyError (`kind.error`): there is no such module, file or class, it cannot be imported, or it is none of this kind.
    """
    form = _FILE.fullmatch(reference) or _DOTTED.fullmatch(reference) or _DOTS_ONLY.fullmatch(reference)
    if form is None:
        raise kind.error(f"{reference!r} names no {kind.noun} class; write {kind.forms}")
    parts = form.groupdict()
    if "file" in parts:
        module = _run_file(Path(absolute(parts["file"], Path.cwd(), kind)), reference, kind)
    else:
        with _importing(reference, parts["module"], kind):
            module = importlib.import_module(parts["module"])
    own = [name for name, value in vars(module).items() if _is(value, kind) and value.__module__ == module.__name__]
    own = [name for name in own if not inspect.isabstract(getattr(module, name))]
    if parts["attribute"] is None and len(own) != 1:
        if not own:
            raise kind.error(f"{reference}: the file defines no {kind.noun} class; derive one from {kind.parent}")
        choices = " or ".join(f"{reference}:{name}" for name in own)
        raise kind.error(f"{reference}: the file defines {len(own)} {kind.noun} classes; write {choices}")
    found: Any = module
    for name in (parts["attribute"] or own[0]).split("."):
        if not hasattr(found, name):
            there = (
                f"its {kind.noun} classes are {', '.join(own)}"
                if own
                else f"it defines no {kind.noun} class; write {kind.forms}"
            )
            raise kind.error(f"{reference}: {parts.get('module') or 'the file'} has no {name!r}; {there}")
        found = getattr(found, name)
    return _checked(found, reference, kind)


def registered(kind: Kind = POLICIES) -> list[str]:
    """The names that installed distributions have registered classes under; nothing is imported for it."""
    return sorted(_registered(tuple(sys.path), kind.group))


def load_registered(name: str, kind: Kind = POLICIES) -> type[Any]:
    """The class that a distribution registered under `name`.

    Raises:
        PolicyError (`kind.error`): two distributions have this name, or the class does not work; names the distribution.
    """
    points = _registered(tuple(sys.path), kind.group)[name]
    where = [f"{point.value} of {point.dist.name if point.dist else 'an unknown distribution'}" for point in points]
    if len(points) > 1:
        raise kind.error(
            f"{' and '.join(where)} are both registered as {name!r}; name the module of the one that you mean, as {points[0].value}"
        )
    try:
        found = load_class(points[0].value, kind)
    except kind.error as error:
        raise kind.error(f"the {kind.noun} {name!r} ({where[0]}) does not work: {error}") from error
    if found.name != name:
        raise kind.error(
            f"{where[0]} is registered as {name!r} and calls itself {found.name!r}; its authors should give both one name, and "
            f"{points[0].value} works until then"
        )
    return found


@lru_cache(maxsize=4)
def _registered(search_path: tuple[str, ...], group: str) -> dict[str, list[EntryPoint]]:
    """Name -> entry points, each value once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in found.items()}


def imported(kind: Kind = POLICIES) -> list[type[Any]]:
    """Every imported class of the kind that has a name of its own and can be built."""
    found: dict[tuple[str, str], type[Any]] = {}
    pending: list[type[Any]] = [kind.base]
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


def is_outside(cls: type[Any], kind: Kind = POLICIES) -> bool:
    """Whether a class is none of the package's own."""
    return not cls.__module__.startswith(f"{kind.package}.")


def travels_by_name(cls: type[Any]) -> bool:
    """Whether another process can find the class by `reference`: not if it is the main script's, or defined in a function."""
    return cls.__module__ in sys.modules and cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def reference(cls: type[Any]) -> str:
    """The text by which `load_class` finds a class again; files are absolute."""
    path = _path_of(cls)
    return f"{cls.__module__ if path is None else path}:{cls.__qualname__}"


def identity(cls: type[Any]) -> str:
    """What a result says of a class: module or file's name, class, and eight digits of the hash of the file that defines it.

    The same wherever the file lies, and another one as soon as the file is changed.
    """
    if cls not in _digests:
        source = getattr(sys.modules.get(cls.__module__), "__file__", None)
        _digests[cls] = _digest(Path(source).read_bytes()) if source and Path(source).is_file() else ""
    path, digest = _path_of(cls), _digests[cls]
    return f"{cls.__module__ if path is None else path.name}:{cls.__qualname__}{f'@{digest}' if digest else ''}"


def to_import(classes: Iterable[type[Any]], kind: Kind = POLICIES) -> dict[str, str]:
    """What another process has to import (see `import_all`) before it can unpickle instances of classes: path -> origin.

    The package's own are not among them, nor those of the main script, or of a function: Ray sends these along.
    """
    away = [cls for cls in dict.fromkeys(classes) if is_outside(cls, kind) and travels_by_name(cls)]
    return {reference(cls): identity(cls) for cls in away}


def import_all(wanted: Mapping[str, str], kind: Kind = POLICIES) -> None:
    """Import the classes that another process found with `to_import`.

    Raises:
        PolicyError (`kind.error`): one cannot be imported here, or is defined by other code than there.
    """
    for path, there in wanted.items():
        here = identity(load_class(path, kind))
        if here != there:
            raise kind.error(f"{path}: this process found {here}, another one {there}; all need the same file")


def _path_of(cls: type[Any]) -> Path | None:
    """The file of a class that is in no module which could be imported: one that was named as a file, or the main script."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file and (cls.__module__ == "__main__" or file in _files):
        return Path(os.path.abspath(file))
    return None


def _run_file(path: Path, reference: str, kind: Kind) -> ModuleType:
    """The module that a file makes, in `sys.modules` under a name of its path: pickles and dataclasses look there."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise kind.error(f"{reference}: cannot read {path} ({error.strerror}); give a Python file's path") from error
    digest, known = _digest(content), _files.get(str(path))
    if known is not None and known[0] == digest:
        return known[1]
    name = f"kvpress_{kind.noun}_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{_digest(str(path).encode())}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    module = module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with _importing(reference, name, kind):
            # Not by the loader: that may take compiled code of a moment ago, and leaves a __pycache__ in the user's folder.
            exec(compile(content, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    _files[str(path)] = digest, module
    for value in vars(module).values():
        if _is(value, kind) and value.__module__ == name:
            _digests[value] = digest
    return module


@contextmanager
def _importing(reference: str, module: str, kind: Kind) -> Iterator[None]:
    """Make what goes wrong while a module is imported an error that names the reference, the reason and the line."""
    try:
        yield
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise kind.error(
                f"{reference}: there is no module {missing!r}; install its package, put its folder on PYTHONPATH, or give the "
                f"file: ./my_{kind.noun}.py:My{kind.noun.title()}"
            ) from error
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        remedy = "install it, or put its folder on PYTHONPATH" if missing else "put that right"
        said = " ".join(str(error).split())
        raise kind.error(f"{reference} cannot be imported: {type(error).__name__}: {said}{place}; {remedy}") from error


def _is_users(file: str) -> bool:
    """Whether a line of this file may be at fault: not ours, and not Python's own library."""
    library = file.startswith((sysconfig.get_path("stdlib"), "<frozen")) and "site-packages" not in file
    return file != __file__ and not library


def _is(value: Any, kind: Kind) -> bool:
    return isinstance(value, type) and issubclass(value, kind.base)


def _checked(found: Any, reference: str, kind: Kind) -> type[Any]:
    """The class, if it is one that can be built by name."""
    if isinstance(found, kind.base):
        raise kind.error(f"{reference} is a {kind.noun} that is built already; name its class, {type(found).__name__}")
    if not _is(found, kind):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        other = " or another role" if kind is POLICIES else ""
        raise kind.error(
            f"{reference} is {what}, and no {kind.noun} class; name one that derives from {kind.parent}{other}"
        )
    cls: type[Any] = found
    if inspect.isabstract(cls):
        raise kind.error(f"{reference} defines no {' and no '.join(sorted(cls.__abstractmethods__))}; add it")
    # Without the decorator a subclass has its parent's fields only, and its own would be ignored.
    annotated = [name for name, annotation in inspect.get_annotations(cls).items() if "ClassVar" not in str(annotation)]
    if annotated and "__dataclass_fields__" not in vars(cls):
        raise kind.error(
            f"{reference} is no dataclass, so that {', '.join(annotated)} cannot be set; put @dataclass(frozen=True, kw_only=True) "
            "above the class"
        )
    if not getattr(cls, "name", ""):
        raise kind.error(f'{reference} has no name, which reports and results need; add name = "..." to the class')
    identity(cls)  # now, while the file is most likely what was imported
    return cls


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
