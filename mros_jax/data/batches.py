"""Which images make which batch: index plans that are pure functions of (seed, epoch)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Integer

from mros_jax.errors import UserError, check_choice

Labels = Integer[np.ndarray, "N"]

# So that two kinds of plan never share a stream of numbers.
_IDENTITIES, _SHUFFLED, _ONCE, _PROBES = range(4)


def steps_per_epoch(num_images: int, batch: int) -> int:
    """Return the number of steps of every epoch, N // batch.

    Raises:
        UserError: there are fewer images than one batch needs.
    """
    if batch < 1:
        raise UserError(f"the batch must hold at least one image, got {batch}")
    if num_images < batch:
        raise UserError(
            f"the training split has {num_images} images, fewer than one batch of {batch}: "
            "lower identities, images or probes of config.batch"
        )
    return num_images // batch


def process_slice(batch: int, process_index: int, process_count: int) -> slice:
    """Return the columns of the global batch that one process of a multi-host run takes.

    Raises:
        UserError: the batch does not divide evenly, or there is no such process.
    """
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} is not in 0..{process_count - 1}")
    if batch % process_count:
        raise UserError(
            f"a batch of {batch} images cannot be shared evenly by {process_count} processes: "
            "choose a multiple of the number of processes (config.batch)"
        )
    share = batch // process_count
    return slice(process_index * share, (process_index + 1) * share)


def plan_epoch(
    labels: Labels,
    *,
    identities: int,
    images: int,
    seed: int,
    epoch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Int32[np.ndarray, "steps local_batch"]:
    """Plan the P x K batches of one epoch.

    Every batch holds P different identities with K consecutive entries each. Within the epoch an
    identity goes through its images in a random order and starts over, in the same order, only when
    all of them have been used; so K different images meet in a batch whenever the identity has K.
    An identity with fewer than K images repeats them within its group of K.

    An epoch has N // (P K) batches, hence N // (P K) x P groups of K. All groups of K unused images
    are equally likely to be among them; groups that need a repeat come in where those do not
    suffice.

    Args:
        labels: (N,) identity of every training image; any integers, junk excluded by the caller.
        identities: P, different identities in a batch.
        images: K, images per identity in a batch.
        seed: the run's seed, not negative.
        epoch: the epoch, counted from 0. The plan depends on seed and epoch alone.
        process_index: which process of a multi-host run this is.
        process_count: how many processes share the batch; each takes consecutive columns.

    Returns:
        (N // (P K), P K / process_count) int32 indices into `labels`.

    Raises:
        UserError: fewer than P identities, fewer than P K images, or a batch that does not divide.
    """
    label, counts = _count_images(labels, identities, images)
    columns = process_slice(identities * images, process_index, process_count)
    steps = steps_per_epoch(len(labels), identities * images)
    rng = np.random.default_rng([seed, epoch, _IDENTITIES])

    groups = _count_groups(counts, images, steps, steps * identities, rng)
    owner = _assign_identities(groups, steps, identities, rng)  # (steps, P)

    # The j-th time an identity appears it takes the j-th K images of its order, cyclically.
    flat = owner.reshape(-1)
    by_owner = np.argsort(flat, kind="stable")
    turn = np.empty(flat.size, np.int64)
    turn[by_owner] = np.arange(flat.size) - np.repeat(np.cumsum(groups) - groups, groups)
    place = turn[:, None] * images + np.arange(images)  # (steps * P, K)
    plan = _look_up(flat, place, label, counts, rng).reshape(steps, identities * images)
    return np.ascontiguousarray(plan[:, columns], dtype=np.int32)


def _count_images(
    labels: Labels, identities: int, images: int
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "C"]]:
    """Number the identities from 0; return the number of each image and the images of each."""
    if identities < 1 or images < 1:
        raise UserError(f"P and K must be at least 1, got P = {identities} and K = {images}")
    _, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(counts) < identities:
        raise UserError(
            f"the training split has {len(counts)} identities and a batch needs {identities} "
            f"different ones: set identities to {len(counts)} or less"
        )
    return label.reshape(-1), counts


def _look_up(
    owner: Int[np.ndarray, "n"],
    place: Int[np.ndarray, "n K"],
    label: Int[np.ndarray, "N"],
    counts: Int[np.ndarray, "C"],
    rng: np.random.Generator,
) -> Int[np.ndarray, "n K"]:
    """The images at places of each owner's own random order, which starts over at its end."""
    shuffled = rng.permutation(len(label))
    order = shuffled[np.argsort(label[shuffled], kind="stable")]
    starts = np.cumsum(counts) - counts
    chosen: np.ndarray = order[place % counts[owner][:, None] + starts[owner][:, None]]
    return chosen


def _count_groups(
    counts: Int[np.ndarray, "C"],
    images: int,
    steps: int,
    wanted: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "C"]:
    """Return how many groups of K each identity gives; at most one a step, `wanted` in all."""
    full: np.ndarray = np.clip(counts // images, 1, steps)
    surplus = int(full.sum()) - wanted
    if surplus > 0:
        dropped = rng.choice(int(full.sum()), surplus, replace=False, shuffle=False)
        owner = np.repeat(np.arange(len(full)), full)
        full -= np.bincount(owner[dropped], minlength=len(full))
        return full
    # First the groups that complete an identity's remaining images, then whole turns again.
    candidates = np.flatnonzero((counts > images) & (counts % images > 0) & (full < steps))
    missing = -surplus
    while missing:
        chosen = rng.permutation(candidates)[:missing]
        full[chosen] += 1
        missing -= len(chosen)
        candidates = np.flatnonzero(full < steps)
    return full


def _assign_identities(
    groups: Int[np.ndarray, "C"], steps: int, identities: int, rng: np.random.Generator
) -> Int[np.ndarray, "steps P"]:
    """Deal the groups to steps at random so that no step holds an identity twice.

    The groups, identity after identity in random order, fill a table of P rows of `steps` places; a
    random permutation of each row says which step a place means. An identity has at most `steps`
    groups, so it can meet itself only where it runs over from one row into the next: there the
    places of the next row avoid the steps that it already has.
    """
    order = rng.permutation(len(groups))
    table = np.repeat(order, groups[order]).reshape(identities, steps)
    owner = np.empty((steps, identities), np.int64)
    for row in range(identities):
        step_of_place = rng.permutation(steps)
        first = table[row, 0]
        if row and table[row - 1, -1] == first:
            taken = np.zeros(steps, bool)
            taken[owner[:, row - 1] == first] = True
            free = step_of_place[~taken[step_of_place]]
            head = free[: np.count_nonzero(table[row] == first)]
            in_head = np.zeros(steps, bool)
            in_head[head] = True
            step_of_place = np.concatenate([head, step_of_place[~in_head[step_of_place]]])
        owner[step_of_place, row] = table[row]
    return owner


def plan_once(
    labels: Labels,
    *,
    identities: int,
    images: int,
    seed: int,
    epoch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Int32[np.ndarray, "steps local_batch"]:
    """Plan the P x K batches of an epoch in which no identity comes twice.

    The identities come in random order, each with K different images; an identity with fewer
    repeats them. Those of the last incomplete batch are left out, others in each epoch. This is
    what many public codes call an epoch; one of `plan_epoch` is as long as all images.

    Args:
        labels: (N,) identity of every training image; any integers, junk excluded by the caller.
        identities: P, different identities in a batch.
        images: K, images per identity in a batch.
        seed: the run's seed, not negative.
        epoch: the epoch, counted from 0. The plan depends on seed and epoch alone.
        process_index: which process of a multi-host run this is.
        process_count: how many processes share the batch; each takes consecutive columns.

    Returns:
        (C // P, P K / process_count) int32 indices into `labels`, of C identities.

    Raises:
        UserError: fewer than P identities, or a batch that does not divide.
    """
    label, counts = _count_images(labels, identities, images)
    columns = process_slice(identities * images, process_index, process_count)
    steps = len(counts) // identities
    rng = np.random.default_rng([seed, epoch, _ONCE])
    owner = rng.permutation(len(counts))[: steps * identities]
    place = np.broadcast_to(np.arange(images), (len(owner), images))
    plan = _look_up(owner, place, label, counts, rng).reshape(steps, identities * images)
    return np.ascontiguousarray(plan[:, columns], dtype=np.int32)


def plan_shuffled(
    num_images: int,
    *,
    batch: int,
    seed: int,
    epoch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Int32[np.ndarray, "steps local_batch"]:
    """Plan plain batches: a random permutation of all images, without the last incomplete batch.

    Args:
        num_images: N.
        batch: images in the global batch.
        seed: the run's seed, not negative.
        epoch: the epoch, counted from 0.
        process_index: which process of a multi-host run this is.
        process_count: how many processes share the batch.

    Returns:
        (N // batch, batch / process_count) int32 indices in 0..N-1, no index twice.

    Raises:
        UserError: fewer images than a batch needs, or a batch that does not divide.
    """
    columns = process_slice(batch, process_index, process_count)
    steps = steps_per_epoch(num_images, batch)
    order = np.random.default_rng([seed, epoch, _SHUFFLED]).permutation(num_images)
    plan = order[: steps * batch].reshape(steps, batch)
    return np.ascontiguousarray(plan[:, columns], dtype=np.int32)


def plan_probes(
    labels: Labels,
    camids: Labels,
    *,
    probes: int,
    gallery: int,
    seed: int,
    epoch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Int32[np.ndarray, "steps local_batch"]:
    """Plan batches of probes, each with gallery images of its identity (Shen et al., CVPR 2018).

    Every image is a probe once an epoch, in random order; those of the last incomplete batch are
    left out, others in each epoch. A probe's gallery images are drawn from those of other cameras,
    where there are none from the identity's other images, and where it is alone it is its own.
    None of them comes twice if there are more than `gallery` to draw from (one more than it takes,
    as in the authors' code). Probes of a batch may share identities.

    Args:
        labels: (N,) identity of every training image; any integers, junk excluded by the caller.
        camids: (N,) camera of every training image.
        probes: in the global batch.
        gallery: images that follow each probe.
        seed: the run's seed, not negative.
        epoch: the epoch, counted from 0. The plan depends on seed and epoch alone.
        process_index: which process of a multi-host run this is.
        process_count: how many processes share the batch; each takes consecutive columns.

    Returns:
        (N // probes, probes (1 + gallery) / process_count) int32 indices into `labels`.

    Raises:
        UserError: fewer images than probes, or a batch that does not divide.
    """
    size = 1 + gallery
    columns = process_slice(probes * size, process_index, process_count)
    steps = steps_per_epoch(len(labels), probes)
    rng = np.random.default_rng([seed, epoch, _PROBES])
    order = rng.permutation(len(labels))[: steps * probes]
    by_label = np.argsort(labels, kind="stable")
    ordered = labels[by_label]
    first, last = (np.searchsorted(ordered, labels[order], side) for side in ("left", "right"))
    plan = np.empty((len(order), size), np.int32)
    for row, probe, begin, end in zip(plan, order, first, last, strict=True):
        own = by_label[begin:end]
        others = own[camids[own] != camids[probe]]
        if not len(others):
            others = own[own != probe] if len(own) > 1 else own
        row[0] = probe
        row[1:] = rng.choice(others, gallery, replace=len(others) <= gallery)
    return np.ascontiguousarray(plan.reshape(steps, probes * size)[:, columns])


@dataclasses.dataclass(frozen=True)
class Identities:
    """P x K batches (`plan_epoch`): `identities` people, `images` of each."""

    identities: int
    images: int

    @property
    def size(self) -> int:
        """Images in the global batch."""
        return self.identities * self.images

    def steps(self, labels: Labels) -> int:
        """Steps of every epoch."""
        return steps_per_epoch(len(labels), self.size)

    def plan(self, labels: Labels, camids: Labels, **place: int) -> Int32[np.ndarray, "steps b"]:
        """Indices of an epoch; `place` are the keyword arguments from `seed` on of `plan_epoch`."""
        return plan_epoch(labels, identities=self.identities, images=self.images, **place)


@dataclasses.dataclass(frozen=True)
class IdentitiesOnce(Identities):
    """P x K batches with each identity once an epoch (`plan_once`)."""

    def steps(self, labels: Labels) -> int:
        """Steps of every epoch."""
        return len(np.unique(labels)) // self.identities

    def plan(self, labels: Labels, camids: Labels, **place: int) -> Int32[np.ndarray, "steps b"]:
        """Indices of an epoch; `place` are the keyword arguments from `seed` on of `plan_once`."""
        return plan_once(labels, identities=self.identities, images=self.images, **place)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Plain batches of `size` images (`plan_shuffled`)."""

    size: int

    def steps(self, labels: Labels) -> int:
        """Steps of every epoch."""
        return steps_per_epoch(len(labels), self.size)

    def plan(self, labels: Labels, camids: Labels, **place: int) -> Int32[np.ndarray, "steps b"]:
        """Indices of an epoch; `place` are the keyword arguments from `seed` on of `plan_epoch`."""
        return plan_shuffled(len(labels), batch=self.size, **place)


@dataclasses.dataclass(frozen=True)
class ProbesAndGallery:
    """Batches of `probes` images, each followed by `gallery` others of its identity."""

    probes: int
    gallery: int

    @property
    def size(self) -> int:
        """Images in the global batch."""
        return self.probes * (1 + self.gallery)

    def steps(self, labels: Labels) -> int:
        """Steps of every epoch."""
        return steps_per_epoch(len(labels), self.probes)

    def plan(self, labels: Labels, camids: Labels, **place: int) -> Int32[np.ndarray, "steps b"]:
        """Indices of an epoch; `place` are the keyword arguments from `seed` of `plan_probes`."""
        return plan_probes(labels, camids, probes=self.probes, gallery=self.gallery, **place)


Sampler = Identities | Shuffled | ProbesAndGallery
# What `config.batch.sampler` may say. The rest of the section are the fields.
SAMPLERS: dict[str, type[Sampler]] = {
    "identities": Identities,
    "identities_once": IdentitiesOnce,
    "shuffled": Shuffled,
    "probes_and_gallery": ProbesAndGallery,
}


def make_sampler(section: Mapping[str, Any]) -> Sampler:
    """The sampler that a config's `batch` section describes.

    Raises:
        UserError: an unknown sampler or field, one that is missing, or a number below 1.
    """
    fields = dict(section)
    name = fields.pop("sampler", None)
    check_choice("batch.sampler", name, SAMPLERS)
    known = {field.name for field in dataclasses.fields(SAMPLERS[name])}
    if set(fields) != known:
        raise UserError(
            f"batch has the fields {', '.join(sorted(fields))}; the sampler {name} needs "
            f"{', '.join(sorted(known))}"
        )
    for field, value in fields.items():
        if value < 1:
            raise UserError(f"batch.{field} is {value}; it must be 1 or more")
    return SAMPLERS[name](**fields)
