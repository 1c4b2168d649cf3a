"""Whether what is exported agrees with the run: on images of its data set, or invented ones."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from mros_jax.data import decoding
from mros_jax.data.images import Picture
from mros_jax.data.splits import Dataset, Split
from mros_jax.errors import UserError
from mros_jax.retrieval import Result, Side, compute_distances, evaluate

log = logging.getLogger(__name__)

Session = Callable[[UInt8[np.ndarray, "B H W 3"]], np.ndarray]

TOLERANCE = 1e-4  # of a descriptor's norm
_TIE = 1e-5  # distances that are this near may change places, as a share of the largest
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """Queries and gallery of a check.

    Attributes:
        source: where they are from, in words.
        query: images as they are decoded, of any sizes.
        gallery: the same.
        labels: pids and camids of both, to evaluate by; None where the images are invented.
    """

    source: str
    query: list[UInt8[np.ndarray, "_ _ 3"]]
    gallery: list[UInt8[np.ndarray, "_ _ 3"]]
    labels: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def images(self) -> list[np.ndarray]:
        """All images, queries first."""
        return [*self.query, *self.gallery]

    def __str__(self) -> str:
        return f"{len(self.query)} queries and {len(self.gallery)} gallery images {self.source}"

    def resize(self, height: int, width: int, interpolation: str) -> "Sample":
        """The same with all images but the first in one size: a program is compiled for each."""
        loaded = decoding.load_images(
            self.images[1:], height=height, width=width, interpolation=interpolation
        )
        images = [self.images[0], *loaded]
        split = len(self.query)
        return dataclasses.replace(self, query=images[:split], gallery=images[split:])


def draw(dataset: Dataset, size: int) -> Sample:
    """Take a part of a data set's queries and gallery, evenly, mates of the queries first.

    Args:
        dataset: the data set.
        size: images in all; a fifth of them queries.

    Raises:
        UserError: an image that cannot be read.
    """
    query = dataset.query.select(_spread(len(dataset.query), max(size // 5, 1)))
    mates = np.isin(dataset.gallery.pids, query.pids)
    rows = np.concatenate([np.flatnonzero(mates), np.flatnonzero(~mates)])
    half = size // 2
    own = rows[: mates.sum()]
    own = own[_spread(len(own), half)]
    others = rows[mates.sum() :]
    others = others[_spread(len(others), max(size - len(query) - len(own), 0))]
    gallery = dataset.gallery.select(np.sort(np.concatenate([own, others])))
    return Sample(
        f"of {dataset.name}",
        read(query),
        read(gallery),
        (query.pids, gallery.pids, query.camids, gallery.camids),
    )


def read(split: Split, count: int | None = None) -> list[np.ndarray]:
    """Images of a split as they are decoded: all, or some that are spread evenly.

    Raises:
        UserError: one cannot be read.
    """
    rows = np.arange(len(split)) if count is None else _spread(len(split), count)
    return list(split.images.select(rows).map(Picture.require))


def _spread(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def invent(size: int, seed: int = 0) -> Sample:
    """Images of colored noise of many sizes, where there is no data set.

    Args:
        size: images in all; a fifth of them queries.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(size):
        coarse = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3)).astype(np.uint8)
        height, width = rng.integers(24, 289, 2)
        images.append(decoding.resize(coarse, int(height), int(width), "bicubic"))
    split = max(size // 5, 1)
    return Sample("of noise", images[:split], images[split:])


def run(session: Session, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> np.ndarray:
    """Descriptors (N, D) of images of any sizes, those of one size in batches."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    made: dict[int, np.ndarray] = {}
    for rows in groups.values():
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            made |= zip(batch, session(np.stack([images[row] for row in batch])), strict=True)
    return np.stack([made[row] for row in range(len(images))])


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far other descriptors of a sample are from the run's.

    Attributes:
        difference: largest ||theirs - ours|| / ||ours||.
        moved: queries whose ranked list is another.
        queries: all queries.
    """

    difference: float
    moved: int
    queries: int

    def __str__(self) -> str:
        return (
            f"descriptors differ by up to {self.difference:.1e} of their norm, "
            f"{self.moved} of {self.queries} ranked lists are others"
        )

    @property
    def holds(self) -> bool:
        """Whether they are the run's: within the tolerance, and all lists the same."""
        return self.difference <= TOLERANCE and not self.moved  # a NaN is no agreement


def compare(
    ours: Float[np.ndarray, "N D"], theirs: Float[np.ndarray, "N D"], queries: int, metric: str
) -> Agreement:
    """Compare descriptors of a sample, and the ranked lists that they give.

    Two images of a list may change places where the run's distances to them are equal to 1e-5 of
    the largest: rounding alone decides there.

    Args:
        ours: the run's, queries first.
        theirs: the file's.
        queries: how many are queries.
        metric: "cosine" or "euclidean".

    Raises:
        UserError: a descriptor of zeros, or with NaN, that cannot be ranked.
    """
    norms = np.linalg.norm(ours, axis=1)
    difference = float(np.max(np.linalg.norm(theirs - ours, axis=1) / norms))
    if not np.isfinite(difference):
        return Agreement(difference, queries, queries)
    # Descriptors are normalized already where the protocol compares them so.
    own, other = (
        compute_distances(x[:queries], x[queries:], metric=metric, normalize=False)
        for x in (ours, theirs)
    )
    order = np.argsort(other, axis=1, kind="stable")
    along = np.take_along_axis(own, order, axis=1)
    # The run's distances must not fall along the file's lists.
    falls = np.maximum.accumulate(along, axis=1) - along
    moved = int(np.count_nonzero(falls.max(axis=1) > _TIE * np.abs(own).max()))
    return Agreement(difference, moved, queries)


def score(made: Float[np.ndarray, "N D"], sample: Sample, section: ConfigDict) -> Result | None:
    """Evaluate descriptors of a sample by the run's protocol, without re-ranking.

    Args:
        made: of the sample's images, queries first.
        sample: the images.
        section: `eval` of the run's config.

    Returns:
        None where the images are invented, or no query has a match among them.
    """
    if sample.labels is None:
        return None
    split = len(sample.query)
    query_pids, gallery_pids, query_camids, gallery_camids = sample.labels
    try:
        return evaluate(
            Side(made[:split], query_pids, query_camids),
            Side(made[split:], gallery_pids, gallery_camids),
            metric=section.metric,
            normalize=section.normalize,
            ap=section.ap,
        )
    except UserError as error:
        log.warning("mAP is not measured on %s: %s", sample, error)
        return None
