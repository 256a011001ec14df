"""Draws a view beside what its geometry says it shows, for a human to see the difference."""

from __future__ import annotations

import colorsys
import textwrap
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from local_distill._precision import widest
from local_distill.geometry import project
from local_distill.structures import CropGeometry
from local_distill.transforms.verification.structured_light import (
    apply_affine,
    pixel_centers,
    predicted_positions,
)

__all__ = ["draw_disagreement", "reference_card"]

_SIDE = 320  # px of each panel's longer side
_GAP = 16
_RIM = 0.08  # of the source, drawn around it
_CELL = 40  # px of the card's cells, about
_INK, _PAPER, _NOWHERE = (20, 20, 20), (255, 255, 255), 120
_TOLD, _SHOWN = (0, 90, 255), (230, 0, 0)


def _font(size: int) -> Any:
    try:
        return PIL.ImageFont.load_default(size)
    except (TypeError, ImportError):  # an older Pillow, or one without FreeType: one small size
        return PIL.ImageFont.load_default()


def reference_card(height: int, width: int) -> PIL.Image.Image:
    """A picture on which each place can be told: cells A1, A2 … in colours of their own."""
    rows, cols = max(2, round(height / _CELL)), max(2, round(width / _CELL))
    card = PIL.Image.new("RGB", (width, height))
    draw = PIL.ImageDraw.Draw(card)
    cell = min(height / rows, width / cols)
    for row in range(rows):
        top, bottom = height * row / rows, height * (row + 1) / rows
        for col in range(cols):
            left, right = width * col / cols, width * (col + 1) / cols
            # hue along x, lightness along y, every other cell paler
            lightness = 0.78 - 0.36 * row / (rows - 1)
            colour = colorsys.hls_to_rgb(
                0.8 * col / cols, lightness, 0.55 + 0.4 * ((row + col) % 2)
            )
            fill = tuple(round(255 * part) for part in colour)
            draw.rectangle((left, top, right, bottom), fill=fill, outline=_PAPER)
            middle = ((left + right) / 2, (top + bottom) / 2)
            name = f"{chr(ord('A') + row % 26)}{col + 1}"
            draw.text(middle, name, fill=_INK, font=_font(round(0.45 * cell)), anchor="mm")
    return card


def draw_disagreement(
    card: PIL.Image.Image,
    view: Any,
    geometry: CropGeometry,
    shown: Tensor | None,
    words: str,
    case: str,
) -> PIL.Image.Image:
    """Four panels: the source with both outlines, the view, what it should show, the difference.

    Args:
        card: the source, `reference_card`.
        view: what the pipeline made of it.
        geometry: where it says the view lies.
        shown: (3, 2) affine map view → source that the pixels show, where one was found.
        words: what is wrong, in words.
        case: seed, kind and size.
    """
    real = _as_levels(view)
    expected, inside = _rebuilt(card, geometry)
    difference = (real.mean(0) - _with_tones_of(expected, real, inside).mean(0)).abs()
    difference = torch.where(inside, (2 * difference).clamp(0, 255), float(_NOWHERE)).expand(
        3, -1, -1
    )
    panels = [
        ("the source: where the view lies", _outlined(card, geometry, shown)),
        ("the view, as the pipeline made it", _fitted(F.to_pil_image(real.to(torch.uint8)))),
        ("what its geometry says it shows", _fitted(F.to_pil_image(expected.to(torch.uint8)))),
        ("difference of the two", _fitted(F.to_pil_image(difference.to(torch.uint8)))),
    ]
    width = _GAP + sum(panel.width + _GAP for _, panel in panels)
    title = textwrap.wrap(words, max(40, width // 9)) or [""]
    head = _GAP + 24 * len(title) + 24
    tallest = max(panels[0][1].height + 48, *(panel.height for _, panel in panels[1:]))
    height = head + 24 + tallest + _GAP
    sheet = PIL.Image.new("RGB", (width, height), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        draw.text((_GAP, _GAP / 2 + 24 * line), text, fill=_INK, font=_font(18))
    draw.text((_GAP, head - 28), case, fill=_INK, font=_font(14))
    left = _GAP
    for label, panel in panels:
        draw.text((left, head), label, fill=_INK, font=_font(14))
        sheet.paste(panel, (left, head + 24))
        left += panel.width + _GAP
    foot = head + 24 + panels[0][1].height + 6
    draw.text((_GAP, foot), "blue: where the geometry says", fill=_TOLD, font=_font(14))
    told = "red: where the pixels lie" if shown is not None else "where the pixels lie: unknown"
    draw.text((_GAP, foot + 20), told, fill=_SHOWN, font=_font(14))
    return sheet


def _as_levels(view: Any) -> Tensor:
    """(3, h, w) levels in [0, 255] of a view in any range, as a normalised one."""
    tensor = F.pil_to_tensor(view) if isinstance(view, PIL.Image.Image) else view.detach().cpu()
    levels: Tensor = tensor.as_subclass(Tensor).to(torch.float32).nan_to_num(0.0)
    levels = levels[:3] if levels.shape[0] >= 3 else levels[:1].expand(3, -1, -1)
    low, high = levels.flatten(1).aminmax(dim=1)
    return (levels - low[:, None, None]) / (high - low).clamp_min(1e-6)[:, None, None] * 255


def _rebuilt(card: PIL.Image.Image, geometry: CropGeometry) -> tuple[Tensor, Tensor]:
    """(3, h, w) levels that the geometry predicts, grey outside the source; and where that is."""
    source = F.pil_to_tensor(card).to(torch.float64)
    positions = predicted_positions(geometry, pixel_centers(*geometry.view_size.tolist()))
    size = torch.tensor([card.width, card.height], dtype=torch.float64)
    inside = ((positions >= 0) & (positions < size)).all(-1)
    grid = (2 * positions / size - 1).nan_to_num(2.0)  # half-pixel convention: align_corners=False
    levels = torch.nn.functional.grid_sample(
        source[None], grid[None], padding_mode="border", align_corners=False
    )[0]
    return torch.where(inside, levels, float(_NOWHERE)).clamp(0, 255), inside


def _with_tones_of(levels: Tensor, like: Tensor, inside: Tensor) -> Tensor:
    """``levels`` with the mean and contrast of ``like``: colours were changed on purpose."""
    if not bool(inside.any()):
        return levels
    one, other = levels[:, inside], like[:, inside]
    gain = other.std() / one.std().clamp_min(1e-6)
    return (levels - one.mean()) * gain + other.mean()


def _fitted(panel: PIL.Image.Image) -> PIL.Image.Image:
    factor = _SIDE / max(panel.size)
    size = (max(1, round(panel.width * factor)), max(1, round(panel.height * factor)))
    return panel.resize(size, PIL.Image.Resampling.NEAREST if factor > 2 else None)


def _outlined(
    card: PIL.Image.Image, geometry: CropGeometry, shown: Tensor | None
) -> PIL.Image.Image:
    """The source, with the view's outline where it is said to lie and where it does.

    An arrow runs along the view's upper edge, from its left to its right.
    """
    height, width = geometry.view_size.tolist()
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
    rim = round(_RIM * max(card.size))  # for what lies outside the source
    sheet = PIL.Image.new("RGB", (card.width + 2 * rim, card.height + 2 * rim), (_NOWHERE,) * 3)
    sheet.paste(card, (rim, rim))
    panel = _fitted(sheet)
    factor = panel.width / sheet.width
    draw = PIL.ImageDraw.Draw(panel)
    outlines = [(project(widest(geometry.matrix), corners), _TOLD, 7)]
    if shown is not None:
        outlines.append((apply_affine(shown, corners), _SHOWN, 3))  # the wider one shows beneath
    for places, colour, thickness in outlines:
        points = [((x + rim) * factor, (y + rim) * factor) for x, y in places.nan_to_num().tolist()]
        for ink, extra in ((_PAPER, 2), (colour, 0)):
            draw.line([*points, points[0]], fill=ink, width=thickness + extra, joint="curve")
        _arrow(draw, points[0], points[1], colour)
    return panel


def _arrow(
    draw: PIL.ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    along = torch.tensor(end) - torch.tensor(start)
    along = along / along.norm().clamp_min(1e-6)
    across = torch.tensor([-along[1], along[0]])
    tip = torch.tensor(start) + 0.6 * (torch.tensor(end) - torch.tensor(start))
    head = [tip, tip - 16 * along + 8 * across, tip - 16 * along - 8 * across]
    draw.polygon([(float(x), float(y)) for x, y in head], fill=colour, outline=_PAPER)
