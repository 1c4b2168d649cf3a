"""Pictures of what a network looks at: attention, regions, and parts, each by its map's name."""

import base64
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

_SIZE = (64, 128)  # width and height of a drawing in pixels
_LEAST = 1e-6  # range of a map that is nothing but rounding


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture, or the picture of the image with something over it.

    Attributes:
        label: what the reader sees below it.
        overlay: data URI of a transparent picture over the image; None: nothing.
        boxes: rectangles over the image: top, left, height and width in percent.
    """

    label: str
    overlay: str | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()


def is_drawn(name: str) -> bool:
    """Whether a map of this name is shown: `attention_*`, `regions_*` or `parts`."""
    return name == "parts" or name.startswith(("attention_", "regions_"))


def draw_maps(maps: Mapping[str, np.ndarray]) -> list[list[Drawing]]:
    """The drawings of each image of a batch, in the order of the maps.

    Args:
        maps: of a network's outputs, of which those are drawn that `is_drawn` names: "regions_*"
            (B, R, 4), top, left, bottom and right as shares of the image; "attention_*"
            (B, H, W, C), its mean over channels; "parts" (B, H, W, S), the share of each place in
            each part, one drawing a part.

    Returns:
        For each image its drawings.
    """
    drawn = {name: np.asarray(value, np.float32) for name, value in maps.items() if is_drawn(name)}
    count = len(next(iter(drawn.values()))) if drawn else 0
    return [_draw_image({name: value[i] for name, value in drawn.items()}) for i in range(count)]


def _draw_image(maps: Mapping[str, np.ndarray]) -> list[Drawing]:
    drawings = []
    for name, value in maps.items():
        level = re.sub(r"^.*_", "", name)
        if name.startswith("regions_"):
            drawings.append(Drawing(f"regions, {level}", boxes=_place(value)))
        elif name.startswith("attention_"):
            mean = value.mean(axis=-1)
            low, high = float(mean.min()), float(mean.max())
            heat = (mean - low) / max(high - low, _LEAST)
            label = f"attention, {level}: {low:.3f} to {high:.3f}"
            drawings.append(Drawing(label, overlay=_encode_heat(heat)))
        else:
            for part in range(value.shape[-1]):
                share = value[..., part]
                label = f"part {part + 1}: {100 * share.mean():.0f} % of the image"
                drawings.append(Drawing(label, overlay=_encode_heat(share)))
    return drawings


def _place(boxes: Float[np.ndarray, "R 4"]) -> tuple[tuple[float, float, float, float], ...]:
    """Rectangles as the page wants them, cut at the edges of the image."""
    top, left, bottom, right = 100 * np.clip(boxes.T, 0, 1)
    tops, lefts, heights, widths = (
        [round(float(value), 2) for value in edge]
        for edge in (top, left, bottom - top, right - left)
    )
    return tuple(zip(tops, lefts, heights, widths, strict=True))


def color_heat(heat: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 4"]:
    """RGBA of numbers 0 to 1: from nothing over dark red to a bright yellow that covers."""
    x = np.clip(heat, 0, 1)[..., None]
    color = x * np.array([255, 220, 60]) + (1 - x) * np.array([150, 0, 40])
    alpha = np.broadcast_to(200 * x, x.shape)
    return np.concatenate([color, alpha], axis=-1).round().astype(np.uint8)


def _encode_heat(heat: Float[np.ndarray, "H W"]) -> str:
    picture = PIL.Image.fromarray(color_heat(heat), "RGBA").resize(
        _SIZE, PIL.Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def explain(names: Sequence[str]) -> list[str]:
    """A sentence on each kind of map among these names."""
    sentences = {
        "regions_": "Rectangles: the regions that the network cuts out at each level, from the "
        "top one in the order of their colors.",
        "attention_": "Attention: its mean over channels, from the least of the image (clear) to "
        "the most (yellow).",
        "parts": "Parts: the share of each place of the feature map in each part, from 0 (clear) "
        "to all of it (yellow).",
    }
    return [text for kind, text in sentences.items() if any(n.startswith(kind) for n in names)]
