"""Scores do not depend on the scale of the descriptors, however far from 1 it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax.errors import UserError
from mros_jax.retrieval import (
    AQE,
    ECN,
    KReciprocal,
    Side,
    compute_distances,
    evaluate,
    evaluate_distances,
    metrics,
    verify,
)

RNG = np.random.default_rng(0)
LABELS = [RNG.integers(1, 5, 12), RNG.integers(1, 5, 50), RNG.integers(0, 3, 12)]
LABELS.append(RNG.integers(0, 3, 50))
QUERY, GALLERY = RNG.standard_normal((12, 6)), RNG.standard_normal((50, 6))
METHODS = (None, ECN(k=8), KReciprocal(k1=8), AQE(k=3))
SCALES = st.floats(-30, 30).map(lambda power: 10.0**power)


def scale(array, factor, dtype):
    """Times the factor, in a type that holds it; no type may change a digit of float32."""
    array = array.astype(np.float32).astype(np.float64) * factor
    return array.astype(dtype)


def assert_same(first, second):
    np.testing.assert_array_equal(first.first_match_rank, second.first_match_rank)
    np.testing.assert_allclose(first.ap, second.ap, rtol=1e-12)


@settings(max_examples=10, deadline=None)
@given(query=SCALES, gallery=SCALES, dtype=st.sampled_from(["float32", "float64"]), data=st.data())
def test_normalized_scores_ignore_scales(query, gallery, dtype, data):
    method = data.draw(st.sampled_from(METHODS))
    metric = data.draw(st.sampled_from(["cosine", "euclidean"]))
    rows = 10.0 ** data.draw(st.sampled_from([0, 1])) * np.ones((50, 1))
    rows[::7] *= 1e-4
    got = evaluate(
        scale(QUERY, query, dtype), scale(GALLERY, gallery * rows, dtype), *LABELS,
        metric=metric, rerank=method,
    )  # fmt: skip
    assert_same(got, evaluate(QUERY, GALLERY, *LABELS, metric=metric, rerank=method))


@settings(max_examples=10, deadline=None)
@given(factor=SCALES, dtype=st.sampled_from(["float32", "float64"]), data=st.data())
def test_unnormalized_scores_ignore_a_common_scale(factor, dtype, data):
    metric = data.draw(st.sampled_from(["cosine", "euclidean"]))
    options = {"metric": metric, "normalize": False}
    features = [scale(array, factor, dtype) for array in (QUERY, GALLERY)]
    assert_same(
        evaluate(*features, *LABELS, **options), evaluate(QUERY, GALLERY, *LABELS, **options)
    )
    power = 2 if metric == "cosine" else 1
    expected = compute_distances(QUERY, GALLERY, **options) * np.float64(factor) ** power
    tolerance = 1e-5 * np.float64(factor) ** power
    np.testing.assert_allclose(
        compute_distances(*features, **options), expected, rtol=1e-5, atol=tolerance
    )
    verified = verify(*features, *LABELS, **options)
    assert verified.eer == pytest.approx(verify(QUERY, GALLERY, *LABELS, **options).eer)


@pytest.mark.parametrize("factor", [1e-21, 1e-42, 1e25])
def test_numbers_at_the_ends_of_float32(factor):
    control = evaluate(QUERY, GALLERY, *LABELS)
    scaled = [
        (array * 2.0 ** np.round(np.log2(factor))).astype(np.float32) for array in (QUERY, GALLERY)
    ]
    got = evaluate(*scaled, *LABELS)
    if factor > 1e-40:  # below, float32 keeps few digits
        assert_same(got, control)
    on_device = evaluate(*(jnp.asarray(array) for array in scaled), *LABELS)
    assert_same(on_device, got)


@pytest.mark.parametrize("factor", [1e200, 1e-200, 1e306])
def test_float64_and_whole_numbers_beyond_float32(factor):
    control = evaluate(QUERY, GALLERY, *LABELS)
    assert_same(evaluate(QUERY * factor, GALLERY * factor, *LABELS), control)
    assert_same(evaluate(QUERY * factor, GALLERY, *LABELS), control)
    assert_same(
        evaluate(QUERY * factor, GALLERY * factor, *LABELS, normalize=False),
        evaluate(QUERY, GALLERY, *LABELS, normalize=False),
    )
    with pytest.raises(UserError, match=r"float64 cannot hold the cosine distances of 12 of 12"):
        compute_distances(QUERY * factor, GALLERY * factor, normalize=False)


def test_whole_numbers():
    features = [np.round(array * 2**40).astype(np.int64) * 2**20 for array in (QUERY, GALLERY)]
    assert_same(evaluate(*features, *LABELS), evaluate(QUERY, GALLERY, *LABELS))


def test_unnormalized_rows_too_far_apart_are_refused():
    gallery = GALLERY.copy()
    gallery[7] *= 1e-40
    with pytest.raises(UserError, match="further apart than float32 can hold"):
        evaluate(QUERY, gallery, *LABELS, normalize=False)
    gallery[7] = 0
    evaluate(QUERY, gallery, *LABELS, normalize=False)  # exactly zero has a place
    evaluate(QUERY * 1e-30, gallery * 1e-30, *LABELS, normalize=False)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-40])
def test_distances_without_a_place_are_refused(value):
    distance = RNG.random((12, 50)).astype(np.float32)
    distance[4, 5] = value
    with pytest.raises(UserError, match=r"distance holds .* in row 4"):
        evaluate_distances(distance, *LABELS)
    evaluate_distances(np.where(np.isfinite(distance), distance, 0).astype(np.float64), *LABELS)


def test_whole_distances_are_not_rounded():
    distance = RNG.integers(0, 2**20, (12, 50))
    assert_same(
        evaluate_distances(distance, *LABELS), evaluate_distances(distance / 2**20, *LABELS)
    )
    with pytest.raises(UserError, match=r"beyond 2\*\*53"):
        evaluate_distances(distance + 2**54, *LABELS)


def test_a_rank_that_cannot_be_is_an_internal_error(monkeypatch):
    def count(distance, rows, labels):
        return np.zeros(labels.matches.lengths[rows].sum(), np.int64)

    monkeypatch.setattr(metrics, "count_on_host", count)
    with pytest.raises(RuntimeError, match="internal error") as error:
        evaluate(Side(QUERY, LABELS[0], LABELS[2]), Side(GALLERY, LABELS[1], LABELS[3]))
    assert not isinstance(error.value, UserError)
