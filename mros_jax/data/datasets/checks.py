"""What can be wrong with a data set: single checks, each returning findings."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mros_jax.data.datasets.splits import Dataset, Split
from mros_jax.data.store import decode_image

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


@dataclasses.dataclass(frozen=True)
class Published:
    """Counts that the data set's authors publish; None where they depend on options."""

    images: int | None
    identities: int
    cameras: int


def _published(cameras: int, **splits: tuple[int | None, int]) -> dict[str, Published]:
    return {split: Published(*counts, cameras) for split, counts in splits.items()}


_CLASSIC = _published(2, train=(None, 1367), query=(None, 100), gallery=(None, 100))
_MSMT17 = _published(15, train=(32_621, 1041), query=(11_659, 3060), gallery=(82_161, 3060))
# Identities without junk and distractors. Market's gallery: 13,120 boxes of people, 2,793
# distractors and 3,819 junk boxes.
PUBLISHED: dict[str, dict[str, Published]] = {
    "market1501": _published(6, train=(12_936, 751), query=(3368, 750), gallery=(19_732, 750)),
    "dukemtmc": _published(8, train=(16_522, 702), query=(2228, 702), gallery=(17_661, 1110)),
    "msmt17": _MSMT17,
    "msmt17_v2": _MSMT17,
    "cuhk03_labeled": _published(2, train=(7368, 767), query=(1400, 700), gallery=(5328, 700)),
    "cuhk03_detected": _published(2, train=(7365, 767), query=(1400, 700), gallery=(5332, 700)),
    "cuhk03_labeled_classic": _CLASSIC,
    "cuhk03_detected_classic": _CLASSIC,
}


def summarise(split: Split) -> dict[str, Any]:
    """Returns the counts of a split: images, identities, junk, distractors, and per camera."""
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


def check_counts(dataset: Dataset) -> list[Finding]:
    """Compares with the published counts, where there are any for this data set."""
    findings = []
    for split in dataset.splits:
        expected = PUBLISHED.get(dataset.name, {}).get(split.name)
        if expected is None:
            continue
        extra = sum(str(name).startswith("500k/") for name in split.names)
        seen = summarise(split)
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
    """Finds identities that are both trained and tested on."""
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
    """Checks that P x K batches can be made."""
    findings = []
    if dataset.num_classes < identities:
        findings.append(
            Finding(
                "fatal",
                "identities",
                f"{dataset.num_classes} training identities, and a batch needs {identities}: "
                f"set batch.identities to {dataset.num_classes} or less",
            )
        )
    if len(dataset.train) < identities * images:
        findings.append(
            Finding(
                "fatal",
                "images",
                f"{len(dataset.train)} training images, and a batch needs {identities * images}: "
                "lower batch.identities or batch.images",
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
    """Finds queries that cannot have a true match, and says why."""
    query, gallery = dataset.query, dataset.gallery
    people = query.pids > 0
    in_gallery = np.isin(query.pids, gallery.pids)
    camera_pairs = np.unique(np.stack([gallery.pids, gallery.camids]), axis=1)
    pids, cameras_of = np.unique(camera_pairs[0], return_counts=True)
    cameras = np.zeros(len(query), np.int64)
    cameras[in_gallery] = cameras_of[np.searchsorted(pids, query.pids[in_gallery])]
    seen = set(map(tuple, camera_pairs.T.tolist()))
    own = np.array([pair in seen for pair in zip(query.pids, query.camids, strict=True)])
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
                "queries of nobody",
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
class _Image:
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)  # height, width
    mode: str = ""
    error: str = ""


def check_images(
    dataset: Dataset, *, num_threads: int | None = None, progress: bool = True
) -> tuple[list[Finding], dict[str, Any]]:
    """Reads and decodes every image.

    Args:
      dataset: the data set.
      num_threads: by default one per CPU.
      progress: show a progress bar.

    Returns:
      Findings about unreadable images, colour modes, and byte-identical images; and the sizes per
      split: count, smallest, median and largest (height, width).
    """
    findings, sizes = [], {}
    digests: dict[bytes, list[tuple[str, str]]] = collections.defaultdict(list)
    for split in dataset.splits:
        images = _read_all(split, num_threads or os.cpu_count() or 1, progress)
        bad = [
            f"{name} ({image.error})"
            for name, image in zip(split.names, images, strict=True)
            if image.error
        ]
        if bad:
            findings.append(
                Finding(
                    "error",
                    "unreadable images",
                    f"{split.name}: {len(bad)} images are unreadable or truncated",
                    tuple(bad),
                )
            )
        modes = collections.Counter(image.mode for image in images if not image.error)
        odd = {mode: count for mode, count in modes.items() if mode != "RGB"}
        if odd:
            counts = ", ".join(f"{count} {mode}" for mode, count in sorted(odd.items()))
            findings.append(
                Finding(
                    "warning",
                    "colour modes",
                    f"{split.name}: not 8-bit RGB, will be converted: {counts}",
                    tuple(
                        str(name)
                        for name, image in zip(split.names, images, strict=True)
                        if image.mode in odd
                    ),
                )
            )
        for name, image in zip(split.names, images, strict=True):
            if image.digest:
                digests[image.digest].append((split.name, str(name)))
        sizes[split.name] = _summarise_sizes([image.size for image in images if not image.error])
    return findings + _find_duplicates(digests), sizes


def _read_all(split: Split, threads: int, progress: bool) -> list[_Image]:
    if split.pixels is not None:
        pixels = split.pixels()
        return [
            _Image(hashlib.blake2b(image.tobytes()).digest(), image.shape[:2], "RGB")
            for image in pixels
        ]

    def read(i: int) -> _Image:
        data = b""
        try:
            data = split.read(i)
            pixels, mode = decode_image(data)
        except Exception as error:  # PIL raises what it likes on broken files
            return _Image(
                hashlib.blake2b(data).digest() if data else b"",
                error=f"{type(error).__name__}: {error}",
            )
        return _Image(hashlib.blake2b(data).digest(), pixels.shape[:2], mode)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = pool.map(read, range(len(split)))
        return list(
            tqdm(
                results,
                total=len(split),
                desc=f"reading {split.name}",
                unit=" images",
                disable=None if progress else True,
            )
        )


def _summarise_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
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
    """Sorts byte-identical images by the splits that they are in."""
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for places in digests.values():
        if len(places) > 1:
            splits = tuple(dict.fromkeys(split for split, _ in places))
            groups[splits].append(" = ".join(f"{split}/{name}" for split, name in places))
    findings = []
    for splits, names in groups.items():
        if len(splits) == 1:
            level: Level = "note"
        else:
            level = "error" if "train" in splits else "warning"
        findings.append(
            Finding(
                level,
                "identical images",
                f"{len(names)} images are byte for byte in {' and '.join(splits)}"
                + (" several times" if len(splits) == 1 else ""),
                tuple(names),
            )
        )
    return findings
