"""Appearance features for trackers: boxes and a frame in, descriptors out.

from mros_jax.tracking import Appearance
appearance = Appearance("runs/market")
features = appearance.get_features(boxes, frame)  # xyxy (N, 4), BGR uint8 (H, W, 3) -> (N, D)

`get_features` is what the trackers of BoxMOT ask their appearance model for (BoT-SORT, StrongSORT,
Deep OC-SORT and others): the same name, arguments and result.
"""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32

from mros_jax.errors import UserError, check_choice
from mros_jax.gallery.features import make_model_record
from mros_jax.inference import Embedder, load_model
from mros_jax.retrieval.inputs import check_count


class Appearance:
    """Descriptors of the people in a frame.

    Args:
        model: a run's directory, or its model.
        channels: of the frames, "bgr" as OpenCV reads them, or "rgb".
        batch_sizes: numbers of people that a program is compiled for, here and now. A frame is
            filled up to the smallest that holds its people; more people than the largest take
            several calls. Nothing is compiled when frames come in.
        flip_test: mean of the descriptors of image and mirror image; None: as the run.

    Attributes:
        size: D, of a descriptor.

    Raises:
        NotFoundError, UserError: as `load_model`; batch sizes below 1, or none.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Embedder,
        *,
        channels: Literal["bgr", "rgb"] = "bgr",
        batch_sizes: Sequence[int] = (4, 16, 64),
        flip_test: bool | None = None,
    ) -> None:
        self._model = model if isinstance(model, Embedder) else load_model(model)
        check_choice("channels", channels, ("bgr", "rgb"))
        self._step = -1 if channels == "bgr" else 1
        if not batch_sizes:
            raise UserError("batch_sizes is empty; expected numbers of people, such as (4, 16)")
        for size in batch_sizes:
            check_count(size, "batch_sizes")
        self._batch_sizes = sorted(batch_sizes)
        record = make_model_record(self._model, flip_test)
        self._options = {name: record[name] for name in ("flip_test", "crops")}
        self.size = self._model.descriptor_sizes["descriptor"]
        for size in self._batch_sizes:
            self._embed([np.zeros((2, 1, 3), np.uint8)], size)

    def get_features(self, xyxys: np.ndarray, img: np.ndarray) -> Float32[np.ndarray, "N D"]:
        """Descriptors of boxes, of unit length.

        They are those that `python -m mros_jax.extract` computes of the boxes cut out of the frame
        and stored without loss, divided by their norms.

        Args:
            xyxys: (N, 4) left, top, right and bottom edge of each box in pixels; further columns
                are not looked at. Edges are rounded to whole pixels, to the even one from halfway,
                and boxes are cut at the frame's. Of a box that has no pixel of the frame the
                nearest one is taken, so that each box has a row; there is no person to be seen, and
                whoever knows should leave such boxes out.
            img: (H, W, 3) uint8 frame, with the channels that the class was told of.

        Returns:
            (N, D); (0, D) where there is no box.

        Raises:
            UserError: boxes or frame of another shape or type; NaN or infinite edges; a right edge
                left of the left one, or a bottom edge above the top one, as in boxes of another
                form (x, y, width, height).
        """
        crops = [crop[:, :, :: self._step] for crop in cut(img, xyxys)]
        largest = self._batch_sizes[-1]
        features = np.empty((len(crops), self.size), np.float32)
        for start in range(0, len(crops), largest):
            part = crops[start : start + largest]
            size = next(size for size in self._batch_sizes if size >= len(part))
            features[start : start + largest] = self._embed(part, size)
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        features /= np.maximum(norms, np.finfo(np.float32).tiny)
        return features

    def _embed(self, crops: list[np.ndarray], size: int) -> np.ndarray:
        return self._model.embed(crops, batch_size=size, fill=True, **self._options)


def cut(img: np.ndarray, xyxys: np.ndarray) -> list[np.ndarray]:
    """Cut boxes out of a frame, see `Appearance.get_features`.

    Returns:
        Views of the frame, each of at least one pixel.
    """
    img, boxes = np.asarray(img), np.asarray(xyxys)
    if img.ndim != 3 or img.shape[2] != 3 or img.dtype != np.uint8 or 0 in img.shape:
        raise UserError(f"the frame is {img.dtype} {img.shape}; expected uint8 (H, W, 3)")
    if boxes.size == 0:
        return []
    if boxes.ndim != 2 or boxes.shape[1] < 4 or boxes.dtype.kind not in "fiu":
        raise UserError(f"boxes are {boxes.dtype} {boxes.shape}; expected numbers (N, 4)")
    edges = boxes[:, :4].astype(np.float64)
    bad = ~np.isfinite(edges).all(1) | (edges[:, 2:] < edges[:, :2]).any(1)
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"box {row} is {edges[row].tolist()}; expected finite edges left, top, right, bottom "
            "with left <= right and top <= bottom"
        )
    height, width = img.shape[:2]
    # In whole pixels, and with at least one of the frame's.
    limit = np.array([width, height])
    first = np.clip(np.rint(edges[:, :2]), 0, limit - 1).astype(int)
    last = np.clip(np.rint(edges[:, 2:]), first + 1, limit).astype(int)
    return [
        img[top:bottom, left:right]
        for (left, top), (right, bottom) in zip(first.tolist(), last.tolist(), strict=True)
    ]
