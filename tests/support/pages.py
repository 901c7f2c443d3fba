"""What a reader of a page sees: its pictures, drawn, and the words in them."""

import json
import re
from html import unescape

import vl_convert

from kvpress.evals.charts import VERSION, library


def own_text(path):
    """A page without the library that draws its pictures."""
    text = path.read_text(encoding="utf-8")
    assert text.count(library()) == 1
    return text.replace(library(), "")


def pictures(path):
    """The specifications of a page's pictures."""
    found = re.findall(
        r'<div data-chart></div><script type="application/json">(.*?)</script>', own_text(path), re.DOTALL
    )
    return [json.loads(one) for one in found]


def words(chart):
    """The texts of a picture as it is drawn; one that Vega-Lite cannot draw is an error here."""
    width = 300 if chart["width"] == "container" else chart["width"]
    svg = vl_convert.vegalite_to_svg(json.dumps(chart | {"width": width}), vl_version=VERSION)
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def shown(chart, field="label"):
    """One field of all that a scatter plot has in colour."""
    return [point[field] for point in chart["data"]["values"] if point["own"]]
