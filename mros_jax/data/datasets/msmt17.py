"""Reader of MSMT17, version 1 and version 2 (the same pictures with blurred faces)."""

import pathlib

from mros_jax.data.datasets.layouts import BadFiles, Entry, OnBadImage, find_root, make_dataset
from mros_jax.data.splits import Dataset
from mros_jax.data.text import parse_whole, read_lines

NUM_TRAIN_PIDS = 1041
_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")


def read_msmt17(
    root: pathlib.Path,
    *,
    version: int,
    include_val: bool = True,
    on_bad_image: OnBadImage = "error",
) -> Dataset:
    """Read MSMT17 (Wei et al., CVPR 2018) by its list files.

    The lists count training and test identities both from 0. To keep them apart from each other and
    from distractors (0), training pid p becomes p + 1 here and test pid p becomes p + 1042.

    Args:
        root: `MSMT17_V1` or `MSMT17_V2`, or the directory that holds it.
        version: 1 (`train/`, `test/`) or 2 (`mask_train_v2/`, `mask_test_v2/`).
        include_val: train on `list_val.txt` as well: 32,621 images as the paper counts them;
            without, 30,248 as some public codes do.
        on_bad_image: what to do about lines that cannot be read: "error" or "skip".

    Raises:
        MissingDataError: the lists or directories are not there.
        UserError: a line that cannot be read, or an empty split.
    """
    name = "msmt17" if version == 1 else "msmt17_v2"
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    base = find_root(root, (train, test, *_LISTS), (f"MSMT17_V{version}",))
    bad_files = BadFiles(on_bad_image)
    lists = {
        entry: _read_list(
            base / entry,
            base / (train if entry in _LISTS[:2] else test),
            1 if entry in _LISTS[:2] else 1 + NUM_TRAIN_PIDS,
            bad_files,
        )
        for entry in _LISTS
    }
    learned = lists["list_train.txt"] + (lists["list_val.txt"] if include_val else [])
    query, gallery = lists["list_query.txt"], lists["list_gallery.txt"]
    return make_dataset(name, str(base), learned, query, gallery, bad_files=bad_files)


def _read_list(
    table: pathlib.Path, images: pathlib.Path, first_pid: int, bad_files: BadFiles
) -> list[Entry]:
    """Read lines like `0000/0000_000_01_0303morning_0015_0.jpg 0`; the third field is a camera."""
    entries, bad = [], []
    for number, line in read_lines(table):
        path, _, last = line.replace("\t", " ").rpartition(" ")
        name = path.strip().rsplit("/", 1)[-1]
        fields = name.split("_")
        pid = parse_whole(last)
        camid = parse_whole(fields[2]) if len(fields) > 2 else None
        if pid is None or pid < 0 or camid is None:
            bad.append(f"line {number} ({line})")
        else:
            entries.append(Entry(images / path.strip(), pid + first_pid, camid, name=name))
    bad_files.report(str(table), bad, "not like 0000/0000_000_01_0303morning_0015_0.jpg 0", "line")
    return entries
