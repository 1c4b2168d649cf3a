"""An index: descriptors on disk with their names, to which images are added and removed.

    index.json               the model, the kind of search, and which segments there are
    segments/000001/         images that were added together, see `mros_jax.gallery.segment`
    segments/000001/removed-000004.npy    rows of it that have been removed
    .lock                    while something is written

`index.json` is replaced when everything that it names is on disk, so a reader, and whoever comes
after a writer that was killed, sees the index as it was before or as it is after, and never between
the two. Adding writes the new images alone, but for this: segments at the end that hold no more
images than the new one become part of it. There are then few of them, at most the binary logarithm
of the number of images, and an image is written again at most as often.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from mros_jax import extras
from mros_jax.errors import NotFoundError, UserError, check_choice
from mros_jax.files import read_json, write_atomically, write_json
from mros_jax.gallery import segment as segments
from mros_jax.gallery.features import Features, check_model
from mros_jax.gallery.segment import BLOCK, KINDS, Block, Nearest, Segment
from mros_jax.retrieval import rerank as reranks
from mros_jax.retrieval.inputs import check_count
from mros_jax.runs import lock

FORMAT = 1  # of the directory: its files, and what they hold

_MANIFEST = "index.json"
_TEMPORARY = re.compile(rf"\.{re.escape(_MANIFEST)}\.\d+\.tmp")
_SEGMENT = re.compile(r"\d{6,}")
_SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class _Part:
    """A segment as the manifest has it."""

    name: str
    files: dict[str, int]
    removed: str | None = None  # file of the rows that have been removed


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What `index.json` holds."""

    size: int
    kind: str
    effort: int | None
    model: dict[str, Any]
    parts: tuple[_Part, ...] = ()
    next: int = 1  # number of the next segment, or file of removed rows

    @classmethod
    def read(cls, path: pathlib.Path) -> "_Manifest":
        try:
            given = read_json(path)
        except NotFoundError as error:
            raise NotFoundError(f"{path.parent} is no index: it has no {path.name}") from error
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, dict) else None
            raise UserError(
                f"{path.parent} is an index of format {found!r}, this version reads {FORMAT}; use "
                "the version that wrote it, or build it again"
            )
        try:
            values = {key: value for key, value in given.items() if key != "format"}
            manifest = cls(**values | {"parts": tuple(_Part(**part) for part in values["parts"])})
            for part in manifest.parts:
                if not _SEGMENT.fullmatch(part.name) or (
                    part.removed is not None and not re.fullmatch(r"removed-\d{6,}", part.removed)
                ):
                    raise ValueError(f"no segment is named {part.name}, {part.removed}")
                if not set(segments.FILES) >= set(part.files) >= set(segments.FILES[:3]):
                    raise ValueError(f"{part.name} has the files {part.files}")
            check_choice("kind", manifest.kind, KINDS)
            check_count(manifest.size, "size")
            check_count(manifest.next, "next")
            if not isinstance(manifest.model, dict):
                raise ValueError(f"model is {manifest.model!r}")
            if manifest.kind != "flat":
                check_count(manifest.effort, "effort")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}; build the index again") from error
        return manifest

    def write(self, path: pathlib.Path) -> None:
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})


class _Snapshot:
    """An index as it was when it was opened; what writers replace afterwards stays mapped.

    Rows are counted over all segments.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.manifest = _Manifest.read(path / _MANIFEST)
        self.segments = _open(path, self.manifest)
        counts = [len(part.vectors) for part in self.segments]
        self.starts = np.cumsum([0, *counts])

    def search(self, query: np.ndarray, top: int, effort: int | None, exact: bool) -> Nearest:
        empty = Nearest(np.empty((len(query), 0), np.float32), np.empty((len(query), 0), np.int64))
        parts = [empty]
        for start, part in zip(self.starts, self.segments, strict=False):
            near = part.search(query, top, effort, exact)
            parts.append(Nearest(near.similarity, near.rows + start))
        return segments.merge(parts, top)

    def find_live(self) -> Int64[np.ndarray, "n"]:
        """Rows that have not been removed."""
        return np.flatnonzero(np.concatenate([np.empty(0, bool), *(x.live for x in self.segments)]))

    def take(self, rows: Int64[np.ndarray, "n"]) -> Float32[np.ndarray, "n D"]:
        """Descriptors of unit length."""
        vectors = np.empty((len(rows), self.manifest.size), np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(owner):
            own = owner == i
            vectors[own] = self.segments[i].vectors[rows[own] - self.starts[i]]
        return vectors

    def read_record(self, row: int) -> dict[str, Any]:
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[i].read_record(row - int(self.starts[i]))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found, nearest first.

    Attributes:
        distances: (Q, k) of each query's k nearest images: cosine distances, or after re-ranking
            those of the method. k is `top`, or all images where there are fewer.
        rows: (Q, k) their numbers in the index as it was searched: 0 for the image that was added
            first, removed ones counted until they are dropped.
    """

    distances: Float[np.ndarray, "Q k"]
    rows: Int64[np.ndarray, "Q k"]
    _snapshot: _Snapshot = dataclasses.field(repr=False)

    @functools.cached_property
    def records(self) -> list[list[dict[str, Any]]]:
        """`name`, `root` and the metadata of each image."""
        return [[self._snapshot.read_record(row) for row in rows] for rows in self.rows.tolist()]

    @property
    def names(self) -> list[list[str]]:
        """The name of each image."""
        return [[record["name"] for record in records] for records in self.records]


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no index can be built.

    Raises:
        UserError: it is an index, or holds something else than what a killed writer leaves.
    """
    path = pathlib.Path(path)
    if (path / _MANIFEST).exists():
        raise UserError(f"{path} is an index already; add to it, or remove the directory")
    left = re.compile(rf"segments|segments/{_SEGMENT.pattern}|\.lock|{_TEMPORARY.pattern}")
    there = (
        file.relative_to(path) for pattern in ("*", "segments/*") for file in path.glob(pattern)
    )
    if others := [name for name in map(str, there) if not left.fullmatch(name)]:
        raise UserError(f"{path} holds {min(others)}; expected a directory without files")


class Index:
    """A gallery on disk: opened to search it, to add to it and to remove from it.

    What is open is the index as it was then. Another process may write to it: `refresh` opens what
    there is now.

    Args:
        path: its directory.

    Attributes:
        path: its directory.

    Raises:
        NotFoundError: there is no index.
        UserError: it is damaged, of another version, or faiss is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        extras.require("faiss", "an index")
        self.path = pathlib.Path(path)
        self.refresh()

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        features: Features,
        *,
        kind: str = "flat",
        effort: int | None = None,
    ) -> "Index":
        """Make an index; what a build that was killed has left behind is replaced.

        Args:
            path: its directory, which must be empty or not there.
            features: the images; there may be none.
            kind: "flat", exact; or "ivf" or "hnsw", which are approximate and take effect where a
                segment has 10,000 images.
            effort: how much work a search does for a query: of "ivf", the clusters that it looks at
                (32 unless told); of "hnsw", the candidates that it keeps (128), at least `top`.

        Raises:
            UserError: the directory is in use or holds something else; bad features, see `add`.
        """
        extras.require("faiss", "an index")
        path = pathlib.Path(path)
        check_choice("kind", kind, KINDS)
        effort = choose_effort(kind, KINDS[kind], effort)
        shape = np.shape(features.features)
        if len(shape) != 2 or shape[1] < 1:
            raise UserError(f"features have shape {shape}; expected (images, numbers)")
        model = json.loads(json.dumps(dict(features.model)))
        made = _Manifest(size=shape[1], kind=kind, effort=effort, model=model)
        path.mkdir(parents=True, exist_ok=True)
        check_place(path)
        with _write_to(path):
            check_place(path)  # another process may have been quicker
            _grow(path, made, [], features).write(path / _MANIFEST)
        return cls(path)

    def refresh(self) -> None:
        """Open the index as it is now.

        Raises:
            NotFoundError, UserError: as for the class.
        """
        while True:
            before = _Manifest.read(self.path / _MANIFEST)
            try:
                self._now = _Snapshot(self.path)
                return
            except NotFoundError:
                raise
            except FileNotFoundError as error:
                # A writer may have replaced segments since the manifest was read.
                if before == _Manifest.read(self.path / _MANIFEST):
                    raise UserError(
                        f"{self.path} is damaged: {error.filename} is not there; build it again"
                    ) from error

    @property
    def kind(self) -> str:
        """The kind of search, see `build`."""
        return self._now.manifest.kind

    @property
    def model(self) -> Mapping[str, Any]:
        """What made the descriptors, see `Features`."""
        return self._now.manifest.model

    def __len__(self) -> int:
        return sum(map(len, self._now.segments))

    def __contains__(self, name: str) -> bool:
        return bool(_locate(self._now.segments, [name]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records of all images: `name`, `root` and metadata."""
        for part in self._now.segments:
            for row in np.flatnonzero(part.live).tolist():
                yield part.read_record(row)

    def add(self, features: Features, *, replace: bool = False) -> None:
        """Add images.

        Args:
            features: the images.
            replace: images of the same names make room; otherwise that is an error.

        Raises:
            UserError: descriptors of another model or size, with NaN, infinity or only zeros; names
                that are there twice or already; metadata that JSON cannot hold; another process
                writes to the index. The index is then as it was.
        """
        check_model(features.model, self.model, str(self.path))
        with _write_to(self.path):
            self.refresh()
            there = _locate(self._now.segments, features.names)
            if there and not replace:
                raise UserError(
                    f"{_show(there)} already in {self.path}; leave out what is there, remove it "
                    "first, or replace it"
                )
            manifest = _mark(self.path, self._now.manifest, self._now.segments, there)
            current = _open(self.path, manifest)
            _grow(self.path, manifest, current, features).write(self.path / _MANIFEST)
            self.refresh()

    def remove(self, names: Iterable[str]) -> None:
        """Remove images.

        They are marked; where more than half of a segment is, it is written again without them.

        Args:
            names: of the images.

        Raises:
            UserError: a name is not there, or another process writes to the index. Nothing is
                removed then.
        """
        names = list(dict.fromkeys(names))
        with _write_to(self.path):
            self.refresh()
            there = _locate(self._now.segments, names)
            if absent := [name for name in names if name not in there]:
                raise UserError(f"{_show(absent)} not in {self.path}; nothing is removed")
            manifest = _mark(self.path, self._now.manifest, self._now.segments, there)
            current = _open(self.path, manifest)
            _compact(self.path, manifest, current).write(self.path / _MANIFEST)
            self.refresh()

    def search(
        self,
        features: Features,
        top: int = 10,
        *,
        effort: int | None = None,
        exact: bool = False,
        rerank: reranks.Rerank | str | None = None,
        shortlist: int = 200,
    ) -> Found:
        """Find the nearest images of queries, by cosine.

        Args:
            features: the queries.
            top: how many of the nearest.
            effort: other than that of the index, see `build`.
            exact: compare with all images, whatever the kind.
            rerank: re-rank the nearest images of each query among themselves, as if they were the
                whole gallery and it the only query: a method such as `ECN()`, or its name.
            shortlist: how many are re-ranked.

        Raises:
            UserError: descriptors of another model or size, with NaN, infinity or only zeros; `top`
                below 1 or beyond the shortlist; a method that needs more images.
        """
        check_model(features.model, self.model, str(self.path))
        check_count(top, "top")
        effort = choose_effort(self.kind, self._now.manifest.effort, effort)
        if rerank is not None:
            check_count(shortlist, "shortlist")
            check_count(top, "top", most=shortlist, of="images in the shortlist")
        query = _make_unit(features.features, features.names, self._now.manifest.size)
        near = self._now.search(query, top if rerank is None else shortlist, effort, exact)
        if rerank is None:
            return Found(np.maximum(1 - near.similarity, 0), near.rows, self._now)
        method = reranks.parse([rerank])[0] if isinstance(rerank, str) else rerank
        if method.learned:
            raise UserError(
                f"an index keeps descriptors of unit length, and {method.name} compares them as "
                "they are; evaluate a run with it"
            )
        distances = np.empty(near.rows.shape)
        for i, rows in enumerate(near.rows):
            if len(rows):
                distances[i] = method.distances(query[i : i + 1], self._now.take(rows))[0]
        order = np.argsort(distances, axis=1, kind="stable")[:, :top]
        chosen = [np.take_along_axis(x, order, axis=1) for x in (distances, near.rows)]
        return Found(chosen[0], chosen[1], self._now)

    def measure_recall(self, *, top: int = 10, num: int = 200, effort: int | None = None) -> float:
        """Share of the exact nearest images that a search finds, over a sample of the index.

        Args:
            top: how many of the nearest of each image, itself not counted.
            num: images of the sample, spread over the index; all where there are fewer.
            effort: as for `search`.

        Raises:
            UserError: there are not more than `top` images.
        """
        if len(self) <= top:
            raise UserError(f"{self.path} has {len(self)} images; expected more than {top}")
        effort = choose_effort(self.kind, self._now.manifest.effort, effort)
        rows = self._now.find_live()
        rows = rows[np.linspace(0, len(rows) - 1, min(num, len(rows))).astype(int)]
        query = self._now.take(rows)
        wanted, found = (
            self._now.search(query, top + 1, effort, exact).rows for exact in (True, False)
        )
        return _compare(wanted, found, rows)


@contextlib.contextmanager
def _write_to(path: pathlib.Path) -> Iterator[None]:
    """Keep other writers out, and delete before and after what the index does not name."""
    with lock.hold(path / ".lock", "wait for it or end it; nothing has been changed"):
        _clean(path)
        try:
            yield
        finally:
            _clean(path)


def choose_effort(kind: str, usual: int | None, given: int | None) -> int | None:
    """The effort that is given, or else the usual one of an index.

    Raises:
        UserError: it is below 1, or given for an exact search.
    """
    if given is None:
        return usual
    if kind == "flat":
        raise UserError("effort is of the kinds ivf and hnsw; an exact search has none")
    check_count(given, "effort")
    return given


def _open(path: pathlib.Path, manifest: _Manifest) -> list[Segment]:
    found = []
    for part in manifest.parts:
        place = path / "segments" / part.name
        removed = np.empty(0, np.int64)
        if part.removed is not None:
            try:
                removed = np.load(place / f"{part.removed}.npy")
            except (ValueError, EOFError) as error:
                raise UserError(f"{place / part.removed}.npy is damaged: {error}") from error
        one = Segment(place, part.files, removed)
        if one.vectors.shape[1] != manifest.size:
            raise UserError(
                f"{place} is damaged: it has descriptors of {one.vectors.shape[1]} numbers, "
                f"expected {manifest.size}"
            )
        found.append(one)
    return found


def _clean(path: pathlib.Path) -> None:
    """Delete what the manifest does not name: of a killed writer, or what has been replaced."""
    file, place = path / _MANIFEST, path / "segments"
    parts = _Manifest.read(file).parts if file.exists() else ()
    kept = {part.name: (*part.files, f"{part.removed}.npy") for part in parts}
    for entry in place.iterdir() if place.is_dir() else ():
        if entry.name in kept:
            for other in entry.iterdir():
                if other.name not in kept[entry.name]:
                    other.unlink()
        elif _SEGMENT.fullmatch(entry.name):
            shutil.rmtree(entry)
    for entry in path.iterdir():
        if _TEMPORARY.fullmatch(entry.name):
            entry.unlink()


def _locate(parts: Sequence[Segment], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Segment and row of those of some names that are in an index."""
    digests = segments.make_digests(names)
    return {
        name: (i, row)
        for i, part in enumerate(parts)
        for name, row in part.find(names, digests).items()
    }


def _mark(
    path: pathlib.Path,
    manifest: _Manifest,
    parts: Sequence[Segment],
    places: Mapping[str, tuple[int, int]],
) -> _Manifest:
    """Write which rows have been removed, those at `places` among them."""
    entries, number = list(manifest.parts), manifest.next
    for i in sorted({i for i, _ in places.values()}):
        live = parts[i].live.copy()
        live[[row for j, row in places.values() if j == i]] = False
        name = f"removed-{number:06d}"
        file = path / "segments" / entries[i].name / f"{name}.npy"
        with write_atomically(file, "wb") as stream:
            np.save(stream, np.flatnonzero(~live))
        entries[i] = dataclasses.replace(entries[i], removed=name)
        number += 1
    return dataclasses.replace(manifest, parts=tuple(entries), next=number)


def _grow(
    path: pathlib.Path, manifest: _Manifest, parts: Sequence[Segment], features: Features
) -> _Manifest:
    """Write new images as a segment, with the last ones that have no more images than it."""
    count, kept = len(features), len(parts)
    new = _make_blocks(features, manifest.size)
    if not count:
        return manifest
    while kept and len(parts[kept - 1]) <= count:
        kept -= 1
        count += len(parts[kept])
    blocks = itertools.chain(*(part.iterate() for part in parts[kept:]), new)
    return _write(path, manifest, manifest.parts[:kept], blocks, count)


def _compact(path: pathlib.Path, manifest: _Manifest, parts: Sequence[Segment]) -> _Manifest:
    """Write segments again of which more than half has been removed."""
    for part, entry in zip(parts, manifest.parts, strict=True):
        if 2 * len(part) < len(part.vectors):
            others = tuple(other for other in manifest.parts if other != entry)
            manifest = _write(path, manifest, others, part.iterate(), len(part))
    return manifest


def _write(
    path: pathlib.Path,
    manifest: _Manifest,
    others: tuple[_Part, ...],
    blocks: Iterator[Block],
    count: int,
) -> _Manifest:
    """Write a segment, which stands behind `others`."""
    if not count:
        return dataclasses.replace(manifest, parts=others)
    name = f"{manifest.next:06d}"
    place = path / "segments" / name
    files = segments.write(place, blocks, count, manifest.size, manifest.kind)
    parts = (*others, _Part(name, files))
    return dataclasses.replace(manifest, parts=parts, next=manifest.next + 1)


def _make_blocks(features: Features, size: int) -> Iterator[Block]:
    """Check new images; what is returned makes what is written of them."""
    names, metadata = list(features.names), features.metadata
    if len(set(names)) < len(names):
        twice = [name for name, times in collections.Counter(names).items() if times > 1]
        raise UserError(f"{_show(twice)} there more than once; expected another name for each")
    _check_shape(features.features, names, size)

    def make() -> Iterator[Block]:
        for start in range(0, len(names), BLOCK):
            part = slice(start, start + BLOCK)
            vectors = _make_unit(features.features[part], names[part], size)
            more = metadata[part] if metadata is not None else [{}] * len(vectors)
            lines = [
                _make_line(name, features.root, own)
                for name, own in zip(names[part], more, strict=True)
            ]
            yield Block(vectors, lines, segments.make_digests(names[part]))

    return make()


def _make_line(name: str, root: str, metadata: Mapping[str, Any]) -> bytes:
    reserved = {"name", "root"} & set(metadata)
    if reserved:
        raise UserError(f"metadata of {name} has {', '.join(sorted(reserved))}: take another word")
    try:
        return json.dumps({"name": name, "root": root, **metadata}).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"metadata of {name} cannot be kept as JSON: {error}") from error


def _check_shape(features: np.ndarray, names: Sequence[str], size: int) -> None:
    shape = np.shape(features)
    if shape != (len(names), size):
        raise UserError(
            f"features have shape {shape} and there are {len(names)} names; expected "
            f"({len(names)}, {size})"
        )


def _make_unit(features: np.ndarray, names: Sequence[str], size: int) -> Float32[np.ndarray, "n D"]:
    """Descriptors divided by their norms.

    Raises:
        UserError: another shape; NaN, infinity or only zeros, by the images' names.
    """
    _check_shape(features, names, size)
    wide = np.asarray(features, np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 0)
    if bad := [name for name, good in zip(names, usable[:, 0], strict=True) if not good]:
        raise UserError(
            f"the descriptors of {_show(bad, verb='')} hold NaN, infinity or only zeros; leave "
            "those images out"
        )
    unit: np.ndarray = (wide / norms).astype(np.float32)
    return unit


def _compare(
    exact: Int64[np.ndarray, "Q k"], found: Int64[np.ndarray, "Q k"], itself: np.ndarray
) -> float:
    """Share of the exact lists that was found; each image itself is not counted."""
    hits = total = 0
    for wanted, got, own in zip(exact, found, itself, strict=True):
        others = set(wanted.tolist()) - {int(own)}
        hits += len(others & set(got.tolist()))
        total += len(others)
    return hits / total


def _show(names: Iterable[str], verb: str | None = None) -> str:
    """The first names, how many more there are, and "is" or "are"."""
    names = list(names)
    text = ", ".join(map(str, names[:_SHOWN]))
    if len(names) > _SHOWN:
        text += f" and {len(names) - _SHOWN} more"
    if verb is None:
        verb = " is" if len(names) == 1 else " are"
    return text + verb
