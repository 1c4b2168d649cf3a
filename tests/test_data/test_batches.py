import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax.data.batches import (
    make_sampler,
    plan_epoch,
    plan_once,
    plan_probes,
    plan_shuffled,
    process_slice,
    steps_per_epoch,
)


def labels_of(counts) -> np.ndarray:
    """Labels with these numbers of images, in scattered order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


def groups_in_order(plan, labels, images):
    """For every identity, the groups of K image indices in the order they are trained on."""
    groups = collections.defaultdict(list)
    for row in plan:
        for group in row.reshape(-1, images):
            (pid,) = set(labels[group].tolist())  # a group shows one identity
            groups[pid].append(group.tolist())
    return groups


def check(labels, counts, P, K, seed=0, epoch=0):
    plan = plan_epoch(labels, identities=P, images=K, seed=seed, epoch=epoch)
    assert plan.shape == (len(labels) // (P * K), P * K)
    assert plan.dtype == np.int32
    for row in plan:
        assert len(set(labels[row].tolist())) == P
    for pid, groups in groups_in_order(plan, labels, K).items():
        count = counts[pid]
        order = [i for group in groups for i in group]
        # Every image is used before any is used again.
        for start in range(0, len(order), count):
            turn = order[start : start + count]
            assert len(set(turn)) == len(turn)
        if count >= K:
            assert all(len(set(group)) == K for group in groups)
        else:
            assert all(set(group) == set(np.flatnonzero(labels == pid)) for group in groups)
    return plan


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 23), min_size=1, max_size=12),
    P=st.integers(1, 6),
    K=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_plan_properties(counts, P, K, seed):
    labels = labels_of(counts)
    if len(counts) < P or len(labels) < P * K:
        with pytest.raises(ValueError, match="identities"):
            plan_epoch(labels, identities=P, images=K, seed=seed, epoch=0)
        return
    check(labels, counts, P, K, seed)


@pytest.mark.parametrize(
    "counts",
    [
        [200, 1, 1, 1],  # one identity has nearly all images
        [150, 150, 150, 190],
        [1] * 50,
        [4] * 40,
        [5] * 40,
        [3, 100, 7, 20, 1, 1, 1],
    ],
)
def test_plan_of_uneven_identities(counts):
    labels = labels_of(counts)
    for epoch in range(5):
        check(labels, counts, 4, 4, epoch=epoch)


def test_whole_groups_are_all_used():
    # 40 identities of 8 images: 20 batches of 4 x 4 are exactly all images once.
    labels = labels_of([8] * 40)
    plan = check(labels, [8] * 40, 4, 4)
    np.testing.assert_array_equal(np.sort(plan.reshape(-1)), np.arange(320))


def test_plan_depends_on_seed_and_epoch_alone():
    labels = labels_of([9] * 20)
    make = lambda seed, epoch: plan_epoch(labels, identities=4, images=4, seed=seed, epoch=epoch)  # noqa: E731
    np.testing.assert_array_equal(make(1, 2), make(1, 2))
    plans = [make(seed, epoch) for seed, epoch in itertools.product(range(3), range(3))]
    for one, other in itertools.combinations(plans, 2):
        assert (one != other).any()


def test_labels_may_have_gaps():
    labels = labels_of([6] * 5)
    one = plan_epoch(labels, identities=3, images=2, seed=0, epoch=0)
    other = plan_epoch(labels * 100 - 7, identities=3, images=2, seed=0, epoch=0)
    np.testing.assert_array_equal(one, other)


def test_images_identities_and_meetings_are_uniform():
    """Over many epochs every image, and every pair of identities, comes equally often."""
    counts = [9] * 12  # one image of each identity is left out or repeated in an epoch
    labels = labels_of(counts)
    seen = np.zeros(len(labels))
    meetings = np.zeros((12, 12))
    epochs = 400
    for epoch in range(epochs):
        plan = plan_epoch(labels, identities=4, images=4, seed=5, epoch=epoch)
        seen += np.bincount(plan.reshape(-1), minlength=len(labels))
        for row in plan:
            pids = np.unique(labels[row])
            meetings[np.ix_(pids, pids)] += 1
    steps = 108 // 16
    expected = epochs * steps * 16 / 108
    # 6 sigma of a binomial; images of an epoch exclude each other, so the true spread is smaller.
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected)
    pairs = meetings[np.triu_indices(12, 1)]
    expected = epochs * steps * (4 * 3) / (12 * 11)
    assert np.abs(pairs - expected).max() < 6 * np.sqrt(expected)


def test_identities_come_at_every_step_alike():
    labels = labels_of([8] * 10)
    count = np.zeros((5, 10))
    for epoch in range(300):
        plan = plan_epoch(labels, identities=4, images=4, seed=0, epoch=epoch)
        for step, row in enumerate(plan):
            count[step, np.unique(labels[row])] += 1
    expected = 300 * 4 / 10
    assert np.abs(count - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batch(processes):
    labels = labels_of([6] * 10)
    whole = plan_epoch(labels, identities=4, images=3, seed=0, epoch=1)
    shuffled = plan_shuffled(60, batch=12, seed=0, epoch=1)
    split = {"process_count": processes}
    parts = [
        plan_epoch(labels, identities=4, images=3, seed=0, epoch=1, process_index=i, **split)
        for i in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
    parts = [
        plan_shuffled(60, batch=12, seed=0, epoch=1, process_index=i, **split)
        for i in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, 1), shuffled)
    once = plan_once(labels, identities=4, images=3, seed=0, epoch=1)
    parts = [
        plan_once(labels, identities=4, images=3, seed=0, epoch=1, process_index=i, **split)
        for i in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, 1), once)


def test_shuffled_uses_no_image_twice():
    plan = plan_shuffled(50, batch=16, seed=3, epoch=0)
    assert plan.shape == (3, 16)
    assert len(np.unique(plan)) == 48
    assert plan.min() >= 0
    assert plan.max() < 50
    assert (plan != plan_shuffled(50, batch=16, seed=3, epoch=1)).any()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    P=st.integers(1, 6),
    K=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_each_identity_once(counts, P, K, seed):
    labels = labels_of(counts)
    sampler = make_sampler({"sampler": "identities_once", "identities": P, "images": K})
    if len(counts) < P:
        with pytest.raises(ValueError, match=f"{len(counts)} identities and a batch needs {P}"):
            sampler.plan(labels, np.zeros_like(labels), seed=seed, epoch=0)
        return
    plan = sampler.plan(labels, np.zeros_like(labels), seed=seed, epoch=3)
    assert plan.shape == (len(counts) // P, P * K) == (sampler.steps(labels), sampler.size)
    assert plan.dtype == np.int32
    groups = plan.reshape(-1, K)
    pids = labels[groups]
    assert (pids == pids[:, :1]).all()
    assert len(np.unique(pids[:, 0])) == len(groups)  # nobody twice
    for pid, group in zip(pids[:, 0], groups, strict=True):
        times = np.unique(group, return_counts=True)[1]
        assert len(times) == min(K, counts[pid])
        assert times.max() - times.min() <= 1  # repeated evenly


def test_each_identity_once_over_many_epochs():
    """Orders, images and who is left out are other ones in each epoch, and equally often."""
    labels = labels_of([6] * 11)
    plans = [plan_once(labels, identities=3, images=2, seed=1, epoch=e) for e in range(300)]
    np.testing.assert_array_equal(
        plans[7], plan_once(labels, identities=3, images=2, seed=1, epoch=7)
    )
    assert any((plans[0] != other).any() for other in plans[1:3])
    expected = 300 * 9 / 11
    seen = np.bincount(labels[np.concatenate(plans)[:, ::2]].reshape(-1))
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected)
    images = np.bincount(np.concatenate(plans).reshape(-1), minlength=66)
    assert np.abs(images - expected / 3).max() < 6 * np.sqrt(expected / 3)


def test_probes_and_their_gallery_images():
    """Each image is a probe once; its images are of other cameras where there are any."""
    counts = [1, 2, 3, 9, 14]
    labels = labels_of(counts)
    camids = np.random.default_rng(1).integers(1, 4, len(labels))
    camids[labels == 2] = 7  # one camera
    sampler = make_sampler({"sampler": "probes_and_gallery", "probes": 4, "gallery": 3})
    plan = sampler.plan(labels, camids, seed=2, epoch=5)
    assert plan.shape == (len(labels) // 4, 16) == (sampler.steps(labels), sampler.size)
    assert plan.dtype == np.int32
    groups = plan.reshape(-1, 4)
    assert len(np.unique(groups[:, 0])) == len(groups)
    assert (labels[groups] == labels[groups[:, :1]]).all()
    for probe, *others in groups:
        own = np.flatnonzero(labels == labels[probe])
        elsewhere = own[camids[own] != camids[probe]]
        possible = elsewhere if len(elsewhere) else own[own != probe] if len(own) > 1 else own
        assert set(others) <= set(possible)
        assert len(possible) <= 3 or len(set(others)) == 3
    np.testing.assert_array_equal(plan, sampler.plan(labels, camids, seed=2, epoch=5))
    assert (plan != sampler.plan(labels, camids, seed=2, epoch=6)).any()
    parts = [
        sampler.plan(labels, camids, seed=2, epoch=5, process_index=i, process_count=2)
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), plan)


def test_gallery_images_are_drawn_evenly():
    labels, camids = np.zeros(8, np.int32), np.array([1, 1, 2, 2, 2, 3, 3, 3])
    drawn = np.zeros(8)
    for epoch in range(400):
        plan = plan_probes(labels, camids, probes=8, gallery=3, seed=0, epoch=epoch)
        first = np.flatnonzero(plan[0, ::4] == 0)[0]
        drawn += np.bincount(plan[0, 4 * first + 1 : 4 * first + 4], minlength=8)
    assert not drawn[:2].any()
    assert np.abs(drawn[2:] - 200).max() < 6 * np.sqrt(200)


def test_market1501_has_41_steps_of_each_identity_once():
    labels = labels_of(np.full(751, 17))
    assert plan_once(labels, identities=18, images=4, seed=0, epoch=0).shape == (41, 72)
    assert plan_epoch(labels, identities=18, images=4, seed=0, epoch=0).shape == (177, 72)


def test_steps_are_the_same_in_every_epoch():
    assert steps_per_epoch(12_936, 128) == 101
    labels = labels_of(np.random.default_rng(0).integers(1, 40, 60))
    steps = {
        plan_epoch(labels, identities=8, images=4, seed=0, epoch=epoch).shape for epoch in range(20)
    }
    assert steps == {(steps_per_epoch(len(labels), 32), 32)}


def test_errors_name_values_and_the_way_out():
    labels = labels_of([5, 5, 5])
    with pytest.raises(ValueError, match=r"3 identities and a batch needs 4 .*identities to 3"):
        plan_epoch(labels, identities=4, images=2, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"15 images, fewer than one batch of 18"):
        plan_epoch(labels, identities=3, images=6, seed=0, epoch=0)
    with pytest.raises(ValueError, match="P = 0 and K = 2"):
        plan_epoch(labels, identities=0, images=2, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"6 images cannot be shared evenly by 4 processes"):
        plan_epoch(labels, identities=3, images=2, seed=0, epoch=0, process_count=4)
    with pytest.raises(ValueError, match=r"process_index 2 is not in 0\.\.1"):
        process_slice(8, 2, 2)
    with pytest.raises(ValueError, match="at least one image"):
        plan_shuffled(10, batch=0, seed=0, epoch=0)
