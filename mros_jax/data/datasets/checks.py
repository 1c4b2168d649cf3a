"""What can be wrong with a data set: single checks, each returning findings."""

import collections
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mros_jax.data import cache
from mros_jax.data.datasets.layouts import DISTRACTORS_500K
from mros_jax.data.datasets.records import DATASETS
from mros_jax.data.images import Picture
from mros_jax.data.splits import Dataset, Split

Level = Literal["fatal", "error", "warning", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        level: "fatal": training or evaluation cannot run; "error": its result would be wrong;
            "warning": look at it; "note".
        check: short name of the check.
        message: one sentence with numbers.
        names: the images, identities or files concerned; all of them.
    """

    level: Level
    check: str
    message: str
    names: tuple[str, ...] = ()


def summarize(split: Split) -> dict[str, Any]:
    """Count images, identities, junk, distractors, and images and identities of each camera."""
    people = split.pids > 0
    cameras = {}
    for camid in np.unique(split.camids).tolist():
        here = split.camids == camid
        cameras[str(camid)] = {
            "images": int(here.sum()),
            "identities": len(np.unique(split.pids[here & people])),
        }
    return {
        "images": len(split),
        "identities": len(np.unique(split.pids[people])),
        "junk": int(split.junk.sum()),
        "distractors": int(split.distractors.sum()),
        "cameras": cameras,
    }


def check_skipped(dataset: Dataset, *, accepted: bool) -> list[Finding]:
    """Tell what the reader left out.

    Args:
        dataset: the data set.
        accepted: misnamed files are to be left out, so that they are no error.
    """
    return [
        Finding(
            "warning" if skipped.harmless or accepted else "error",
            "left out" if skipped.harmless else "misnamed files",
            skipped.message,
            skipped.names,
        )
        for skipped in dataset.skipped
    ]


def check_counts(dataset: Dataset) -> list[Finding]:
    """Compare with the published counts, where there are any for this data set."""
    findings: list[Finding] = []
    if dataset.name not in DATASETS:
        return findings
    published = DATASETS[dataset.name].counts(dataset.options)
    for split in dataset.splits:
        expected = published.get(split.name)
        if expected is None:
            continue
        extra = sum(str(name).startswith(DISTRACTORS_500K) for name in split.names)
        seen = summarize(split)
        pairs = {
            "images": (len(split) - extra, expected.images),
            "identities": (seen["identities"], expected.identities),
            "cameras": (len(set(seen["cameras"]) - {"0"}), expected.cameras),
        }
        wrong = [
            f"{have:,} {what} (published: {want:,})"
            for what, (have, want) in pairs.items()
            if want is not None and have != want
        ]
        if wrong:
            findings.append(Finding("warning", "counts", f"{split.name}: {', '.join(wrong)}"))
    return findings


def check_overlap(dataset: Dataset) -> list[Finding]:
    """Find identities that are both trained and tested on."""
    tested = np.union1d(dataset.query.pids, dataset.gallery.pids)
    shared = np.intersect1d(dataset.train.pids, tested[tested > 0])
    if not len(shared):
        return []
    return [
        Finding(
            "error",
            "identities in train and test",
            f"{len(shared)} identities are in the training split and in query or gallery",
            tuple(map(str, shared.tolist())),
        )
    ]


def check_batches(dataset: Dataset, *, identities: int, images: int) -> list[Finding]:
    """Check that P x K batches can be made."""
    findings = []
    if dataset.num_classes < identities:
        findings.append(
            Finding(
                "fatal",
                "identities",
                f"{dataset.num_classes} training identities, and a batch needs {identities}: "
                f"set identities to {dataset.num_classes} or less",
            )
        )
    if len(dataset.train) < identities * images:
        findings.append(
            Finding(
                "fatal",
                "images",
                f"{len(dataset.train)} training images, and a batch needs {identities * images}: "
                "lower identities or images of a batch",
            )
        )
    pids, counts = np.unique(dataset.train.pids, return_counts=True)
    few = pids[counts < images]
    if len(few):
        findings.append(
            Finding(
                "warning",
                "few images",
                f"{len(few)} of {len(pids)} training identities have fewer than {images} images; "
                "they repeat within a batch",
                tuple(map(str, few.tolist())),
            )
        )
    return findings


def check_queries(dataset: Dataset) -> list[Finding]:
    """Find queries that cannot have a true match, and says why."""
    query, gallery = dataset.query, dataset.gallery
    people = query.pids > 0
    in_gallery = np.isin(query.pids, gallery.pids)
    camera_pairs = np.unique(np.stack([gallery.pids, gallery.camids]), axis=1)
    pids, cameras_of = np.unique(camera_pairs[0], return_counts=True)
    cameras = np.zeros(len(query), np.int64)
    cameras[in_gallery] = cameras_of[np.searchsorted(pids, query.pids[in_gallery])]
    seen = set(map(tuple, camera_pairs.T.tolist()))
    pairs = zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    own = np.array([pair in seen for pair in pairs])
    one_camera = people & in_gallery & (cameras - own == 0)
    absent = people & ~in_gallery

    findings = []
    for which, reason in (
        (absent, "their identity is not in the gallery"),
        (one_camera, "the gallery has their identity in their own camera only"),
    ):
        if which.any():
            findings.append(
                Finding(
                    "warning",
                    "queries without a match",
                    f"{int(which.sum())} of {len(query)} queries cannot match: {reason}",
                    tuple(query.names[which].tolist()),
                )
            )
    if not people.all():
        findings.append(
            Finding(
                "error",
                "queries without identity",
                f"{int((~people).sum())} queries are junk or distractors (pid -1 or 0)",
                tuple(query.names[~people].tolist()),
            )
        )
    if not (people & ~absent & ~one_camera).any():
        every = np.union1d(query.camids, gallery.camids)
        why = f": all images are of camera {every[0]}" if len(every) == 1 else ""
        findings.append(
            Finding(
                "fatal",
                "no valid query",
                f"no query has a true match in another camera{why}; evaluation would be undefined",
            )
        )
    return findings


@dataclasses.dataclass(frozen=True)
class Look:
    """What reading all images of a data set has shown.

    Attributes:
        findings: unreadable, converted and identical images.
        sizes: of each split: how many different (height, width), the smallest, median and largest.
        readable: (N,) bool for each split.
        decoded_bytes: bytes of all images, decoded, in the size that training keeps them in.
    """

    findings: list[Finding]
    sizes: dict[str, Any]
    readable: dict[str, np.ndarray]
    decoded_bytes: int


def look_at_images(
    dataset: Dataset,
    *,
    input_size: tuple[int, int] = (384, 128),
    accepted: bool = False,
    num_threads: int | None = None,
    progress: bool = True,
) -> Look:
    """Read and decode every image.

    Args:
        dataset: the data set.
        input_size: height and width of the network's input, in which images are kept that differ in
            size.
        accepted: unreadable images are to be left out, so that they are no error.
        num_threads: by default one for each CPU.
        progress: show a progress bar.
    """
    findings: list[Finding] = []
    sizes: dict[str, Any] = {}
    readable: dict[str, np.ndarray] = {}
    digests: dict[bytes, list[tuple[str, str]]] = collections.defaultdict(list)
    decoded_bytes = 0

    def without_pixels(picture: Picture) -> tuple[Picture, tuple[int, int]]:
        size = (0, 0) if picture.pixels is None else picture.pixels.shape[:2]
        return dataclasses.replace(picture, pixels=None), size

    for split in dataset.splits:
        names = [str(name) for name in split.names]
        looked = list(split.images.map(without_pixels, num_threads=num_threads, progress=progress))
        pictures = [picture for picture, _ in looked]
        for name, picture in zip(names, pictures, strict=True):
            if picture.digest:
                digests[picture.digest].append((split.name, name))
        bad = tuple(
            f"{name} ({picture.error})"
            for name, picture in zip(names, pictures, strict=True)
            if picture.error
        )
        if bad:
            level: Level = "warning" if accepted else "error"
            message = f"{split.name}: {len(bad)} images are unreadable or truncated"
            findings.append(Finding(level, "unreadable images", message, bad))
        findings += _find_changes(split.name, names, pictures)
        seen = [size for _, size in looked if size != (0, 0)]
        sizes[split.name] = _summarize_sizes(seen)
        readable[split.name] = np.array([not picture.error for picture in pictures])
        height, width = seen[0] if len(set(seen)) == 1 else input_size
        decoded_bytes += 3 * height * width * len(seen)
    return Look(findings + _find_duplicates(digests), sizes, readable, decoded_bytes)


def _find_changes(split: str, names: Sequence[str], pictures: Sequence[Picture]) -> list[Finding]:
    """Tell of each kind of change which images decoding changes so."""
    changed: dict[str, list[str]] = collections.defaultdict(list)
    for name, picture in zip(names, pictures, strict=True):
        for change in picture.changes:
            changed[change].append(name)
    return [
        Finding("warning", "converted images", f"{split}: {len(which)} x {change}", tuple(which))
        for change, which in sorted(changed.items())
    ]


def check_cache(needed: int, cache_dir: str | os.PathLike[str] | None) -> list[Finding]:
    """Check that decoded images can be kept.

    Args:
        needed: bytes.
        cache_dir: where; None for the user's cache directory.
    """
    chosen = cache.directory(cache_dir)
    place = next((path for path in (chosen, *chosen.parents) if path.exists()), pathlib.Path("/"))
    problem = ""
    if not place.is_dir():
        problem = f"{place} is a file"
    elif not os.access(place, os.W_OK):
        problem = f"{place} is not writable"
    elif (free := shutil.disk_usage(place).free) < needed:
        problem = f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
    if not problem:
        return []
    message = f"decoded images cannot be kept in {chosen} ({problem}); they are decoded each time"
    return [Finding("warning", "cache", message)]


def _summarize_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {"different": 0}
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return {
        "different": len(set(sizes)),
        "smallest": list(by_area[0]),
        "median": list(by_area[len(by_area) // 2]),
        "largest": list(by_area[-1]),
    }


def _find_duplicates(digests: dict[bytes, list[tuple[str, str]]]) -> list[Finding]:
    """Sort byte-identical images by the splits that they are in."""
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for places in digests.values():
        if len(places) > 1:
            splits = tuple(dict.fromkeys(split for split, _ in places))
            groups[splits].append(" = ".join(f"{split}/{name}" for split, name in places))
    findings = []
    for splits, names in groups.items():
        if len(splits) == 1:
            severity: Level = "note"
        else:
            severity = "error" if "train" in splits else "warning"
        findings.append(
            Finding(
                severity,
                "identical images",
                f"{len(names)} images are byte for byte in {' and '.join(splits)}"
                + (" several times" if len(splits) == 1 else ""),
                tuple(names),
            )
        )
    return findings
