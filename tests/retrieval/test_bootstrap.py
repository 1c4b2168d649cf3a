import numpy as np
import pytest

from mros_jax.retrieval import bootstrap, evaluate_distances


def make_result(seed=0, num_pids=30, queries_per_pid=4, strength=1.0):
    """Distances whose quality differs from person to person, so that queries of one are alike."""
    rng = np.random.default_rng(seed)
    query_pids = np.repeat(np.arange(1, num_pids + 1), queries_per_pid)
    gallery_pids = np.repeat(np.arange(1, num_pids + 1), 5)
    distance = rng.standard_normal((len(query_pids), len(gallery_pids)))
    quality = np.random.default_rng(99).exponential(strength, num_pids + 1)
    distance -= (query_pids[:, None] == gallery_pids) * quality[query_pids][:, None]
    return evaluate_distances(
        distance, query_pids, gallery_pids, np.ones_like(query_pids), 2 * np.ones_like(gallery_pids)
    )


def test_interval_equals_the_normal_approximation():
    result = make_result()
    low, high = bootstrap.estimate_intervals(
        result, rng=np.random.default_rng(0), samples=4000, by="query"
    )["mAP"]
    error = 1.96 * result.ap.std() / np.sqrt(len(result.ap))
    assert low == pytest.approx(result.mAP - error, abs=error / 10)
    assert high == pytest.approx(result.mAP + error, abs=error / 10)


def test_identities_make_wider_intervals_than_queries():
    result = make_result()
    width = {}
    for by in bootstrap.UNITS:
        low, high = bootstrap.estimate_intervals(result, rng=np.random.default_rng(0), by=by)["mAP"]
        assert low < result.mAP < high
        width[by] = high - low
    assert width["identity"] > 1.2 * width["query"]


def test_wider_confidence_makes_wider_intervals_and_the_seed_decides():
    result = make_result()

    def estimate(confidence):
        return bootstrap.estimate_intervals(
            result, rng=np.random.default_rng(5), samples=500, confidence=confidence
        )

    narrow, wide = estimate(0.5), estimate(0.99)
    for name in ("mAP", "mINP", "rank1", "rank5", "rank10"):
        assert wide[name][0] <= narrow[name][0] <= narrow[name][1] <= wide[name][1]
    assert estimate(0.5) == narrow


def compare(a, b, by="identity", samples=2000):
    tested = bootstrap.compare_paired(a, b, rng=np.random.default_rng(0), by=by, samples=samples)
    return {difference.metric: difference for difference in tested}


def test_a_result_does_not_differ_from_itself():
    result = make_result()
    same = compare(result, result)["mAP"]
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("by", bootstrap.UNITS)
def test_a_large_difference_is_found_and_has_a_direction(by):
    weak, strong = make_result(1, strength=0.5), make_result(2, strength=3.0)
    found = compare(weak, strong, by)["mAP"]
    assert found.difference == pytest.approx(strong.mAP - weak.mAP)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.01
    back = compare(strong, weak, by)["mAP"]
    assert back.high < 0
    assert back.p_value < 0.01


def test_noise_alone_is_rarely_significant():
    p_values = [
        compare(make_result(2 * i), make_result(2 * i + 1), samples=300)["mAP"].p_value
        for i in range(40)
    ]
    # Under the null hypothesis p is uniform: more than 8 of 40 below 0.05 has probability < 1e-3.
    assert sum(p < 0.05 for p in p_values) <= 8
    assert 0.25 < np.mean(p_values) < 0.75


def test_bad_input():
    result = make_result()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="different queries"):
        bootstrap.compare_paired(result, make_result(num_pids=20), rng=rng)
    with pytest.raises(ValueError, match="samples is 0"):
        bootstrap.estimate_intervals(result, rng=rng, samples=0)
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap.estimate_intervals(result, rng=rng, confidence=95)
    with pytest.raises(ValueError, match="by is 'camera'; expected one of query, identity"):
        bootstrap.estimate_intervals(result, rng=rng, by="camera")
