"""Where this project keeps what can be made or fetched again."""

import os
import pathlib


def cache_directory(name: str) -> pathlib.Path:
    """The directory `mros_jax/NAME` in the user's cache directory.

    That is $XDG_CACHE_HOME, or ~/.cache. Names in use: "images" (decoded data sets), "weights"
    (ImageNet weights), "xla" (compiled programs). Each may be deleted at any time.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "mros_jax" / name
