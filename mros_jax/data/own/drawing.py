"""Who trains and who is tested: no identity in both, and a true match for every query."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from mros_jax.data.own.sightings import Sighting, natural_key
from mros_jax.errors import UserError

# Identities: a triplet needs two to train on, and a ranking somebody who is not meant.
LEAST_TRAINED, LEAST_TESTED = 2, 2
_SPLITS = ("train", "query", "gallery")


def cut_tracks(sightings: Sequence[Sighting], parts: int) -> list[Sighting]:
    """Make cameras of times: what a camera saw of an identity becomes `parts` cameras, in order.

    Args:
        sightings: who was seen where.
        parts: how many equal parts, as far as there are as many pictures.

    Returns:
        The same, in the same order, with cameras such as "entrance, part 2 of 3".
    """
    tracks: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for row, sighting in enumerate(sightings):
        tracks[sighting.identity, sighting.camera].append(row)
    cut = list(sightings)
    for rows in tracks.values():
        rows.sort(key=lambda row: sightings[row].frame)
        for place, row in enumerate(rows):
            part = place * parts // len(rows) + 1
            camera = f"{sightings[row].camera}, part {part} of {parts}"
            cut[row] = dataclasses.replace(sightings[row], camera=camera)
    return cut


def draw_splits(
    sightings: Sequence[Sighting], *, test_fraction: float = 0.5, min_images: int = 2, seed: int = 0
) -> list[str]:
    """Give every sighting its split; identities are drawn at random.

    An identity is tested only if two cameras saw it, as the protocol does not count matches of a
    query's own camera; others train. A query is drawn from each camera with two images or more
    of a tested identity (if none has, its first camera gives one); what remains is the gallery, so
    that every query has a true match.

    Args:
        sightings: who was seen where; if they state their splits, these are checked and kept.
        test_fraction: share of identities to test, as far as there are enough for both.
        min_images: identities with fewer are left out, where splits are drawn.
        seed: other seed, other draw.

    Returns:
        "train", "query", "gallery", or "" for what is left out, of each.

    Raises:
        UserError: too few identities, or too few that two cameras saw; or stated splits that are
            incomplete, or that share identities between training and test.
    """
    if any(sighting.split for sighting in sightings):
        return _check_splits(sightings)
    rows_of: dict[str, list[int]] = collections.defaultdict(list)
    for row, sighting in enumerate(sightings):
        rows_of[sighting.identity].append(row)
    people = [name for name in sorted(rows_of, key=natural_key) if len(rows_of[name]) >= min_images]
    cameras = {name: {sightings[row].camera for row in rows_of[name]} for name in people}
    several = [name for name in people if len(cameras[name]) > 1]
    _check_enough(len(rows_of), len(people), len(several), sightings, min_images)
    count = min(
        max(round(test_fraction * len(people)), LEAST_TESTED),
        len(several),
        len(people) - LEAST_TRAINED,
    )
    rng = np.random.default_rng(seed)
    tested = {several[i] for i in rng.permutation(len(several))[:count]}
    splits = [""] * len(sightings)
    for name in people:
        for row in rows_of[name]:
            splits[row] = "gallery" if name in tested else "train"
        if name in tested:
            for row in _draw_queries(sightings, rows_of[name], rng):
                splits[row] = "query"
    return splits


def _draw_queries(
    sightings: Sequence[Sighting], rows: Sequence[int], rng: np.random.Generator
) -> list[int]:
    rows_of: dict[str, list[int]] = collections.defaultdict(list)
    for row in rows:
        rows_of[sightings[row].camera].append(row)
    ordered = [rows_of[camera] for camera in sorted(rows_of, key=natural_key)]
    chosen = [camera for camera in ordered if len(camera) > 1] or ordered[:1]
    return [camera[rng.integers(len(camera))] for camera in chosen]


def _check_enough(
    found: int, enough: int, several: int, sightings: Sequence[Sighting], min_images: int
) -> None:
    least = LEAST_TRAINED + LEAST_TESTED
    if enough < least:
        raise UserError(
            f"{enough} of {found} identities have at least {min_images} images; expected {least} "
            f"or more, {LEAST_TRAINED} to train and {LEAST_TESTED} to test"
        )
    if several < LEAST_TESTED:
        cameras = sorted({sighting.camera for sighting in sightings}, key=natural_key)
        if len(cameras) == 1:
            seen, advice = f"all images are of one camera ({cameras[0]})", ""
        else:
            seen = f"{several} of {enough} identities were seen by two of {len(cameras)} cameras"
            advice = "If ids of tracks mean the same person in all cameras, say so by shared_ids. "
        raise UserError(
            f"{seen}, and the protocol counts matches in another camera than the query's alone: "
            f"expected {LEAST_TESTED} such identities or more. {advice}With "
            "pseudo_cameras=2 what a camera saw of an identity is cut into an earlier and a later "
            "half that count as cameras; scores then say how people are found again in the same "
            "view, which is far easier"
        )


def _check_splits(sightings: Sequence[Sighting]) -> list[str]:
    splits = [sighting.split for sighting in sightings]
    without = [sighting.origin for sighting in sightings if not sighting.split]
    if without:
        raise UserError(
            f"{len(without)} of {len(splits)} images have no split, the others have one: "
            f"{without[0]}; state all of them, or none for a draw"
        )
    lacking = [split for split in _SPLITS if split not in splits]
    if lacking:
        raise UserError(f"no image is of the split {' or '.join(lacking)}; all three are needed")
    trained = {s.identity for s in sightings if s.split == "train"}
    shared = sorted({s.identity for s in sightings if s.split != "train"} & trained)
    if shared:
        raise UserError(
            f"{len(shared)} identities are in train and in query or gallery: "
            f"{', '.join(shared[:5])}; an identity may be in one of them only"
        )
    return splits
