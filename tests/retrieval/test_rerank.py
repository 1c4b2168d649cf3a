import pathlib
import sys

import jax
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.retrieval import AQE, ECN, KReciprocal, Placement
from mros_jax.retrieval.neighbors import search_faiss, search_neighbors, select_top, stack

GOLDEN = pathlib.Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request):
    with np.load(GOLDEN / f"retrieval_{request.param}.npz") as file:
        data = dict(file)
    data["gallery_features"] = data["gallery_features"][data["gallery_pids"] != -1]
    return data


def features_of(data):
    return data["query_features"], data["gallery_features"]


@pytest.mark.parametrize("method", ["rankdist", "origdist"])
@pytest.mark.parametrize(("k", "t", "q"), [(25, 3, 8), (10, 2, 4)])
def test_ecn_equals_golden(golden, method, k, t, q):
    got = ECN(k=k, t=t, q=q, method=method).distances(*features_of(golden))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, golden[f"ecn_{method}_k{k}_t{t}_q{q}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (10, 3, 0.5)])
def test_k_reciprocal_equals_golden(golden, k1, k2, lambda_value):
    got = KReciprocal(k1=k1, k2=k2, lambda_value=lambda_value).distances(*features_of(golden))
    expected = golden[f"kreciprocal_k{k1}_{k2}_l{lambda_value}"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def make_features(seed=0, num_query=20, num_gallery=60, size=8):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, size))
    features = centres[rng.integers(0, 12, num_query + num_gallery)]
    features = (features + 0.5 * rng.standard_normal(features.shape)).astype(np.float32)
    return features[:num_query], features[num_query:]


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def ecn_by_definition(query, gallery, k, t, q):
    """The mean over expanded neighbours, with all N x N matrices."""
    features = unit(np.concatenate([query, gallery]).astype(float))
    num, num_query = len(features), len(query)
    cosine = 1 - features @ features.T
    np.fill_diagonal(cosine, -1)
    order = np.argsort(cosine, axis=1, kind="stable")
    weights = np.zeros((num, num))
    for i in range(num):
        weights[i, order[i, :k]] = np.arange(k, 0, -1)
    distance = -weights @ weights.T

    def expand(i):
        first = order[i, 1 : t + 1]
        return np.concatenate([first, *(order[j, 1 : q + 1] for j in first)])

    result = np.empty((num_query, len(gallery)))
    for i in range(num_query):
        for j in range(num_query, num):
            mean = np.mean([*distance[expand(i), j], *distance[i, expand(j)]])
            result[i, j - num_query] = mean if mean != 0 else cosine[i, j]
    return result


@pytest.mark.parametrize(("k", "t", "q"), [(6, 2, 3), (3, 1, 5), (5, 4, 1)])
def test_ecn_equals_its_definition(k, t, q):
    query, gallery = make_features()
    got = ECN(k=k, t=t, q=q).distances(query, gallery)
    np.testing.assert_allclose(got, ecn_by_definition(query, gallery, k, t, q), atol=1e-6)


def test_ecn_of_unrelated_images_is_their_cosine_distance():
    query, gallery = make_features()
    got = ECN(k=2, t=1, q=1).distances(query, gallery)
    plain = 1 - unit(query) @ unit(gallery).T
    unrelated = got > 0
    assert unrelated.any()
    np.testing.assert_allclose(got[unrelated], plain[unrelated], atol=1e-6)
    assert got[~unrelated].max() < 0


def test_methods_ignore_scale_and_gallery_order():
    query, gallery = make_features()
    rng = np.random.default_rng(3)
    order = rng.permutation(len(gallery))
    scale = np.float32(2.0) ** rng.integers(-5, 5, (len(gallery), 1))
    for method in (ECN(), KReciprocal(), AQE()):
        expected = method.distances(query, gallery)
        np.testing.assert_allclose(method.distances(query, gallery * scale), expected, atol=1e-6)
        np.testing.assert_allclose(
            method.distances(query, gallery[order]),
            expected[:, order],
            atol=2e-6,
            err_msg=str(method),
        )


@pytest.mark.parametrize("alpha", [0, 2.5])
def test_aqe_equals_numpy(alpha):
    query, gallery = make_features(1)
    a, b = unit(query.astype(float)), unit(gallery.astype(float))
    cosine = a @ b.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :4]
    weights = np.take_along_axis(cosine, near, axis=1) ** alpha
    expanded = unit(a + np.einsum("qk,qkd->qd", weights, b[near]))
    got = AQE(k=4, alpha=alpha).distances(query, gallery)
    np.testing.assert_allclose(got, 1 - expanded @ b.T, atol=1e-6)
    given = AQE(k=4, alpha=alpha, neighbors=near).distances(query, gallery)
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("num", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_select_top_keeps_the_order_of_ties(num, k):
    values = np.random.default_rng(num).integers(0, 9, (20, num)).astype(np.float32)
    top, indices = jax.jit(select_top, static_argnums=1)(values, k)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(top, np.take_along_axis(values, order, axis=1))


def test_each_image_is_its_own_first_neighbour_even_among_duplicates():
    query, gallery = make_features()
    features = stack(query, np.concatenate([gallery, gallery[:10]]))
    found = search_neighbors(features, 5)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(len(features)))
    cosine = unit(features) @ unit(features).T
    np.testing.assert_allclose(found.smallest, cosine.min(1), atol=1e-6)
    np.testing.assert_allclose(
        found.similarity, np.take_along_axis(cosine, found.indices, axis=1), atol=1e-6
    )


def test_given_neighbours_equal_the_search():
    query, gallery = make_features(2)
    lists = np.asarray(search_neighbors(stack(query, gallery), 30).indices)
    swapped = lists.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]  # itself second: as with a duplicate
    for neighbors in (lists, swapped):
        np.testing.assert_array_equal(
            ECN(neighbors=neighbors).distances(query, gallery), ECN().distances(query, gallery)
        )
        np.testing.assert_allclose(
            KReciprocal(neighbors=neighbors).distances(query, gallery),
            KReciprocal().distances(query, gallery),
            atol=1e-6,
        )


def test_devices_and_blocks_do_not_change_the_result():
    query, gallery = make_features(4, num_query=70, num_gallery=200)
    one, small = Placement(devices=jax.local_devices()[:1]), Placement(block_size=32)
    for method in (ECN(), KReciprocal()):
        expected = method.distances(query, gallery, placement=one)
        got = method.distances(query, gallery, placement=small)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_accepts_jax_arrays():
    query, gallery = make_features(5)
    on_device = jax.device_put(query), jax.device_put(gallery)
    for method in (ECN(), KReciprocal(), AQE()):
        np.testing.assert_allclose(
            method.distances(*on_device), method.distances(query, gallery), atol=1e-6
        )
    np.testing.assert_allclose(
        ECN(method="origdist").distances(*on_device),
        ECN(method="origdist").distances(query, gallery),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ECN, {"k": 81}, "k is 81, but there are only 80 images"),
        (ECN, {"t": 80}, "t is 80, but there are only 79"),
        (ECN, {"q": 0}, "q is 0; expected a whole number of at least 1"),
        (ECN, {"method": "other"}, "one of rankdist, origdist"),
        (ECN, {"neighbors": "magic"}, "neighbors is 'magic'"),
        (KReciprocal, {"k1": 80}, "k1 is 80, but there are only 79"),
        (KReciprocal, {"lambda_value": 2}, "lambda_value is 2"),
        (AQE, {"k": 61}, "k is 61, but there are only 60 gallery images"),
        (AQE, {"alpha": -1}, "alpha is -1"),
    ],
)
def test_bad_parameters(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options).distances(*make_features())


LISTS = np.stack([np.roll(np.arange(80), -i)[:30] for i in range(80)])


@pytest.mark.parametrize(
    ("neighbors", "message"),
    [
        (LISTS[:70], r"shape \(70, 30\).*\(80, k\)"),
        (LISTS[:, :10], "lists of 10.*at least 25"),
        (LISTS - 1, r"indices -1\.\.78"),
        (np.zeros_like(LISTS), "twice"),
        (LISTS.astype(float), "whole numbers"),
    ],
)
def test_bad_neighbours(neighbors, message):
    with pytest.raises(ValueError, match=message):
        ECN(neighbors=neighbors).distances(*make_features())


def test_missing_faiss_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"mros_jax\[faiss\]"):
        ECN(neighbors="faiss")


def test_faiss_equals_the_exact_search():
    pytest.importorskip("faiss")
    query, gallery = make_features(6)
    for neighbors in ("faiss", "faiss:Flat"):
        np.testing.assert_allclose(
            ECN(neighbors=neighbors).distances(query, gallery),
            ECN().distances(query, gallery),
            atol=1e-6,
        )


def test_faiss_takes_an_index_and_its_parameters():
    pytest.importorskip("faiss")
    query, gallery = make_features(6)
    exact = search_neighbors(stack(query, gallery), 10).indices

    def share(neighbors):
        return (search_faiss(stack(query, gallery), 10, neighbors) == exact).mean()

    assert share("faiss:IVF2,Flat:nprobe=1") < share("faiss:IVF2,Flat:nprobe=2") == 1
    for neighbors in ("faiss:Nonsense", "faiss:Flat:nonsense=1"):
        with pytest.raises(UserError, match="but faiss says"):
            ECN(neighbors=neighbors).distances(query, gallery)
