"""Which files of a directory are images: one answer for all readers and programs."""

import os
from collections.abc import Callable

from mros_jax.errors import NotFoundError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
# What systems and archives leave behind beside images; hidden files as well, see `is_clutter`.
_CLUTTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "icon\r", "lost+found"),
    *("@eadir", "#recycle", "@recycle", "#snapshot"),
    *("readme.txt", "readme.md"),
}


def is_clutter(name: str) -> bool:
    """Whether a file or directory of this name is passed over without a word.

    Hidden ones are (`.DS_Store`, `._0001_c1s1_000001_00.jpg`), and what Windows, macOS, file
    servers and the archives of data sets put beside images (`Thumbs.db`, `@eaDir`,
    `0001.jpg:Zone.Identifier`, `readme.txt`).
    """
    lowered = name.lower()
    return name.startswith(".") or lowered in _CLUTTER or lowered.endswith(("zone.identifier", "~"))


def list_images(
    directory: str | os.PathLike[str], *, recursive: bool = False
) -> tuple[list[str], list[str]]:
    """List the images of a directory.

    Args:
        directory: where to look.
        recursive: look into the directories below it as well, also through symbolic links.

    Returns:
        Paths relative to the directory, with `/`, in order of their text: of images, and of
        everything else but clutter (see `is_clutter`).

    Raises:
        NotFoundError: there is no such directory.
        UserError: it is a file.
        PermissionError: a directory may not be read; the error names it.
    """
    images: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()  # a link may lead back to where it lies

    def scan(where: str, below: str) -> None:
        info = os.stat(where)
        if (info.st_dev, info.st_ino) in seen:
            return
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(where) as entries:
            for entry in entries:
                path = below + entry.name
                if is_clutter(entry.name):
                    continue
                if recursive and _is(entry.is_dir):
                    scan(entry.path, f"{path}/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and _is(entry.is_file):
                    images.append(path)
                else:
                    others.append(path)

    try:
        scan(os.fspath(directory), "")
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename} does not exist") from error
    except NotADirectoryError as error:
        raise UserError(f"{directory} is a file; expected a directory of images") from error
    return sorted(images), sorted(others)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link in a circle
        return False
