"""Dataset doctor: what is wrong with a data set, before a day of training tells."""

import warnings

import numpy as np

from mros_jax.data.splits import Dataset


def check_cheap(dataset: Dataset, *, identities: int, images: int) -> None:
    """What training checks first; looks at names only, never at images.

    Args:
      dataset: the data set.
      identities: P of the batch.
      images: K of the batch.

    Raises:
      ValueError: training or evaluation cannot work.
    """
    if dataset.num_classes < identities:
        raise ValueError(
            f"data set {dataset.name!r} has {dataset.num_classes} training identities and a batch "
            f"needs {identities}: set batch.identities to {dataset.num_classes} or less"
        )
    counts = np.bincount(dataset.train.labels)
    few = int((counts < images).sum())
    if few:
        warnings.warn(
            f"{few} of {len(counts)} training identities have fewer than {images} images; "
            "their images repeat within a batch",
            stacklevel=2,
        )
