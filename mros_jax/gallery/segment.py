"""A segment of an index: images that were added together, in files that never change.

    vectors.npy    (n, D) float32, of unit length
    rows.npy       (n,) for each image: a digest of its name, and where its record lies
    records.jsonl  for each image a line of JSON: its name, root and metadata
    search.faiss   what faiss searches in place of all vectors; in large approximate segments alone

All but the last are mapped into memory, and so is the last as far as faiss can: a segment is open
at once, and its pages are shared by all processes that search it.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from mros_jax.errors import UserError
from mros_jax.retrieval.neighbors import MOST_POINTS

# Kinds of search, and how much work each does for a query unless told: "flat" compares it with all
# vectors; "ivf" with those of this many of its clusters; "hnsw" walks a graph of neighbours with
# this many candidates.
KINDS = {"flat": None, "ivf": 32, "hnsw": 128}
FILES = ("vectors.npy", "rows.npy", "records.jsonl", "search.faiss")
BLOCK = 65536  # rows that are handled at once

_LEAST_APPROXIMATE = 10_000  # rows; fewer are compared with all of them in milliseconds
_LEAST_POINTS = 39  # that a cluster of "ivf" is found from; faiss warns of fewer
_LINKS = 32  # of an image in the graph of "hnsw"
_ROW = np.dtype([("digest", "<u8"), ("start", "<i8"), ("stop", "<i8")])


def _import_faiss() -> Any:  # slow to import
    import faiss

    return faiss


class Block(NamedTuple):
    """Some images on their way into a segment.

    Attributes:
        vectors: (n, D) descriptors of unit length.
        records: their lines of JSON.
        digests: (n,) of their names.
    """

    vectors: Float32[np.ndarray, "n D"]
    records: Sequence[bytes]
    digests: UInt64[np.ndarray, "n"]


class Nearest(NamedTuple):
    """The nearest rows of some queries, nearest first.

    Attributes:
        similarity: (Q, k) cosines.
        rows: (Q, k) which rows; equal cosines by row.
    """

    similarity: Float32[np.ndarray, "Q k"]
    rows: Int64[np.ndarray, "Q k"]


def merge(parts: Sequence[Nearest], top: int) -> Nearest:
    """The nearest of several lists of the same queries."""
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    order = np.lexsort((rows, -similarity), axis=1)[:, :top]
    return Nearest(np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1))


def make_digests(names: Iterable[str]) -> UInt64[np.ndarray, "n"]:
    """64 bits for each name, by which it is looked for."""
    sizes = (hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8) for name in names)
    return np.frombuffer(b"".join(made.digest() for made in sizes), "<u8")


def write(
    path: pathlib.Path, blocks: Iterable[Block], count: int, size: int, kind: str
) -> dict[str, int]:
    """Write a segment; nothing of it counts until an index names it.

    Args:
        path: its directory, which must not be there.
        blocks: of `count` images.
        count: number of images.
        size: of a descriptor.
        kind: of `KINDS`.

    Returns:
        The size in bytes of each file.
    """
    path.mkdir(parents=True)
    rows = np.empty(count, _ROW)
    filled = end = 0
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, size)}
    # Written, not mapped: a full disk is then an error and not the end of the process.
    with open(path / "vectors.npy", "wb") as vectors, open(path / "records.jsonl", "wb") as records:
        np.lib.format.write_array_header_1_0(vectors, shape)
        for block in blocks:
            vectors.write(np.ascontiguousarray(block.vectors, "<f4").data)
            records.writelines(block.records)
            part = rows[filled : filled + len(block.records)]
            stops = end + np.cumsum([len(line) for line in block.records])
            part["digest"], part["stop"] = block.digests, stops
            part["start"] = np.concatenate([[end], stops[:-1]])
            filled, end = filled + len(part), int(stops[-1])
        assert filled == count
    with open(path / "rows.npy", "wb") as file:
        np.save(file, rows)
    if kind != "flat" and count >= _LEAST_APPROXIMATE:
        _write_approximate(path, kind)
    for written in (*path.iterdir(), path, path.parent, path.parent.parent):
        _sync(written)
    return {file.name: file.stat().st_size for file in sorted(path.iterdir())}


def describe_index(kind: str, count: int) -> str:
    """What faiss calls the index of a kind for so many vectors."""
    clusters = int(min(4 * count**0.5, count / _LEAST_POINTS))
    return {"flat": "Flat", "ivf": f"IVF{clusters},Flat", "hnsw": f"HNSW{_LINKS},Flat"}[kind]


def _write_approximate(path: pathlib.Path, kind: str) -> None:
    faiss = _import_faiss()

    vectors = np.load(path / "vectors.npy", mmap_mode="r")
    count, size = vectors.shape
    index = faiss.index_factory(size, describe_index(kind, count), faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.cp.max_points_per_centroid = MOST_POINTS
        index.train(vectors)
    for start in range(0, count, BLOCK):
        index.add(vectors[start : start + BLOCK])
    try:
        faiss.write_index(index, str(path / "search.faiss"))
    except RuntimeError as error:
        said = str(error).splitlines()[-1]
        raise UserError(f"{path / 'search.faiss'} cannot be written: {said}") from error


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Segment:
    """An open segment.

    Attributes:
        vectors: (n, D) descriptors of unit length, those that have been removed included.
        digests: (n,) of the names.
        live: (n,) which images have not been removed.

    Args:
        path: its directory.
        files: the size in bytes of each file.
        removed: numbers of the rows that have been removed.

    Raises:
        FileNotFoundError: a file is not there.
        UserError: a file is damaged.
    """

    def __init__(
        self, path: pathlib.Path, files: dict[str, int], removed: Int64[np.ndarray, "r"]
    ) -> None:
        self.path = path
        for name, size in files.items():
            found = (path / name).stat().st_size
            if found != size:
                raise UserError(f"{path / name} is damaged: it has {found} bytes instead of {size}")
        try:
            # As plain arrays: what is cut from one is then no mapped file to NumPy either.
            self.vectors = np.asarray(np.load(path / "vectors.npy", mmap_mode="r"))
            self._rows = np.asarray(np.load(path / "rows.npy", mmap_mode="r"))
            self._records = np.memmap(path / "records.jsonl", np.uint8, "r")
            self.live = np.ones(len(self.vectors), bool)
            self.live[removed] = False
            fits = self._rows.dtype == _ROW and self.vectors.dtype == np.float32
            if not fits or self._rows.shape != self.vectors.shape[:1]:
                raise ValueError(f"{self._rows.dtype} {self._rows.shape} {self.vectors.shape}")
        except OSError:
            raise
        except Exception as error:  # NumPy checks little of what it reads
            raise UserError(f"{path} is damaged: {error}") from error
        self.digests = self._rows["digest"]
        self._approximate: Any = _read_approximate(path) if "search.faiss" in files else None

    def __len__(self) -> int:
        """How many images have not been removed."""
        return int(self.live.sum())

    def read_record(self, row: int) -> dict[str, Any]:
        """Name, root and metadata of an image.

        Raises:
            UserError: it is damaged.
        """
        try:
            record: dict[str, Any] = json.loads(self._read_line(row))
            if isinstance(record["name"], str):
                return record
        except (ValueError, LookupError, TypeError):
            pass
        raise UserError(f"{self.path / 'records.jsonl'} is damaged in row {row}")

    def _read_line(self, row: int) -> bytes:
        _, start, stop = self._rows[row]
        return self._records[start:stop].tobytes()

    def find(self, names: Sequence[str], digests: UInt64[np.ndarray, "m"]) -> dict[str, int]:
        """The rows of those of some names that are here and have not been removed.

        Args:
            names: what to look for.
            digests: of the names.
        """
        wanted = set(names)
        rows = np.flatnonzero(np.isin(self.digests, digests) & self.live).tolist()
        found = {self.read_record(row)["name"]: row for row in rows}
        return {name: row for name, row in found.items() if name in wanted}

    def iterate(self) -> Iterator[Block]:
        """All images that have not been removed, some at a time."""
        rows = np.flatnonzero(self.live)
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            lines = [self._read_line(row) for row in part.tolist()]
            yield Block(self.vectors[part], lines, self.digests[part])

    def search(
        self, query: Float32[np.ndarray, "Q D"], top: int, effort: int | None, exact: bool = False
    ) -> Nearest:
        """The nearest images that have not been removed.

        Args:
            query: descriptors of unit length.
            top: how many, at most all.
            effort: see `KINDS`.
            exact: compare with all vectors, whatever the kind.
        """
        top = min(top, len(self))
        if self._approximate is None or exact:
            return self._search_exactly(query, top)
        assert effort is not None
        similarity, rows = self._search_approximately(query, top, effort)
        while (few := (rows < 0).any(1)).any():  # it came upon fewer than `top`
            effort *= 2
            if effort < len(self.vectors):
                similarity[few], rows[few] = self._search_approximately(query[few], top, effort)
            else:
                similarity[few], rows[few] = self._search_exactly(query[few], top)
        return merge([Nearest(similarity, rows)], top)

    def _search_exactly(self, query: np.ndarray, top: int) -> Nearest:
        faiss = _import_faiss()

        found = Nearest(np.empty((len(query), 0), np.float32), np.empty((len(query), 0), np.int64))
        for vectors, rows in self._live_parts():
            similarity, position = faiss.knn(
                query, vectors, min(top, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT
            )
            found = merge([found, Nearest(similarity, rows[position])], top)
        return found

    def _live_parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vectors and their rows; only those beside a removed one are copied."""
        if self.live.all():
            yield self.vectors, np.arange(len(self.vectors))
            return
        for start in range(0, len(self.vectors), BLOCK):
            live = self.live[start : start + BLOCK]
            vectors = self.vectors[start : start + BLOCK]
            if live.any():
                yield (vectors if live.all() else vectors[live]), start + np.flatnonzero(live)

    def _search_approximately(self, query: np.ndarray, top: int, effort: int) -> Nearest:
        faiss = _import_faiss()
        selector = {} if self._selector is None else {"sel": self._selector[0]}
        if isinstance(self._approximate, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, top), **selector)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=effort, **selector)
        return Nearest(*self._approximate.search(query, top, params=parameters))

    @functools.cached_property
    def _selector(self) -> tuple[Any, np.ndarray] | None:
        """What faiss leaves removed rows out by, and the memory that it looks at."""
        faiss = _import_faiss()

        if self.live.all():
            return None
        bits = np.packbits(self.live, bitorder="little")
        return faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits)), bits


def _read_approximate(path: pathlib.Path) -> Any:
    faiss = _import_faiss()

    # Since faiss 1.11 more can be mapped.
    flag = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    try:
        return faiss.read_index(str(path / "search.faiss"), flag)
    except RuntimeError as error:
        (path / "search.faiss").stat()  # has it been removed meanwhile?
        said = str(error).splitlines()[-1]
        raise UserError(f"{path / 'search.faiss'} is damaged: {said}") from error
