"""Reader of MSMT17, version 1 and version 2 (the same pictures with blurred faces)."""

import pathlib

from mros_jax.data.datasets.layouts import OnBadImage, Record, find_root, make_dataset, report_bad
from mros_jax.data.datasets.splits import Dataset

NUM_TRAIN_PIDS = 1041
_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")


def read_msmt17(
    root: pathlib.Path,
    *,
    version: int,
    include_val: bool = True,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Reads MSMT17 (Wei et al., CVPR 2018) by its list files.

    The lists count training and test identities both from 0. To keep them apart from each other and
    from distractors (0), training pid p becomes p + 1 here and test pid p becomes p + 1042.

    Args:
      root: `MSMT17_V1` or `MSMT17_V2`, or the directory that holds it.
      version: 1 (`train/`, `test/`) or 2 (`mask_train_v2/`, `mask_test_v2/`).
      include_val: train on `list_val.txt` as well: 32,621 images as the paper counts them; without,
        30,248 as some public codes do.
      on_bad_image: what to do about lines that cannot be read: "error" or "skip".

    Raises:
      FileNotFoundError: the lists or directories are not there.
      ValueError: a line that cannot be read, or an empty split.
    """
    name = "msmt17" if version == 1 else "msmt17_v2"
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    base = find_root(name, root, (train, test, *_LISTS), (f"MSMT17_V{version}",))
    lists = {
        entry: _read_list(
            base / entry,
            base / (train if entry in _LISTS[:2] else test),
            1 if entry in _LISTS[:2] else 1 + NUM_TRAIN_PIDS,
            on_bad_image,
        )
        for entry in _LISTS
    }
    learned = lists["list_train.txt"] + (lists["list_val.txt"] if include_val else [])
    return make_dataset(
        name, str(base), learned, lists["list_query.txt"], lists["list_gallery.txt"]
    )


def _read_list(
    table: pathlib.Path, images: pathlib.Path, first_pid: int, on_bad_image: OnBadImage
) -> list[Record]:
    """Reads lines like `0000/0000_000_01_0303morning_0015_0.jpg 0`; the third field is a camera."""
    records, bad = [], []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            path, pid = line.rsplit(maxsplit=1)
            camid = int(pathlib.PurePosixPath(path).name.split("_")[2])
            records.append(
                Record(images / path, int(pid) + first_pid, camid, name=path.rsplit("/", 1)[-1])
            )
        except (ValueError, IndexError):
            bad.append(f"line {number} ({line})")
    report_bad(
        str(table), bad, "not like 0000/0000_000_01_0303morning_0015_0.jpg 0", on_bad_image, "line"
    )
    return records
