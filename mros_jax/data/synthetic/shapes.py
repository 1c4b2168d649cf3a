"""Shapes and paint for the renderer: signed distances, their coverage of pixels, and layers.

A distance is negative inside a shape; both it and places are in the canvas's unit. See
https://iquilezles.org/articles/distfunctions2d for the distances. Images are (3, H, W), so that
every operation runs along whole rows.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

Point = tuple[Array | float, Array | float]


class Canvas(NamedTuple):
    """Where each pixel lies, x and y of (H, W), and how large one pixel is, in some unit."""

    x: Array
    y: Array
    pixel: Array


def capsule(
    at: Canvas, a: Array, b: Array, ra: Array | float, rb: Array | float
) -> tuple[Array, Array]:
    """Signed distance to a capsule from a to b with radius ra to rb, and the place along it."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    px, py = at.x - a[0], at.y - a[1]
    along = jnp.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6), 0.0, 1.0)
    gap = jnp.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2 + 1e-9)
    return gap - (ra + (rb - ra) * along), along


def ellipse(at: Canvas, centre: Point, rx: Array | float, ry: Array | float) -> Array:
    """Signed distance to an ellipse, to first order: exact enough within a pixel of the edge."""
    x, y = (at.x - centre[0]) / rx, (at.y - centre[1]) / ry
    norm = jnp.sqrt(x * x + y * y + 1e-9)
    slope = jnp.sqrt((x / rx) ** 2 + (y / ry) ** 2 + 1e-9)
    return norm * (norm - 1.0) / slope


def box(at: Canvas, centre: Point, rx: Array | float, ry: Array | float, r: float) -> Array:
    """Signed distance to a box with corners rounded by r."""
    x = jnp.abs(at.x - centre[0]) - (rx - r)
    y = jnp.abs(at.y - centre[1]) - (ry - r)
    outside = jnp.sqrt(jnp.maximum(x, 0.0) ** 2 + jnp.maximum(y, 0.0) ** 2 + 1e-9)
    return outside + jnp.minimum(jnp.maximum(x, y), 0.0) - r


def fraction(value: Array) -> Array:
    """What is left of a number without its whole part, in [0, 1)."""
    return value - jnp.floor(value)


def wave(angle: Array) -> Array:
    """A sine to within 6 %, from parabolas: XLA's own is 20 times as slow on a CPU."""
    turn = fraction(angle / (2 * math.pi)) - 0.5
    return turn * (16.0 * jnp.abs(turn) - 8.0)


def cover(at: Canvas, distance: Array) -> Array:
    """Share of each pixel inside the shape, with a ramp one pixel wide at its edge."""
    return jnp.clip(0.5 - distance / at.pixel, 0.0, 1.0)


def step(at: Canvas, distance: Array) -> Array:
    """1 where distance > 0, with a ramp one pixel wide."""
    return jnp.clip(0.5 + distance / at.pixel, 0.0, 1.0)


def within(at: Canvas, value: Array, low: Array | float, high: Array | float) -> Array:
    """1 where low < value < high, with ramps one pixel wide."""
    return step(at, value - low) * step(at, high - value)


def paint(image: Array, cover: Array, colour: Array, shade: Array | float = 1.0) -> Array:
    """Lays `colour`, (3,) or (3, H, W), over the image where `cover` is 1."""
    colour = colour.reshape(3, 1, 1) if colour.ndim == 1 else colour
    return image + cover * (colour * shade - image)


def mix(cover: Array, below: Array, above: Array) -> Array:
    """A colour that is `above` where `cover` is 1 and `below` where it is 0."""
    below = below.reshape(3, 1, 1) if below.ndim == 1 else below
    return paint(below, cover, above)


def roundness(distance: Array, radius: Array | float) -> Array:
    """Shade of a round part: darker towards its edge."""
    return 0.76 + 0.27 * jnp.clip(-distance / radius, 0.0, 1.0)
