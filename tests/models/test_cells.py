"""Cells against graphs written by hand, genotypes as text, and what a search makes of weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import auto_reid
from mros_jax.config import make_network, parse_config
from mros_jax.errors import NotFoundError, UserError
from mros_jax.models.cells import (
    EDGES,
    Cell,
    MixedCell,
    Squeeze,
    choose_edges,
    draw_cell,
    format_cell,
    parse_cell,
    read_genotype,
    write_genotype,
)
from mros_jax.models.operations import OPERATIONS, FactorizedReduce, PartAttention, PartAware
from tests.recorded import draw

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMAL, REDUCE = (auto_reid.GENOTYPES[""][name] for name in ("normal", "reduce"))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 7, 4, 6), np.float32))


def fill(module, *inputs):
    """Variables of a module, drawn by their names."""
    init = functools.partial(module.init, train=False)
    flat = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), *inputs), sep="/")
    drawn = {name: draw(name, x.shape).astype(np.float32) for name, x in flat.items()}
    return traverse_util.unflatten_dict(drawn, sep="/")


@pytest.mark.parametrize(
    ("channels", "count"), [(64, 12_120), (128, 47_636), (256, 190_488), (512, 758_548)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_numbers_to_learn_of_the_part_aware_operation(channels, count, stride):
    init = functools.partial(PartAware(channels, stride).init, train=False)
    image = jax.ShapeDtypeStruct((1, 12, 4, channels), jnp.float32)
    shapes = jax.eval_shape(init, jax.random.key(0), image)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_numbers_to_learn_of_the_trunk():
    """The contract test counts what these add up to with neck and classifier."""
    trunks = {"": 9_878_400, "reid_space": 9_441_728, "darts_baseline": 10_310_080}
    head = 2048 + 751 * 2048
    assert {name: count + head for name, count in trunks.items()} == auto_reid.NUM_PARAMETERS


def test_part_attention():
    module = PartAttention()
    variables = fill(module, X)
    mixed, attention = jax.jit(functools.partial(module.apply, train=False))(variables, X)
    np.testing.assert_allclose(attention.sum(axis=2), 1, rtol=1e-6)

    local, stats = variables["params"]["local"], variables["batch_stats"]["local"]["bn"]
    parts = [np.asarray(X)[:, a:b].mean((1, 2)) for a, b in ((0, 1), (1, 3), (3, 5), (5, 7))]
    y = np.einsum("mbc,mch->bmh", np.maximum(parts, 0), local["kernel"]) + local["bias"]
    f = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    f = f * local["bn"]["scale"] + local["bn"]["bias"]
    k, q = (
        np.einsum("bmh,hg->bmg", f, variables["params"][name]["kernel"])
        + variables["params"][name]["bias"]
        for name in ("key", "query")
    )
    weights = np.exp(np.einsum("big,bjg->bij", k, q))
    weights /= np.einsum("bij->bi", weights)[..., None]
    np.testing.assert_allclose(attention, weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mixed, np.einsum("bij,bjh->bih", weights, f), rtol=1e-4, atol=1e-5)


def test_cell_is_its_graph():
    """The published reduction cell, edge by edge."""
    before = jnp.asarray(RNG.standard_normal((2, 14, 8, 5), np.float32))
    cell = Cell(features=6, reduce=True, reduced=True, nodes=parse_cell(REDUCE))
    variables = fill(cell, before, X)

    @jax.jit
    def both(variables):
        def apply(name, module, x):
            own = {key: value[name] for key, value in variables.items() if name in value}
            return module.apply(own, x, train=False)

        def operation(name, kind, x, stride=1):
            return apply(name, OPERATIONS[kind](6, stride), x)

        s0 = apply("squeeze0", FactorizedReduce(6, 2), before)
        s1 = apply("squeeze1", Squeeze(6), X)
        n2 = operation("node2_0", "max", s0, 2) + operation("node2_1", "part", s1, 2)
        n3 = operation("node3_0", "sep", s0, 2) + operation("node3_1", "dil", n2)
        n4 = operation("node4_0", "dil", n2) + operation("node4_1", "max", s0, 2)
        n5 = operation("node5_0", "dil", n4) + operation("node5_1", "dil", n3)
        return cell.apply(variables, before, X, train=False), jnp.concatenate([n2, n3, n4, n5], -1)

    result, expected = both(variables)
    assert result.shape == (2, 4, 2, 24)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_mixed_cell_with_one_operation_an_edge_is_that_cell():
    nodes = parse_cell("sep(0) part(1), avg(2) dil(0), skip(1) max(2), dil(4) skip(3)")
    mixed = MixedCell(features=6, reduce=True, affine=False)
    weights = np.zeros((len(EDGES), len(OPERATIONS)), np.float32)
    kinds = list(OPERATIONS)
    weights[:, kinds.index("none")] = 1
    x = jnp.asarray(RNG.standard_normal((2, 8, 4, 6), np.float32))
    variables = fill(mixed, x, x, weights)
    own = {
        kind: {k: v for k, v in tree.items() if "squeeze" in k} for kind, tree in variables.items()
    }
    for node, edges in enumerate(nodes, start=2):
        for place, (kind, source) in enumerate(edges):
            row = EDGES.index((node, source))
            weights[row] = np.eye(len(kinds))[kinds.index(kind)]
            at = [j for j, (_, start) in enumerate(EDGES) if start == source].index(row)
            for name, tree in variables.items():
                if kind in tree[f"from{source}"]:
                    of_edge = jax.tree.map(lambda v, at=at: v[at], tree[f"from{source}"][kind])
                    own[name][f"node{node}_{place}"] = of_edge
    cell = Cell(features=6, reduce=True, affine=False, nodes=nodes)
    result = jax.jit(functools.partial(mixed.apply, train=False))(variables, x, x, weights)
    expected = jax.jit(functools.partial(cell.apply, train=False))(own, x, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_chosen_edges():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 0.1, (len(EDGES), len(OPERATIONS)))
    kinds = list(OPERATIONS)
    weights[:, kinds.index("none")] = 0.9  # never chosen, however strong
    nodes = parse_cell("skip(1) sep(0), part(0) max(2), avg(3) dil(2), dil(4) dil(1)")
    for node, edges in enumerate(nodes, start=2):
        for strength, (kind, source) in zip((0.5, 0.4), edges, strict=True):
            weights[EDGES.index((node, source)), kinds.index(kind)] = strength
    assert choose_edges(weights) == nodes


def test_random_cells_are_cells():
    rng = np.random.default_rng(0)
    cells = [draw_cell(rng) for _ in range(50)]
    assert len(set(cells)) == 50
    for cell in cells:
        assert parse_cell(format_cell(cell)) == cell
        assert all(len({source for _, source in node}) == 2 for node in cell)
    used = {kind for cell in cells for node in cell for kind, _ in node}
    assert used == set(OPERATIONS) - {"none"}


def test_a_genotype_of_a_file_is_in_the_config(tmp_path):
    genotype = {"normal": parse_cell(REDUCE), "reduce": parse_cell(NORMAL)}
    path = tmp_path / "found.toml"
    write_genotype(path, genotype, "what it is\nand whence")
    assert path.read_text().startswith("# what it is\n# and whence\n")
    config, _ = parse_config([f"--config=configs/auto_reid.py:{path},duke"])
    assert config is not None
    assert (config.network.normal, config.network.reduce) == (REDUCE, NORMAL)
    assert (config.name, config.dataset.name) == ("auto_reid-own", "dukemtmc")
    with pytest.raises(UserError, match="several genotypes"):
        parse_config([f"--config=configs/auto_reid.py:{path},reid_space"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no genotype.*search_auto_reid"),
        ("normal = ", "no TOML file"),
        (f'normal = "{NORMAL}"', "has normal; expected the texts of normal and reduce"),
        (f'normal = "{NORMAL}"\nreduce = "conv(0)"', "found.toml, reduce: .*no operation 'conv'"),
    ],
)
def test_files_that_are_no_genotype(tmp_path, content, message):
    path = tmp_path / "found.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotFoundError if content is None else UserError, match=message):
        read_genotype(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "node 2 of a cell is ''; expected two edges"),
        ("sep skip(1)", r"'sep' is no edge of a cell; expected OPERATION\(MAP\)"),
        ("sep(0) conv(1)", "no operation 'conv'; expected one of none, max, avg, sep, dil"),
        ("sep(0) skip(2)", "node 2 cannot be made from map 2.*expected 0 to 1"),
        ("sep(0) skip(1) max(0)", "node 2 of a cell is .*expected two edges"),
        ("sep(0) skip(1), max(2) dil(0)", "has 2 nodes; expected 4"),
    ],
)
def test_texts_that_are_no_cell(text, message):
    with pytest.raises(UserError, match=message):
        parse_cell(text)


@pytest.mark.parametrize(
    ("changes", "height", "message"),
    [
        ({"reduce": "conv(0)"}, 96, "config.network.reduce: .*no operation 'conv'"),
        ({"cells": ()}, 96, r"cells are \(\)"),
        ({"cells": (1, 0)}, 96, r"cells are \(1, 0\)"),
        ({"width": 2}, 96, "width 2"),
        ({}, 24, r"map of 3 rows and splits it into 4 parts.*input\.height"),
    ],
)
def test_bad_input(changes, height, message, unchecked):
    config = auto_reid.get_config("small")
    config.network.update(changes)
    network = make_network(config, 2)
    images = jnp.zeros((1, height, 32, 3))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
