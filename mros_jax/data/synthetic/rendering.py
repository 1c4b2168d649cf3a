"""Draw synthetic pedestrians: (person, picture, camera) -> uint8 pixels, a pure function.

A body is a posed skeleton projected into the picture; each part is a signed distance turned
into anti-aliased coverage, and parts are painted from back to front. Inside this file an image is
(3, H, W) in 0..1.

Body coordinates: y downwards from the crown (0) to the soles (1), x to the picture's right, both in
body heights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from mros_jax.data.synthetic import imaging
from mros_jax.data.synthetic.pedestrians import Camera, Person, Picture
from mros_jax.data.synthetic.shapes import (
    Canvas,
    box,
    capsule,
    cover,
    ellipse,
    fraction,
    mix,
    paint,
    roundness,
    step,
    wave,
    within,
)

_GROUP = 4  # pictures that are vectorised together
_BODY = 0.91  # body height of a 1.0 person, as a share of the box


class _Limb(NamedTuple):
    """Projected joints and depth towards the camera of one side's limb."""

    start: Array
    middle: Array
    end: Array
    tip: Array
    depth: Array


def _project(picture: Picture, pitch: Array, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Screen place and depth of a body point: x to the person's left, z forward."""
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    depth = z * cos - x * sin
    # A camera that looks down sees nearer points lower.
    at = jnp.stack([x * cos + z * sin + picture.lean * (0.5 - y), y + pitch * depth])
    return at, depth


def _leg(person: Person, picture: Picture, camera: Camera, side: float) -> _Limb:
    swing = picture.stride * jnp.sin(picture.phase + (0.0 if side > 0 else jnp.pi))
    rate = picture.stride * jnp.cos(picture.phase + (0.0 if side > 0 else jnp.pi))
    bend = 0.06 + 1.3 * jnp.maximum(rate, 0.0) + 0.25 * jnp.maximum(-swing, 0.0)
    point = functools.partial(_project, picture, camera.pitch)
    x = side * 0.046 * jnp.sqrt(person.girth)
    hip, depth = point(x, jnp.float32(0.50), jnp.float32(0.0))
    ky, kz = 0.50 + 0.235 * jnp.cos(swing), 0.235 * jnp.sin(swing)
    knee, _ = point(x, ky, kz)
    ay, az = ky + 0.215 * jnp.cos(swing - bend), kz + 0.215 * jnp.sin(swing - bend)
    ankle, _ = point(x, ay, az)
    toe, _ = point(x * 1.25, ay + 0.028 - 0.03 * bend, az + 0.095)
    return _Limb(hip, knee, ankle, toe, depth)


def _arm(person: Person, picture: Picture, camera: Camera, side: float) -> _Limb:
    swing = -0.85 * picture.stride * jnp.sin(picture.phase + (0.0 if side > 0 else jnp.pi))
    point = functools.partial(_project, picture, camera.pitch)
    x = side * 0.101 * person.shoulders * jnp.sqrt(person.girth)
    zero = jnp.float32(0.0)
    shoulder, depth = point(x, jnp.float32(0.222), zero)
    ey, ez = 0.222 + 0.145 * jnp.cos(swing), 0.145 * jnp.sin(swing)
    elbow, _ = point(x * 1.20, ey, ez)
    wy, wz = ey + 0.135 * jnp.cos(swing + 0.25), ez + 0.135 * jnp.sin(swing + 0.25)
    wrist, _ = point(x * 1.23, wy, wz)
    hand, _ = point(x * 1.21, wy + 0.025, wz + 0.01)
    return _Limb(shoulder, elbow, wrist, hand, depth)


def _lines(x: Array, y: Array, grid: Array, width: Array | float) -> Array:
    """Coverage of a grid of lines, `grid` lines per unit in x and y; 0 lines where it is 0."""
    lines = jnp.zeros_like(x)
    for value, rate in ((x, grid[0]), (y, grid[1])):
        cell = value * rate
        off = jnp.abs(cell - jnp.round(cell)) / jnp.maximum(rate, 1e-3)
        lines = jnp.maximum(lines, jnp.clip(1.5 - off / width, 0.0, 1.0) * (rate > 0))
    return lines


def _backdrop(frame: Canvas, picture: Picture, camera: Camera) -> Array:
    """The scene without people."""
    x, y = frame.x, frame.y
    zoom = 1.0 + 0.1 * jnp.tanh(picture.scene[1])
    wx, wy = (x + picture.scene[0]) * zoom, y * zoom
    horizon = camera.horizon + 0.06 * picture.scene[1]
    below = jnp.maximum(y - horizon, 0.0)
    depth = 1.0 / (0.35 + below)
    gx, gy = x * depth * 0.8 + picture.scene[0], depth * 1.2 + picture.scene[1]
    wall = mix(_lines(wx, wy, camera.wall_grid, 0.006) * 0.8, camera.wall, camera.wall_line)
    ground = mix(_lines(gx, gy, camera.ground_grid, 0.010) * 0.7, camera.ground, camera.ground_line)
    ground = ground * (0.88 + 0.16 * jnp.clip(below, 0.0, 1.0))
    image = mix(jnp.clip(0.5 + (y - horizon) * 90.0, 0.0, 1.0), wall, ground)
    mottle = (
        wave(17.0 * wx + 9.0 * y + 3.0 * wave(11.0 * y + picture.scene[0]))
        + wave(41.0 * y - 23.0 * wx + 2.0 * wave(29.0 * wx))
        + wave(7.0 * wx - 5.0 * y + picture.scene[1])
    )
    image = image * (1.0 + camera.mottle * mottle)
    # Something else in the scene: a door, a sign, a bin.
    c = picture.clutter
    bottom = horizon + 0.05 + 0.2 * c[1]
    centre = (0.6 * (c[0] - 0.5), bottom - 0.15 - 0.2 * c[2])
    seen = cover(frame, box(frame, centre, 0.03 + 0.1 * c[3], 0.15 + 0.2 * c[2], 0.01))
    muted = 0.5 * picture.clutter_colour + 0.5 * camera.wall
    return paint(image, seen * (c[1] > 0.45), muted)


def _legs(image: Array, at: Canvas, person: Person, limb: _Limb, near: Array) -> Array:
    g = person.girth
    dim = 0.72 + 0.28 * near
    thigh, t = capsule(at, limb.start, limb.middle, 0.052 * g, 0.038 * g)
    trousers, shorts = person.bottom_kind == 0, person.bottom_kind == 1
    calf = jnp.where(trousers, 0.036, 0.031) * g
    shin, s = capsule(at, limb.middle, limb.end, calf, jnp.where(trousers, 0.027, 0.018))
    foot, _ = capsule(at, limb.end + jnp.array([0.0, 0.018]), limb.tip, 0.021, 0.018)
    shoe_on, shoe = person.detail_on[7], person.detail_colour[7]
    image = paint(image, cover(at, foot) * shoe_on, shoe, dim * roundness(foot, 0.02))
    socks = within(at, s, 0.66, 1.1) * person.detail_on[6]
    colour = mix(jnp.float32(trousers), person.skin, person.bottom)
    colour = mix(socks, colour, person.detail_colour[6])
    image = paint(image, cover(at, shin), colour, dim * roundness(shin, calf))
    cloth = jnp.where(trousers | shorts, 1.0, 0.0)
    colour = mix(cloth * jnp.ones_like(t), person.skin, person.bottom)
    # Above the knee on trousers, at the seam of shorts and skirts: one height for everybody.
    band = within(at, t, 0.62, 0.86) * person.detail_on[5]
    colour = mix(band, colour, person.detail_colour[5])
    return paint(image, cover(at, thigh), colour, dim * roundness(thigh, 0.045 * g))


def _arms(image: Array, at: Canvas, person: Person, limb: _Limb, near: Array) -> Array:
    g = jnp.sqrt(person.girth)
    dim = 0.74 + 0.26 * near
    hand, _ = capsule(at, limb.end, limb.tip, 0.016, 0.017)
    image = paint(image, cover(at, hand), person.skin, dim)
    fore, _ = capsule(at, limb.middle, limb.end, 0.028 * g, 0.020 * g)
    sleeve = mix(person.long_sleeves, person.skin, person.top)
    image = paint(image, cover(at, fore), sleeve, dim * roundness(fore, 0.024))
    upper, t = capsule(at, limb.start, limb.middle, 0.036 * g, 0.030 * g)
    band = within(at, t, 0.42, 0.78) * person.detail_on[3]
    colour = mix(band, person.top, person.detail_colour[3])
    return paint(image, cover(at, upper), colour, dim * roundness(upper, 0.033))


def _torso(image: Array, at: Canvas, person: Person, picture: Picture, neck: Array) -> Array:
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    g = person.girth

    def width(lateral: float, sagittal: float) -> Array:
        """Half the width seen of an elliptical cross-section."""
        return jnp.sqrt((lateral * cos) ** 2 + (sagittal * sin) ** 2) * g

    shoulder = width(0.108, 0.064) * person.shoulders
    waist, hip = width(0.083, 0.066), width(0.095, 0.072)
    x = at.x - picture.lean * (0.5 - at.y)
    place = Canvas(x, at.y, at.pixel)

    # Hips, in the colour of the trousers, then a skirt over the thighs.
    hips = box(place, (0.0, 0.50), hip * 0.97, 0.055, 0.035)
    image = paint(image, cover(at, hips), person.bottom, roundness(hips, hip))
    flare = hip * (0.95 + 0.55 * jnp.clip((at.y - 0.45) / 0.27, 0.0, 1.0))
    skirt = jnp.maximum(jnp.abs(x) - flare, jnp.abs(at.y - 0.585) - 0.135)
    band = within(at, at.y, 0.655, 0.70) * person.detail_on[5]
    colour = mix(band, person.bottom, person.detail_colour[5])
    worn = jnp.float32(person.bottom_kind == 2)
    pleats = 0.95 + 0.06 * wave(x * 150.0)
    image = paint(image, cover(at, skirt) * worn, colour, roundness(skirt, hip) * pleats)

    # The top: straight lines from shoulder to waist to hem, with sloping shoulders.
    v = at.y
    half = jnp.where(
        v < 0.38,
        shoulder + (waist - shoulder) * jnp.clip((v - 0.20) / 0.18, 0.0, 1.0),
        waist + (hip * 1.03 - waist) * jnp.clip((v - 0.38) / 0.14, 0.0, 1.0),
    )
    slope = 0.168 + 0.050 * (jnp.abs(x) / jnp.maximum(shoulder, 0.03)) ** 2
    top = jnp.maximum(jnp.abs(x) - half, jnp.maximum(slope - v, v - person.top_length))
    u = x / jnp.maximum(half, 0.03)
    period = person.top_period
    # Distances to the nearest edge of a stripe, so that patterns are anti-aliased as shapes are.
    wave_v = (jnp.abs(fraction(v / period) - 0.5) - 0.25) * period
    turn = (x - 0.06 * sin) / period
    wave_u = (jnp.abs(fraction(turn) - 0.5) - 0.25) * period
    striped = step(at, wave_v)
    checked = 0.5 * striped + 0.5 * step(at, wave_u)
    pattern = jnp.where(person.top_kind == 1, striped, checked) * (person.top_kind > 0)
    colour = mix(pattern, person.top, person.top_second)
    hem = within(at, v, person.top_length - 0.045, 1.0) * person.detail_on[4]
    colour = mix(hem, colour, person.detail_colour[4])
    # A scarf or collar shows from every side.
    collar = within(at, v, 0.0, 0.205) * person.detail_on[1]
    colour = mix(collar, colour, person.detail_colour[1])
    # The logo sits on the chest: it moves and narrows as the person turns, and is gone behind.
    facing = jnp.maximum(cos, 0.0)
    lx, ly = (x - 0.068 * sin * g) / (0.15 + facing), v - 0.285
    r = 0.036
    square = jnp.maximum(jnp.abs(lx), jnp.abs(ly)) - r * 0.9
    bar = jnp.maximum(jnp.abs(lx) - 0.05, jnp.abs(ly) - 0.017)
    disc = jnp.sqrt(lx * lx + ly * ly + 1e-9) - r
    lozenge = (jnp.abs(lx) + jnp.abs(ly)) * 0.7 - r * 0.85
    logo = jnp.select(
        [person.logo_kind == 0, person.logo_kind == 1, person.logo_kind == 2],
        [disc, square, bar],
        lozenge,
    )
    shown = cover(at, logo) * person.detail_on[2] * jnp.clip(facing * 4.0 - 0.4, 0.0, 1.0)
    colour = mix(shown, colour, person.detail_colour[2])
    folds = 1.0 + 0.035 * wave(x * 60.0 + v * 45.0) * wave(v * 70.0 - x * 25.0)
    shade = (1.0 - 0.22 * u * u) * folds
    image = paint(image, cover(at, top), colour, shade)
    throat = box(place, (neck[0], 0.155), 0.030, 0.034, 0.015)
    neck_colour = mix(
        person.detail_on[1] * step(at, v - 0.150), person.skin * 0.88, person.detail_colour[1]
    )
    return paint(image, cover(at, throat), neck_colour)


def _head(image: Array, at: Canvas, person: Person, picture: Picture, head: Array) -> Array:
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    cx, cy = head[0], 0.078
    rx = 0.050 + 0.008 * jnp.abs(sin)
    x, y = at.x - cx, at.y - cy
    face = ellipse(at, (cx, cy), rx, 0.070)
    image = paint(image, cover(at, face), person.skin, roundness(face, 0.09))
    # Eyes and nose as one dark line and one light dot are all that 128 rows leave of them.
    front = jnp.maximum(cos, 0.0)
    eyes = jnp.maximum(
        jnp.abs(jnp.abs(x - 0.030 * sin) - 0.019 * front) - 0.007, jnp.abs(y) - 0.005
    )
    image = paint(
        image, cover(at, eyes) * 0.55 * jnp.clip(cos * 3.0 + 0.8, 0.0, 1.0), person.skin * 0.35
    )
    # Hair: what lies behind a plane that turns with the head; seen from behind that is all of it.
    scalp = ellipse(at, (cx, cy - 0.004), rx + 0.006, 0.073)
    line = -0.030 - 0.105 * jnp.clip(cos, -1.0, 0.0) * 1.2
    side = sin * x * 1.1
    hairline = (y - line) + jnp.maximum(side + 0.012 * jnp.abs(sin), -0.2) * jnp.abs(sin) * 1.8
    low = jnp.where(person.hair_kind >= 2, 0.02, 0.0) * (1 - front)
    cap = jnp.maximum(scalp, hairline - low)
    haired = jnp.float32(person.hair_kind > 0)
    return paint(image, cover(at, cap) * haired, person.hair, roundness(cap, 0.05))


def _long_hair(
    image: Array, at: Canvas, person: Person, picture: Picture, head: Array, show: Array
) -> Array:
    sin = jnp.sin(picture.yaw)
    end = jnp.where(person.hair_kind == 3, 0.27, 0.165)
    centre = (head[0] - 0.028 * sin, (0.06 + end) / 2)
    fall = box(at, centre, 0.060 - 0.018 * jnp.abs(sin), (end - 0.06) / 2, 0.03)
    worn = cover(at, fall) * show * (person.hair_kind >= 2)
    return paint(image, worn, person.hair, roundness(fall, 0.05))


def _hat(image: Array, at: Canvas, person: Person, picture: Picture, head: Array) -> Array:
    sin, cos = jnp.sin(picture.yaw), jnp.cos(picture.yaw)
    cx = head[0]
    dome = jnp.maximum(ellipse(at, (cx, 0.062), 0.060, 0.068), at.y - 0.050)
    reach = jnp.where(person.hat_kind == 1, 0.05, 0.0)
    brim_x = cx + 1.1 * reach * sin
    wide = jnp.where(person.hat_kind == 2, 0.085, jnp.where(person.hat_kind == 1, 0.045, 0.061))
    shown = jnp.where((person.hat_kind == 1) & (cos < -0.3), 0.0, 1.0)
    brim = ellipse(at, (brim_x, 0.052 + 0.006 * (person.hat_kind > 0)), wide, 0.014)
    colour = person.detail_colour[0]
    on = person.detail_on[0]
    image = paint(image, cover(at, dome) * on, colour, roundness(dome, 0.06))
    return paint(image, cover(at, brim) * on * shown, colour, 0.82)


def _backpack(image: Array, at: Canvas, person: Person, picture: Picture, show: Array) -> Array:
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    half = jnp.sqrt((0.085 * cos) ** 2 + (0.045 * sin) ** 2)
    pack = box(at, (-0.105 * sin * person.girth, 0.305), half, 0.105, 0.03)
    on = jnp.float32(person.bag_kind == 1) * show
    pocket = box(at, (-0.115 * sin * person.girth, 0.355), half * 0.7, 0.035, 0.015)
    colour = mix(cover(at, pocket) * jnp.clip(-cos * 3, 0.0, 1.0), person.bag, person.bag * 0.65)
    return paint(image, cover(at, pack) * on, colour, roundness(pack, 0.05))


def _straps(image: Array, at: Canvas, person: Person, picture: Picture) -> Array:
    """Backpack straps in front; the strap of a shoulder bag across the body, front and back."""
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    x = at.x - 0.02 * sin
    pair = jnp.maximum(
        jnp.abs(jnp.abs(x) - 0.062 * jnp.abs(cos)) - 0.011, jnp.abs(at.y - 0.26) - 0.085
    )
    front = jnp.float32(person.bag_kind == 1) * jnp.clip(cos * 4.0, 0.0, 1.0)
    image = paint(image, cover(at, pair) * front, person.bag, 0.85)
    s = person.bag_side * cos
    a, b = jnp.stack([-0.075 * s, jnp.float32(0.18)]), jnp.stack([0.10 * s, jnp.float32(0.46)])
    belt, _ = capsule(at, a, b, 0.010, 0.010)
    return paint(image, cover(at, belt) * (person.bag_kind == 2), person.bag, 0.85)


def _shoulder_bag(image: Array, at: Canvas, person: Person, picture: Picture, show: Array) -> Array:
    cos, sin = jnp.cos(picture.yaw), jnp.sin(picture.yaw)
    half = 0.042 + 0.030 * jnp.abs(sin)
    bag = box(at, (0.135 * person.bag_side * cos * person.girth, 0.50), half, 0.055, 0.012)
    on = jnp.float32(person.bag_kind == 2) * show
    flap = mix(step(at, 0.485 - at.y), person.bag, person.bag * 0.75)
    return paint(image, cover(at, bag) * on, flap, roundness(bag, 0.05))


def _figure(image: Array, at: Canvas, person: Person, picture: Picture, camera: Camera) -> Array:
    left_leg, right_leg = (_leg(person, picture, camera, side) for side in (1.0, -1.0))
    left_arm, right_arm = (_arm(person, picture, camera, side) for side in (1.0, -1.0))

    def order(a: _Limb, b: _Limb) -> tuple[_Limb, _Limb]:
        far = a.depth <= b.depth
        pick = functools.partial(jax.tree.map, lambda p, q: jnp.where(far, p, q))
        return pick(a, b), pick(b, a)

    far_leg, near_leg = order(left_leg, right_leg)
    far_arm, near_arm = order(left_arm, right_arm)
    side = jnp.abs(jnp.sin(picture.yaw))
    from_behind = jnp.clip(0.5 - 4.0 * jnp.cos(picture.yaw), 0.0, 1.0)
    bag_near = jnp.clip(0.5 - 4.0 * person.bag_side * jnp.sin(picture.yaw), 0.0, 1.0)
    head, _ = _project(
        picture, camera.pitch, jnp.float32(0.0), jnp.float32(0.08), jnp.float32(0.02)
    )
    dim = 1.0 - side

    image = _backpack(image, at, person, picture, 1.0 - from_behind)
    image = _shoulder_bag(image, at, person, picture, 1.0 - bag_near)
    image = _long_hair(image, at, person, picture, head, 1.0 - from_behind)
    image = _arms(image, at, person, far_arm, dim)
    image = _legs(image, at, person, far_leg, dim)
    image = _legs(image, at, person, near_leg, jnp.float32(1.0))
    image = _torso(image, at, person, picture, head)
    image = _straps(image, at, person, picture)
    image = _head(image, at, person, picture, head)
    image = _long_hair(image, at, person, picture, head, from_behind)
    image = _hat(image, at, person, picture, head)
    image = _backpack(image, at, person, picture, from_behind)
    image = _shoulder_bag(image, at, person, picture, bag_near)
    return _arms(image, at, person, near_arm, jnp.float32(1.0))


def _occlude(image: Array, frame: Canvas, picture: Picture, half_width: float) -> Array:
    """Something between the camera and the person: a pole, a low thing, or somebody at the edge."""
    kind, where = picture.occluder_kind, picture.occluder_at
    pole = jnp.abs(frame.x - (2 * where - 1) * half_width) - 0.035
    low = jnp.maximum(0.72 + 0.16 * where - frame.y, jnp.abs(frame.x - 0.1 * (where - 0.5)) - 0.2)
    edge = jnp.where(where < 0.5, -1.0, 1.0) * (0.8 + 0.2 * where) * half_width
    body = box(frame, (edge, 0.62), 0.10, 0.42, 0.07)
    head = ellipse(frame, (edge, 0.13), 0.050, 0.068)
    distance = jnp.select([kind == 1, kind == 2], [pole, low], jnp.minimum(body, head))
    legs = step(frame, frame.y - 0.56) * (kind == 3)
    colour = mix(legs, picture.occluder_colour, picture.occluder_colour * 0.35)
    colour = mix(cover(frame, head) * (kind == 3), colour, jnp.array([0.7, 0.5, 0.4]))
    return paint(image, cover(frame, distance) * (kind > 0), colour, roundness(distance, 0.05))


def _scene(person: Person, picture: Picture, camera: Camera, height: int, width: int) -> Array:
    """What the camera looks at, (3, H, W), in 0..1."""
    y = (jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5) / height
    x = (jnp.arange(width, dtype=jnp.float32)[None, :] + 0.5 - width / 2) / height
    x, y = jnp.broadcast_arrays(x, y)  # each (H, W), in box heights
    frame = Canvas(x, y, jnp.float32(1 / height))
    image = _backdrop(frame, picture, camera)

    size = _BODY * person.height * picture.scale
    feet = 0.965 + picture.shift[1] - 0.5 * (picture.scale - 1.0)
    at = Canvas((x - picture.shift[0]) / size, 1.0 + (y - feet) / size, 1.0 / (height * size))
    shadow = ellipse(at, (0.06 * camera.light, 0.985), 0.19, 0.022 + 0.05 * camera.pitch)
    soft = jnp.clip(0.5 - shadow / 0.03, 0.0, 1.0) * 0.38 * picture.present
    image = image * (1.0 - soft)
    body = _figure(image, at, person, picture, camera)
    # Light from one side, on the person only.
    body = body * (1.0 + 0.10 * camera.light * jnp.clip(at.x / 0.12, -1.0, 1.0))
    image = jnp.where(picture.present > 0, body, image)
    return _occlude(image, frame, picture, width / height / 2)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def render(
    people: Person,
    pictures: Picture,
    cameras: Camera,
    camera_rows: Int[Array, "B"],
    *,
    height: int = 128,
    width: int = 64,
) -> UInt8[Array, "B H W 3"]:
    """Renders a batch of pictures.

    Args:
        people: who is in each picture, leading dimension B.
        pictures: pose, box and surroundings, leading dimension B.
        cameras: the cameras there are, leading dimension K.
        camera_rows: (B,) which of them took each picture, 0..K-1.
        height: pixels, a multiple of 16 (JPEG works on blocks of 8, colour on blocks of 16).
        width: pixels, a multiple of 16.

    Returns:
        sRGB pixels, (B, height, width, 3).
    """
    sensors = imaging.make_sensors(cameras, height, width)

    def one(i: Array) -> Array:
        person, picture, row = jax.tree.map(lambda leaf: leaf[i], (people, pictures, camera_rows))
        camera, sensor = jax.tree.map(lambda leaf: leaf[row], (cameras, sensors))
        scene = _scene(person, picture, camera, height, width)
        return imaging.expose(scene, picture, camera, *sensor)

    # Groups of one size, the last filled up: what is compiled for a picture, and with it the
    # rounding of its pixels, does not depend on how many there are. Small ones stay in the cache.
    count = len(camera_rows)
    index = jnp.minimum(jnp.arange(-(-count // _GROUP) * _GROUP), count - 1)
    pixels: Array = jax.lax.map(one, index, batch_size=_GROUP)
    return pixels[:count]
