"""The pages' templates, in `data/`."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape


def fill(name: str, **values: Any) -> str:
    """A template with these values; in HTML they are escaped, whatever they hold."""
    return _environment().get_template(name).render(values)


def chart(name: str, **values: Any) -> dict[str, Any]:
    """The Vega-Lite specification that a template gives."""
    found: dict[str, Any] = yaml.safe_load(fill(name, **values))
    return found


def read_data(name: str) -> str:
    """A file of `data/` as it is."""
    return (files("kvpress.evals") / "data" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(read_data),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
