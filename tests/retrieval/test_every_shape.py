"""Scores of many shapes, small ones above all, against float64 sorts: what a compiler fuses is a
matter of shapes, and must not be a matter of scores."""

import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mros_jax.retrieval import Placement, evaluate

SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (1, 64, 16),
    (2, 5, 4),
    (3, 17, 1),
    (3, 40, 8),
    (5, 40, 8),
    (6, 31, 2),
    (8, 64, 16),
    (8, 33, 7),
    (33, 47, 5),
    (70, 130, 12),
    (9, 33, 4096),
]
QUICK = [(1, 1, 1), (2, 5, 4), (5, 40, 8), (9, 33, 4096)]
KINDS = list(itertools.product(("cosine", "euclidean"), (True, False)))


class Elsewhere(Placement):
    """Ranks on the devices, as where they are no processor of the host."""

    def is_host(self):
        return False


def make_case(shape, *, whole, seed):
    """Features and labels, the first query with a match at least."""
    size = shape[2]
    rng = np.random.default_rng([*shape, seed])
    if whole:  # all products are whole numbers, and so exact; many of them are equal
        features = [rng.integers(-3, 4, (n, size)).astype(np.float32) for n in shape[:2]]
    else:
        features = [rng.standard_normal((n, size), np.float32) for n in shape[:2]]
    pids = [rng.integers(1, 5, n) for n in shape[:2]]
    camids = [rng.integers(0, 3, n) for n in shape[:2]]
    pids[1][0], camids[1][0] = pids[0][0], camids[0][0] + 1
    return *features, *pids, *camids


def measure(query, gallery, metric, normalize):
    query, gallery = query.astype(np.float64), gallery.astype(np.float64)
    if normalize:
        query, gallery = (x / np.sqrt((x * x).sum(1))[:, None] for x in (query, gallery))
    if metric == "cosine":
        return -(query[:, None] * gallery).sum(2)
    return np.square(query[:, None] - gallery).sum(2)


def rank_plainly(distance, query_pids, gallery_pids, query_camids, gallery_camids):
    """Ranks of the matches of each query that has some, by sorting in plain Python."""
    ranks = []
    for row, pid, camid in zip(distance, query_pids, query_camids, strict=True):
        rank, found = 0, []
        for i in sorted(range(len(row)), key=lambda i: (row[i], i)):
            if gallery_pids[i] == pid and gallery_camids[i] == camid:
                continue
            rank += 1
            if gallery_pids[i] == pid:
                found.append(rank)
        if found:
            ranks.append(found)
    return ranks


def check_shape(shape, num_devices, metric, normalize, *, whole):
    for seed in itertools.count():
        case = make_case(shape, whole=whole, seed=seed)
        distance = measure(case[0], case[1], metric, normalize)
        gaps = np.diff(np.sort(distance, axis=1), axis=1)
        if whole or not gaps.size or gaps.min() > 1e-5:  # else float32 cannot tell them apart
            break
        if shape[2] == 1 and normalize:  # one number becomes a sign: ties, whatever the seed
            return
    ranks = rank_plainly(distance, *case[2:])
    for kind in (Placement, Elsewhere):
        placement = kind(devices=jax.local_devices()[:num_devices])
        result = evaluate(*case, metric=metric, normalize=normalize, placement=placement)
        np.testing.assert_array_equal(result.first_match_rank, [r[0] for r in ranks])
        expected = [np.mean([(i + 1) / r for i, r in enumerate(found)]) for found in ranks]
        np.testing.assert_allclose(result.ap, expected, rtol=1e-12)


def check_all(shapes, num_devices):
    for shape in shapes:
        check_shape(shape, num_devices, "cosine", True, whole=False)
        check_shape(shape, num_devices, "euclidean", False, whole=True)


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SHAPES],
    ids=str,
)
def test_scores_equal_plain_sorting(shape):
    for metric, normalize in KINDS:
        check_shape(shape, 1, metric, normalize, whole=False)
    check_shape(shape, 1, "cosine", False, whole=True)
    check_shape(shape, 1, "euclidean", False, whole=True)


def test_scores_equal_plain_sorting_on_four_devices():
    check_all([(5, 40, 8)], 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4])
def test_scores_of_every_shape_on_several_devices(num_devices):
    check_all(SHAPES, num_devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["--xla_disable_hlo_passes=fusion", "--xla_cpu_enable_fast_math=true"]
)
def test_scores_do_not_depend_on_what_is_fused(flag):
    flags = f"{flag} --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, __file__], env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=120
    )


if __name__ == "__main__":
    check_all([(2, 5, 4), (5, 40, 8), (8, 64, 16)], jax.local_device_count())
