"""Colours, light and dark, and the look that all charts share.

Charts name their colours as CSS variables, so a page changes its theme without drawing anything anew; for
pictures, which know no CSS, `with_colours` puts the light ones in. The palette is close to Okabe's and Ito's,
which colour-blind people can tell apart; where colour says something, so does a text, a place or a dash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"

RUN_COLOURS = 8
"""How many runs have a colour of their own; more differ by their dashes."""

LIGHT = {
    "page": "#ffffff",
    "panel": "#ffffff",
    "ink": "#16202b",
    "soft": "#566372",
    "grid": "#e4e9ee",
    "edge": "#d3dae2",
    "good": "#0b6fb0",
    "bad": "#d1570a",
    "safe": "#0d8f6a",
    "idle": "#aab4bf",
    "range": "#93a4b8",
    "loss0": "#f1f4f7", "loss1": "#fdebd3", "loss2": "#fbd3a1", "loss3": "#f6b064", "loss4": "#e9863a",
    "loss5": "#cb5a13", "loss6": "#8f3606", "onloss": "#ffffff",
    "scale0": "#3b0f52", "scale1": "#44337f", "scale2": "#3a568c", "scale3": "#2d748e", "scale4": "#21918c",
    "scale5": "#2fae7a", "scale6": "#65c860", "scale7": "#aadb35", "scale8": "#f5e443",
    "run0": "#0072b2", "run1": "#d55e00", "run2": "#009e73", "run3": "#a8518a", "run4": "#b07d00",
    "run5": "#3f9bd4",
    "run6": "#4b4f56", "run7": "#7a5cc0",
}  # fmt: skip
"""CSS variables by name, without their dashes."""

DARK = LIGHT | {
    "page": "#0f151c",
    "panel": "#151d26",
    "ink": "#e9eef4",
    "soft": "#9fadbc",
    "grid": "#263340",
    "edge": "#2e3c4b",
    "good": "#56aee8",
    "bad": "#ff9a4a",
    "safe": "#3fcf9f",
    "idle": "#5d6b7a",
    "range": "#6f8298",
    "loss0": "#1d2732", "loss1": "#4a3320", "loss2": "#6f4520", "loss3": "#9a591d", "loss4": "#c9711f",
    "loss5": "#f39237", "loss6": "#ffc98a", "onloss": "#0f151c",
    "run0": "#56aee8", "run1": "#ff8f4f", "run2": "#3fcf9f", "run3": "#e39bc6", "run4": "#e8c04c",
    "run5": "#9bd6f7",
    "run6": "#c3ccd6", "run7": "#b7a1f0",
}  # fmt: skip
"""The same for dark surroundings."""


def var(name: str) -> str:
    """A colour by its name."""
    if name not in LIGHT:
        raise KeyError(name)
    return f"var(--{name})"


def with_colours(text: str, colours: Mapping[str, str] = LIGHT) -> str:
    """A chart's JSON with colours in place of their names."""
    return re.sub(r"var\(--(\w+)\)", lambda match: colours[match[1]], text)


def css(colours: Mapping[str, str]) -> str:
    """Declarations of the variables."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def config() -> dict[str, object]:
    """Vega-Lite's configuration."""
    quiet = {"labelColor": var("soft"), "titleColor": var("soft"), "labelFont": FONT, "titleFont": FONT}
    axis = quiet | {
        "domain": False,
        "ticks": False,
        "gridColor": var("grid"),
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelPadding": 6,
        "labelLimit": 260,
    }
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "axis": axis,
        "axisY": {"grid": False},
        "legend": quiet
        | {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "orient": "top"},
        "header": quiet | {"labelFontSize": 12, "titleFontSize": 12, "labelLimit": 300},
        "title": {
            "color": var("ink"),
            "subtitleColor": var("soft"),
            "font": FONT,
            "subtitleFont": FONT,
            "fontSize": 16,
            "subtitleFontSize": 12,
            "anchor": "start",
            "offset": 14,
        },
        "text": {"font": FONT, "color": var("ink")},
    }
