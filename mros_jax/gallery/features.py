"""Descriptors of images in files, with their names and what made them."""

import argparse
import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from ml_collections import ConfigDict

from mros_jax import console, parallel
from mros_jax.data import listing, text
from mros_jax.data.decoding import decode_images
from mros_jax.errors import NotFoundError, UserError
from mros_jax.inference import CROPS, Embedder, choose_test
from mros_jax.retrieval import descriptors
from mros_jax.runs.checkpoints import NAMES

log = logging.getLogger(__name__)

_BATCH = 128
_MADE_WITH = ("checkpoint", "flip_test", "crops")


class Listed(NamedTuple):
    """Image files.

    Attributes:
        root: the directory that names are relative to.
        names: of the files.
    """

    root: pathlib.Path
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Features:
    """Descriptors of images, with their names and what made them.

    Attributes:
        features: (N, D) numbers, not normalised.
        names: of the N images.
        model: what made them, in plain values by name. Only descriptors whose models are equal can
            be compared.
        root: the directory that the names are relative to, "" where they are not of files.
        metadata: of each image, what JSON can hold by name; None: nothing.

    Raises:
        UserError: names that are no text; metadata of another number of images.
    """

    features: Float[np.ndarray, "N D"]
    names: Sequence[str]
    model: Mapping[str, Any]
    root: str = ""
    metadata: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if not isinstance(name, str):
                raise UserError(f"the name {name!r} of an image is no text")
        if self.metadata is not None and len(self.metadata) != len(self.names):
            raise UserError(
                f"there are {len(self.names)} names and metadata of {len(self.metadata)} images"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Features":
        """Read what `save` has written.

        Raises:
            NotFoundError: there is no such file.
            UserError: it is another file or a damaged one; see `descriptors.load_arrays`.
        """
        arrays = descriptors.load_arrays(path, ("names", "features", "root", *_MADE_WITH))
        features, names = arrays["features"], arrays["names"]
        if features.ndim != 2 or features.dtype.kind != "f" or names.shape != features.shape[:1]:
            raise UserError(
                f"{path} holds features of shape {features.shape} and type {features.dtype} and "
                f"names of shape {names.shape}; expected numbers (N, D) and N names"
            )
        model = {
            "checkpoint": str(arrays["checkpoint"]),
            "flip_test": bool(arrays["flip_test"]),
            "crops": str(arrays["crops"]),
        }
        return cls(features, list(map(str, names)), model, str(arrays["root"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.npz` file: `names`, `features`, `root`, `checkpoint`, `flip_test`, `crops`."""
        made_with = {name: np.array(self.model[name]) for name in _MADE_WITH}
        arrays = {
            "names": np.array(self.names, np.str_),
            "features": self.features,
            "root": np.array(self.root),
            **made_with,
        }
        descriptors.save_features(path, arrays)


def check_model(given: Mapping[str, Any], expected: Mapping[str, Any], who: str) -> None:
    """Refuse descriptors of another model.

    Args:
        given: the model of some descriptors.
        expected: the model of those that they are to be compared with.
        who: what holds the latter, as the subject of a sentence.

    Raises:
        UserError: they are not equal; says what each is.
    """
    if dict(given) != dict(expected):
        here, there = (
            ", ".join(f"{name} {value!r}" for name, value in model.items())
            for model in (given, expected)
        )
        raise UserError(
            f"{who} holds descriptors of {there}; those given are of {here}: they cannot be "
            "compared. Extract both with the same run and options"
        )


def make_model_record(
    model: Embedder, flip_test: bool | None = None, crops: str | None = None
) -> dict[str, Any]:
    """What `Features.model` is of the descriptors that `describe` computes.

    Args:
        model: as `load_model` gives it.
        flip_test: as for `describe`.
        crops: as for `describe`.
    """
    plain = ConfigDict({"flip_test": False, "crops": "none"})
    flip_test, crops = choose_test(model.config.eval if model.config else plain, flip_test, crops)
    return {"checkpoint": model.checkpoint_id, "flip_test": flip_test, "crops": crops}


def describe(
    model: Embedder,
    images: Listed,
    *,
    flip_test: bool | None = None,
    crops: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    progress: bool = False,
    together: bool = False,
) -> Features:
    """Compute the descriptors of image files with a run's model.

    Args:
        model: as `load_model` gives it; one without a config has neither flip test nor crops.
        images: as `list_images` gives them.
        flip_test: mean of the descriptors of image and mirror image; None: as the run.
        crops: as `Embedder.embed_all` takes them; None: as the run.
        on_bad_image: "error", or "skip" to leave unreadable images out; the log names them.
        progress: show a progress bar.
        together: all processes of the run make the same call, see `extract`.

    Raises:
        UserError: as `extract`.
    """
    record = make_model_record(model, flip_test, crops)
    options = {name: record[name] for name in ("flip_test", "crops")}
    size = min(_BATCH, len(images.names))

    def embed(batch: list[np.ndarray]) -> np.ndarray:
        return model.embed(batch, batch_size=size, fill=True, **options)

    features, names, bad = extract(
        embed,
        *images,
        on_bad_image=on_bad_image,
        batch_size=size,
        progress=progress,
        together=together,
    )
    for name, reason in bad.items():
        log.warning("left out: %s (%s)", name, reason)
    return Features(features, names, record, str(images.root))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `describe` and of the checkpoint to a command line."""
    parser.add_argument("--checkpoint", choices=NAMES, default="last", help="of the run")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument(
        "--flip_test",
        action=argparse.BooleanOptionalAction,
        help="mean of the descriptors of image and mirror image (default: as the run)",
    )
    parser.add_argument("--crops", choices=CROPS, help="mean over crops (default: as the run)")


def list_images(source: str | os.PathLike[str]) -> Listed:
    """List the names of the images that a directory or a list holds.

    Args:
        source: a directory, searched with those below it; or a text file with one path a line,
            relative to the file's own directory; empty lines and lines with # at the start are
            left out.

    Returns:
        The root, and the names relative to it; sorted for a directory, in order for a list.

    Raises:
        NotFoundError: there is no such directory or list.
        UserError: it holds no images, or is no text.
    """
    source = pathlib.Path(source)
    if source.is_dir():
        names, _ = listing.list_images(source, recursive=True)
        root = source
        expected = f"files ending in {', '.join(listing.IMAGE_SUFFIXES)}"
    elif source.is_file():
        if source.suffix.lower() in listing.IMAGE_SUFFIXES:
            raise UserError(f"{source} is an image; expected a directory or a list of paths")
        lines = (line for _, line in text.read_lines(source) if not line.startswith("#"))
        names = [line.replace("\\", "/") for line in lines]
        root = source.parent
        expected = "one path a line"
    else:
        raise NotFoundError(f"{source} is neither a directory of images nor a list of paths")
    if not names:
        raise UserError(f"{source} holds no images; expected {expected}")
    return Listed(root.resolve(), names)


class _Batch(NamedTuple):
    features: np.ndarray | None
    kept: list[str]
    bad: dict[str, str]


def extract(
    embed: Callable[[list[np.ndarray]], np.ndarray],
    root: str | os.PathLike[str],
    names: Sequence[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int = _BATCH,
    progress: bool = False,
    together: bool = False,
) -> tuple[Float32[np.ndarray, "N D"], list[str], dict[str, str]]:
    """Compute descriptors of image files, a batch in memory at a time.

    Args:
        embed: images of any size to descriptors, such as `Embedder.embed`.
        root: directory of the files.
        names: files relative to it.
        on_bad_image: "error", or "skip" to leave unreadable images out.
        batch_size: images at a time.
        progress: show a progress bar.
        together: all processes of the run make the same call; each reads a share of the batches,
            and all get the whole.

    Returns:
        Descriptors (N, D), the N names they belong to, and the reason for each image left out.

    Raises:
        UserError: unreadable images (all are named), or none that can be read.
    """

    def work(starts: Sequence[int]) -> list[_Batch]:
        options = {"unit": " images", "unit_scale": batch_size, "disable": not progress}
        batches: list[_Batch] = []
        failed = False
        for start in console.progress(starts, desc="descriptors", **options):
            batch = names[start : start + batch_size]
            decoded = decode_images([pathlib.Path(root) / name for name in batch])
            pairs = list(zip(batch, decoded, strict=True))
            bad = {name: image.reason for name, image in pairs if isinstance(image, Exception)}
            kept = [name for name, image in pairs if not isinstance(image, Exception)]
            images = [image for image in decoded if not isinstance(image, Exception)]
            failed = failed or bool(bad)
            # After a bad image only the other bad ones are of interest.
            wanted = images and not (failed and on_bad_image == "error")
            batches.append(_Batch(embed(images) if wanted else None, kept, bad))
        return batches

    starts = range(0, len(names), batch_size)
    batches = parallel.share(starts, work) if together else work(starts)
    bad = {name: reason for batch in batches for name, reason in batch.bad.items()}
    kept = [name for batch in batches for name in batch.kept]
    parts = [batch.features for batch in batches if batch.features is not None]
    if bad and on_bad_image == "error":
        listed = "\n".join(f"  {name} ({reason})" for name, reason in bad.items())
        raise UserError(
            f"{len(bad)} of {len(names)} images cannot be read "
            f"(--on_bad_image=skip leaves them out):\n{listed}"
        )
    if not parts:
        raise UserError(f"none of {len(names)} images below {root} can be read")
    return np.concatenate(parts), kept, bad
