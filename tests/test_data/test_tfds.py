import concurrent.futures
import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mros_jax.data import fingerprint, prepare
from mros_jax.data.datasets import prepared as tfds_builders
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.fingerprint import fingerprint_split
from mros_jax.data.store import load_store
from mros_jax.errors import UserError


@pytest.fixture(autouse=True)
def _quiet(capsys):
    """TFDS prints progress bars."""


def assert_equal(one, other):
    assert one.name == other.name
    np.testing.assert_array_equal(one.pid_of_label, other.pid_of_label)
    for a, b in zip(one.splits, other.splits, strict=True):
        assert a.name == b.name
        for field in ("names", "pids", "camids", "sequences"):
            left, right = getattr(a, field), getattr(b, field)
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype
        if b.labels is None:
            assert a.labels is None
        else:
            np.testing.assert_array_equal(a.labels, b.labels)
        bytes_of = [[x.images.encoded(i) for i in range(len(x))] for x in (a, b)]
        assert bytes_of[0] == bytes_of[1]


def test_records_equal_the_directory(market, tmp_path):
    # More images than one read takes, with names whose order is not that of their hashes.
    names = [f"{pid:04d}_c{1 + pid % 6}s1_{i:06d}_00.jpg" for pid in (2, 7) for i in range(150)]
    market.write("bounding_box_train", *names)
    plain = load_dataset("market1501", market.root)
    path = tfds_builders.prepare("market1501", market.root, tmp_path / "tfds")
    assert path == tmp_path / "tfds" / "market1501" / "plain" / "1.0.0"
    assert {p.suffix for p in path.iterdir() if p.suffix != ".json"} == {
        ".array_record-00000-of-00001"
    }
    stored = load_dataset("market1501", tmp_path / "tfds")
    assert_equal(stored, plain)
    maps = [
        load_store(data.train, height=16, width=8, progress=False).images
        for data in (stored, plain)
    ]
    assert isinstance(maps[0], np.memmap)
    assert isinstance(maps[1], np.memmap)
    assert maps[0].filename == maps[1].filename
    assert "tensorflow" not in sys.modules

    # The reader is used from several threads.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        again = list(pool.map(stored.train.images.encoded, range(len(stored.train))))
    assert again == [plain.train.images.encoded(i) for i in range(len(plain.train))]


def test_prepared_twice_is_read_once(market, tmp_path):
    for _ in range(2):
        tfds_builders.prepare("market1501", market.root, tmp_path / "tfds")
    assert len(load_dataset("market1501", tmp_path / "tfds").train) == 5


def test_prepared_from_other_data_is_not_taken_for_these(market, tmp_path):
    tfds_builders.prepare("market1501", market.root, tmp_path / "tfds")
    market.write("query", "0003_c1s6_015971_00.jpg")  # the same name, another picture
    with pytest.raises(UserError, match="prepared from other data: the query split differs"):
        tfds_builders.prepare("market1501", market.root, tmp_path / "tfds")


def test_options_choose_the_records(market, tmp_path):
    market.write("distractors_500k", "0000_c1s1_000151_01.jpg")
    out = tmp_path / "tfds"
    prepare.main(["--dataset", "market1501", "--root", str(market.root), "--out", str(out)])
    with pytest.raises(FileNotFoundError, match=r"no prepared records .*distractors_500k"):
        load_dataset("market1501", out, distractors_500k=True)
    tfds_builders.prepare("market1501", market.root, out, distractors_500k=True)
    stored = load_dataset("market1501", out, distractors_500k=True)
    assert_equal(stored, load_dataset("market1501", market.root, distractors_500k=True))
    assert len(load_dataset("market1501", out, distractors_500k=False).gallery) == 6
    with pytest.raises(FileNotFoundError, match="no prepared records for data set 'dukemtmc'"):
        load_dataset("dukemtmc", out)


def test_msmt17_command_line(layout, tmp_path):
    lines = "0000/0000_000_01_0303morning_0015_0.jpg 0"
    for folder in ("train", "test"):
        layout.write(folder, lines.split()[0])
    for name in ("train", "val", "query", "gallery"):
        text = lines if name != "val" else ""
        (layout.root / f"list_{name}.txt").write_text(text)
    arguments = ["--dataset", "msmt17", "--root", str(layout.root), "--out", str(tmp_path / "tfds")]
    prepare.main([*arguments, "--include_val=False"])
    stored = load_dataset("msmt17", tmp_path / "tfds", include_val=False)
    assert_equal(stored, load_dataset("msmt17", layout.root, include_val=False))


def test_plain_tfds_reads_and_prepares(market, tmp_path):
    builder = tfds.builder("market1501", data_dir=str(tmp_path))
    assert builder.builder_config.name == "plain"
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(market.root)),
        file_format="array_record",
    )
    source = tfds.data_source("market1501/plain", split="gallery", data_dir=str(tmp_path))
    examples = sorted(source, key=lambda example: example["index"])
    assert [example["name"] for example in examples] == [
        name.encode() for name in load_dataset("market1501", market.root).gallery.names
    ]
    assert [int(example["pid"]) for example in examples] == [-1, 0, 1, 1, 3, 3]
    assert examples[0]["image"].shape == (16, 8, 3)
    assert "ICCV 2015" in builder.info.citation

    page = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
    (block,) = re.findall(
        r"```python\n(import mros_jax.data.datasets.prepared[^`]*)```", page.read_text()
    )
    exec(block.replace("/data/tfds", str(tmp_path)), {})


def test_misnamed_files(market, tmp_path):
    market.write("query", "person.jpg")
    with pytest.raises(ValueError, match=r"person\.jpg"):
        tfds_builders.prepare("market1501", market.root, tmp_path / "a")
    tfds_builders.prepare("market1501", market.root, tmp_path / "b", on_bad_image="skip")
    assert len(load_dataset("market1501", tmp_path / "b").query) == 3


def test_missing_root_and_unknown_options(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Market-1501-v15\.09\.15\.zip"):
        tfds_builders.prepare("market1501", tmp_path / "nowhere", tmp_path / "tfds")
    with pytest.raises(ValueError, match="'folder' cannot be prepared; these can: market1501"):
        tfds_builders.prepare("folder", tmp_path, tmp_path / "tfds")
    with pytest.raises(ValueError, match=r"test_set is 21; expected 0 to 19"):
        tfds_builders.make_builder("cuhk03_labeled_classic", tmp_path, test_set=21)


def test_every_file_data_set_has_a_builder(tmp_path):
    from mros_jax.data.datasets.records import DATASETS

    for name in set(DATASETS) - {"folder", "synthetic"}:
        builder = tfds_builders.make_builder(name, tmp_path)
        assert builder.builder_config.dataset == name
        assert "index" in builder.info.features


def test_sources_do_not_import_tfds_before_it_is_needed(market):
    code = (
        "import sys; from mros_jax.data.datasets.sources import load_dataset; "
        f"load_dataset('market1501', {str(market.root)!r}); "
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.util.find_spec("tensorflow_datasets")


@pytest.fixture
def stored(market, tmp_path):
    """Prepared records, and the files that say what they claim and what they hold."""
    path = tfds_builders.prepare("market1501", market.root, tmp_path / "tfds")
    return path, path / "metadata.json", next(path.glob("*-query.array_record*"))


def test_records_that_are_not_those_prepared_are_refused(market, tmp_path, stored):
    _, metadata, _ = stored
    claims = json.loads(metadata.read_text())
    assert claims["query"]["fingerprint"] == fingerprint_split(
        load_dataset("market1501", market.root).query
    )

    def load(**changes):
        metadata.write_text(json.dumps({**claims, **changes}))
        return load_dataset("market1501", tmp_path / "tfds")

    with pytest.raises(UserError, match=r"query split in .* are 3, 4 were stored"):
        load(query={**claims["query"], "images": 4})
    with pytest.raises(UserError, match=r"gallery split in .* other names, identities or cameras"):
        load(gallery={**claims["gallery"], "fingerprint": "0" * 32})
    with pytest.raises(UserError, match=r"train split in .* None were stored; prepare them again"):
        load(train=None)
    other = fingerprint.combine(load().query, "1" * 32)
    altered = load(query={**claims["query"], "content": "1" * 32, "fingerprint": other})
    with pytest.raises(UserError, match="bytes are not those that were stored"):
        fingerprint_split(altered.query)
    assert len(load().train) == 5


@pytest.mark.parametrize("damage", ["records", "metadata.json", "dataset_info.json"])
def test_damaged_records_are_named(tmp_path, stored, damage):
    path, _, query = stored
    victim = query if damage == "records" else path / damage
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(UserError, match=r"tfds.*prepare"):
        load_dataset("market1501", tmp_path / "tfds")
