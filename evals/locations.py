"""YAML that remembers where each value stands, so that an error can name file and line."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
"""Where a value is in the tree: keys and indices from the root."""
Locations = dict[KeyPath, str]
"""Each path's location as it is shown: "file.yaml, line 7"."""


class ConfigError(ValueError):
    """A configuration that cannot work; the message names file and line, the value, and the remedy."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, for one node at a time."""


def load(path: Path) -> tuple[Any, Locations]:
    """The content of a YAML file, and the location of every value in it.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}; give the path of a YAML file") from error
    loader = _Loader(text)
    locations: Locations = {(): str(path)}
    try:
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), locations, str(path))), locations
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, path: KeyPath, locations: Locations, file: str) -> Any:
    locations.setdefault(path, f"{file}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key, where = loader.construct_object(key_node), f"{file}, line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is no text; write it in quotes")
            if key in found:
                raise ConfigError(f"{where}: {key!r} stands there a second time; keep one")
            locations[(*path, key)] = where
            found[key] = _value(loader, value_node, (*path, key), locations, file)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, i), locations, file) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def location_of(locations: Mapping[KeyPath, str], path: KeyPath) -> str:
    """The location of the value at `path`, or of the nearest one around it."""
    while path not in locations and path:
        path = path[:-1]
    return locations.get(path, "")


def variables(text: str) -> set[str]:
    """The names of the environment variables that a text refers to as `${NAME}`."""
    return set(re.findall(r"\$\{(\w+)\}", text))


def expand(value: Any) -> Any:
    """The value with each `${NAME}` in its texts replaced by that environment variable.

    Raises:
        KeyError: there is no such variable; the error holds its name.
    """
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], value)
    if isinstance(value, dict):
        return {key: expand(item) for key, item in value.items()}
    return [expand(item) for item in value] if isinstance(value, list) else value
