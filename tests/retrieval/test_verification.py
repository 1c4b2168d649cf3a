import numpy as np
import pytest

from mros_jax.retrieval import compute_distances, verify, verify_distances

LABELS = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")


def make_data(seed=0, num_query=30, num_gallery=150):
    rng = np.random.default_rng(seed)
    pids = {"query": rng.integers(1, 9, num_query), "gallery": rng.integers(-1, 9, num_gallery)}
    centres = rng.standard_normal((10, 8))
    data = {}
    for name, p in pids.items():
        noise = rng.standard_normal((len(p), 8))
        data[f"{name}_features"] = (centres[p] + noise).astype(np.float32)
        data[f"{name}_pids"] = p
        data[f"{name}_camids"] = rng.integers(0, 3, len(p))
    return data


def split_pairs(distance, data):
    """Genuine and impostor distances by the definition."""
    same = data["query_pids"][:, None] == data["gallery_pids"]
    camera = data["query_camids"][:, None] == data["gallery_camids"]
    counts = (data["gallery_pids"] != -1)[None] & ~(same & camera)
    return distance[same & counts], distance[~same & counts], same, counts


def test_rates_equal_their_definition():
    data = make_data()
    features = data["query_features"], data["gallery_features"]
    distance = compute_distances(*features)
    genuine, impostor, _, _ = split_pairs(distance, data)
    result = verify_distances(distance, *(data[name] for name in LABELS))
    assert result.num_genuine == len(genuine)
    assert result.num_impostor == len(impostor)
    for threshold, fpr, tpr in zip(result.thresholds, result.fpr, result.tpr, strict=True):
        assert tpr == pytest.approx((genuine <= threshold).mean())
        assert fpr == pytest.approx((impostor <= threshold).mean())
    np.testing.assert_allclose(result.fnr, 1 - result.tpr)
    for point in result.tpr_at_fpr:
        assert point.false_rate <= point.target
        assert (impostor <= point.threshold).mean() == pytest.approx(point.false_rate)
        assert (genuine <= point.threshold).mean() == pytest.approx(point.true_rate)
        worse = genuine[genuine > point.threshold].min()
        assert (impostor <= worse).mean() > point.target
    from_features = verify(*features, *(data[name] for name in LABELS))
    np.testing.assert_allclose(from_features.thresholds, result.thresholds, rtol=1e-5)
    np.testing.assert_allclose(from_features.fpr, result.fpr, atol=1e-3)


def test_true_positive_rate_is_the_right_way_round():
    """Harder targets leave less: a table that rises towards 1e-4 would be turned round."""
    result = verify(*(make_data()[n] for n in ("query_features", "gallery_features", *LABELS)))
    rates = [point.true_rate for point in result.tpr_at_fpr]
    assert [point.target for point in result.tpr_at_fpr] == [1e-1, 1e-2, 1e-3, 1e-4]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]


def verify_one(distance, pids, **kwargs):
    """One query, pid 1, camera 1; the gallery from camera 2."""
    return verify_distances(
        np.asarray([distance], float), [1], pids, [1], [2] * len(pids), **kwargs
    )


def test_equal_error_rate_by_hand():
    # At 0.4: one of two impostors accepted, one of two genuine rejected.
    result = verify_one([0.1, 0.2, 0.4, 0.6], [1, 2, 1, 2], rates=[0.5])
    assert result.eer == pytest.approx(0.5)
    assert 0.1 <= result.eer_threshold <= 0.4
    # Perfectly apart, and perfectly the wrong way round.
    assert verify_one([0.1, 0.2, 0.8, 0.9], [1, 1, 2, 2]).eer == 0
    assert verify_one([0.8, 0.9, 0.1, 0.2], [1, 1, 2, 2]).eer == 1


def test_equal_error_rate_of_chance_is_one_half():
    rng = np.random.default_rng(0)
    result = verify_one(rng.permutation(4000) / 4000.0, [1] * 2000 + [2] * 2000)
    assert result.eer == pytest.approx(0.5, abs=0.02)


def test_ties_between_genuine_and_impostor_are_accepted_together():
    result = verify_one([0.3, 0.3, 0.5], [1, 2, 2], rates=[0.5, 0.4])
    assert (result.tpr.tolist(), result.fpr.tolist()) == ([1.0], [0.5])
    reached, not_reached = result.tpr_at_fpr
    assert (reached.true_rate, reached.threshold) == (1.0, 0.3)
    assert (not_reached.true_rate, not_reached.threshold) == (0.0, None)


def test_open_set_by_hand():
    distance = np.array(
        [
            [0.1, 0.7, 0.8],  # found at 0.1; without its match the nearest is at 0.7
            [0.6, 0.4, 0.9],  # pid 2, found at 0.4; otherwise 0.6
            [0.5, 0.9, 0.6],  # pid 3: a stranger is nearest, at 0.5
            [0.3, 0.8, 0.9],  # pid 9 is unknown: nearest at 0.3
        ]
    )
    result = verify_distances(
        distance, [1, 2, 3, 9], [1, 2, 3], [1] * 4, [2] * 3, rates=[0.25, 0.2]
    )
    assert (result.num_known, result.num_unknown) == (3, 4)
    quarter, fifth = result.dir_at_far
    assert (quarter.threshold, quarter.true_rate, quarter.false_rate) == (0.4, 2 / 3, 0.25)
    assert (fifth.threshold, fifth.true_rate, fifth.false_rate) == (0.1, 1 / 3, 0.0)


def test_euclidean_thresholds_are_distances():
    data = make_data(1)
    features = data["query_features"], data["gallery_features"]
    labels = [data[name] for name in LABELS]
    for normalize in (True, False):
        from_features = verify(*features, *labels, metric="euclidean", normalize=normalize)
        distance = compute_distances(*features, metric="euclidean", normalize=normalize)
        given = verify_distances(distance, *labels)
        np.testing.assert_allclose(from_features.thresholds, given.thresholds, rtol=1e-6)
        assert from_features.eer == given.eer


def test_to_dict_is_plain_and_short():
    data = make_data()
    result = verify(*(data[n] for n in ("query_features", "gallery_features", *LABELS)))
    values = result.to_dict(points=10)
    assert len(values["fpr"]) == len(values["fnr"]) == 10
    assert values["tpr"][-1] == result.tpr[-1] == 1
    assert "EER" in str(result)


def test_bad_input():
    with pytest.raises(ValueError, match="no impostor pairs"):
        verify_one([0.1], [1])
    with pytest.raises(ValueError, match="true match"):
        verify_one([0.1], [2])
    with pytest.raises(ValueError, match=r"rates is 1\.5"):
        verify_one([0.1, 0.2], [1, 2], rates=[1.5])
    with pytest.raises(ValueError, match="NaN"):
        verify_one([np.nan, 0.2], [1, 2])
