"""Draws detected boxes on images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detector import Boxes

# Distinct at a glance, also beside each other; classes beyond the last start over.
COLOURS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231"),
    *("#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4"),
)
MARGIN = 8


def draw_boxes(image: np.ndarray, boxes: Boxes, names: Sequence[str], enlarge: int = 1) -> Image.Image:
    """An RGB image (3, H, W) of 0 to 255, enlarged, with its boxes, class names and scores."""
    height, width = image.shape[1:]
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)).astype(np.uint8))
    picture = picture.resize((width * enlarge, height * enlarge), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    # The best last, on top of the others.
    for bbox, label, score in reversed(list(zip(*boxes, strict=True))):
        colour = COLOURS[label % len(COLOURS)]
        y_min, x_min, y_max, x_max = np.clip(bbox, 0, [height, width] * 2) * enlarge
        draw.rectangle((x_min, y_min, x_max, y_max), outline=colour, width=2)
        text = f"{names[label]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = min(x_min, width * enlarge - right - 2)
        y = max(0, y_min - bottom - 2)
        draw.rectangle((x, y, x + right + 2, y + bottom + 2), fill=colour)
        draw.text((x + 1, y), text, fill="black", font=font)
    return picture


def above(first: Image.Image, second: Image.Image) -> Image.Image:
    """A picture above another one, which is brought to the same width, on white."""
    height = round(second.height * first.width / second.width)
    sheet = Image.new("RGB", (first.width, first.height + height), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(second.resize((first.width, height), Image.Resampling.LANCZOS), (0, first.height))
    return sheet


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, in rows, on white."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white"
    )
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (MARGIN + column * (width + MARGIN), MARGIN + row * (height + MARGIN)))
    return sheet
