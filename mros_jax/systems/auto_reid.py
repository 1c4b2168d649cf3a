"""Auto-ReID: a part-aware network that was searched for (Quan et al., ICCV 2019, 1903.09776).

The cells are public. Number and widths of cells, stem and head are not, and are this project's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.cells import CELLS, EDGES, CellTrunk, parse_cell
from mros_jax.models.heads import Classifiers
from mros_jax.models.operations import OPERATIONS
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import BatchNorm
from mros_jax.models.stripes import pool_stripes


class _Network(nn.Module):
    """Stages of cells, global average pooling, a batch normalization and one classifier.

    Attributes:
        num_classes: identities of the training set, N.
        cells: of each stage.
        width: channels of the first stage's nodes; they double with every stage.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).
    """

    num_classes: int
    cells: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    def _make_trunk(self, **fields: Any) -> CellTrunk:
        if not self.cells or min(self.cells) < 1:
            raise UserError(f"cells are {self.cells}; expected 1 or more for each stage")
        if self.num_classes < 1 or self.width < 3:
            raise UserError(
                f"num_classes is {self.num_classes} and width {self.width}; they must be 1 or "
                "more, and 3 or more"
            )
        return CellTrunk(
            cells=self.cells,
            width=self.width,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
            **fields,
        )

    def _finish(self, maps: dict[str, Array], train: bool) -> Outputs:
        g = pool_stripes(maps[f"t{len(self.cells)}"], 1, overlap=False)
        neck = BatchNorm(use_bias=False, axis_name=self.bn_axis_name, dtype=g.dtype, name="neck")
        h = neck(g, train=train)
        logits = Classifiers(self.num_classes, use_bias=False, name="classifier")(h)
        return Outputs(h[:, 0], {"g": g, "h": h}, {"global": logits}, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part("global", 4 * self.width * 2 ** (len(self.cells) - 1)),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """Nothing: there are no ImageNet weights of these cells."""
        return None


class AutoReID(_Network):
    """The network of a genotype.

    Attributes:
        normal: the cell that keeps its map's size, as text (see `mros_jax.models.cells`).
        reduce: the cell that halves it, which begins each stage but the first.

    The other attributes are `num_classes` (identities of the training set, N), `cells` (of each
    stage), `width` (channels of the first stage's nodes, which double with every stage), `dtype`
    (of the trunk's computation; what follows, parameters and statistics are float32) and
    `bn_axis_name` (axis of synchronised batch statistics; None: every device its own).

    Outputs:
        embeddings: "g" and "h", (B, 1, C), pooled, before and after batch normalization. logits:
            "global". maps: "t1" to "t4". descriptor: h; 2,048 numbers by default.

    Example:
        >>> cell = "sep(0) skip(1), dil(2) dil(0), dil(3) sep(2), dil(4) dil(3)"
        >>> model = AutoReID(num_classes=751, normal=cell, reduce=cell)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 2048)
    """

    normal: str = ""
    reduce: str = ""

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
            UserError: a genotype that is none, fields that make no network; images of another rank,
                channel number or type, or too low for the part-aware operation.
        """
        check_images(images)
        genotype = {}
        for name in CELLS:
            try:
                genotype[name] = parse_cell(getattr(self, name))
            except UserError as error:
                raise UserError(f"config.network.{name}: {error}") from error
        maps = self._make_trunk(**genotype)(jnp.asarray(images), train=train)
        return self._finish(maps, train)


class AutoReIDSearch(_Network):
    """The network of all genotypes at once, whose best one is sought.

    Every edge of a cell is all operations, weighted by the softmax of `alphas`, which all cells of
    a kind share. Its fields and outputs are those of `AutoReID`.
    """

    @nn.compact
    def __call__(
        self,
        images: Shaped[np.ndarray | Array, "..."],
        *,
        train: bool = False,
        keys: Key[Array, "B"] | None = None,
    ) -> Outputs:
        """Compute all outputs; see `mros_jax.models.outputs.Network`."""
        check_images(images)
        alphas = Alphas(name="alphas")()
        weights = {name: jax.nn.softmax(alpha, axis=-1) for name, alpha in alphas.items()}
        trunk = self._make_trunk(affine=False)
        maps = trunk(jnp.asarray(images), train=train, weights=weights)
        return self._finish(maps, train)


class Alphas(nn.Module):
    """The architecture's parameters, started from N(0, 1e-3)."""

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """Those of "normal" and "reduce", (E, O): of each edge for each operation."""
        shape = (len(EDGES), len(OPERATIONS))
        init = nn.initializers.normal(1e-3)
        return {name: self.param(name, init, shape, jnp.float32) for name in CELLS}
