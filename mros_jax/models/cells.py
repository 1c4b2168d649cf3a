"""Cells of a searched network: the graph that joins operations, and genotypes as text.

A genotype is two cells, one that keeps its map's size ("normal") and one that halves it ("reduce").
The text of a cell are its nodes with commas between them, each the sum of two operations of
`mros_jax.models.operations` on maps before it: 0 and 1 are what the cell gets, nodes count from 2.

    sep(0) skip(1), dil(2) dil(0), dil(3) sep(2), dil(4) dil(3)

The cell is DARTS's (Liu et al., ICLR 2019): its maps 0 and 1 are the results of the two cells
before, and its result are its nodes, one behind the other.
"""

import os
import pathlib
import re
import tomllib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mros_jax.errors import NotFoundError, UserError
from mros_jax.files import write_atomically
from mros_jax.models.operations import OPERATIONS, FactorizedReduce, Operation
from mros_jax.models.resnet import BatchNorm, Conv

CELLS = ("normal", "reduce")
INPUTS = 2  # maps that a cell gets
NODES = 4
# Of the mixed cell: (node, map before it), in the order of the rows of its weights.
EDGES = tuple((node, j) for node in range(INPUTS, INPUTS + NODES) for j in range(node))

Edge = tuple[str, int]  # an operation, and the map that it is applied to
Nodes = tuple[tuple[Edge, ...], ...]  # of each node, the edges that it sums

_EDGE = re.compile(r"([a-z]+)\(([0-9]+)\)")


def parse_cell(text: str) -> Nodes:
    """Read a cell's text, see above.

    Raises:
        UserError: an unknown operation, an edge from a node that is not there yet, a node without
            two edges, another number of nodes, or no such text at all; names it.
    """
    example = "as in 'sep(0) skip(1), dil(2) dil(0), dil(3) sep(2), dil(4) dil(3)'"
    nodes = []
    for node, part in enumerate(text.split(","), start=INPUTS):
        edges = []
        for word in part.split():
            match = _EDGE.fullmatch(word)
            if match is None:
                raise UserError(
                    f"{word!r} is no edge of a cell; expected OPERATION(MAP), {example}"
                )
            kind, source = match[1], int(match[2])
            if kind not in OPERATIONS:
                raise UserError(
                    f"{word}: there is no operation {kind!r}; expected one of "
                    f"{', '.join(OPERATIONS)}"
                )
            if source >= node:
                raise UserError(
                    f"{word}: node {node} cannot be made from map {source}, which is not there "
                    f"yet; expected 0 to {node - 1}"
                )
            edges.append((kind, source))
        if len(edges) != 2:
            raise UserError(
                f"node {node} of a cell is {part.strip()!r}; expected two edges, {example}"
            )
        nodes.append(tuple(edges))
    if len(nodes) != NODES:
        raise UserError(
            f"the cell {text!r} has {len(nodes)} nodes; expected {NODES} with commas between "
            f"them, {example}"
        )
    return tuple(nodes)


def format_cell(nodes: Nodes) -> str:
    """The text that `parse_cell` reads."""
    return ", ".join(" ".join(f"{kind}({source})" for kind, source in node) for node in nodes)


def read_genotype(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a genotype's file: TOML with the texts of its cells, `normal` and `reduce`.

    Raises:
        NotFoundError: there is no such file.
        UserError: it is no such file, or one of its cells is none.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise NotFoundError(
            f"there is no genotype {path}; scripts/search_auto_reid.py writes one, and a config "
            "without a file has the published ones"
        )
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no TOML file: {error}; search again, or write it anew"
        ) from error
    if set(content) != set(CELLS) or not all(isinstance(x, str) for x in content.values()):
        raise UserError(
            f"{path} has {', '.join(content) or 'nothing'}; expected the texts of "
            f"{' and '.join(CELLS)}"
        )
    for name in CELLS:
        try:
            parse_cell(content[name])
        except UserError as error:
            raise UserError(f"{path}, {name}: {error}") from error
    return {name: content[name] for name in CELLS}


def write_genotype(path: str | os.PathLike[str], genotype: dict[str, Nodes], about: str) -> None:
    """Write a genotype's file, atomically.

    Args:
        path: the file.
        genotype: "normal" and "reduce".
        about: lines of comment for its head.
    """
    with write_atomically(path) as file:
        file.writelines(f"# {line}\n" for line in about.splitlines())
        file.writelines(f'{name} = "{format_cell(genotype[name])}"\n' for name in CELLS)


def choose_edges(weights: Float[np.ndarray, "E O"]) -> Nodes:
    """The cell that a mixed cell has become (Liu et al., 2019, Section 2.4).

    Each edge is as strong as its strongest operation, "none" left out; each node keeps its two
    strongest edges, the strongest first.

    Args:
        weights: of each edge of `EDGES` for each of `OPERATIONS`.
    """
    kinds = [kind for kind in OPERATIONS if kind != "none"]
    columns = [list(OPERATIONS).index(kind) for kind in kinds]
    weights = np.asarray(weights)[:, columns]
    nodes = []
    for node in range(INPUTS, INPUTS + NODES):
        rows = [row for row, (end, _) in enumerate(EDGES) if end == node]
        strongest = sorted(rows, key=lambda row: -weights[row].max())[:2]
        nodes.append(tuple((kinds[weights[row].argmax()], EDGES[row][1]) for row in strongest))
    return tuple(nodes)


def draw_cell(rng: np.random.Generator) -> Nodes:
    """A random cell: each node's two maps and operations, all alike likely, without "none"."""
    kinds = [kind for kind in OPERATIONS if kind != "none"]
    return tuple(
        tuple((str(rng.choice(kinds)), int(j)) for j in rng.choice(node, 2, replace=False))
        for node in range(INPUTS, INPUTS + NODES)
    )


class _Cell(nn.Module):
    """What cells share.

    Attributes:
        features: channels C of each node; what comes out has 4 C.
        reduce: halve the map: operations on what the cell gets have stride 2.
        reduced: the cell before has halved its map, so that the earlier of the two is larger.
        affine: learn scale and bias of batch normalizations, see `Operation`.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    features: int
    reduce: bool = False
    reduced: bool = False
    affine: bool = True
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    def _common(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("affine", "dtype", "bn_axis_name")}

    def _squeeze(self, before: Array, last: Array, train: bool) -> list[Array]:
        """Maps 0 and 1: the two that the cell gets, with C channels and of one size."""
        first: Operation
        if self.reduced:
            first = FactorizedReduce(self.features, 2, name="squeeze0", **self._common())
        else:
            first = Squeeze(self.features, name="squeeze0", **self._common())
        second = Squeeze(self.features, name="squeeze1", **self._common())
        return [first(before, train=train), second(last, train=train)]

    def _stride(self, source: int) -> int:
        return 2 if self.reduce and source < INPUTS else 1


class Squeeze(Operation):
    """ReLU, 1x1 convolution, batch normalization."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"], *, train: bool) -> Float[Array, "B H W C"]:
        """Apply it."""
        return self._norm("bn")(self._conv(self.features, "conv")(nn.relu(x)), train=train)


class Cell(_Cell):
    """A cell of a genotype; `nodes` are of `parse_cell`."""

    nodes: Nodes = ()

    @nn.compact
    def __call__(
        self, before: Float[Array, "B _ _ _"], last: Float[Array, "B _ _ _"], *, train: bool
    ) -> Float[Array, "B _ _ _"]:
        """Compute the cell from the results of the cell before the last, and of the last."""
        maps = self._squeeze(before, last, train)
        for node, edges in enumerate(self.nodes, start=INPUTS):
            parts = []
            for place, (kind, source) in enumerate(edges):
                operation = OPERATIONS[kind](
                    features=self.features,
                    stride=self._stride(source),
                    name=f"node{node}_{place}",
                    **self._common(),
                )
                parts.append(operation(maps[source], train=train))
            maps.append(sum(parts[1:], start=parts[0]))
        return jnp.concatenate(maps[INPUTS:], axis=-1)


class MixedCell(_Cell):
    """A cell in which every edge is all operations at once, weighted; its architecture is sought.

    Edges from one map are computed side by side, each with parameters of its own: the program is a
    third as long.
    """

    @nn.compact
    def __call__(
        self,
        before: Float[Array, "B _ _ _"],
        last: Float[Array, "B _ _ _"],
        weights: Float[Array, "E O"],
        *,
        train: bool,
    ) -> Float[Array, "B _ _ _"]:
        """Compute the cell.

        Args:
            before: the result of the cell before the last.
            last: of the last cell.
            weights: of each edge of `EDGES` for each of `OPERATIONS`.
            train: batch statistics (True) or running statistics (False).
        """
        maps = self._squeeze(before, last, train)
        side_by_side = nn.vmap(
            MixedOperation,
            in_axes=(None, 0, None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        sums: dict[int, Any] = dict.fromkeys(range(INPUTS, INPUTS + NODES), 0)
        for source in range(INPUTS + NODES - 1):
            rows = [row for row, (_, j) in enumerate(EDGES) if j == source]
            operation = side_by_side(
                self.features, self._stride(source), name=f"from{source}", **self._common()
            )
            found = operation(maps[source], weights[np.array(rows)], train)
            for place, row in enumerate(rows):
                sums[EDGES[row][0]] += found[place]
            if source + 1 >= INPUTS:  # the node after it is whole
                maps.append(sums[source + 1])
        return jnp.concatenate(maps[INPUTS:], axis=-1)


class MixedOperation(Operation):
    """The weighted sum of all operations."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], weights: Float[Array, "O"], train: bool
    ) -> Float[Array, "B H2 W2 C"]:
        """Apply them; the weights are in the order of `OPERATIONS`."""
        total: Array = jnp.zeros((), self.dtype)
        for place, (kind, make) in enumerate(OPERATIONS.items()):
            operation = make(
                self.features,
                self.stride,
                self.affine,
                self.dtype,
                self.bn_axis_name,
                name=kind,
            )
            total = total + weights[place].astype(self.dtype) * operation(x, train=train)
        return total


class CellTrunk(nn.Module):
    """A stem, and stages of cells; all but the first stage begin with a cell that halves the map.

    The macro structure is this project's (Auto-ReID's is not public): ResNet's stem and stages with
    cells for blocks.

    Attributes:
        normal: the cell that keeps its map's size; not looked at where `weights` are given.
        reduce: the cell that halves it; the same.
        cells: how many each stage has.
        width: channels of the stem, and of the first stage's nodes; they double with every stage.
        affine: learn scale and bias of the cells' batch normalizations, see `Operation`.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    normal: Nodes = ()
    reduce: Nodes = ()
    cells: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    affine: bool = True
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        *,
        train: bool,
        weights: dict[str, Float[Array, "E O"]] | None = None,
    ) -> dict[str, Float[Array, "B _ _ _"]]:
        """The map of each stage, "t1" (B, H/4, W/4, 4 width), "t2" (B, H/8, W/8, 8 width), ...

        Args:
            images: normalized.
            train: batch statistics (True) or running statistics (False).
            weights: "normal" and "reduce": each cell is a `MixedCell`. None: a `Cell`.
        """
        x = Conv(self.width, 7, 2, self.dtype, name="stem_conv")(images)
        bn = BatchNorm(pool=True, axis_name=self.bn_axis_name, dtype=self.dtype, name="stem_bn")
        x = nn.relu(bn(x, train=train))  # after the pooling, where it gives the same
        before, reduced = x, False
        maps: dict[str, Array] = {}
        for stage, count in enumerate(self.cells, start=1):
            for i in range(count):
                reduce = stage > 1 and i == 0
                kind = "reduce" if reduce else "normal"
                fields: dict[str, Any] = {
                    "features": self.width * 2 ** (stage - 1),
                    "reduce": reduce,
                    "reduced": reduced,
                    "affine": self.affine,
                    "dtype": self.dtype,
                    "bn_axis_name": self.bn_axis_name,
                    "name": f"stage{stage}_cell{i}",
                }
                if weights is None:
                    cell = Cell(nodes=getattr(self, kind), **fields)
                    result = cell(before, x, train=train)
                else:
                    result = MixedCell(**fields)(before, x, weights[kind], train=train)
                before, x, reduced = x, result, reduce
            maps[f"t{stage}"] = x
        return maps
