"""The tree of TBN+'s reconstruction: its shapes, and whose gradient a leaf's is; bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.models.outputs import Part
from mros_jax.systems.tbn_plus import TBNPlus, Tree

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_shapes_of_the_full_tree():
    tree = Tree(depth=3, width=512, block="bottleneck")
    root = jax.ShapeDtypeStruct((2, 24, 8, 2048), jnp.float32)
    init = functools.partial(tree.init_with_output, train=False)
    levels, variables = jax.eval_shape(init, jax.random.key(0), root)
    expected = [[(2, 12, 8, 2048)] * 2, [(2, 6, 8, 2048)] * 4]
    assert [[node.shape for node in nodes] for nodes in levels] == expected
    # 1x1 to 512, 3x3, 1x1 back to 2048, each with a normalization.
    block = 2048 * 512 + 9 * 512**2 + 512 * 2048 + 2 * (512 + 512 + 2048)
    sizes = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(node))
        for name, node in variables["params"].items()
    }
    assert sizes == dict.fromkeys(
        [f"node2_{i}" for i in (1, 2)] + [f"node3_{i}" for i in (1, 2, 3, 4)], block
    )


def test_a_leafs_gradient_is_of_its_piece_and_its_ancestors():
    tree = Tree(depth=3, width=4, block="basic")
    root = jax.random.normal(jax.random.key(1), (3, 8, 2, 4))
    variables = jax.jit(functools.partial(tree.init, train=False))(jax.random.key(0), root)

    @jax.jit
    def pull(variables, root, leaf):
        def value(params, root):
            (_, leaves), _ = tree.apply(
                {**variables, "params": params}, root, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.stack(leaves)[leaf] ** 2)

        return jax.grad(value, argnums=(0, 1))(variables["params"], root)

    for leaf in range(4):
        params, of_root = pull(variables, root, leaf)
        moved = {n for n, node in params.items() if any(np.any(x) for x in jax.tree.leaves(node))}
        assert moved == {f"node3_{leaf + 1}", f"node2_{leaf // 2 + 1}"}
        rows = np.flatnonzero(np.any(of_root, axis=(0, 2, 3)))
        # The parent's two 3x3 convolutions see two rows beyond a quarter, and no further half.
        assert rows.tolist() == list(range(4 * (leaf // 2), 4 * (leaf // 2) + 4))


def test_parts_are_the_pieces_down_the_tree():
    halves = (Part("level2", 256, 0, 1 / 2), Part("level2", 256, 1 / 2, 1))
    quarters = tuple(Part("level3", 256, i / 4, (i + 1) / 4) for i in range(4))
    assert TBNPlus(num_classes=2).parts(384, 128) == (Part("level1", 256), *halves, *quarters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth 0 and reduced 256 must be 1 or more"),
        ({"reduced": 0}, "reduced 0 must be 1 or more"),
        ({"trunk": "tiny_densenet"}, "needs a ResNet"),
        ({}, "give a t4 of height 6.* 4 equal stripes; use images of height 64 or 128"),
    ],
)
def test_bad_input(fields, message, unchecked):
    network = TBNPlus(**{"num_classes": 2, "trunk": "tiny", **fields})
    images = jnp.zeros((1, 96, 32, 3))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
