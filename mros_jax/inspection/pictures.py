"""The images behind a run's descriptors, as thumbnails within a page."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax.data.images import Images, Picture
from mros_jax.errors import UserError
from mros_jax.runs.run import Run

_THUMBNAIL = (160, 160)  # largest width and height in pixels


class Pictures:
    """The images of a run's queries and gallery, found by the rows of its descriptors.

    Args:
        run: the run.
        features: the arrays of its `features.npz`.

    Raises:
        NotFoundError, UserError: the data set is not where the config says, is damaged, or lacks
            images.
    """

    def __init__(self, run: Run, features: Mapping[str, np.ndarray]):
        dataset = configs.load_dataset(ConfigDict(run.config))
        self._images: dict[str, Images] = {}
        self._places: dict[str, np.ndarray | None] = {}
        for split in (dataset.query, dataset.gallery):
            self._images[split.name] = split.images
            names = features.get(f"{split.name}_names")
            # Images that were skipped as unreadable shift the rows: names find them again.
            index = {str(name): place for place, name in enumerate(split.names)}
            if names is None:
                self._places[split.name] = None
                continue
            if missing := [str(name) for name in names if str(name) not in index]:
                raise UserError(
                    f"the run was tested on {len(missing)} images that are not in {dataset.name} "
                    f"any more, such as {missing[0]}"
                )
            self._places[split.name] = np.array([index[str(name)] for name in names])

    def select(self, split: str, rows: Sequence[int]) -> Images:
        """The images of some rows of the descriptors of "query" or "gallery"."""
        places = self._places[split]
        chosen = np.asarray(rows, int)
        return self._images[split].select(chosen if places is None else places[chosen])

    def encode(self, split: str, rows: Sequence[int]) -> dict[int, str]:
        """Row -> data URI of its thumbnail.

        Raises:
            UnreadableImageError: an image cannot be read any more.
        """
        return dict(zip(rows, self.select(split, rows).map(_encode), strict=True))


def name_image(features: Mapping[str, np.ndarray], split: str, row: int) -> str:
    """The name of an image, or where it is if the descriptors came without names."""
    names = features.get(f"{split}_names")
    return f"{split} {row}" if names is None else str(names[row])


def _encode(picture: Picture) -> str:
    return encode_pixels(picture.require())


def encode_pixels(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Data URI of an image's thumbnail, a JPEG."""
    image = PIL.Image.fromarray(pixels)
    image.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
