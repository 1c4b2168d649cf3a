"""A reconstruction of TBN+, the tree branch network (Li et al., 2019, arXiv 1904.00355).

Of the paper its abstract alone was at hand: the maps of a backbone are cut again and again into
pieces, with a bottleneck after each cut, and all levels of the tree are the descriptor. Depth,
place, widths and heads of the tree are this project's.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers, Reduction
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import Block, ResidualBlock, torchvision_name
from mros_jax.models.stripes import check_height, pool_stripes, stripe_edges
from mros_jax.models.trunks import find_resnet


class TBNPlus(nn.Module):
    """A ResNet whose last map is the root of a tree of ever smaller pieces of the image.

    Each node is pooled, reduced and classified by layers of its own. A reconstruction, see the
    head of this file: what it scores is not what TBN+ scores.

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a ResNet in `mros_jax.models.trunks.TRUNKS`.
        depth: levels of the tree; 1 is the root alone, 3 have 1 + 2 + 4 nodes.
        reduced: numbers that each node's pooled map is reduced to.
        dtype: compute dtype of trunk and tree; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "g" and "f", (B, S, C) and (B, S, reduced), before and after reduction: the
            nodes from the root down, those of a level from the top of the image.
        logits: "nodes", a classifier for each node.
        maps: "t1" to "t3"; of each level i "leveli", its nodes' maps one below the other, as high
            as the root.
        descriptor: all f; 7 x 256 numbers by default, of any length.

    Example:
        >>> model = TBNPlus(num_classes=751)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 1792)
    """

    num_classes: int
    trunk: str = "resnet50"
    depth: int = 3
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
                or of a height that cannot be halved so often (names heights that can).
        """
        spec = find_resnet(self.trunk)
        check_images(images)
        if min(self.num_classes, self.depth, self.reduced) < 1:
            raise UserError(
                f"num_classes {self.num_classes}, depth {self.depth} and reduced {self.reduced} "
                "must be 1 or more"
            )
        check_height(images.shape[1], spec.stride("t4"), 2 ** (self.depth - 1), "t4")
        common = {"dtype": self.dtype, "bn_axis_name": self.bn_axis_name}
        maps = spec.make(name="trunk", **common)(jnp.asarray(images), train=train)
        root = maps.pop("t4")
        tree = Tree(self.depth, 8 * spec.width, spec.block, name="tree", **common)
        levels = [(root,), *tree(root, train=train)]
        for i, nodes in enumerate(levels, start=1):
            maps[f"level{i}"] = jnp.concatenate(nodes, axis=1)

        pooled = [pool_stripes(node, 1, overlap=False) for nodes in levels for node in nodes]
        g = jnp.concatenate(pooled, axis=1)  # (B, S, C)
        f = Reduction(
            self.reduced,
            shared=False,
            bn_axis_name=self.bn_axis_name,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
            name="reduction",
        )(g, train=train)
        logits = {"nodes": Classifiers(self.num_classes, name="classifier")(f)}
        return Outputs(f.reshape(images.shape[0], -1), {"g": g, "f": f}, logits, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The pieces of the image, from the whole of it down the tree."""
        return tuple(
            Part(f"level{i}", self.reduced, top, bottom)
            for i in range(1, self.depth + 1)
            for top, bottom in stripe_edges(2 ** (i - 1), overlap=False)
        )

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk, the root with it, starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None


class Tree(nn.Module):
    """Below a root: each node is a half of its parent's map after a residual block of its own.

    Attributes:
        depth: levels, the root's with them.
        width: of the blocks, see `ResidualBlock`.
        block: their kind.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    depth: int
    width: int
    block: Block
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, root: Float[Array, "B H W C"], *, train: bool
    ) -> list[tuple[Float[Array, "B _ W C"], ...]]:
        """Compute the nodes of each level below the root, from the top of the image.

        Args:
            root: its height is a multiple of 2^(depth - 1).
            train: batch statistics (True) or running statistics (False).
        """
        levels: list[tuple[Array, ...]] = []
        nodes: tuple[Array, ...] = (root,)
        for level in range(2, self.depth + 1):
            halves = [half for node in nodes for half in jnp.split(node, 2, axis=1)]
            blocks = [
                ResidualBlock(
                    self.width,
                    self.block,
                    stride=1,
                    dtype=self.dtype,
                    bn_axis_name=self.bn_axis_name,
                    name=f"node{level}_{i}",
                )
                for i, _ in enumerate(halves, start=1)
            ]
            nodes = tuple(b(half, train=train) for b, half in zip(blocks, halves, strict=True))
            levels.append(nodes)
        return levels
