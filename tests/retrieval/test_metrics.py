import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax.retrieval import (
    ECN,
    Placement,
    Result,
    blocks,
    compute_distances,
    evaluate,
    evaluate_distances,
    metrics,
)
from mros_jax.retrieval.labels import check_labels
from mros_jax.retrieval.metrics import rank_by_group
from tests.retrieval.test_every_shape import Elsewhere

GOLDEN = pathlib.Path(__file__).parents[1] / "data"
LABELS = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")
DATA = ("query_features", "gallery_features", *LABELS)


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request):
    with np.load(GOLDEN / f"retrieval_{request.param}.npz") as file:
        return dict(file)


def labels_of(data):
    return [data[name] for name in LABELS]


def check_golden(result, golden):
    assert np.array_equal(result.valid_queries, np.flatnonzero(golden["valid_query"]))
    np.testing.assert_allclose(result.cmc, golden["cmc50"], atol=1e-6)
    np.testing.assert_allclose(result.ap, golden["ap_standard"], atol=1e-6)
    np.testing.assert_allclose(result.inp, golden["inp"], atol=1e-6)
    assert result.mAP == pytest.approx(golden["ap_standard"].mean(), abs=1e-9)
    assert result.mINP == pytest.approx(golden["inp"].mean(), abs=1e-9)


@pytest.mark.parametrize("kind", [Placement, Elsewhere])
def test_features_equal_golden(golden, kind):
    check_golden(evaluate(*(golden[name] for name in DATA), placement=kind()), golden)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_equal_golden(golden, dtype):
    check_golden(
        evaluate_distances(golden["cosine_distance"].astype(dtype), *labels_of(golden)), golden
    )


def test_trapezoid_equals_golden(golden):
    result = evaluate(*(golden[name] for name in DATA), ap="trapezoid")
    expected = golden["ap_trapezoid"][result.valid_queries]
    np.testing.assert_allclose(result.ap, expected, atol=1e-6)
    assert result.protocol["ap"] == "trapezoid"


def test_normalised_euclidean_equals_cosine(golden):
    check_golden(evaluate(*(golden[name] for name in DATA), metric="euclidean"), golden)


@pytest.mark.parametrize("kind", [Placement, Elsewhere])
@pytest.mark.parametrize("name", ["ecn_rankdist_k25_t3_q8", "kreciprocal_k20_6_l0.3"])
def test_reranked_mAP_equals_golden(golden, name, kind):
    method = "ecn" if name.startswith("ecn") else "k_reciprocal"
    result = evaluate(*(golden[key] for key in DATA), rerank=method, placement=kind())
    assert result.mAP == pytest.approx(float(golden[f"mAP_after_{name}"]), abs=1e-6)


def evaluate_one(distance, pids, camids, *, query_pid=1, query_camid=1, **kwargs):
    return evaluate_distances(
        np.asarray([distance], np.float32), [query_pid], pids, [query_camid], camids, **kwargs
    )


def test_ties_are_ordered_by_gallery_index():
    # All equal: the matches are at gallery places 2 and 4.
    result = evaluate_one([0.5] * 4, [2, 1, 3, 1], [2, 2, 2, 2])
    assert result.first_match_rank.tolist() == [2]
    assert result.ap.tolist() == [(1 / 2 + 2 / 4) / 2]
    assert result.inp.tolist() == [2 / 4]


def test_one_match_by_hand():
    result = evaluate_one([0.3, 0.1, 0.2], [1, 2, 3], [2, 2, 2], max_rank=5)
    assert result.cmc.tolist() == [0, 0, 1, 1, 1]
    assert result.ap.tolist() == [1 / 3]


@pytest.mark.parametrize("first", [0, 3, 3000, 9000])
def test_ranks_of_long_and_short_rows(first):
    """Two matches among 10,000 images, the nearer one with so many images before it."""
    distance = np.random.default_rng(0).permutation(10_000)
    pids = np.full(10_000, 2)
    pids[[np.flatnonzero(distance == rank)[0] for rank in (first, first + 20)]] = 1
    result = evaluate_one(distance, pids, np.full(10_000, 2))
    assert result.first_match_rank.tolist() == [first + 1]
    assert result.inp.tolist() == [2 / (first + 21)]


def test_trapezoid_by_hand():
    # Matches at ranks 1 and 3: (1 + 1) / 2 and (1/2 + 2/3) / 2.
    result = evaluate_one([0.1, 0.2, 0.3], [1, 2, 1], [2, 2, 2], ap="trapezoid")
    assert result.mAP == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)


def test_same_pid_same_camera_is_removed_and_other_same_camera_is_not():
    # Before the match: its own camera's shot (removed) and a stranger of the same camera (stays).
    result = evaluate_one([0.1, 0.2, 0.3], [1, 2, 1], [1, 1, 2])
    assert result.first_match_rank.tolist() == [2]


def test_junk_does_not_count_and_distractors_do():
    assert evaluate_one([0.1, 0.3], [-1, 1], [2, 2]).first_match_rank.tolist() == [1]
    assert evaluate_one([0.1, 0.3], [0, 1], [2, 2]).first_match_rank.tolist() == [2]


def test_distractors_never_match_unless_pid_zero_is_a_person():
    with pytest.raises(ValueError, match="distractor_pid=None"):
        evaluate_one([0.1], [0], [2], query_pid=0)
    assert evaluate_one([0.1], [0], [2], query_pid=0, distractor_pid=None).mAP == 1


def test_query_without_match_is_left_out():
    result = evaluate_distances(
        np.array([[0.1, 0.2], [0.1, 0.2]], np.float32), [1, 9], [1, 2], [1, 1], [2, 2]
    )
    assert result.invalid_queries.tolist() == [1]
    assert result.valid_queries.tolist() == [0]
    assert result.mAP == 1
    assert result.protocol["num_query"] == 2
    assert result.protocol["num_valid_queries"] == 1


@pytest.mark.parametrize(
    ("pids", "camids", "why"),
    [
        ([1, 1], [1, 1], "all queries have camera 1"),
        ([-1, -1], [2, 2], "all 2 gallery images are junk"),
        ([2, 3], [2, 2], "no query pid"),
    ],
)
def test_no_valid_query_says_why(pids, camids, why):
    with pytest.raises(ValueError, match=why):
        evaluate_one([0.1, 0.2], pids, camids)


def rank_by_sorting(distance, data, ap):
    """The protocol as it is written: a stable sort of each row."""
    scores = []
    for i, row in enumerate(distance):
        order = np.argsort(row, kind="stable")
        pids, camids = data["gallery_pids"][order], data["gallery_camids"][order]
        same = pids == data["query_pids"][i]
        keep = (pids != -1) & ~(same & (camids == data["query_camids"][i]))
        hit = same[keep] & (pids[keep] != 0)
        if hit.any():
            r = np.flatnonzero(hit) + 1
            n = np.arange(1, len(r) + 1)
            before = np.array(
                [1 if x == 1 else (j - 1) / (x - 1) for j, x in zip(n, r, strict=True)]
            )
            scores.append(np.mean(n / r if ap == "standard" else (n / r + before) / 2))
    return np.array(scores)


def make_data(seed, num_query=40, num_gallery=200, pids=12, cameras=3, features=6):
    rng = np.random.default_rng(seed)
    return {
        "query_features": rng.standard_normal((num_query, features), np.float32),
        "gallery_features": rng.standard_normal((num_gallery, features), np.float32),
        "query_pids": rng.integers(1, pids, num_query),
        "gallery_pids": rng.integers(-1, pids, num_gallery),
        "query_camids": rng.integers(0, cameras, num_query),
        "gallery_camids": rng.integers(0, cameras, num_gallery),
    }


@pytest.mark.parametrize("ap", ["standard", "trapezoid"])
def test_many_ties_equal_a_stable_sort(ap):
    data = make_data(0)
    distance = np.random.default_rng(1).integers(0, 8, (40, 200)).astype(np.float32)
    result = evaluate_distances(distance, *labels_of(data), ap=ap)
    np.testing.assert_allclose(result.ap, rank_by_sorting(distance, data, ap), atol=1e-12)


def test_ranks_by_group_equal_those_of_each_group_alone():
    data = make_data(4)
    distance = np.random.default_rng(1).integers(0, 8, (40, 200)).astype(np.float32)
    arrays = {name: data[name] for name in LABELS}
    labels = check_labels(**arrays, num_query=40, num_gallery=200, junk_pid=None, distractor_pid=0)
    groups = data["gallery_camids"]
    rows = np.array([3, 0, 21])
    among_all, grouped = rank_by_group(distance[rows], rows, labels, groups)
    row, column = labels.matches.cells(rows)
    for i, match, rank, rank_in_group in zip(row, column, among_all, grouped, strict=True):
        order = np.argsort(distance[rows[i]], kind="stable")
        order = order[~np.isin(order, labels.removed.of(rows[i]))]
        assert rank == 1 + np.flatnonzero(order == match)[0]
        own = order[groups[order] == groups[match]]
        assert rank_in_group == 1 + np.flatnonzero(own == match)[0]


def test_float64_distances_are_not_rounded():
    # Apart only in float64; in float32 the tie would put the stranger first.
    result = evaluate_distances(np.array([[0.5 + 1e-12, 0.5]]), [1], [2, 1], [1], [2, 2])
    assert result.first_match_rank.tolist() == [1]


def test_unnormalised_metrics_equal_numpy():
    data = make_data(2)
    a, b = data["query_features"].astype(float), data["gallery_features"].astype(float)
    expected = {
        ("euclidean", False): np.linalg.norm(a[:, None] - b, axis=2),
        ("cosine", False): -a @ b.T,
    }
    for (metric, normalize), distance in expected.items():
        got = compute_distances(
            data["query_features"], data["gallery_features"], metric=metric, normalize=normalize
        )
        np.testing.assert_allclose(got, distance, atol=2e-6)
        result = evaluate(*(data[n] for n in DATA), metric=metric, normalize=normalize)
        np.testing.assert_allclose(
            result.ap, rank_by_sorting(distance, data, "standard"), atol=1e-12
        )


def test_devices_and_blocks_do_not_change_the_result():
    assert jax.local_device_count() == 4
    data = make_data(3, num_query=150)
    features = [data[name] for name in DATA]
    one = evaluate(*features, placement=Placement(devices=jax.local_devices()[:1]))
    four = evaluate(*features, placement=Placement(block_size=32))
    assert one.to_dict() == four.to_dict()


def test_threads_that_count_do_not_change_the_result(monkeypatch):
    data = make_data(3, num_query=150)
    distance = compute_distances(data["query_features"], data["gallery_features"])
    placement = Placement(block_size=32)
    one = evaluate_distances(distance, *labels_of(data), placement=placement)
    monkeypatch.setattr(metrics, "_SHORT", 0)
    several = evaluate_distances(distance, *labels_of(data), placement=placement)
    assert one.to_dict() == several.to_dict()


def test_rows_are_copied_only_where_they_must_be():
    array = np.arange(40, dtype=np.float32).reshape(10, 4)
    following = blocks.take_rows(array, np.arange(3, 7))
    assert np.shares_memory(following, array)
    np.testing.assert_array_equal(following, array[3:7])
    apart = blocks.take_rows(array, np.array([3, 4, 6]))
    np.testing.assert_array_equal(apart, array[[3, 4, 6]])
    assert np.asarray(apart).ctypes.data % 64 == 0
    assert blocks.take_rows(array, np.zeros(0, np.int64)).shape == (0, 4)


def test_blocks_of_wide_descriptors_are_small_on_a_processor(monkeypatch):
    data = make_data(3, num_query=300, features=4096)
    most = []
    original = blocks.BlockMap.__call__

    def call(self, *rows):
        most.append(len(rows[0]))
        return original(self, *rows)

    monkeypatch.setattr(blocks.BlockMap, "__call__", call)
    evaluate(*(data[name] for name in DATA), placement=Placement(devices=jax.local_devices()[:1]))
    assert max(most) <= 64
    assert blocks.choose_block(150, 4096) > 256  # on accelerators
    # Neither the gallery nor what is asked for is forgotten.
    assert blocks.choose_block(50_000, 512, host=True) * 50_000 * 4 <= 32e6
    assert blocks.choose_block(15_913, 512, 200, host=True) == 200


def test_work_is_spread_over_all_devices(monkeypatch):
    used = []
    original = blocks.BlockMap.__call__

    def call(self, *rows):
        out = original(self, *rows)
        used.append({d for leaf in jax.tree.leaves(out) for d in leaf.sharding.device_set})
        return out

    monkeypatch.setattr(blocks.BlockMap, "__call__", call)
    data = make_data(3)
    evaluate(*(data[name] for name in DATA))
    assert used
    assert all(devices == set(jax.local_devices()) for devices in used)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_properties(seed):
    data = make_data(5)
    rng = np.random.default_rng(seed)
    before = evaluate(*(data[name] for name in DATA))

    def same(changed):
        after = evaluate(*((data | changed)[name] for name in DATA))
        np.testing.assert_array_equal(after.ap, before.ap)
        np.testing.assert_array_equal(after.cmc, before.cmc)
        assert after.mINP == before.mINP

    order = rng.permutation(200)
    gallery = ("gallery_features", "gallery_pids", "gallery_camids")
    same({name: data[name][order] for name in gallery})  # no ties here
    scale = np.float32(2.0) ** rng.integers(-8, 8, (200, 1))
    same({"gallery_features": data["gallery_features"] * scale})
    junk = np.flatnonzero(data["gallery_pids"] == -1)
    again = np.concatenate([np.arange(200), rng.choice(junk, 30)])
    same({name: data[name][again] for name in gallery})


def test_accepts_jax_arrays_and_half_precision():
    data = make_data(6)
    plain = evaluate(*(data[name] for name in DATA))
    moved = {name: jnp.asarray(data[name]) for name in DATA}
    assert evaluate(*(moved[name] for name in DATA)).to_dict() == plain.to_dict()
    rounded = data | {
        name: data[name].astype(np.float16) for name in ("query_features", "gallery_features")
    }
    assert evaluate(*(rounded[name] for name in DATA)).mAP == pytest.approx(plain.mAP, abs=0.01)


def test_max_rank_beyond_the_gallery_is_flat():
    result = evaluate_one([0.3, 0.1], [1, 2], [2, 2], max_rank=4)
    assert result.cmc.tolist() == [0, 1, 1, 1]


def test_json_round_trip():
    data = make_data(7)
    result = evaluate(*(data[name] for name in DATA), rerank=ECN(k=10))
    again = Result.from_dict(json.loads(result.to_json()))
    assert again.to_dict() == result.to_dict()
    assert result.protocol["rerank_options"] == {
        "k": 10,
        "t": 3,
        "q": 8,
        "method": "rankdist",
        "neighbors": "exact",
    }
    assert "mAP" in str(result)
    with pytest.raises(ValueError, match="lacks inp"):
        Result.from_dict({k: v for k, v in result.to_dict().items() if k != "inp"})


def test_keep_junk_changes_only_reranking():
    data = make_data(8)
    plain = [evaluate(*(data[n] for n in DATA), keep_junk=keep).mAP for keep in (False, True)]
    assert plain[0] == plain[1]
    ecn = [
        evaluate(*(data[n] for n in DATA), rerank="ecn", keep_junk=keep) for keep in (False, True)
    ]
    assert ecn[0].mAP != ecn[1].mAP
    assert ecn[0].protocol["junk"] != ecn[1].protocol["junk"]
    assert len(ecn[0].ap) == len(ecn[1].ap)


BAD = {
    "NaN": ({"gallery_features": (3, np.nan)}, "gallery_features holds NaN.*1 of 200 rows: 3"),
    "infinite": ({"query_features": (2, np.inf)}, "query_features holds NaN.*: 2"),
    "zero": ({"gallery_features": (7, 0.0)}, "gallery_features is zero in 1 of 200 rows: 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_name_their_rows(case):
    changes, message = BAD[case]
    data = make_data(9)
    for name, (row, value) in changes.items():
        data[name] = data[name].copy()
        data[name][row] = value
    with pytest.raises(ValueError, match=message):
        evaluate(*(data[name] for name in DATA))


def test_zero_features_are_fine_unnormalised():
    data = make_data(9)
    data["gallery_features"][7] = 0
    evaluate(*(data[name] for name in DATA), metric="euclidean", normalize=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pids": np.array(["a"] * 40)}, r"query_pids\[0\] is .*whole numbers"),
        ({"query_pids": np.full(40, 1.5)}, "whole numbers"),
        ({"gallery_camids": np.zeros(3, int)}, r"gallery_camids has shape \(3,\).*\(200,\)"),
        ({"gallery_features": np.ones((200, 5), np.float32)}, "6 columns, gallery_features 5"),
        ({"query_features": np.ones(40, np.float32)}, r"query_features has shape \(40,\)"),
        ({"query_features": np.ones((0, 6), np.float32)}, "query_features is empty"),
        ({"query_features": np.array([["x"] * 6] * 40)}, "expected numbers"),
    ],
)
def test_bad_arrays(change, message):
    data = make_data(10) | change
    with pytest.raises(ValueError, match=message):
        evaluate(*(data[name] for name in DATA))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "l1"}, "metric is 'l1'; expected one of cosine, euclidean"),
        ({"ap": "area"}, "one of standard, trapezoid"),
        ({"rerank": "magic"}, "no re-ranking 'magic'; expected some of ecn"),
        ({"max_rank": 0}, "max_rank is 0"),
    ],
)
def test_bad_options(options, message):
    data = make_data(10)
    with pytest.raises(ValueError, match=message):
        evaluate(*(data[name] for name in DATA), **options)


def test_bad_distances():
    data = make_data(11)
    distance = np.ones((40, 200), np.float32)
    distance[4, 5] = np.nan
    with pytest.raises(ValueError, match=r"distance holds NaN.* in row 4"):
        evaluate_distances(distance, *labels_of(data))
    with pytest.raises(ValueError, match=r"query_pids has shape \(40,\)"):
        evaluate_distances(np.ones((41, 200)), *labels_of(data))
    with pytest.raises(ValueError, match="distance has shape"):
        evaluate_distances(np.ones(3), *labels_of(data))
