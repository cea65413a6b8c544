"""Pictures of what a plan does: boxes in matching colours, grids, regions, points, correspondence lines, HTML pages.

Every function takes and gives uint8 pictures [3, h, w] and unit coordinates, so that pictures compose. Drawing is done
with Pillow, which torchvision brings along.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from .geometry import checks, regions
from .geometry.affine import AxisAffine

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Picture = UInt8[Tensor, "3 _h _w"]


def color_of(i: int) -> tuple[int, int, int]:
    """A colour for slot i; neighbours differ strongly, and the first dozen are easy to tell apart."""
    hue, light = (i * 0.381966) % 1.0, 0.55 if (i // 8) % 2 == 0 else 0.35
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarge(picture: Picture, factor: int) -> Picture:
    """The picture with every pixel repeated, so that lines drawn on it are fine."""
    return picture.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _drawn(picture: Picture, draw: Callable[[ImageDraw, int, int], None]) -> Picture:
    from PIL import Image, ImageDraw

    ok = picture.ndim == 3 and picture.shape[0] == 3 and picture.dtype == torch.uint8
    checks.require(ok, "viz", "picture", "uint8 [3, h, w]", checks.shape_of(picture))
    canvas = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    draw(ImageDraw.Draw(canvas), picture.shape[-1], picture.shape[-2])
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def boxes(
    picture: Picture,
    xyxy: Float[Tensor, "K 4"],
    valid: Bool[Tensor, " K"] | None = None,
    *,
    labels: Sequence[str] | None = None,
    width: int = 2,
) -> Picture:
    """Outlines of boxes, slot k in the same colour in every picture; slots that are not valid are left out."""
    from PIL import ImageFont

    tall = 6 + 5 * width
    font = ImageFont.load_default(tall)

    def draw(canvas: ImageDraw, w: int, h: int) -> None:
        taken: list[tuple[float, float]] = []
        for k, (x0, y0, x1, y1) in enumerate(xyxy.tolist()):
            if valid is not None and not valid[k]:
                continue
            canvas.rectangle(
                (x0 * w, y0 * h, max(x0 * w, x1 * w - 1), max(y0 * h, y1 * h - 1)), None, color_of(k), width
            )
            if labels is not None:
                x, y = x0 * w + width + 1, y0 * h + width
                while any(abs(x - a) < 60 and abs(y - b) < tall for a, b in taken):
                    y += tall + 2  # below the label that stands there already
                taken.append((x, y))
                canvas.text((x, y), labels[k], fill=color_of(k), stroke_width=1, stroke_fill=0, font=font)

    return _drawn(picture, draw)


def titled(picture: Picture, title: str, *, tall: int = 20) -> Picture:
    """The picture under a white strip with a title."""
    from PIL import ImageFont

    strip = torch.full((3, tall + tall // 2, picture.shape[-1]), 255, dtype=torch.uint8)
    font = ImageFont.load_default(tall)
    return torch.cat(
        (_drawn(strip, lambda canvas, w, h: canvas.text((4, 0), title, fill=0, font=font)), picture), dim=1
    )


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, *, tall: int = 14) -> Picture:
    """Names beside squares of their colours, on white, in as many rows as a picture of this width needs."""
    from PIL import ImageFont

    font, line = ImageFont.load_default(tall), tall + tall // 2
    places, x, y = [], 4, 0
    for name, _ in entries:
        wide = line + 6 + int(font.getlength(name)) + tall
        if x > 4 and x + wide > width:
            x, y = 4, y + line
        places.append((x, y))
        x += wide

    def draw(canvas: ImageDraw, w: int, h: int) -> None:
        for (name, color), (left, top) in zip(entries, places, strict=True):
            canvas.rectangle((left, top + 3, left + tall, top + 3 + tall), fill=color)
            canvas.text((left + tall + 6, top + 2), name, fill=0, font=font)

    return _drawn(torch.full((3, y + line + 4, width), 255, dtype=torch.uint8), draw)


def points(
    picture: Picture,
    xy: Float[Tensor, "P 2"],
    ids: Int64[Tensor, " P"] | None = None,
    valid: Bool[Tensor, " P"] | None = None,
    *,
    radius: float = 5.0,
    rim: tuple[int, int, int] = (0, 0, 0),
) -> Picture:
    """Dots, coloured by id (by their own index without ids), with a thin rim."""

    def draw(canvas: ImageDraw, w: int, h: int) -> None:
        for p, (x, y) in enumerate(xy.tolist()):
            if valid is None or valid[p]:
                at = (x * w - radius, y * h - radius, x * w + radius, y * h + radius)
                canvas.ellipse(at, fill=color_of(p if ids is None else int(ids[p])), outline=rim)

    return _drawn(picture, draw)


def cells(picture: Picture, size: tuple[int, int], valid: Bool[Tensor, " cells"] | None = None) -> Picture:
    """The lines of an (h, w) feature map; cells that are not valid are darkened."""
    rows, columns = checks.pair_of_sizes(size, "viz.cells", "size")
    h, w = picture.shape[-2:]
    if valid is not None:
        shade = torch.where(valid.view(1, 1, rows, columns), 1.0, 0.35)
        picture = (picture * torch.nn.functional.interpolate(shade, (h, w))[0]).to(torch.uint8)
    y = torch.arange(1, rows)[:, None] / rows
    x = torch.arange(1, columns)[:, None] / columns
    across = torch.cat((torch.zeros_like(y), y, torch.ones_like(y), y), dim=-1)
    down = torch.cat((x, torch.zeros_like(x), x, torch.ones_like(x)), dim=-1)
    return segments(picture, torch.cat((across, down)), color=(255, 255, 255))


def source_grid(picture: Picture, view_from_source: AxisAffine, n: int) -> Picture:
    """The n x n grid regions of the source as one view shows them, tinted by region."""
    h, w = picture.shape[-2:]
    labels = regions.label_map(AxisAffine(view_from_source.scale[None], view_from_source.shift[None]), n, (h, w))[0]
    palette = torch.tensor([color_of(i) for i in range(n * n)], dtype=torch.float32)
    tint = palette[labels.clamp(min=0)].permute(2, 0, 1)
    mixed = torch.where(labels[None] >= 0, 0.65 * picture + 0.35 * tint, picture)
    return mixed.round().to(torch.uint8)


def heat(values: Float[Tensor, "h w"], size: tuple[int, int]) -> Picture:
    """A map of values from black (0 and less) over red and yellow to white (1), cells enlarged smoothly to (h, w)."""
    height, width = checks.pair_of_sizes(size, "viz.heat", "size")
    wide = torch.nn.functional.interpolate(
        values.detach().float().cpu()[None, None], (height, width), mode="bilinear", align_corners=False
    )[0, 0].clamp(0, 1)
    channels = torch.stack([3 * wide - channel for channel in range(3)]).clamp(0, 1)
    return (255 * channels).round().to(torch.uint8)


def ring(picture: Picture, x: float, y: float, *, radius: float = 7.0, width: int = 3) -> Picture:
    """A red circle around a point, so that what lies there can be seen."""

    def draw(canvas: ImageDraw, w: int, h: int) -> None:
        box = (x * w - radius, y * h - radius, x * w + radius, y * h + radius)
        canvas.ellipse(box, outline=(230, 0, 0), width=width)

    return _drawn(picture, draw)


def segments(
    picture: Picture, ends: Float[Tensor, "S 4"], *, color: tuple[int, int, int] | None = None, width: int = 1
) -> Picture:
    """Straight lines (x0, y0, x1, y1), of one colour or each of its own."""

    def draw(canvas: ImageDraw, w: int, h: int) -> None:
        for s, (x0, y0, x1, y1) in enumerate(ends.tolist()):
            canvas.line((x0 * w, y0 * h, x1 * w, y1 * h), fill=color or color_of(s), width=width)

    return _drawn(picture, draw)


def beside(pictures: Sequence[Picture], *, gap: int = 8) -> Picture:
    """Pictures in a row on white, aligned at the top."""
    height = max(p.shape[-2] for p in pictures)
    padded = [torch.nn.functional.pad(p, (0, gap, 0, height - p.shape[-2]), value=255) for p in pictures]
    return torch.cat(padded, dim=-1)[..., :-gap] if gap else torch.cat(padded, dim=-1)


def below(pictures: Sequence[Picture], *, gap: int = 8) -> Picture:
    """Pictures in a column on white, aligned at the left: a contact sheet when each is a row."""
    return beside([p.mT for p in pictures], gap=gap).mT.contiguous()


def correspondence(
    a: Picture,
    b: Picture,
    points_a: Float[Tensor, "P 2"],
    points_b: Float[Tensor, "P 2"],
    valid: Bool[Tensor, " P"],
    *,
    gap: int = 24,
) -> Picture:
    """Two views beside each other, each valid pair of points joined by a line."""
    sheet = beside([a, b], gap=gap)
    h, w = sheet.shape[-2:]
    to_a = torch.tensor([a.shape[-1] / w, a.shape[-2] / h])
    to_b = torch.tensor([b.shape[-1] / w, b.shape[-2] / h])
    from_a, from_b = points_a * to_a, points_b * to_b + torch.tensor([(a.shape[-1] + gap) / w, 0.0])
    ends = torch.cat((from_a, from_b), dim=-1)[valid]
    index = torch.arange(len(ends))
    sheet = segments(sheet, ends)
    return points(points(sheet, ends[:, :2], index), ends[:, 2:], index)


def save(picture: Picture, path: Path | str) -> Path:
    """Write a PNG, and make its folder if need be."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_png(picture))
    return target


def _png(picture: Picture) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG")
        return file.getvalue()


def page(title: str, sections: Sequence[tuple[str, str, Picture | None]], path: Path | str) -> Path:
    """One self-contained HTML page of sections (heading, text, picture or None); pictures are embedded."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}",
        "img{max-width:100%;height:auto;border:1px solid #ddd}pre{white-space:pre-wrap}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, text, picture in sections:
        parts.append((f"<h2>{html.escape(heading)}</h2>" if heading else "") + f"<pre>{html.escape(text)}</pre>")
        if picture is not None:
            data = base64.b64encode(_png(picture)).decode()
            parts.append(f"<img alt='{html.escape(heading or text)}' src='data:image/png;base64,{data}'>")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([*parts, "</html>", ""]), encoding="utf-8", errors="backslashreplace")
    return target
