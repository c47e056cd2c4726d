"""Charts as PNG files, for papers and READMEs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vl_convert

from ada_loss.report.charts import VEGA_LITE, WIDTH, as_spec
from ada_loss.report.theme import LIGHT, with_colours

SCALE = 2.0
"""Pixels of the picture for one of the chart, so that it is sharp on any screen."""


def to_png(chart: Any, title: str = "", subtitle: str = "") -> bytes:
    """A chart in light colours, under its title."""
    spec = as_spec(chart)
    if spec.get("width") == "container":
        spec["width"] = WIDTH
    if title:
        spec["title"] = {"text": title, "subtitle": subtitle} if subtitle else {"text": title}
    spec["config"]["background"] = LIGHT["page"]
    spec["padding"] = 18
    text = with_colours(json.dumps(spec))
    return bytes(vl_convert.vegalite_to_png(text, vl_version=VEGA_LITE, scale=SCALE))


def write_pictures(charts: Mapping[str, Any], titles: Mapping[str, str], directory: Path) -> list[Path]:
    """One file for every chart, named after it."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in charts.items():
        path = directory / (re.sub(r"[^\w]+", "-", name).strip("-") + ".png")
        path.write_bytes(to_png(chart, titles.get(name, name)))
        written.append(path)
    return written
