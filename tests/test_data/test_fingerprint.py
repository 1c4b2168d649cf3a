import shutil

import numpy as np

from mros_jax.data import store
from mros_jax.data.datasets import prepared
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.fingerprint import fingerprint_split


def fingerprint(root, split="gallery"):
    return fingerprint_split(getattr(load_dataset("folder", root), split))


def test_the_place_of_the_files_does_not_matter(market, tmp_path):
    before = fingerprint(market.root)
    assert len(before) == 32
    shutil.copytree(market.root, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == before


def test_everything_that_a_split_holds_matters(market, random_pixels, encode):
    folder = market.root / "bounding_box_test"
    seen = {fingerprint(market.root)}

    def is_new():
        digest = fingerprint(market.root)
        new = digest not in seen
        seen.add(digest)
        return new

    (folder / "0003_c1s6_015971_01.jpg").write_bytes(encode(random_pixels(99)))
    assert is_new()  # other pixels under the same name
    for name in ("0003_c1s6_015971_02", "0003_c2s6_015971_02", "0004_c2s6_015971_02"):
        (path,) = [p for p in folder.iterdir() if "015971" in p.name]
        path.rename(folder / f"{name}.jpg")
        assert is_new()  # other names, cameras, identities of the same bytes
    (folder / "0004_c2s6_015971_02.jpg").unlink()
    assert is_new()
    market.write("bounding_box_test", "0004_c2s6_015971_02.jpg")
    (folder / "0004_c2s6_015971_02.jpg").write_bytes(b"")
    assert is_new()


def test_split_and_training_labels_matter(market):
    train = load_dataset("folder", market.root).train
    reordered = train.select(np.arange(len(train))[::-1])
    part = train.select(np.array([2, 3, 4]))  # labels 1, 1, 1: as numbered in the whole split
    digests = [fingerprint_split(split) for split in (train, reordered, part)]
    assert len({*digests, fingerprint(market.root, "query")}) == 4


def test_the_store_knows_it_as_listed(market, tmp_path):
    split = load_dataset("folder", market.root).train
    options = {"height": 16, "width": 8, "cache_dir": tmp_path / "cache", "progress": False}
    for use_cache in (True, False):
        loaded = store.load_store(split, use_cache=use_cache, **options)
        assert loaded.fingerprint == fingerprint_split(split)
    (market.root / "bounding_box_train" / split.names[1]).write_bytes(b"")
    loaded = store.load_store(split, on_bad_image="skip", **options)
    assert len(loaded) == len(split) - 1
    assert loaded.fingerprint == fingerprint_split(split)


def test_prepared_records_have_the_directorys(market, tmp_path, capsys):
    prepared.prepare("market1501", market.root, tmp_path / "tfds")
    plain = load_dataset("market1501", market.root)
    records = load_dataset("market1501", tmp_path / "tfds")
    for one, other in zip(plain.splits, records.splits, strict=True):
        assert fingerprint_split(one) == fingerprint_split(other)


def test_rendered_pictures_are_known_by_their_parameters():
    first, again, other = (
        load_dataset("synthetic", preset="small", seed=seed).query for seed in (0, 0, 1)
    )
    assert fingerprint_split(first) == fingerprint_split(again) != fingerprint_split(other)
