"""What accelerators run, here on CPUs: re-ranking by gathers, and evaluations in one program."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mros_jax.retrieval import AQE, ECN, KReciprocal, Placement, evaluate, gathers, jitted
from scripts import compile_for_tpu

GOLDEN = pathlib.Path(__file__).parents[1] / "data"
SHAPES = [  # queries and gallery, k, t, q
    ((1, 2), 1, 1, 1),
    ((2, 5), 7, 2, 3),
    ((5, 40), 45, 3, 8),
    ((33, 47), 10, 12, 5),
    ((70, 700), 25, 3, 8),
]


def make_features(num_query, num_gallery, *, exact, size=16, seed=0):
    """Descriptors in groups; exact: cosines are whole sixteenths, with many ties and duplicates."""
    rng = np.random.default_rng([num_query, num_gallery, seed])
    if exact:
        features = rng.choice(np.array([-1, 1], np.float32), (num_query + num_gallery, size))
        features[1::5] = features[0]
    else:
        centers = rng.standard_normal((7, size), np.float32)
        features = rng.standard_normal((num_query + num_gallery, size), np.float32)
        features += centers[rng.integers(0, 7, len(features))]
    return features[:num_query], features[num_query:]


def make_case(num_query, num_gallery, *, junk=True, **options):
    """The six arrays of `evaluate`; some of the gallery are junk and distractors."""
    features = make_features(num_query, num_gallery, **options)
    rng = np.random.default_rng([num_query, num_gallery])
    pids = [rng.integers(1, 6, num_query), rng.integers(0 - junk, 6, num_gallery)]
    camids = [rng.integers(0, 3, n) for n in (num_query, num_gallery)]
    pids[1][0], camids[1][0] = pids[0][0], camids[0][0] + 1
    return *features, *pids, *camids


def on_devices(num):
    return Placement(devices=jax.local_devices()[:num])


@pytest.fixture
def choose(monkeypatch):
    """`choose(True)`: dense gathers; `choose(False)`: sparse products."""
    return lambda dense: monkeypatch.setattr(gathers, "suit", lambda placement: dense)


def test_accelerators_get_dense_gathers(unchecked):
    def suit(*platforms):
        devices = [type("Device", (), {"platform": platform}) for platform in platforms]
        return gathers.suit(Placement(devices))

    assert suit("gpu")
    assert suit("tpu", "tpu")
    assert not suit("cpu")
    assert not gathers.suit(Placement())


def check_gathers(choose, shape, k, t, q, exact, devices):
    """Bit for bit equal, cosine distances of unrelated images included."""
    features = make_features(*shape, exact=exact)
    method = ECN(k=k, t=t, q=q)
    for dtype in (np.float64, np.float32):
        choose(False)
        expected = method.distances(*features, dtype=dtype, placement=on_devices(1))
        choose(True)
        for num in devices:
            got = method.distances(*features, dtype=dtype, placement=on_devices(num))
            np.testing.assert_array_equal(got, expected)


def test_dense_gathers_equal_sparse_products(choose):
    check_gathers(choose, (70, 130), 25, 3, 8, exact=True, devices=(1, 4))
    check_gathers(choose, (70, 130), 4, 1, 2, exact=False, devices=(1,))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "k", "t", "q"), SHAPES)
def test_dense_gathers_of_every_shape(shape, k, t, q, choose):
    check_gathers(choose, shape, k, t, q, exact=True, devices=(2, 4))
    check_gathers(choose, shape, k, t, q, exact=False, devices=(1,))


@pytest.mark.parametrize(("keep_junk", "num_devices"), [(False, 1), (True, 4)])
def test_scores_of_dense_gathers_equal_those_of_sparse_products(keep_junk, num_devices, choose):
    case = make_case(40, 130, exact=True)
    results = []
    for dense in (False, True):
        choose(dense)
        results.append(
            evaluate(
                *case,
                rerank=ECN(k=12),
                keep_junk=keep_junk,
                placement=on_devices(num_devices),
            ).to_dict()
        )
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("method", "keep_junk", "num_devices"),
    [
        (KReciprocal(k1=10, k2=3), False, 1),
        (KReciprocal(k1=10, k2=3), True, 4),
        (ECN(k=12, method="origdist"), True, 4),
        (AQE(k=7, alpha=2.0), True, 4),
    ],
)
def test_other_re_ranking_on_devices_equals_that_of_the_host(
    method, keep_junk, num_devices, choose
):
    case = make_case(40, 130, exact=False)
    placement = on_devices(num_devices)
    scores, distances = [], []
    for dense in (False, True):
        choose(dense)
        written = method.prepare(*case[:2], placement)
        assert isinstance(written, gathers.DeviceRows) == dense
        options = {"rerank": method, "keep_junk": keep_junk, "placement": placement}
        scores.append(evaluate(*case, **options))
        distances.append(method.distances(*case[:2], placement=placement))
    np.testing.assert_allclose(distances[1], distances[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores[1].ap, scores[0].ap, rtol=1e-6)
    assert scores[1].protocol == scores[0].protocol


@pytest.mark.parametrize("name", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_re_ranking_equals_golden(name, choose):
    with np.load(GOLDEN / f"retrieval_{name}.npz") as file:
        data = dict(file)
    features = data["query_features"], data["gallery_features"][data["gallery_pids"] != -1]
    expected = data["ecn_rankdist_k25_t3_q8"]
    choose(True)
    np.testing.assert_allclose(ECN().distances(*features), expected, rtol=0, atol=1e-5)
    got = jitted.compute_distances(*features, rerank=ECN())
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    expected = data["kreciprocal_k20_6_l0.3"]
    for got in (
        KReciprocal().distances(*features),
        jitted.compute_distances(*features, rerank=KReciprocal()),
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def share(function, num_devices):
    """One program on several devices: each does a share, and all get the whole."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("rows",))
    whole = PartitionSpec()
    return jax.shard_map(
        functools.partial(function, axis_name="rows"),
        mesh=mesh,
        in_specs=whole,
        out_specs=whole,
        check_vma=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (7, 9), (59, 60)])
def test_jitted_k_reciprocal_equals_sparse_sets(k1, k2):
    """Sets of every size that they can have, up to all images."""
    features = make_features(20, 40, exact=False)
    method = KReciprocal(k1=k1, k2=k2)
    got = jitted.compute_distances(*features, rerank=method)
    np.testing.assert_allclose(got, method.distances(*features), rtol=0, atol=1e-6)


def check_jitted(shape, k, t, q, devices):
    """Bit for bit equal, on one device and shared by several."""
    features = make_features(*shape, exact=True)
    method = ECN(k=k, t=t, q=q)
    expected = method.distances(*features, dtype=np.float32)
    function = functools.partial(jitted.compute_distances, rerank=method, block_size=32)
    np.testing.assert_array_equal(function(*features), expected)
    for num in devices:
        np.testing.assert_array_equal(jax.jit(share(function, num))(*features), expected)


def test_jitted_distances_equal_sparse_products():
    check_jitted((70, 130), 25, 3, 8, devices=(4,))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "k", "t", "q"), SHAPES)
def test_jitted_distances_of_every_shape(shape, k, t, q):
    check_jitted(shape, k, t, q, devices=(2,))


def check_scores(got, expected):
    np.testing.assert_array_equal(got.ranks[expected.valid_queries, 0], expected.first_match_rank)
    np.testing.assert_allclose(got.ap[expected.valid_queries], expected.ap, rtol=1e-6)
    assert np.isnan(got.ap[expected.invalid_queries]).all()
    for name in ("mAP", "mINP", "cmc"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.parametrize(
    ("rerank", "options"),
    [
        (ECN(k=12), {}),
        (ECN(k=12), {"keep_junk": True, "ap": "trapezoid", "max_rank": 7}),
        (KReciprocal(k1=8, k2=3), {}),
        pytest.param(KReciprocal(k2=1), {"keep_junk": True}, marks=pytest.mark.slow),
        pytest.param(None, {"junk_pid": None, "distractor_pid": None}, marks=pytest.mark.slow),
    ],
)
def test_jitted_scores_equal_those_of_evaluate(rerank, options):
    case = make_case(40, 130, exact=not isinstance(rerank, KReciprocal))
    case[2][1:3] = 0, -1  # queries that nothing matches
    expected = evaluate(*case, rerank=rerank, **options)
    most = np.unique(case[3], return_counts=True)[1].max()
    function = functools.partial(
        jitted.evaluate, most_per_pid=int(most), rerank=rerank, block_size=32, **options
    )
    run = function if options else jax.jit(share(function, 2))
    check_scores(run(*case), expected)


@pytest.mark.slow
def test_sets_of_several_sizes_are_mapped_at_once():
    """Galleries become equally long by junk, which changes nothing."""
    cases = [make_case(10, 60, exact=True), make_case(10, 45, exact=True)]
    fill = (1, -1, 0)  # of features, pids and camids
    padded = [list(case) for case in cases]
    for i, value in zip((1, 3, 5), fill, strict=True):
        added = np.full_like(cases[1][i], value, shape=(15, *cases[1][i].shape[1:]))
        padded[1][i] = np.concatenate([cases[1][i], added])
    method = ECN(k=8)
    function = functools.partial(jitted.evaluate, most_per_pid=60, rerank=method)
    got = jax.vmap(function)(*(np.stack(both) for both in zip(*padded, strict=True)))
    for i, case in enumerate(cases):
        check_scores(jax.tree.map(lambda x, i=i: x[i], got), evaluate(*case, rerank=method))


def test_what_does_not_fit_is_not_a_number():
    case = make_case(10, 60, exact=True)
    most = np.bincount(case[3][case[3] > 0]).max()
    cut = jitted.evaluate(*case, most_per_pid=int(most) - 1)
    assert np.isnan([cut.mAP, cut.mINP, cut.cmc[0]]).all()
    assert np.isfinite(cut.ap).any()  # of queries whose matches are fewer
    visible = 10 + int((case[3] != -1).sum())
    assert np.isnan(jitted.evaluate(*case, most_per_pid=60, rerank=ECN(k=visible + 1)).mAP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rerank": ECN(method="origdist")}, "compiled are None, KReciprocal, and ECN with"),
        ({"rerank": AQE()}, "all with neighbors 'exact'"),
        ({"rerank": ECN(k=71)}, "k is 71, but there are only 70"),
        ({"ap": "mean"}, "one of standard, trapezoid"),
        ({"most_per_pid": 0}, "most_per_pid is 0"),
    ],
)
def test_bad_parameters(options, message, unchecked):
    case = make_case(10, 60, exact=True)
    with pytest.raises(ValueError, match=message):
        jitted.evaluate(*case, **{"most_per_pid": 60} | options)


@pytest.mark.slow
def test_no_array_of_all_pairs():
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    num = 20000
    features = [shape(num, 8)] * 2
    labels = [shape(num, dtype=jnp.int32)] * 4
    lowered = jitted.evaluate.lower(*features, *labels, most_per_pid=64, rerank=ECN())
    memory = compile_for_tpu.find_memory(lowered.compile())
    assert memory.temporaries < num * num  # float32 has four bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["--xla_disable_hlo_passes=fusion", "--xla_cpu_enable_fast_math=true"]
)
def test_scores_do_not_depend_on_what_is_fused(flag):
    subprocess.run(
        [sys.executable, "-m", "tests.retrieval.test_jitted"],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flag},
        check=True,
        timeout=120,
    )


if __name__ == "__main__":
    for sizes, method in (((8, 64), None), ((5, 40), ECN(k=12))):
        made = make_case(*sizes, exact=False, junk=False)
        scores = jitted.evaluate(*made, most_per_pid=64, rerank=method, distractor_pid=None)
        check_scores(scores, evaluate(*made, rerank=method, distractor_pid=None))
