"""HA-CNN: harmonious attention network (Li, Zhu, Gong, CVPR 2018, arXiv 1802.08122)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers, Reduction, to_unit_length, uniform_init
from mros_jax.models.inception import ConvUnit, Inception
from mros_jax.models.layers import widen
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.regions import cut_regions, resize_map

# Of the four regions: all as wide as the image and a quarter as high, and the centers' heights from
# -1 to 1 that the layer's bias starts from; its tanh puts them a little nearer to the middle.
_SCALE = (1.0, 0.25)
_STARTS = (-0.75, -0.25, 0.25, 0.75)


class HACNN(nn.Module):
    """A small network from scratch: soft attention for the image, hard attention for four regions.

    A global branch of three levels, whose maps a soft attention over places and channels weights.
    At each level four regions are cut out of what the level gets, at places that are predicted from
    what it makes; a local branch, the same for all regions, adds the cut to its own map.

    Attributes:
        num_classes: identities of the training set, N.
        stem: channels of the first convolution.
        widths: channels of each level, multiples of 16.
        region: height and width of the cuts at the first level; half of it at each level after.
        align_corners: how regions are sampled, see `mros_jax.models.regions.sampled_positions`:
            PyTorch's only way up to 1.2, or its default since.
        embedded: numbers of each branch's embedding.
        dtype: compute dtype of all maps; what follows, places of regions, parameters and statistics
            are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "global" and "local" (B, 1, embedded). logits: "global" and "local". maps: "x0",
            the first convolution's; of each level i "xi", its map after attention,
            "attention_xi", the attention (B, H, W, C), 0.5 to 1; "regions_xi" (B, 4, 4), top, left,
            bottom and right of each region as shares of the image. descriptor: both embeddings,
            each of unit length.
    """

    num_classes: int
    stem: int = 32
    widths: tuple[int, ...] = (128, 256, 384)
    region: tuple[int, int] = (24, 28)
    align_corners: bool = True
    embedded: int = 512
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Shaped[np.ndarray | Array, "..."],
        *,
        train: bool = False,
        keys: Key[Array, "B"] | None = None,
    ) -> Outputs:
        """Compute all outputs; see `mros_jax.models.outputs.Network`.

        Raises:
            UserError: fields that make no network; images of another rank, channel number or type.
        """
        check_images(images)
        self._check()
        common = {"dtype": self.dtype, "bn_axis_name": self.bn_axis_name}
        stem = ConvUnit(self.stem, size=3, stride=2, name="stem", **common)
        x = stem(jnp.asarray(images), train=train)
        maps = {"x0": x}
        local: Any = None  # maps of all first regions, then of all second ones, ...
        for i, width in enumerate(self.widths, start=1):
            before = x
            x = Inception(width, name=f"inception{i}_a", **common)(before, train=train)
            x = Inception(width, halve=True, name=f"inception{i}_b", **common)(x, train=train)
            shifts = RegionPlaces(name=f"hard{i}")(x)  # (B, 4, 2)
            mask = SoftAttention(name=f"soft{i}", **common)(x, train=train)
            x = x * mask

            cuts = cut_regions(
                before,
                shifts,
                scale=_SCALE,
                height=self.region[0] // 2 ** (i - 1),
                width=self.region[1] // 2 ** (i - 1),
                align_corners=self.align_corners,
            )
            cuts = jnp.swapaxes(cuts, 0, 1).reshape(-1, *cuts.shape[2:])  # (4 B, h, w, C)
            # The same block for all regions, and batch statistics for each.
            block = Inception(width, halve=True, name=f"local{i}", **common)
            local = block(cuts if local is None else cuts + local, train=train, groups=len(_STARTS))
            maps |= {f"x{i}": x, f"attention_x{i}": mask, f"regions_x{i}": _boxes(shifts)}

        regions = _average(local).reshape(len(_STARTS), images.shape[0], -1)
        joined = jnp.swapaxes(regions, 0, 1).reshape(images.shape[0], -1)
        pooled = {"global": _average(x), "local": joined}
        embeddings: dict[str, Array] = {}
        logits: dict[str, Array] = {}
        for kind, g in pooled.items():
            reduction = Reduction(
                self.embedded,
                shared=True,
                use_bias=True,
                kernel_init=uniform_init,
                bn_axis_name=self.bn_axis_name,
                dtype=g.dtype,
                name=f"embedding_{kind}",
            )
            e = reduction(g[:, None], train=train)
            head = Classifiers(
                self.num_classes, kernel_init=uniform_init, name=f"classifier_{kind}"
            )
            embeddings[kind], logits[kind] = e, head(e)
        units = [to_unit_length(e[:, 0]) for e in embeddings.values()]
        return Outputs(jnp.concatenate(units, axis=-1), embeddings, logits, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The whole image as each branch sees it."""
        return (Part("global", self.embedded), Part("local", self.embedded))

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """Nothing: it is trained from scratch."""
        return None

    def _check(self) -> None:
        if self.stem < 1 or self.embedded < 1:
            raise UserError(
                f"stem is {self.stem} and embedded {self.embedded}; both must be 1 or more"
            )
        if not self.widths or any(width < 16 or width % 16 for width in self.widths):
            raise UserError(f"widths are {self.widths}; expected multiples of 16, one a level")
        least = 2 ** (len(self.widths) - 1)
        if len(self.region) != 2 or any(size < least or size % least for size in self.region):
            raise UserError(
                f"region is {self.region}; expected height and width that can be halved from level "
                f"to level, multiples of {least}"
            )


class SoftAttention(nn.Module):
    """A weight of 0.5 to 1 for each place and channel: a map of places times one of channels.

    The last ReLU comes before the sigmoid, so that no weight is below 0.5.

    Attributes:
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W C"]:
        """Compute the weights."""

        def block(y: Array, name: str, features: int, size: int = 1, stride: int = 1) -> Array:
            make = ConvUnit(features, size, stride, self.dtype, self.bn_axis_name, name=name)
            return make(y, train=train)

        _, height, width, channels = x.shape
        place = jnp.mean(widen(x), axis=-1, keepdims=True)
        place = block(place, "place_1", 1, size=3, stride=2)
        place = block(resize_map(place, height, width), "place_2", 1)
        channel = block(_average(x)[:, None, None], "channel_1", channels // 16)
        channel = block(channel, "channel_2", channels)
        return nn.sigmoid(block(place * channel, "join", channels))


class RegionPlaces(nn.Module):
    """The places of the four regions, from the mean of a map.

    The kernel starts at 0, so that all images start with the same regions, one below the other.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 4 2"]:
        """Shift of each region's center to the right and down, -1 to 1."""

        def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.asarray([[0.0, y] for y in _STARTS], dtype).reshape(shape)

        linear = nn.Dense(
            2 * len(_STARTS),
            kernel_init=nn.initializers.zeros,
            bias_init=start,
            name="linear",
        )
        return jnp.tanh(linear(_average(x))).reshape(-1, len(_STARTS), 2)


def _average(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    return jnp.mean(widen(x), axis=(1, 2))


def _boxes(shifts: Float[Array, "B 4 2"]) -> Float[Array, "B 4 4"]:
    """Top, left, bottom and right as shares of the image."""
    center = (shifts[..., ::-1] + 1) / 2
    half = jnp.broadcast_to(jnp.asarray(_SCALE[::-1], center.dtype) / 2, center.shape)
    return jax.lax.stop_gradient(jnp.concatenate([center - half, center + half], axis=-1))
