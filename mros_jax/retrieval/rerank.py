"""Re-ranking: ECN, k-reciprocal encoding, average query expansion, a learned random walk.

Each needs only the lists of nearest neighbours, and numbers of these; nothing of size
(queries + gallery) squared is ever made. Descriptors are normalised, but for the learned walk.

A method is a value that holds its parameters: `ECN(k=20)`. `evaluate(..., rerank=ECN(k=20))` ranks
with it block by block and never holds all distances; `ECN().distances(query, gallery)` makes them.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import scipy
from jaxtyping import Array, Float

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval import blocks, distances, gathers, padded, rescore
from mros_jax.retrieval.descriptors import PAIR_ARRAYS
from mros_jax.retrieval.inputs import Numbers, check_count, check_number, check_pair
from mros_jax.retrieval.neighbors import (
    Neighbors,
    check_neighbors,
    check_search,
    describe_neighbors,
    search_faiss,
    search_gallery,
    search_neighbors,
    stack,
)
from mros_jax.retrieval.reciprocal import compute_jaccard, encode, make_rows, scale_distances

# Called with query indices and an array, it writes the distances of those queries into the array.
Rows = Callable[[np.ndarray, np.ndarray], None]
_Features = Float[np.ndarray | Array, "_ D"]
_FEW = 8  # queries whose shared neighbours are listed at once: a core's cache holds them


@dataclasses.dataclass(frozen=True)
class Rerank(abc.ABC):
    """What all methods have in common: a name, parameters that are checked, and `distances`."""

    name: ClassVar[str]
    learned: ClassVar[bool] = False  # it needs heads of a trained network, and raw descriptors

    def bind(self, arrays: Mapping[str, Any]) -> "Rerank":
        """The method with what it needs of the arrays that a network's descriptors came with.

        Args:
            arrays: of `mros_jax.retrieval.descriptors.load_features`.

        Raises:
            UserError: a learned method, and there is nothing that it could use.
        """
        return self

    def check_features(
        self, query_features: Numbers, gallery_features: Numbers
    ) -> tuple[_Features, _Features]:
        """Check features as `inputs.check_pair`, for this method.

        Raises:
            UserError: as there; raw descriptors that do not fit float32.
        """
        query, gallery, exponent = check_pair(
            query_features, gallery_features, normalize=not self.learned
        )
        if exponent:
            raise UserError(
                f"{self.name} compares descriptors as they are, and some of these are too large or "
                "too small for float32"
            )
        return query, gallery

    @abc.abstractmethod
    def check(self, num_query: int, num_gallery: int) -> None:
        """Refuse parameters that ask for more images than there are.

        Raises:
            UserError: names the parameter, and the most that it may be.
        """

    @abc.abstractmethod
    def _prepare(self, query: _Features, gallery: _Features, placement: blocks.Placement) -> Rows:
        """`prepare` of checked features."""

    def prepare(
        self,
        query_features: Numbers,
        gallery_features: Numbers,
        placement: blocks.Placement = blocks.EVERYWHERE,
    ) -> Rows:
        """Do what is done once for all queries; the result writes the distances of some.

        Raises:
            UserError: as `distances`.
        """
        query, gallery = self.check_features(query_features, gallery_features)
        self.check(len(query), len(gallery))
        return self._prepare(query, gallery, placement)

    def distances(
        self,
        query_features: Numbers,
        gallery_features: Numbers,
        *,
        dtype: Any = np.float64,
        placement: blocks.Placement = blocks.EVERYWHERE,
    ) -> Float[np.ndarray, "Q G"]:
        """Distances of every query to every gallery image.

        Args:
            query_features: (Q, D).
            gallery_features: (G, D).
            dtype: of the result. ECN's are fractions of whole numbers of several thousand: float64
                has them exactly; float32 keeps their order in half the memory.
            placement: devices and block size.

        Raises:
            UserError: bad features (see `evaluate`); parameters that ask for more images than there
                are.
        """
        write = self.prepare(query_features, gallery_features, placement)
        num_query, num_gallery = len(query_features), len(gallery_features)
        result = np.empty((num_query, num_gallery), dtype)
        size = np.shape(gallery_features)[1]
        step = blocks.choose_block(num_gallery, size, placement.block_size)

        def work(start: int) -> None:
            part = result[start : start + step]
            write(np.arange(start, start + len(part)), part)

        blocks.map_on_host(work, range(0, num_query, step))
        return result

    def describe(self) -> dict[str, Any]:
        """All parameters in plain values, as a result's protocol states them."""
        values = {name: getattr(self, name) for name in _list_options(type(self))}
        if not isinstance(values.get("neighbors", ""), str):
            values["neighbors"] = "given"
        return values


@dataclasses.dataclass(frozen=True)
class ECN(Rerank):
    """Expanded cross neighbourhood distances (Sarfraz et al., CVPR 2018).

    The rank vector w_i gives each image b max(0, k - position of b in i's list); the rank distance
    is r(i, j) = -w_i . w_j; the expanded neighbours N(i) are the t nearest of i and the q nearest
    of each of those. The distance of query and gallery image is the mean of r(n, gallery) over
    N(query) and r(query, n) over N(gallery). As r is bilinear the mean over n is taken first: with
    E_i the mean of w_n over N(i), it is -(E_q . w_g + w_q . E_g) / 2: sparse products. Where
    that is 0 the cosine distance stands in its place (so those come last, in cosine order).

    Attributes:
        k: length of the rank lists, the image itself counted.
        t: nearest neighbours taken first.
        q: neighbours taken of each of those.
        method: "rankdist", or "origdist": the same mean of cosine distances.
        neighbors: "exact"; "faiss...", see `neighbors.search_faiss`; or lists from any other
            search: (Q + G, at least max(k, q + 1, t + 1)) indices into queries and gallery stacked,
            nearest first.

    Raises:
        UserError: parameters of another type, or below 1.
    """

    name = "ecn"
    k: int = 25
    t: int = 3
    q: int = 8
    method: str = "rankdist"
    neighbors: Numbers | str = "exact"

    def __post_init__(self) -> None:
        for name in ("k", "t", "q"):
            check_count(getattr(self, name), f"{self.name}: {name}")
        check_choice(f"{self.name}: method", self.method, ("rankdist", "origdist"))
        _check_search(self.neighbors)

    def check(self, num_query: int, num_gallery: int) -> None:
        """See `Rerank.check`."""
        num, of = num_query + num_gallery, "images in queries and gallery together"
        check_count(self.k, f"{self.name}: k", most=num, of=of)
        for name in ("t", "q"):
            check_count(getattr(self, name), f"{self.name}: {name}", most=num - 1, of=f"other {of}")

    @property
    def list_length(self) -> int:
        """How many neighbours of each image are needed, itself counted."""
        return max(self.k, self.t + 1, self.q + 1)

    def _prepare(self, query: _Features, gallery: _Features, placement: blocks.Placement) -> Rows:
        k, t, q = self.k, self.t, self.q
        num_query, num = len(query), len(query) + len(gallery)
        features = stack(query, gallery)
        query, gallery = features[:num_query], features[num_query:]
        if isinstance(self.neighbors, str) and self.neighbors == "exact":
            lists = search_neighbors(features, self.list_length, placement).indices
        else:
            lists = _take_lists(features, self.list_length, self.neighbors, placement)
        dense = gathers.suit(placement)
        if dense and self.method == "rankdist":
            return gathers.DeviceRows(
                *(gathers.make_order(k, t, q), query, gallery, [lists]),
                restore=lambda x: np.where(x <= -1, x / np.float64(2 * (t + t * q)), x),
                placement=placement,
            )
        first = lists[:, 1 : t + 1]
        expanded = np.concatenate([first, lists[first, 1 : q + 1].reshape(num, t * q)], axis=1)
        if dense:
            means = gathers.average_all(features, expanded, placement)
            return gathers.DeviceRows(
                *(gathers.order_by_means, query, gallery, [means]), placement=placement
            )
        chosen = make_rows(expanded, np.ones(expanded.shape, np.float32), num)
        count = expanded.shape[1]

        if self.method == "origdist":
            # The mean of 1 - x_n . x_g over n is 1 - (mean of x_n) . x_g.
            cosines = distances.Gallery(features, "similarity", placement=placement.alone())
            host = np.asarray(features)
            scale = 1 / np.sqrt(np.einsum("nd,nd->n", host, host))

            def write_means(rows: np.ndarray, out: np.ndarray) -> None:
                own = chosen[rows].multiply(scale).tocsr() @ host  # (B, D)
                from_query = own @ host[num_query:].T * scale[num_query:]
                from_gallery = (chosen[num_query:] @ cosines(query[rows]).T).T
                np.subtract(1.0, (from_query + from_gallery) / (2 * count), out=out)

            return write_means

        # Whole numbers, so float32 sums are exact below 2**24; the division comes last, in float64.
        weights = np.broadcast_to(np.arange(k, 0, -1, dtype=np.float32), (num, k))
        rank = make_rows(lists[:, :k], weights, num)
        ranked_by = rank.T.tocsr()
        mean = chosen[:num_query] @ rank
        of_gallery = scipy.sparse.vstack(
            [rank[num_query:].T.tocsr(), chosen[num_query:].T.tocsr()], format="csr"
        )
        cosine_distances = distances.Gallery(gallery, "cosine", placement=placement.alone())

        def write_ranks(rows: np.ndarray, out: np.ndarray) -> None:
            # The gallery's means would take the most memory: w_q . E_g is the mean of w_q . w_n.
            shared = rank[rows] @ ranked_by
            total = scipy.sparse.hstack([mean[rows], shared], format="csr") @ of_gallery
            np.copyto(out, cosine_distances(query[rows]))
            values = total.data.astype(np.float64) / (-2 * count)
            for row, begin, end in zip(out, total.indptr, total.indptr[1:], strict=False):
                row[total.indices[begin:end]] = values[begin:end]

        return write_ranks


@dataclasses.dataclass(frozen=True)
class KReciprocal(Rerank):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017), as the paper's own code computes it.

    Squared Euclidean distances of unit vectors, divided by the largest of the row; k1 + 1
    neighbours with the image itself; weights exp(-d) over the expanded reciprocal sets; mean over
    k2 neighbours; (1 - lambda) * Jaccard distance + lambda * original distance, between 0 and 1.

    Attributes:
        k1: neighbours for the reciprocal sets.
        k2: neighbours, itself counted, for the local query expansion; 1 leaves it out.
        lambda_value: weight of the original distance.
        neighbors: as for `ECN`; lists of at least max(k1 + 1, k2).

    Raises:
        UserError: parameters of another type, or out of range.
    """

    name = "k_reciprocal"
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    neighbors: Numbers | str = "exact"

    def __post_init__(self) -> None:
        check_count(self.k1, f"{self.name}: k1")
        check_count(self.k2, f"{self.name}: k2")
        check_number(self.lambda_value, f"{self.name}: lambda_value", 0, 1)
        _check_search(self.neighbors)

    def check(self, num_query: int, num_gallery: int) -> None:
        """See `Rerank.check`."""
        num, of = num_query + num_gallery, "images in queries and gallery together"
        check_count(self.k1, f"{self.name}: k1", most=num - 1, of=f"other {of}")
        check_count(self.k2, f"{self.name}: k2", most=num, of=of)

    @property
    def list_length(self) -> int:
        """How many neighbours of each image are needed, itself counted."""
        return max(self.k1 + 1, self.k2)

    def _prepare(self, query: _Features, gallery: _Features, placement: blocks.Placement) -> Rows:
        num_query = len(query)
        features = stack(query, gallery)
        query, gallery = features[:num_query], features[num_query:]
        found = self._find(features, self.list_length, placement)
        if gathers.suit(placement):
            padding = padded.encode(features, found, self.k1, self.k2, placement)
            return gathers.DeviceRows(
                *(padded.make_measure(self.lambda_value), query, gallery),
                [*padding, found.smallest],
                placement=placement,
            )
        encoded = encode(features, found, self.k1, self.k2)
        encoded_gallery = encoded[num_query:].tocsc()
        cosine_distances = distances.Gallery(gallery, "cosine", placement=placement.alone())

        def write(rows: np.ndarray, out: np.ndarray) -> None:
            share = 1 - self.lambda_value
            for i in range(0, len(rows), _FEW):
                jaccard = compute_jaccard(encoded[rows[i : i + _FEW]], encoded_gallery)
                np.multiply(jaccard, share, out=out[i : i + _FEW])
            original = scale_distances(cosine_distances(query[rows]), found.smallest[rows, None])
            original *= self.lambda_value
            out += original

        return write

    def _find(self, features: _Features, length: int, placement: blocks.Placement) -> Neighbors:
        if isinstance(self.neighbors, str) and self.neighbors == "exact":
            return search_neighbors(features, length, placement)
        return describe_neighbors(
            features, _take_lists(features, length, self.neighbors, placement), placement
        )


@dataclasses.dataclass(frozen=True)
class AQE(Rerank):
    """Average query expansion (Chum et al., ICCV 2007; alpha: Radenovic et al., TPAMI 2019).

    Each query becomes the mean of itself and its k nearest gallery images, all of unit length, each
    weighted by its cosine to the power of alpha; then plain cosine distances.

    Attributes:
        k: gallery images to add.
        alpha: 0 weights them all the same.
        neighbors: "exact", or (Q, at least k) gallery indices from another search.

    Raises:
        UserError: parameters of another type, or out of range.
    """

    name = "aqe"
    k: int = 5
    alpha: float = 0.0
    neighbors: Numbers | str = "exact"

    def __post_init__(self) -> None:
        check_count(self.k, f"{self.name}: k")
        check_number(self.alpha, f"{self.name}: alpha", 0)
        if isinstance(self.neighbors, str):
            check_choice(f"{self.name}: neighbors", self.neighbors, ("exact",))

    def check(self, num_query: int, num_gallery: int) -> None:
        """See `Rerank.check`."""
        check_count(self.k, f"{self.name}: k", most=num_gallery, of="gallery images")

    def _prepare(self, query: _Features, gallery: _Features, placement: blocks.Placement) -> Rows:
        if isinstance(self.neighbors, str):
            lists = search_gallery(query, gallery, self.k, placement)
        else:
            lists = self._take(len(query), len(gallery))
        if gathers.suit(placement):
            expanded = gathers.expand_all(query, gallery, lists, float(self.alpha), placement)
            return gathers.DeviceRows(
                *(gathers.order_by_cosine, expanded, gallery, []), placement=placement
            )
        cosine_distances = distances.Gallery(gallery, "cosine", placement=placement.alone())

        def write(rows: np.ndarray, out: np.ndarray) -> None:
            expanded = gathers.expand_queries(query[rows], gallery[lists[rows]], float(self.alpha))
            np.copyto(out, cosine_distances(np.asarray(expanded)))

        return write

    def _take(self, num_query: int, num_gallery: int) -> np.ndarray:
        lists = np.asarray(self.neighbors)
        if lists.shape[:1] != (num_query,) or lists.ndim != 2 or lists.shape[1] < self.k:
            raise UserError(
                f"neighbors has shape {lists.shape}; expected ({num_query}, at least {self.k})"
            )
        if lists.dtype.kind not in "iu" or lists.min() < 0 or lists.max() >= num_gallery:
            raise UserError(f"neighbors must hold gallery indices 0..{num_gallery - 1}")
        return lists[:, : self.k]


@dataclasses.dataclass(frozen=True)
class GSRW(Rerank):
    """Group-shuffling random walk among the nearest images (Shen et al., CVPR 2018).

    Squared Euclidean distances of raw descriptors rank the gallery first. The nearest `top` images
    are ranked again by the probability of another identity that K heads of the trained network give
    after K^2 walks among these images, see `rescore.score`; all others keep their order behind, at
    their distances and what is missing to 1 more than the worst of the first.

    Attributes:
        top: images that are ranked again.
        alpha: of the walk; 0: the heads alone.
        heads: of the network that made the descriptors, see `bind`.

    Raises:
        UserError: parameters of another type, or out of range.
    """

    name = "gsrw"
    learned = True
    top: int = 75
    alpha: float = 0.95
    heads: rescore.PairHeads | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count(self.top, f"{self.name}: top")
        check_number(self.alpha, f"{self.name}: alpha", 0)
        if self.alpha >= 1:
            raise UserError(f"{self.name}: alpha is {self.alpha}; it must be below 1")

    def bind(self, arrays: Mapping[str, Any]) -> "GSRW":
        """See `Rerank.bind`."""
        if missing := [name for name in PAIR_ARRAYS if name not in arrays]:
            raise UserError(
                f"{self.name} needs the heads of the network that made the descriptors, and these "
                f"came without ({', '.join(missing)}). Runs of configs/gsrw.py have them, and the "
                "features.npz that is kept in such a run; other systems have none"
            )
        heads = rescore.PairHeads(*(arrays[name] for name in PAIR_ARRAYS))
        return dataclasses.replace(self, heads=heads)

    def check(self, num_query: int, num_gallery: int) -> None:
        """See `Rerank.check`."""
        check_count(self.top, f"{self.name}: top", most=num_gallery, of="gallery images")

    def _prepare(self, query: _Features, gallery: _Features, placement: blocks.Placement) -> Rows:
        if self.heads is None:
            raise UserError(
                f"{self.name} has no heads of a trained network; bind(arrays) takes them from what "
                "descriptors.load_features reads of a run's features.npz"
            )
        groups, size, _ = self.heads.kernel.shape
        if groups * size != query.shape[1]:
            raise UserError(
                f"{self.name}: the heads are of descriptors of {groups * size} numbers, and these "
                f"have {query.shape[1]}"
            )
        placement = placement.alone()
        first = distances.Gallery(
            gallery, "euclidean", look=rescore.make_first(self.top), placement=placement
        )
        again = blocks.BlockMap(
            rescore.make_rescore(float(self.alpha)), [gallery, *self.heads], placement=placement
        )

        def write(rows: np.ndarray, out: np.ndarray) -> None:
            of_rows = query[rows]
            distance, nearest = first(of_rows)
            scores = again.collect(
                len(rows),
                len(gallery),
                lambda part: [of_rows[part], nearest[part]],
                num_features=query.shape[1],
            )
            at = np.arange(len(rows))[:, None], nearest
            others = np.array(distance)
            others[at] = np.inf
            missing = np.maximum(scores.max(1) + 1 - others.min(1), 0)
            np.add(others, missing[:, None], out=out)
            out[at] = scores

        return write


def _check_search(neighbors: Numbers | str) -> None:
    if isinstance(neighbors, str):
        check_search(neighbors)
    elif not isinstance(neighbors, np.ndarray | jax.Array | list | tuple):
        raise UserError(f"neighbors is {neighbors!r}; expected 'exact', 'faiss...' or lists")


def _take_lists(
    features: _Features, length: int, neighbors: Numbers | str, placement: blocks.Placement
) -> np.ndarray:
    """Lists that faiss finds, or those given, with each image itself first."""
    if isinstance(neighbors, str):
        neighbors = search_faiss(features, length, neighbors, placement)
    return check_neighbors(neighbors, len(features), length)[:, :length]


_KINDS = {int: "a whole number", float: "a number", str: "text"}
METHODS: dict[str, type[Rerank]] = {
    "ecn": ECN,
    "k_reciprocal": KReciprocal,
    "aqe": AQE,
    "gsrw": GSRW,
}


def _list_options(method: type[Rerank]) -> dict[str, Any]:
    """A method's parameters with their defaults; what is learned is none."""
    fields = dataclasses.fields(method)
    return {field.name: field.default for field in fields if field.name != "heads"}


def parse(names: Any, options: Any = None) -> tuple[Rerank, ...]:
    """Re-rankings from what a command line or a config says; all of it is checked.

    Args:
        names: of `METHODS`, each once.
        options: parameters by the method's name; also of methods that are not in `names`.

    Raises:
        UserError: names, parameters or values that there are not; lists those that there are.
    """
    known = ", ".join(METHODS)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"re-rankings are {names!r}; expected a list of some of {known}")
    if len(set(names)) < len(names):
        raise UserError(f"re-rankings {', '.join(names)}: one is named twice")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UserError(
            f'parameters of re-ranking are {options!r}; expected them by method, as {{"ecn": '
            '{"k": 20}}'
        )
    for name in (*names, *options):
        if name not in METHODS:
            raise UserError(f"there is no re-ranking {name!r}; expected some of {known}")
    methods = {name: _make(name, options.get(name, {})) for name in (*names, *options)}
    return tuple(methods[name] for name in names)


def _make(name: str, parameters: Any) -> Rerank:
    fields = _list_options(METHODS[name])
    shown = ", ".join(f"{field} ({default!r})" for field, default in fields.items())
    if not isinstance(parameters, Mapping):
        raise UserError(f"{name} has parameters {parameters!r}; expected some of {shown} by name")
    for field in parameters:
        if field not in fields:
            raise UserError(f"{name} has no parameter {field!r}; expected some of {shown}")
        value, default = parameters[field], fields[field]
        kind = int | float if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{name}: {field} is {value!r}; expected {_KINDS[type(default)]}, as {default!r}"
            )
    return METHODS[name](**parameters)
