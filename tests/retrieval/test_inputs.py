import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.retrieval import AQE, ECN, KReciprocal, Side, evaluate, rerank
from mros_jax.retrieval.inputs import check_ids

BIG = 2**63 - 1


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, BIG], [1, BIG]),
        ([-(2**63), -1], [-(2**63), -1]),
        (np.array([1, BIG], np.uint64), [1, BIG]),
        (np.array([1.0, 2**53 - 1]), [1, 2**53 - 1]),
        (np.array([3, 4], np.float16), [3, 4]),
        (np.array([True, False]), [1, 0]),
        (np.array(["0007", " -1"]), [7, -1]),
        (np.array([b"12", b"+3"]), [12, 3]),
        (np.array([np.int8(5), "6", 7.0, np.uint64(BIG)], object), [5, 6, 7, BIG]),
    ],
)
def test_whole_numbers_of_any_type_are_exact(ids, expected):
    got = check_ids(ids, "pids", len(expected))
    assert got.dtype == np.int64
    assert got.tolist() == expected


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, 10**19], np.uint64),
        [1, 10**19],
        [1, -(2**63) - 1],
        np.array([1.0, 2.0**53]),
        np.array([1.0, 2.0**24], np.float32),
        np.array([1.0, 2048.0], np.float16),
        np.array([1.0, 1.5]),
        np.array([1.0, np.nan]),
        np.array([1.0, np.inf]),
        ["1", "a"],
        ["1", "9" * 30],
        ["1", "²"],
        ["1", ""],
        [1, None],
        [1, 2.5],
        [1, np.nan],
        [1, 1j],
    ],
    ids=str,
)
def test_labels_that_are_no_whole_number_are_named(ids):
    with pytest.raises(UserError, match=r"pids\[1\] is .*; expected whole numbers"):
        check_ids(ids, "pids", 2)


def test_dates_and_other_shapes_are_refused():
    with pytest.raises(UserError, match=r"pids\[0\] is"):
        check_ids(np.array(["2020-01-01"], "datetime64[D]"), "pids", 1)
    with pytest.raises(UserError, match=r"shape \(1, 2\); expected \(2,\)"):
        check_ids([[1, 2]], "pids", 2)


def test_large_labels_stay_apart():
    labels = [[BIG, BIG - 1], [BIG - 1, BIG], [0, 0], [1, 1]]
    eye = np.eye(2)
    assert evaluate(eye, eye[::-1], *labels).mAP == 1


def test_sides_equal_six_arrays():
    eye = np.eye(3)
    query, gallery = Side(eye[:2], [7, 8], [1, 1]), Side(eye, [7, 9, 8], [2, 2, 2])
    six = evaluate(eye[:2], eye, [7, 8], [7, 9, 8], [1, 1], [2, 2, 2])
    assert evaluate(query, gallery).to_dict() == six.to_dict()
    with pytest.raises(TypeError, match="two Side, or six arrays"):
        evaluate(query, gallery, [1])


def test_ranks_beyond_the_curve_are_absent():
    eye = np.eye(3)
    result = evaluate(eye[:1], eye, [8], [7, 9, 8], [1], [2, 2, 2], max_rank=2)
    assert (result.rank(1), result.rank(2), result.rank(3)) == (0.0, 0.0, None)
    assert "Rank-5" not in str(result)
    # The curve is defined beyond the gallery: it stays where it is.
    assert evaluate(eye[:1], eye, [8], [7, 9, 8], [1], [2, 2, 2]).rank(10) == 1.0


def test_parse_reranks():
    assert rerank.parse([]) == ()
    assert rerank.parse(["ecn"], {"ecn": {"k": 5}, "aqe": {"k": 2}}) == (ECN(k=5),)
    assert rerank.parse(["aqe", "k_reciprocal"]) == (AQE(), KReciprocal())


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["ecm"], {}, "no re-ranking 'ecm'; expected some of ecn, k_reciprocal, aqe"),
        (["ecn"], {"ecm": {"k": 5}}, "no re-ranking 'ecm'"),
        (["ecn"], {"k": 5}, "no re-ranking 'k'"),
        (["ecn"], {"ecn": {"foo": 1}}, r"ecn has no parameter 'foo'; expected .*k \(25\), t \(3\)"),
        (["ecn"], [1], r"\[1\]; expected them by method"),
        (["ecn"], {"ecn": 5}, "ecn has parameters 5"),
        (["ecn"], {"aqe": {"k": 0}}, "aqe: k is 0"),
        (["ecn", "ecn"], {}, "named twice"),
        ("ecn", {}, "expected a list"),
        (["ecn"], {"ecn": {"k": 2.5}}, "ecn: k is 2.5; expected a whole number"),
        (["ecn"], {"ecn": {"k": True}}, "ecn: k is True"),
        (["ecn"], {"ecn": {"method": "foo"}}, "ecn: method is 'foo'"),
        (["ecn"], {"ecn": {"method": ["foo"]}}, "ecn: method is"),
        (["ecn"], {"ecn": {"neighbors": 3}}, "neighbors is 3; expected text"),
        (["ecn"], {"ecn": {"neighbors": "faiss:a:b:c"}}, "'faiss:INDEX:PARAMETERS'"),
        (["k_reciprocal"], {"k_reciprocal": {"lambda_value": "x"}}, "lambda_value is 'x'"),
        (["k_reciprocal"], {"k_reciprocal": {"lambda_value": float("nan")}}, "lambda_value is nan"),
        (["aqe"], {"aqe": {"alpha": float("inf")}}, "alpha is inf"),
    ],
)
def test_what_parse_refuses(names, options, message):
    with pytest.raises(UserError, match=message):
        rerank.parse(names, options)


def test_check_knows_every_parameter():
    ECN(k=5, t=4, q=4).check(2, 3)
    for method, message in (
        (ECN(k=6), "ecn: k is 6, but there are only 5 images"),
        (ECN(k=2, t=5, q=1), "ecn: t is 5, but there are only 4"),
        (ECN(k=2, t=1, q=5), "ecn: q is 5, but there are only 4"),
        (KReciprocal(k1=5), "k1 is 5, but there are only 4"),
        (AQE(), "aqe: k is 5, but there are only 3 gallery images"),
    ):
        with pytest.raises(UserError, match=message):
            method.check(2, 3)
