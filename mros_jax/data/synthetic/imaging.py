"""What a synthetic camera does to a picture: optics, sensor, tone curve, noise and JPEG.

Images are (3, H, W) floats in 0..1 until `expose` returns (H, W, 3) uint8.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mros_jax.data.synthetic.pedestrians import Camera, Picture

# Accelerators round float32 to fewer bits for a product unless they are told not to.
_einsum = functools.partial(jnp.einsum, precision="highest")

# Quantisation tables of the JPEG standard (ITU-T T.81, Annex K), for luminance and colour.
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMA = np.full((8, 8), 99, np.float32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# Orthonormal DCT-II of length 8: row = frequency, column = sample.
_DCT = np.cos(np.pi * (2 * np.arange(8)[None, :] + 1) * np.arange(8)[:, None] / 16) / 2
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)

# JFIF: RGB to luminance and two colour differences, all in 0..255 around 0 for the latter.
_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_RGB = np.linalg.inv(_YCC).astype(np.float32)


def _sensor(size: int, resolution: Array, blur: Array) -> Float[Array, "n n"]:
    """One axis of optics and sensor as a matrix: Gaussian blur, fewer pixels, and back to `size`.

    Separable and linear, so two small products do all of it. Each of the m = resolution * size
    sensor pixels averages what falls on it; the picture is read back with bilinear weights.
    """
    i = jnp.arange(size, dtype=jnp.float32)
    gauss = jnp.exp(-0.5 * ((i[:, None] - i[None, :]) / blur) ** 2)
    gauss = gauss / gauss.sum(1, keepdims=True)
    # Sensor pixel j covers [j, j + 1) / m of the axis; rows beyond m stay unused.
    m = jnp.round(resolution * size)
    low, high = i[:, None] * size / m, (i[:, None] + 1) * size / m
    collect = jnp.clip(jnp.minimum(high, i[None, :] + 1) - jnp.maximum(low, i[None, :]), 0.0, 1.0)
    collect = collect / jnp.maximum(collect.sum(1, keepdims=True), 1e-6)
    at = jnp.clip((i + 0.5) * m / size - 0.5, 0.0, m - 1.0)
    spread = jnp.clip(1.0 - jnp.abs(at[:, None] - i[None, :]), 0.0, 1.0)
    return _einsum("ik,kj->ij", _einsum("ik,kj->ij", spread, collect), gauss)


def _quantise(plane: Float[Array, "H W"], table: Float[Array, "8 8"]) -> Float[Array, "H W"]:
    """Rounds the plane's 8 x 8 DCT coefficients to whole multiples of the table."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8)  # block row, y, block column, x
    coefficients = _einsum("uy,iyjx,vx->iujv", _DCT, blocks, _DCT)
    step = table[None, :, None, :]
    coefficients = jnp.round(coefficients / step) * step
    return _einsum("uy,iujv,vx->iyjx", _DCT, coefficients, _DCT).reshape(height, width)


def jpeg(image: Float[Array, "3 H W"], quality: Float[Array, ""]) -> Float[Array, "3 H W"]:
    """What baseline JPEG at a quality of 1..100 leaves of an image in 0..255.

    libjpeg's scaling of the standard's tables, colour at half resolution (4:2:0, box up and down).
    H and W are multiples of 16.
    """
    scale = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    luma_table = jnp.clip(jnp.round(_LUMA * scale), 1, 255)
    chroma_table = jnp.clip(jnp.round(_CHROMA * scale), 1, 255)
    luma, *chroma = _einsum("ij,jhw->ihw", _YCC, image)
    planes = [_quantise(luma - 128.0, luma_table) + 128.0]
    for plane in chroma:
        height, width = plane.shape
        half = plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        half = _quantise(half, chroma_table)
        planes.append(jnp.repeat(jnp.repeat(half, 2, 0), 2, 1))
    return _einsum("ij,jhw->ihw", _RGB, jnp.stack(planes))


def make_sensors(
    cameras: Camera, height: int, width: int
) -> tuple[Float[Array, "K H H"], Float[Array, "K W W"]]:
    """Optics and sensor of each camera as a matrix for each axis."""
    blur = cameras.blur * height / 128
    vertical = jax.vmap(functools.partial(_sensor, height))(cameras.resolution, blur)
    horizontal = jax.vmap(functools.partial(_sensor, width))(cameras.resolution, blur)
    return vertical, horizontal


def _grain(key: Array, height: int, width: int) -> Float[Array, "3 H W"]:
    """Noise of mean 0 and variance 1: for each colour the sum of two numbers of 5 bits.

    All colours of a pixel come from one word of 32 bits: six times quicker than Gaussian noise,
    and not to be told from it once the picture has gone through JPEG.
    """
    bits = jax.random.bits(key, (height, width))
    digits = jnp.stack([(bits >> shift) & 31 for shift in range(0, 30, 5)])  # (6, H, W)
    total = (digits[:3] + digits[3:]).astype(jnp.float32)
    # Each digit has mean 31 / 2 and variance (32^2 - 1) / 12.
    return (total - 31.0) / math.sqrt(1023 / 6)


def expose(
    image: Float[Array, "3 H W"],
    picture: Picture,
    camera: Camera,
    vertical: Float[Array, "H H"],
    horizontal: Float[Array, "W W"],
) -> UInt8[Array, "H W 3"]:
    """Takes the picture of a scene in 0..1 with a camera and its matrices from `make_sensors`."""
    _, height, width = image.shape
    image = _einsum("yh,chw,xw->cyx", vertical, image, horizontal)
    image = image * (camera.cast * picture.exposure)[:, None, None]
    image = jnp.exp(camera.gamma * jnp.log(jnp.clip(image, 1e-4, 1.0)))
    image = 0.5 + (image - 0.5) * camera.contrast
    image = image + camera.noise * _grain(picture.noise_key, height, width)
    image = jpeg(jnp.clip(image, 0.0, 1.0) * 255.0, camera.jpeg)
    return jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8).transpose(1, 2, 0)
