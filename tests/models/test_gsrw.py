"""GSRW: the walk, heads and groups, what carries no gradient, bad input."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mros_jax import console, evaluate, train
from mros_jax.config import apply_overrides, read, shrink
from mros_jax.data.augment import example_keys
from mros_jax.errors import UserError
from mros_jax.inspection.ranking import Ranking
from mros_jax.losses import make_objective
from mros_jax.losses.pairs import pair_cross_entropy
from mros_jax.models.walk import make_transitions, walk
from mros_jax.retrieval import descriptors
from mros_jax.systems.gsrw import GSRW, PairHeads, refine
from mros_jax.training import recipe
from tests.parity.common import CONFIGS
from tests.recorded import draw

pytestmark = pytest.mark.usefixtures("quick_compilation")

rng = np.random.default_rng(0)


def test_the_closed_form_is_where_the_walk_ends():
    """Against 4,000 steps, in float64; the weights of each image's score add up to 1."""
    values, same = rng.standard_normal((3, 9, 5)), 3 * rng.standard_normal((3, 9, 9))
    with jax.enable_x64(True):
        transitions = np.asarray(make_transitions(jnp.asarray(same)))
        refined = np.asarray(walk(jnp.asarray(values), jnp.asarray(transitions), 0.95))
        whole = walk(jnp.ones((3, 9, 1)), jnp.asarray(transitions), 0.95)
    assert not np.diagonal(transitions, axis1=1, axis2=2).any()
    np.testing.assert_allclose(transitions.sum(-1), 1, rtol=1e-14)
    y = values
    for _ in range(4000):
        y = 0.95 * transitions @ y + 0.05 * values
    np.testing.assert_allclose(refined, y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(whole, 1, rtol=0, atol=1e-12)


def test_no_walk_and_nowhere_to_go():
    values = jnp.asarray(rng.standard_normal((2, 6, 3)), jnp.float32)
    transitions = make_transitions(jnp.asarray(rng.standard_normal((2, 6, 6)), jnp.float32))
    np.testing.assert_array_equal(walk(values, transitions, 0.0), values)
    alone = make_transitions(jnp.full((1, 1, 1), 7.0))
    np.testing.assert_allclose(walk(values[:1, :1], alone, 0.95), values[:1, :1], rtol=1e-5)


def test_no_gradient_through_the_steps():
    """That of refined scores is M's transpose, and sees the logits of "another" alike."""
    p2g, g2g = (jnp.asarray(rng.standard_normal((1, n, 5, 2)), jnp.float32) for n in (2, 5))
    weight = rng.standard_normal((1, 2, 5)).astype(np.float32)

    def total(p2g, g2g):
        return jnp.sum(weight[..., None] * refine(p2g, g2g, 0.9)[0])

    of_probes, of_gallery = jax.grad(total, argnums=(0, 1))(p2g, g2g)
    assert not np.any(of_gallery)  # probes' scores see it through W alone
    m = 0.1 * np.linalg.inv(np.eye(5) - 0.9 * np.asarray(make_transitions(g2g[..., 1]))[0])
    for kind in (0, 1):
        np.testing.assert_allclose(of_probes[0, ..., kind], weight[0] @ m, rtol=1e-4, atol=1e-6)


def make_heads(heads=2, size=3):
    """Heads with drawn variables, and four images of two groups."""
    module = PairHeads(heads, dropout=0.0)
    x = jnp.asarray(rng.standard_normal((4, 2, size)), jnp.float32)
    init = functools.partial(module.init, train=False)
    shapes = jax.eval_shape(lambda key: init(key, x, x, None, None), jax.random.key(0))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: draw("/".join(p.key for p in path), x.shape).astype(np.float32), shapes
    )
    return module, variables, x


def test_heads_compare_squared_differences():
    module, variables, x = make_heads()
    y = x[1:] + 1
    p2g, g2g = module.apply(variables, x, y, None, None, train=False)
    assert p2g.shape == (4, 4, 3, 2)
    assert g2g.shape == (4, 3, 3, 2)
    norm, linear = variables["params"]["bn"], variables["params"]["classifier"]
    running = variables["batch_stats"]["bn"]
    for found, rows in ((p2g, x), (g2g, y)):
        for i, j in ((0, 1), (1, 0)):
            z = (rows[2, i] - y[1, i]) ** 2
            z = (z - running["mean"][j]) / np.sqrt(running["var"][j] + 1e-5)
            z = z * norm["scale"][j] + norm["bias"][j]
            expected = z @ linear["kernel"][j] + linear["bias"][j]
            np.testing.assert_allclose(found[2 * i + j, 2, 1], expected, rtol=1e-4, atol=1e-5)


def test_folded_heads_are_the_heads():
    module, variables, x = make_heads()
    network = GSRW(num_classes=3, groups=2)
    folded = network.fold_heads({kind: {"pairs": tree} for kind, tree in variables.items()})
    found = module.apply(variables, x, x, None, None, train=False)[1]
    squared = (x[:, None] - x) ** 2
    expected = jnp.einsum("xyic,kcn->ikxyn", squared, folded["pair_kernel"], precision="highest")
    expected += folded["pair_bias"][:, None, None]
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)
    assert folded["pair_kernel"].dtype == folded["pair_bias"].dtype == np.float32


def test_every_head_sees_every_group_and_each_pass_moves_its_statistics():
    """Head j on group i is scores i K + j; P2G and G2G of every group are passes of their own."""
    network = GSRW(num_classes=3, trunk="tiny", groups=2, dropout=0.0, alpha=0.0)
    images = jnp.asarray(rng.standard_normal((8, 32, 16, 3)), jnp.float32)
    shapes = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: draw("/".join(p.key for p in path), x.shape).astype(np.float32), shapes
    )
    apply = jax.jit(functools.partial(network.apply, train=True, mutable=["batch_stats"]))
    outputs, updated = apply(variables, images)
    p2g, g2g = outputs.pairs["p2g"], outputs.pairs["g2g"]
    assert p2g.logits.shape == (4, 2, 6, 2)
    assert g2g.logits.shape == (4, 6, 6, 2)
    np.testing.assert_array_equal(p2g.rows, [0, 4])
    np.testing.assert_array_equal(p2g.columns, [1, 2, 3, 5, 6, 7])
    for x in (g2g.rows, g2g.columns):
        np.testing.assert_array_equal(x, p2g.columns)
    g = np.asarray(outputs.descriptor)
    heads, before = variables["params"]["pairs"], variables["batch_stats"]["pairs"]["bn"]
    mean = before["mean"].copy()
    for i in range(2):
        part = g[:, 64 * i : 64 * (i + 1)]
        for rows, found in ((p2g.rows, p2g.logits), (g2g.rows, g2g.logits)):
            z = (part[rows][:, None] - part[np.asarray(p2g.columns)]) ** 2
            flat = z.reshape(-1, 64)
            mean += 0.1 * (flat.mean(0) - mean)
            z = (z - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
            for j in range(2):
                y = z * heads["bn"]["scale"][j] + heads["bn"]["bias"][j]
                expected = y @ heads["classifier"]["kernel"][j] + heads["classifier"]["bias"][j]
                np.testing.assert_allclose(found[2 * i + j], expected, rtol=1e-3, atol=1e-3)
    moved = updated["batch_stats"]["pairs"]["bn"]["mean"]
    np.testing.assert_allclose(moved, mean, rtol=1e-4, atol=1e-5)


def test_dropout_has_a_mask_for_every_pair_group_and_head():
    module = PairHeads(2, dropout=0.8)
    _, variables, _ = make_heads(2, 50)
    variables = jax.tree.map(jnp.asarray, variables)
    x = jnp.asarray(rng.standard_normal((1, 1, 50)), jnp.float32).repeat(6, 0).repeat(2, 1)
    y = x + jnp.asarray(rng.standard_normal((1, 1, 50)), jnp.float32)
    keys = example_keys(0, 3, jnp.arange(6))
    run = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
    p2g, g2g = run(variables, x, y, keys, keys)[0]
    assert len(np.unique(p2g)) == p2g.size  # all of the pairs are alike but for the masks
    again = run(variables, x, y, keys[np.zeros(6, int)], keys)[0]
    np.testing.assert_array_equal(again[0][:, 0], again[0][:, 5])  # a row has a key
    np.testing.assert_array_equal(again[1], g2g)


def test_loss_is_the_mean_over_all_pairs_of_both_kinds():
    network = GSRW(num_classes=3, trunk="tiny", dropout=0.0)
    images = jnp.asarray(rng.standard_normal((8, 32, 16, 3)), jnp.float32)
    run = lambda key: network.init_with_output(key, images, train=False)  # noqa: E731
    outputs = jax.eval_shape(run, jax.random.key(0))[0]
    outputs = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), outputs)
    places = {"p2g": (np.array([0, 4]), np.r_[1:4, 5:8]), "g2g": (np.r_[1:4, 5:8],) * 2}
    labels = np.array([5, 5, 5, 5, 5, 9, 9, 9])
    total = []
    for name, (rows, columns) in places.items():
        logits = rng.standard_normal((16, len(rows), len(columns), 2))
        outputs.pairs[name] = outputs.pairs[name].replace(
            logits=jnp.asarray(logits), rows=jnp.asarray(rows), columns=jnp.asarray(columns)
        )
        same = (labels[rows][:, None] == labels[columns]).astype(int)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total.append(-np.take_along_axis(log, same[None, ..., None].repeat(16, 0), -1).ravel())
    objective = make_objective({"pairs": {"loss": "pairs", "on": ("p2g", "g2g")}})
    found, _ = objective({}, outputs, jnp.asarray(labels))
    np.testing.assert_allclose(found, np.concatenate(total).mean(), rtol=1e-5)
    with pytest.raises(UserError, match="no pairs 'g'; it has g2g, p2g"):
        make_objective({"pairs": {"loss": "pairs", "on": ("g",)}})({}, outputs, jnp.asarray(labels))


def test_loss_of_sure_pairs():
    logits = jnp.asarray([[[[0.0, 200.0], [200.0, 0.0]]]])
    assert pair_cross_entropy(logits, jnp.asarray([[True, False]])) == 0
    np.testing.assert_allclose(pair_cross_entropy(logits, jnp.asarray([[False, True]])), 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.groups=3", "groups is 3; the 128 channels of tiny .* 1, 2, 4, 8, 16"),
        ("network.groups=0", "groups is 0"),
        ("network.alpha=1.0", "alpha is 1.0; it must be from 0 to below 1"),
        ("network.dropout=1.0", "dropout rate is 1.0"),
        ("batch.gallery=0", "gallery is 0"),
        ("objective.pairs.on=('g2p',)", "no pairs 'g2p'; it has "),
        ("augment.erase_place=middle", "erase_place is 'middle'; expected one of uniform, corner"),
        ("eval.rerank_options.gsrw.alpha=1.0", "gsrw: alpha is 1.0; it must be below 1"),
    ],
)
def test_parts_that_do_not_fit_each_other(change, message):
    config = shrink(read(CONFIGS / "gsrw.py").unlock()).lock()
    apply_overrides(config, [f"--config.{change}"])
    with pytest.raises(UserError, match=message):
        recipe.check_config(config)


def test_one_number_of_gallery_images():
    """Who changes it in the batch changes it in the network, too."""
    config = read(CONFIGS / "gsrw.py")
    apply_overrides(config, ["--config.batch.gallery=2"])
    assert config.network.gallery == 2
    assert ConfigDict(config.to_dict()).network.gallery == 2


def test_a_batch_of_something_else():
    network = GSRW(num_classes=3, trunk="tiny")
    images = jnp.zeros((6, 32, 16, 3))
    shapes = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)
    run = functools.partial(network.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(
        UserError, match=r"6 images is not of probes with 3 gallery .* multiple of 4"
    ):
        jax.eval_shape(run, shapes, images)


def test_a_network_without_heads_has_no_such_reranking():
    config = shrink(read(CONFIGS / "trinet.py").unlock()).lock()
    config.eval.rerank = ("gsrw",)
    with pytest.raises(UserError, match=r"gsrw, which needs heads .* network trinet has none"):
        recipe.check_config(config)


@pytest.mark.slow
def test_a_run_is_reranked_by_its_own_heads(tmp_path, cache_dir, capsys):
    """In training, by the command and in the report: the same scores."""
    config = shrink(read(CONFIGS / "gsrw.py").unlock()).lock()
    changes = {
        "dataset.preset": "small",
        "dataset.cache_dir": cache_dir,
        "num_epochs": 2,
        "stages.stage1.epochs": 1,
        "stages.stage2.epochs": 1,
        "batch.probes": 8,
        "input.width": 32,
        "eval.rerank_options.gsrw.top": 10,
    }
    apply_overrides(config, [f"--config.{name}={value}" for name, value in changes.items()])
    results = train.train(config, tmp_path / "run")
    assert results is not None
    found = results["results"]
    assert [entry["name"] for entry in found] == ["plain", "gsrw"]
    words = ["--run", str(tmp_path / "run"), "--rerank=gsrw", "--json", "--no_progress"]
    assert console.run(evaluate.main, [*words, '--rerank_options={"gsrw": {"top": 10}}']) == 0
    again = json.loads(capsys.readouterr().out)["results"]
    assert [entry["mAP"] for entry in again] == [entry["mAP"] for entry in found]
    features = descriptors.load_features(tmp_path / "run" / "features.npz")
    ranking = Ranking(features, found[1])
    distances = ranking.rows(np.arange(4))
    kept = features["gallery_pids"] != -1
    assert (distances[:, kept] <= 1).sum(1).min() == 10
    alone = ranking.compare(features["query_features"][2])
    np.testing.assert_allclose(alone, distances[2], rtol=1e-4, atol=1e-6)
    assert "gsrw" in (tmp_path / "run" / "report.html").read_text()
