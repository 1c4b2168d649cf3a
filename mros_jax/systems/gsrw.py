"""GSRW: "Deep Group-Shuffling Random Walk for Person Re-Identification" (Shen et al., 2018)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers, dropout
from mros_jax.models.outputs import Outputs, Pairs, Part, check_images
from mros_jax.models.resnet import BatchNorm, torchvision_name
from mros_jax.models.stripes import pool_stripes
from mros_jax.models.trunks import find_trunk
from mros_jax.models.walk import make_transitions, walk

_EPSILON = 1e-5  # of the heads' batch normalization


class PairHeads(nn.Module):
    """Heads that each say of two images whether they are of one identity.

    A head sees the squared difference of two vectors, through batch normalization over all pairs,
    dropout and a linear layer of two classes: another identity, the same. Every head compares by
    every group of features.

    Attributes:
        heads: K, with parameters and running statistics each of its own.
        dropout: rate; every pair, group and head has a mask of its own.
    """

    heads: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        probes: Float[Array, "P I C"],
        gallery: Float[Array, "G I C"],
        probe_keys: Key[Array, "P"] | None,
        gallery_keys: Key[Array, "G"] | None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "S P G 2"], Float[Array, "S G G 2"]]:
        """Logits of probes, and of gallery images, with gallery images: S = I K."""
        norm = BatchNorm(feature_axes=2, epsilon=_EPSILON, dtype=gallery.dtype, name="bn")
        classify = Classifiers(2, name="classifier")

        def compare(x: Float[Array, "R C"], y: Float[Array, "G C"]) -> Float[Array, "R G K C"]:
            z = jnp.square(x[:, None] - y)[:, :, None]
            z = jnp.broadcast_to(z, (*z.shape[:2], self.heads, z.shape[3]))
            normalized: Float[Array, "R G K C"] = norm(z, train=train)
            return normalized

        # Running statistics move with each comparison, in this order.
        compared = [
            (compare(probes[:, i], gallery[:, i]), compare(gallery[:, i], gallery[:, i]))
            for i in range(gallery.shape[1])
        ]
        logits = []
        for kind, keys in enumerate((probe_keys, gallery_keys)):
            z = jnp.stack([pair[kind] for pair in compared], axis=2)  # (R, G, I, K, C)
            z = dropout(z, self.dropout, keys, train=train, salt=kind)
            y = classify(z.reshape(-1, *z.shape[3:])).reshape(*z.shape[:2], -1, 2)
            logits.append(jnp.moveaxis(y, 2, 0))
        return logits[0], logits[1]


class GSRW(nn.Module):
    """ResNet, and heads whose scores of pairs are refined by a walk over the gallery.

    A training batch is probes, each followed by `gallery` images. The pooled feature is split into
    K groups of neighbouring channels; each of K heads compares probes with gallery images (P2G) and
    these with each other (G2G), by each of the groups: K^2 sets of scores (group shuffling), each
    with a walk of its own, whose steps are W = softmax of the G2G logits of "the same identity".
    The refined scores of an image are those of its neighbours, too: M p with
    M = (1 - a) (I - a W)^-1. W carries no gradient.

    The paper compares pooled features; the public code compares probes with gallery images by
    Kronecker product matching of their maps, which is not here: see docs/evaluation.md.

    Attributes:
        num_classes: identities of the training set; no layer depends on it.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        last_stride: stride of the trunk's last stage, 1 or 2.
        groups: K.
        dropout: rate, in the heads.
        alpha: a, the share of the neighbours' scores in a step; 0: no walk.
        gallery: gallery images that follow each probe in a training batch.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics of the trunk (None: every device its
            own). The heads always see the pairs of the whole batch.
        axis_name: axis of the devices that share a training batch; None: there is one.

    Outputs:
        embeddings: "g" (B, 1, C), the pooled feature. logits: none. maps: "t1" to "t4".
        descriptor: g, of any length. pairs, in training only: "p2g" and "g2g", refined,
            (K^2, P, G, 2) and (K^2, G, G, 2) of P probes and G gallery images; head j on group i is
            i K + j.

    Example:
        >>> model = GSRW(num_classes=751)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 2048)
    """

    num_classes: int
    trunk: str = "resnet50"
    last_stride: int = 2
    groups: int = 4
    dropout: float = 0.8
    alpha: float = 0.95
    gallery: int = 3
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None
    axis_name: str | None = None

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
            UserError: fields that make no network; images of another rank, channel number or type;
                a training batch that is not of probes with their gallery images.
        """
        check_images(images)
        spec = find_trunk(self.trunk)
        self._check(spec.channels("t4"))
        trunk = spec.make(
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        g = pool_stripes(maps["t4"], 1, overlap=False)  # (B, 1, C)
        compared = train or self.is_initializing()
        pairs = self._compare(g[:, 0], keys, train=train) if compared else {}
        return Outputs(g[:, 0], {"g": g}, {}, maps, pairs=pairs)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part("global", find_trunk(self.trunk).channels("t4")),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

    def fold_heads(self, variables: Any) -> dict[str, np.ndarray]:
        """What the heads compute at test time: a linear layer of squared differences each.

        Args:
            variables: of this network.

        Returns:
            `pair_kernel` (K, C / K, 2) and `pair_bias` (K, 2), float32, as
            `mros_jax.retrieval.descriptors` describes them.
        """
        heads, statistics = (variables[kind]["pairs"] for kind in ("params", "batch_stats"))
        norm, linear, running = jax.tree.map(
            lambda x: np.asarray(x, np.float64),
            (heads["bn"], heads["classifier"], statistics["bn"]),
        )
        scale = norm["scale"] / np.sqrt(running["var"] + _EPSILON)  # (K, C / K)
        shift = norm["bias"] - running["mean"] * scale
        folded = {
            "pair_kernel": linear["kernel"] * scale[..., None],
            "pair_bias": linear["bias"] + np.einsum("kc,kcn->kn", shift, linear["kernel"]),
        }
        return {name: x.astype(np.float32) for name, x in folded.items()}

    def _compare(
        self, g: Float[Array, "B C"], keys: Key[Array, "B"] | None, *, train: bool
    ) -> dict[str, Pairs]:
        """Refined scores of the pairs of a batch; before training, of each image with each."""
        rows = columns = np.arange(len(g))
        if train:
            if self.axis_name is not None:
                g, keys = lax.all_gather((g, keys), self.axis_name, tiled=True)
            rows, columns = _find_probes(len(g), self.gallery)
        parts = g.reshape(len(g), self.groups, -1)
        probe_keys, gallery_keys = (None if keys is None else keys[x] for x in (rows, columns))
        heads = PairHeads(self.groups, self.dropout, name="pairs")
        scores = heads(parts[rows], parts[columns], probe_keys, gallery_keys, train=train)
        refined = refine(*scores, self.alpha)
        return {
            "p2g": Pairs(refined[0], jnp.asarray(rows), jnp.asarray(columns)),
            "g2g": Pairs(refined[1], jnp.asarray(columns), jnp.asarray(columns)),
        }

    def _check(self, channels: int) -> None:
        if self.groups < 1 or channels % self.groups:
            possible = [k for k in range(1, 17) if channels % k == 0]
            raise UserError(
                f"groups is {self.groups}; the {channels} channels of {self.trunk} make equal "
                f"groups of {', '.join(map(str, possible))}"
            )
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}; it must be from 0 to below 1")
        if self.gallery < 1:
            raise UserError(f"gallery is {self.gallery}; a probe needs 1 or more gallery images")


def refine(
    p2g: Float[Array, "S P G 2"], g2g: Float[Array, "S G G 2"], alpha: float
) -> tuple[Float[Array, "S P G 2"], Float[Array, "S G G 2"]]:
    """Scores of all pairs after the walk over the gallery images, both classes alike.

    Args:
        p2g: logits of probes with gallery images.
        g2g: logits of gallery images with each other, from which the walk's steps are made.
        alpha: of the walk.
    """
    scores = jnp.concatenate([p2g, g2g], axis=1)  # (S, P + G, G, 2)
    values = jnp.moveaxis(scores, 2, 1).reshape(*g2g.shape[:2], -1)  # (S, G, 2 (P + G))
    refined = walk(values, make_transitions(g2g[..., 1]), alpha)
    refined = jnp.moveaxis(refined.reshape(*g2g.shape[:2], -1, 2), 1, 2)
    return refined[:, : p2g.shape[1]], refined[:, p2g.shape[1] :]


def _find_probes(num: int, gallery: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the probes and of the gallery images in a batch."""
    if num % (1 + gallery) or num == 0:
        raise UserError(
            f"a batch of {num} images is not of probes with {gallery} gallery images each; its "
            f"size must be a multiple of {1 + gallery}"
        )
    places = np.arange(num)
    is_probe = places % (1 + gallery) == 0
    return places[is_probe], places[~is_probe]
