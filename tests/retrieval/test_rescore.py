"""Learned re-ranking by a random walk: against its definition, by blocks, at its edges."""

import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.retrieval import GSRW, Placement, Side, descriptors, evaluate, rerank
from mros_jax.retrieval.rescore import PairHeads

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, C, TOP = 2, 3, 7


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((6, K * C))
    features = centers[rng.integers(0, 6, 29)] + 0.5 * rng.standard_normal((29, K * C))
    query, gallery = features[:9].astype(np.float32), features[9:].astype(np.float32)
    heads = PairHeads(
        rng.standard_normal((K, C, 2)).astype(np.float32),
        rng.standard_normal((K, 2)).astype(np.float32),
    )
    return query, gallery, heads


def by_definition(query, gallery, heads, top, alpha):
    """In float64, one query, head and group after another; the walk by its inverse."""
    query, gallery = query.astype(float), gallery.astype(float)
    result = ((query[:, None] - gallery) ** 2).sum(-1)
    for row, x in zip(result, query, strict=True):
        order = np.argsort(row, kind="stable")
        near, rest = order[:top], order[top:]
        y, total = gallery[near], np.zeros((top, 2))
        for i in range(K):
            part = slice(i * C, (i + 1) * C)
            for kernel, bias in zip(*heads, strict=True):
                p = (x[part] - y[:, part]) ** 2 @ kernel + bias
                g = (y[:, None, part] - y[:, part]) ** 2 @ kernel + bias
                w = np.exp(g[..., 1])
                if top > 1:
                    np.fill_diagonal(w, 0)
                w /= w.sum(1, keepdims=True)
                total += (1 - alpha) * np.linalg.inv(np.eye(top) - alpha * w) @ p
        logits = total / K**2
        scores = np.exp(logits[:, 0]) / np.exp(logits).sum(1)
        if len(rest):
            row[rest] += max(0, scores.max() + 1 - row[rest].min())
        row[near] = scores
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_definition(data, alpha):
    query, gallery, heads = data
    got = GSRW(top=TOP, alpha=alpha, heads=heads).distances(query, gallery)
    expected = by_definition(query, gallery, heads, TOP, alpha)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_nothing_moves_across_the_last_place(data):
    """Also where distances are far below what the walk gives."""
    query, gallery, heads = data
    for scale in (1.0, 1e-2):
        q, g = query * np.float32(scale), gallery * np.float32(scale)
        plain = np.argsort(((q[:, None].astype(float) - g) ** 2).sum(-1), axis=1)
        order = np.argsort(GSRW(top=TOP, heads=heads).distances(q, g), axis=1)
        assert (order[:, :TOP] != plain[:, :TOP]).any()
        for ours, before in zip(order, plain, strict=True):
            assert set(ours[:TOP]) == set(before[:TOP])
            np.testing.assert_array_equal(ours[TOP:], before[TOP:])


def test_blocks_are_the_whole(data):
    query, gallery, heads = data
    method = GSRW(top=TOP, heads=heads)
    many = np.tile(query, (3, 1))
    whole = method.distances(many, gallery)
    blocked = method.distances(many, gallery, placement=Placement(block_size=8))
    np.testing.assert_allclose(blocked, whole, rtol=1e-5, atol=1e-6)


def test_equal_images_have_equal_scores(data):
    query, gallery, heads = data
    twice = gallery[:5].repeat(2, axis=0)
    got = GSRW(top=10, heads=heads).distances(query, twice)
    np.testing.assert_allclose(got[:, ::2], got[:, 1::2], rtol=1e-4, atol=1e-6)
    assert np.unique(got[:, ::2].round(4)).size > 10


def test_one_image_and_all_images(data):
    """The nearest alone has nobody to walk to; with all there is no rest."""
    query, gallery, heads = data
    for top in (1, len(gallery)):
        got = GSRW(top=top, heads=heads).distances(query, gallery)
        expected = by_definition(query, gallery, heads, top, 0.0 if top == 1 else 0.95)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert got.min() >= 0
    assert got.max() <= 1


def test_sure_pairs_are_0_and_1(data):
    """No number is left that a ranking would refuse."""
    query, gallery, _ = data
    bias = np.tile(np.array([0, 95], np.float32), (K, 1))
    heads = PairHeads(np.zeros((K, C, 2), np.float32), bias)
    got = GSRW(top=20, heads=heads).distances(query, gallery, dtype=np.float32)
    assert (got == 0).all()
    labels = [np.arange(n) % 3 + 1 for n in (9, 20)]
    cameras = [np.zeros(9, int), np.ones(20, int)]
    evaluate(query, gallery, *labels, *cameras, rerank=GSRW(top=20, heads=heads))


def test_evaluation_is_of_raw_descriptors(data):
    query, gallery, heads = data
    pids = [np.arange(n) % 3 + 1 for n in (9, 20)]
    sides = [
        Side(x, pid, np.full(len(x), i))
        for i, (x, pid) in enumerate(zip(data[:2], pids, strict=True))
    ]
    method = GSRW(top=TOP, heads=heads)
    result = evaluate(*sides, rerank=method)
    protocol = result.protocol
    assert (protocol["metric"], protocol["normalize"]) == ("euclidean", False)
    assert protocol["rerank_options"] == {"top": TOP, "alpha": 0.95}
    distance = method.distances(query, gallery)
    match = pids[0][:, None] == pids[1]
    order = np.argsort(distance, axis=1, kind="stable")
    hits = np.take_along_axis(match, order, axis=1)
    precision = hits.cumsum(1) / np.arange(1, 21)
    expected = ((precision * hits).sum(1) / hits.sum(1)).mean()
    np.testing.assert_allclose(result.mAP, expected, rtol=1e-6)


def test_heads_come_with_the_descriptors(data, tmp_path):
    query, gallery, heads = data
    arrays = {
        "query_features": query,
        "gallery_features": gallery,
        **{f"{name}_{kind}": np.arange(n) for name, n in (("query", 9), ("gallery", 20))
           for kind in ("pids", "camids")},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"came without .pair_kernel, pair_bias.*configs/gsrw\.py"):
        GSRW().bind(arrays)
    both = arrays | dict(zip(descriptors.PAIR_ARRAYS, heads, strict=True))
    descriptors.save_features(tmp_path / "f.npz", both)
    bound = GSRW(top=TOP).bind(descriptors.load_features(tmp_path / "f.npz"))
    np.testing.assert_array_equal(
        bound.distances(query, gallery), GSRW(top=TOP, heads=heads).distances(query, gallery)
    )
    for name, bad in (
        ("pair_kernel", heads.kernel[:, :2]),
        ("pair_bias", heads.bias[:1]),
        ("pair_bias", np.float32(1)),
        ("pair_bias", np.full((K, 2), np.nan, np.float32)),
        ("pair_kernel", np.zeros((0, C, 2), np.float32)),
    ):
        descriptors.save_features(tmp_path / "bad.npz", both | {name: bad})
        with pytest.raises(UserError, match=r"expected numbers of shape \(K, 6 / K, 2\)"):
            descriptors.load_features(tmp_path / "bad.npz")


def test_bad_input(data):
    query, gallery, heads = data
    with pytest.raises(UserError, match="gsrw: top is 75, but there are only 20 gallery images"):
        GSRW(heads=heads).distances(query, gallery)
    with pytest.raises(UserError, match="no heads of a trained network"):
        GSRW(top=TOP).distances(query, gallery)
    with pytest.raises(UserError, match="descriptors of 6 numbers, and these have 5"):
        GSRW(top=TOP, heads=heads).distances(query[:, 1:], gallery[:, 1:])
    with pytest.raises(UserError, match="too large or too small for float32"):
        GSRW(top=TOP, heads=heads).distances(query * 1e30, gallery * 1e30)
    for options, message in (
        ({"top": 0}, "gsrw: top is 0"),
        ({"alpha": 1.0}, "alpha is 1.0; it must be below 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
    ):
        with pytest.raises(UserError, match=message):
            GSRW(**options)
    with pytest.raises(UserError, match="no parameter 'heads'; expected some of top"):
        rerank.parse(["gsrw"], {"gsrw": {"heads": 1}})
