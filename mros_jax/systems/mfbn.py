"""MFBN: multi-granularity feature boosting network (He et al., 2019)."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.attention import SqueezeExcitation
from mros_jax.models.heads import Classifiers, Reduction, kaiming_init, near_one_init
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import ResNet, TrunkSpec, torchvision_name
from mros_jax.models.stripes import check_height, pool_stripes, stripe_edges
from mros_jax.models.trunks import find_resnet

_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.1)
_classifier_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class MFBN(nn.Module):
    """A shared trunk, and branches that get what the branches before them have found.

    The trunk ends with layer3's first block, of map X. Branch k weighs the channels of X by an
    attention of its own, and adds what the branch before got, x_k = att_k(X) + x_(k-1); its tail is
    the rest of layer3 and layer4 with stride 1. Its boosted map is its tail's plus those of all
    branches before: q_1 = b_1, q_2 = b_2 + q_1, q_3 = b_3 + q_2 + q_1. (The public repository's
    figure multiplies the attended maps and has 6 vectors; this is its code.)

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a ResNet in `mros_jax.models.trunks.TRUNKS`.
        stripes: of each branch's boosted map, beside the whole of it; 1: the whole map only.
        ratio: of the attention, see `SqueezeExcitation`.
        reduced: numbers that each pooled vector is reduced to, by a layer of its own.
        dtype: compute dtype of trunk, attention and tails; what follows, parameters and statistics
            are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "z" and "f", (B, S, C) and (B, S, reduced), before and after reduction: whole
            maps in the order of the branches, then their stripes, top first; 8 vectors by default.
        logits: "global", one classifier of the descriptor.
        maps: "t1", "t2", "shared" (X), and of each branch k "xk" and "qk".
        descriptor: all f; 8 x 256 numbers by default, of any length.

    Example:
        >>> model = MFBN(num_classes=751)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 2048)
    """

    num_classes: int
    trunk: str = "resnet50"
    stripes: tuple[int, ...] = (1, 2, 3)
    ratio: int = 8
    reduced: int = 256
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
            UserError: fields that make no network; images of another rank, channel number or type,
                or of a height that does not give equal stripes (names heights that do).
        """
        spec = find_resnet(self.trunk)
        check_images(images)
        self._check(spec, images.shape[1])
        names = spec.blocks()
        cut = names.index("layer3_0") + 1
        trunk = self._make_piece(spec, name="trunk", blocks=names[:cut])
        shared = trunk(jnp.asarray(images), train=train)
        maps = {"t1": shared["t1"], "t2": shared["t2"], "shared": shared["t3"]}

        x: Any = 0
        boosted: list[Array] = []
        for k, _ in enumerate(self.stripes, start=1):
            x = SqueezeExcitation(self.ratio, name=f"attention_{k}")(shared["t3"]) + x
            tail = self._make_piece(spec, name=f"tail_{k}", blocks=names[cut:], stem=False)
            boosted.append(tail(x, train=train)["t4"] + sum(boosted))
            maps |= {f"x{k}": x, f"q{k}": boosted[-1]}

        pooled = [pool_stripes(q, 1, overlap=False) for q in boosted]
        pooled += [
            pool_stripes(q, count, overlap=False)
            for q, count in zip(boosted, self.stripes, strict=True)
            if count > 1
        ]
        z = jnp.concatenate(pooled, axis=1)  # (B, S, C)
        f = Reduction(
            self.reduced,
            shared=False,
            kernel_init=kaiming_init,
            scale_init=near_one_init,
            activation=_leaky_relu,
            bn_axis_name=self.bn_axis_name,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
            name="reduction",
        )(z, train=train)
        descriptor = f.reshape(images.shape[0], -1)
        head = Classifiers(self.num_classes, kernel_init=_classifier_init, name="classifier")
        logits = {"global": head(descriptor[:, None])}
        return Outputs(descriptor, {"z": z, "f": f}, logits, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The whole image as each branch sees it, then the stripes of each branch."""
        whole = tuple(Part("global", self.reduced) for _ in self.stripes)
        return whole + tuple(
            Part(f"part{count}", self.reduced, top, bottom)
            for count in self.stripes
            if count > 1
            for top, bottom in stripe_edges(count, overlap=False)
        )

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """Trunk and tails start from ImageNet weights, all tails from the same."""
        if path[0] == "trunk" or path[0].startswith("tail_"):
            return torchvision_name(path[1:])
        return None

    def _make_piece(self, spec: TrunkSpec, **fields: Any) -> ResNet:
        return spec.make(dtype=self.dtype, bn_axis_name=self.bn_axis_name, **fields)

    def _check(self, spec: TrunkSpec, height: int) -> None:
        if self.num_classes < 1 or self.reduced < 1:
            raise UserError(
                f"num_classes {self.num_classes} and reduced {self.reduced} must be 1 or more"
            )
        if not self.stripes:
            raise UserError("stripes are (); expected a number for each branch")
        for k, count in enumerate(self.stripes, start=1):
            check_height(height, spec.stride("t4"), count, f"q{k}")
