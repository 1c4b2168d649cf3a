"""Who is in a synthetic picture and how it was taken: identities, cameras and single pictures.

Everything is a pure function of a seed and a number: an identity of its pid, a camera of its camid,
a walk past a camera of (identity, camid), a picture of its place in the data set. Nothing depends
on how many others there are or on the order in which they are drawn.

Identities come in groups of look-alikes. A group shares build, clothes, hair and bag; its members
differ in two of eight *details*, each at one height of the body: hat, collar, logo, sleeve band,
hem, knee band, socks, shoes. The whole-picture average tells members of one group apart poorly.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

DETAILS = ("hat", "collar", "logo", "sleeve", "hem", "knee", "socks", "shoes")
NUM_LEVELS = 3  # absent, accent A, accent B

# sRGB in 0..1. Weights follow what people wear in the street: dark and neutral first.
_CLOTHES = (
    (0.07, 0.07, 0.08),
    (0.90, 0.90, 0.88),
    (0.45, 0.46, 0.48),
    (0.10, 0.13, 0.28),
    (0.20, 0.33, 0.62),
    (0.55, 0.72, 0.88),
    (0.72, 0.10, 0.12),
    (0.38, 0.08, 0.14),
    (0.12, 0.42, 0.22),
    (0.36, 0.38, 0.20),
    (0.80, 0.72, 0.56),
    (0.40, 0.27, 0.17),
    (0.92, 0.76, 0.16),
    (0.92, 0.55, 0.68),
    (0.42, 0.22, 0.55),
    (0.93, 0.46, 0.12),
)
_CLOTHES_WEIGHTS = (5, 4, 4, 4, 3, 2, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1)
_TROUSERS_WEIGHTS = (6, 1, 3, 5, 4, 1, 0.5, 0.5, 0.5, 1, 3, 2, 0.2, 0.3, 0.2, 0.2)
_ACCENTS = (
    (0.96, 0.96, 0.94),
    (0.88, 0.10, 0.12),
    (0.98, 0.84, 0.12),
    (0.10, 0.62, 0.28),
    (0.12, 0.36, 0.86),
    (0.96, 0.50, 0.08),
    (0.90, 0.28, 0.62),
    (0.05, 0.05, 0.06),
)
_SKIN = ((0.95, 0.78, 0.66), (0.87, 0.67, 0.52), (0.74, 0.53, 0.38), (0.53, 0.35, 0.24))
_HAIR = (
    (0.06, 0.05, 0.05),
    (0.20, 0.12, 0.08),
    (0.38, 0.22, 0.12),
    (0.72, 0.55, 0.30),
    (0.60, 0.60, 0.60),
    (0.52, 0.20, 0.09),
)
_LEATHER = ((0.08, 0.07, 0.07), (0.25, 0.16, 0.10), (0.35, 0.35, 0.36))
_HAIR_WEIGHTS = (5, 5, 3, 2, 1.5, 0.7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Person:
    """What an identity looks like. Lengths are in body heights, colours sRGB in 0..1.

    Kinds are whole numbers: `hair_kind` 0 bald, 1 short, 2 shoulder length, 3 long; `top_kind` 0
    plain, 1 striped, 2 checked; `bottom_kind` 0 trousers, 1 shorts, 2 skirt; `bag_kind` 0 none, 1
    backpack, 2 shoulder bag; `hat_kind` 0 beanie, 1 cap, 2 brimmed hat; `logo_kind` 0 disc, 1
    square, 2 bar, 3 lozenge. A detail's coverage is 0 where it is absent.
    """

    height: Float[Array, "*b"]
    girth: Float[Array, "*b"]
    shoulders: Float[Array, "*b"]
    skin: Float[Array, "*b 3"]
    hair: Float[Array, "*b 3"]
    hair_kind: Int[Array, "*b"]
    top: Float[Array, "*b 3"]
    top_second: Float[Array, "*b 3"]
    top_kind: Int[Array, "*b"]
    top_period: Float[Array, "*b"]
    top_length: Float[Array, "*b"]
    long_sleeves: Float[Array, "*b"]
    bottom: Float[Array, "*b 3"]
    bottom_kind: Int[Array, "*b"]
    bag: Float[Array, "*b 3"]
    bag_kind: Int[Array, "*b"]
    bag_side: Float[Array, "*b"]
    hat_kind: Int[Array, "*b"]
    logo_kind: Int[Array, "*b"]
    detail_on: Float[Array, "*b 8"]
    detail_colour: Float[Array, "*b 8 3"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Camera:
    """How one camera sees: what is behind the people, and what the picture goes through.

    `horizon` is where the wall meets the ground (share of the picture's height from the top),
    `wall_grid` and `ground_grid` are lines per picture height, `blur` a standard deviation in
    pixels at a picture height of 128, `resolution` the share of the pixels that the sensor has,
    `noise` a standard deviation in 0..1, `jpeg` a libjpeg quality in 1..100.
    """

    horizon: Float[Array, "*b"]
    wall: Float[Array, "*b 3"]
    wall_line: Float[Array, "*b 3"]
    wall_grid: Float[Array, "*b 2"]
    ground: Float[Array, "*b 3"]
    ground_line: Float[Array, "*b 3"]
    ground_grid: Float[Array, "*b 2"]
    mottle: Float[Array, "*b"]
    pitch: Float[Array, "*b"]
    light: Float[Array, "*b"]
    cast: Float[Array, "*b 3"]
    gamma: Float[Array, "*b"]
    contrast: Float[Array, "*b"]
    blur: Float[Array, "*b"]
    resolution: Float[Array, "*b"]
    noise: Float[Array, "*b"]
    jpeg: Float[Array, "*b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a person: pose, box, surroundings.

    `yaw` 0 faces the camera, pi / 2 walks to the right, pi shows the back; `phase` is that
    of the walk. The box is off by `shift` (shares of its height) and `scale`. `occluder_kind` 0
    none, 1 pole, 2 something low at the bottom, 3 another person; `present` is 0 for nobody.
    """

    yaw: Float[Array, "*b"]
    phase: Float[Array, "*b"]
    stride: Float[Array, "*b"]
    lean: Float[Array, "*b"]
    shift: Float[Array, "*b 2"]
    scale: Float[Array, "*b"]
    scene: Float[Array, "*b 2"]
    clutter: Float[Array, "*b 4"]
    clutter_colour: Float[Array, "*b 3"]
    occluder_kind: Int[Array, "*b"]
    occluder_at: Float[Array, "*b"]
    occluder_colour: Float[Array, "*b 3"]
    exposure: Float[Array, "*b"]
    present: Float[Array, "*b"]
    noise_key: Key[Array, "*b"]


class _Draws:
    """Hands out random values from one vector of uniform numbers.

    One call of the generator for everything about a person or a picture compiles in a tenth of the
    time that a key for each property takes.
    """

    def __init__(self, key: Array, size: int):
        # Strictly inside (0, 1), so that a normal value is finite.
        self._uniform = jax.random.uniform(key, (size,), minval=1e-6, maxval=1.0 - 1e-6)
        self._used = 0

    def uniform(self, *shape: int) -> Array:
        """Values in (0, 1)."""
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > len(self._uniform):
            raise ValueError(f"{len(self._uniform)} random numbers are too few")
        return self._uniform[start : self._used].reshape(shape)

    def between(self, low: float, high: float, *shape: int) -> Array:
        """Values in (low, high)."""
        return low + (high - low) * self.uniform(*shape)

    def normal(self, *shape: int) -> Array:
        """Standard normal values."""
        return jax.scipy.special.ndtri(self.uniform(*shape))

    def sign(self, *shape: int) -> Array:
        """Minus or plus one."""
        return 1.0 - 2.0 * (self.uniform(*shape) < 0.5).astype(jnp.float32)

    def kind(self, *weights: float) -> Array:
        """A whole number from 0 with these relative weights."""
        edges = np.cumsum(weights)[:-1] / np.sum(weights)
        return jnp.sum(self.uniform() > edges).astype(jnp.int32)

    def row(
        self, table: Sequence[Sequence[float]], weights: Sequence[float] | None = None
    ) -> Array:
        """A row of the table."""
        weights = (1.0,) * len(table) if weights is None else weights
        return jnp.array(table, jnp.float32)[self.kind(*weights)]


def _root(seed: Array | int, stream: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), stream)


def _accents(draws: _Draws, clothes: Array) -> Array:
    """Two accent colours, (2, 3), that stand out from every colour of `clothes`, (K, 3)."""
    table = jnp.array(_ACCENTS)
    gap = jnp.min(jnp.abs(table[:, None] - clothes[None]).sum(-1), axis=1)
    # Above this gap any accent is clear to the eye, and chance may decide between them.
    score = jnp.minimum(gap, 0.8) + draws.between(0.0, 0.5, len(_ACCENTS))
    first = jnp.argmax(score)
    apart = jnp.abs(table - table[first]).sum(-1)
    second = jnp.argmax(jnp.minimum(score, score + apart - 0.9))
    return table[jnp.stack([first, second])]


def _levels(draws: _Draws, member: Array, steps: Array) -> Array:
    """Which level each detail has, (8,): the group's, and two changed for every member but 0."""
    num = len(DETAILS)
    base = jnp.where(
        draws.uniform(num) < 0.3, 1 + (draws.uniform(num) * (NUM_LEVELS - 1)).astype(int), 0
    )
    order = jnp.argsort(draws.uniform(num))
    # The members' pairs of changed details are all distinct, hence so are the members.
    slots = jnp.arange(num)
    changed = (slots == order[member]) | (slots == order[(member + 1) % num])
    return jnp.where(changed & (member > 0), (base + steps) % NUM_LEVELS, base)


def _person(seed: Array | int, number: Array, lookalikes: int) -> Person:
    group, member = (number - 1) // lookalikes, (number - 1) % lookalikes
    draws = _Draws(jax.random.fold_in(_root(seed, 0), group), 96)
    own = _Draws(jax.random.fold_in(_root(seed, 1), number), len(DETAILS))
    top = draws.row(_CLOTHES, _CLOTHES_WEIGHTS) + draws.between(-0.05, 0.05, 3)
    bottom = draws.row(_CLOTHES, _TROUSERS_WEIGHTS) + draws.between(-0.05, 0.05, 3)
    top, bottom = jnp.clip(top, 0.03, 0.95), jnp.clip(bottom, 0.03, 0.95)
    second = draws.row(_CLOTHES, _CLOTHES_WEIGHTS)
    second = jnp.where(jnp.abs(second - top).sum() < 0.5, jnp.where(top < 0.5, 0.9, 0.1), second)
    accents = _accents(draws, jnp.stack([top, bottom]))
    steps = 1 + (own.uniform(len(DETAILS)) * (NUM_LEVELS - 1)).astype(jnp.int32)
    level = _levels(draws, member, steps)
    colour = accents[jnp.maximum(level, 1) - 1]  # (8, 3)
    leather = draws.row(_LEATHER)
    # Everybody wears shoes: without an accent they are leather.
    shoes = DETAILS.index("shoes")
    colour = colour.at[shoes].set(jnp.where(level[shoes] > 0, colour[shoes], leather))

    return Person(
        height=draws.between(0.90, 1.0),
        girth=draws.between(0.86, 1.28),
        shoulders=draws.between(0.92, 1.10),
        skin=draws.row(_SKIN, (4, 4, 2, 2)),
        hair=draws.row(_HAIR, _HAIR_WEIGHTS),
        hair_kind=draws.kind(0.6, 4.5, 2.0, 2.5),
        top=top,
        top_second=second,
        top_kind=draws.kind(6, 2, 2),
        top_period=draws.between(0.045, 0.085),
        top_length=draws.between(0.49, 0.56),
        long_sleeves=(draws.uniform() < 0.6).astype(jnp.float32),
        bottom=bottom,
        bottom_kind=draws.kind(6, 2, 2),
        bag=draws.row(_CLOTHES, _CLOTHES_WEIGHTS),
        bag_kind=draws.kind(4, 3, 3),
        bag_side=draws.sign(),
        hat_kind=draws.kind(1, 1, 1),
        logo_kind=draws.kind(1, 1, 1, 1),
        detail_on=(level > 0).astype(jnp.float32).at[shoes].set(1.0),
        detail_colour=colour,
    )


# One row a place: horizon, wall, its lines, its grid (x, y), ground, its lines, its grid.
_PLACES = (
    # lawn behind a paved way
    (0.30, (.32, .45, .22), (.24, .36, .16), (9, 0), (.66, .64, .60), (.50, .48, .45), (7, 6)),
    # brick wall and tarmac
    (0.62, (.55, .33, .27), (.70, .62, .56), (5, 16), (.40, .40, .42), (.36, .36, .38), (0, 3)),
    # bright hall with tiles
    (0.22, (.80, .78, .72), (.62, .60, .56), (3, 0), (.78, .76, .73), (.66, .64, .62), (5, 7)),
    # shop front with dark panes
    (0.55, (.22, .25, .30), (.62, .62, .60), (3, 2), (.56, .52, .47), (.44, .41, .38), (6, 8)),
    # sand-coloured square, seen from above
    (-0.5, (.60, .60, .60), (.60, .60, .60), (0, 0), (.72, .66, .55), (.60, .54, .45), (4, 4)),
    # road at dusk with a fence
    (0.40, (.34, .36, .44), (.20, .21, .25), (14, 0), (.31, .32, .36), (.36, .37, .40), (0, 4)),
)  # fmt: skip


def _camera(seed: Array | int, camid: Array) -> Camera:
    draws = _Draws(jax.random.fold_in(_root(seed, 2), camid), 24)
    # The places are dealt out in a seeded order, so that six cameras show six places.
    deal = jax.random.permutation(_root(seed, 3), len(_PLACES))
    place = deal[camid % len(_PLACES)]
    columns = [jnp.array(column, jnp.float32)[place] for column in zip(*_PLACES, strict=True)]
    horizon, wall, wall_line, wall_grid, ground, ground_line, ground_grid = columns
    tint = draws.between(-0.06, 0.06, 2, 3)
    return Camera(
        horizon=horizon + draws.between(-0.05, 0.05),
        wall=wall + tint[0],
        wall_line=wall_line + tint[0],
        wall_grid=wall_grid,
        ground=ground + tint[1],
        ground_line=ground_line + tint[1],
        ground_grid=ground_grid,
        mottle=draws.between(0.02, 0.06),
        pitch=draws.between(0.05, 0.35),
        light=draws.between(-1.0, 1.0),
        cast=draws.between(0.88, 1.06, 3),
        gamma=draws.between(0.85, 1.20),
        contrast=draws.between(0.82, 1.05),
        blur=draws.between(0.3, 1.0),
        resolution=draws.between(0.45, 1.0),
        noise=draws.between(0.004, 0.028),
        jpeg=draws.between(45.0, 92.0),
    )


def _picture(
    seed: Array | int, stream: Array | int, index: Array, number: Array, camid: Array, flaw: Array
) -> Picture:
    walk = _Draws(jax.random.fold_in(jax.random.fold_in(_root(seed, 4), number), camid), 3)
    key = jax.random.fold_in(jax.random.fold_in(_root(seed, 5), stream), index)
    draws = _Draws(key, 40)
    junk, nobody = flaw == 1, flaw == 2
    yaw = walk.between(-math.pi, math.pi) + 0.35 * draws.normal()
    stroll = walk.between(-2.0, 2.0, 2)
    shift = draws.normal(2) * jnp.array([0.018, 0.015])
    scale = 1.0 + 0.035 * draws.normal()
    # A junk box misses much of the person: it is far off, and far too large or too small.
    far = draws.sign(2) * draws.between(0.12, 0.34, 2) * jnp.array([0.5, 1.0])
    wrong = jnp.exp(draws.sign() * draws.between(0.2, 0.5))
    shift, scale = jnp.where(junk, far, shift), jnp.where(junk, wrong, scale)
    occluder = draws.kind(0.86, 0.05, 0.05, 0.04)
    heavy = draws.kind(0.3, 0.2, 0.25, 0.25)
    return Picture(
        yaw=yaw,
        phase=draws.between(0.0, 2 * jnp.pi),
        stride=draws.between(0.10, 0.46),
        lean=0.015 * draws.normal(),
        shift=shift,
        scale=scale,
        scene=stroll + draws.between(-0.6, 0.6, 2),
        clutter=draws.between(0.0, 1.0, 4),
        clutter_colour=draws.row(_CLOTHES),
        occluder_kind=jnp.where(junk, heavy, occluder),
        occluder_at=draws.between(0.0, 1.0),
        occluder_colour=draws.row(_CLOTHES),
        exposure=jnp.exp(0.08 * draws.normal()),
        present=1.0 - nobody.astype(jnp.float32),
        noise_key=jax.random.fold_in(key, 1),
    )


@functools.partial(jax.jit, static_argnames="lookalikes")
def draw_people(seed: Int[Array, ""] | int, numbers: Int[Array, "B"], *, lookalikes: int) -> Person:
    """Draw identities.

    Args:
        seed: the data set's seed.
        numbers: identity numbers from 1.
        lookalikes: consecutive numbers that differ in details only, 1 to 8; 1 for no look-alikes.

    Returns:
        One `Person` with a leading dimension B.
    """
    return jax.vmap(lambda n: _person(seed, n, lookalikes))(numbers)


@jax.jit
def draw_cameras(seed: Int[Array, ""] | int, camids: Int[Array, "B"]) -> Camera:
    """Draw cameras by their number; the same number is the same camera in every split."""
    return jax.vmap(lambda c: _camera(seed, c))(camids)


@jax.jit
def draw_pictures(
    seed: Int[Array, ""] | int,
    stream: Int[Array, ""] | int,
    indices: Int[Array, "B"],
    numbers: Int[Array, "B"],
    camids: Int[Array, "B"],
    flaws: Int[Array, "B"],
) -> Picture:
    """Draw what differs from picture to picture.

    The view angle and the place in the scene stay close within one walk, that is for one identity
    in one camera; everything else is drawn anew.

    Args:
        seed: the data set's seed.
        stream: the split's number, so that equal indices of two splits give different pictures.
        indices: the picture's place in its split.
        numbers: identity numbers.
        camids: camera numbers.
        flaws: 0 a good box, 1 a junk box (badly cut or hidden), 2 nobody in the box.
    """
    draw = functools.partial(_picture, seed, stream)
    return jax.vmap(draw)(indices, numbers, camids, flaws)
