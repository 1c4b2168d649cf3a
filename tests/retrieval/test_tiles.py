"""Lists made with each product used for both images, against sorts and the search by blocks."""

import threading

import jax
import numpy as np
import pytest

from mros_jax import parallel
from mros_jax.retrieval import Placement, tiles
from mros_jax.retrieval.neighbors import search_blocks

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_exact(num):
    """Features whose cosines are sixteenths in any rounding, so that many of them are equal."""
    return np.random.default_rng(num).choice(np.array([-1, 1], np.float32), (num, 16))


@pytest.mark.parametrize(("num", "k"), [(1, 1), (31, 5), (100, 7), (100, 60), (129, 129)])
def test_lists_equal_a_stable_sort(num, k):
    features = make_exact(num)
    cosine = features @ features.T / 16
    expected = cosine.copy()
    np.fill_diagonal(expected, np.inf)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    for devices in (1, 3):
        placement = Placement(jax.local_devices()[:devices], block_size=32)
        indices, similarity, smallest = tiles.search(features, k, placement)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(similarity, np.take_along_axis(cosine, order, axis=1))
        np.testing.assert_array_equal(smallest, cosine.min(1))


def test_lists_equal_those_of_blocks():
    features = np.random.default_rng(0).standard_normal((150, 24), np.float32)
    placement = Placement(block_size=48)
    found, expected = tiles.search(features, 9, placement), search_blocks(features, 9)
    np.testing.assert_array_equal(found[0], expected.indices)
    np.testing.assert_allclose(found[1], expected.similarity, atol=1e-6)
    np.testing.assert_allclose(found[2], expected.smallest, atol=1e-6)


def test_processes_share_the_tiles(monkeypatch):
    """Two threads in place of processes: each works on half, and no image is listed twice."""
    features = make_exact(100)
    meeting, results = threading.Barrier(2), {}
    shares = []

    def share(items, work):
        process = int(threading.current_thread().name)
        own = items[process::2]
        shares.append((len(own), len(items)))
        results[process] = work(own)
        meeting.wait()
        joined = [results[i % 2][i // 2] for i in range(len(items))]
        meeting.wait()
        return joined

    monkeypatch.setattr(parallel, "share", share)
    placement = Placement(jax.local_devices()[:1], block_size=32, together=True)
    found = {}

    def work():
        found[threading.current_thread().name] = tiles.search(features, 7, placement)

    threads = [threading.Thread(target=work, name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = tiles.search(features, 7, placement.alone())
    for process in ("0", "1"):
        for ours, theirs in zip(found[process], alone, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert sorted(shares) == [(2, 4), (2, 4), (3, 6), (3, 6)]


def test_keys_order_by_similarity_then_index():
    similarity = np.array([np.inf, 1, 0.5, 0.0, -0.0, -0.25, -1, -np.inf], np.float32)
    index = np.array([9, 2**31 - 1, 0, 4, 5, 7, 3, 0])
    keys = tiles.encode(similarity, index)
    assert (np.diff(keys) < 0).all()
    decoded, indices = tiles.decode(keys)
    np.testing.assert_array_equal(decoded, similarity)
    np.testing.assert_array_equal(indices, index)
