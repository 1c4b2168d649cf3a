import json
import logging
import sys

import numpy as np
import pytest
from absl import logging as absl_logging

from mros_jax.data import doctor
from mros_jax.data.datasets.checks import PUBLISHED, Published
from mros_jax.data.datasets.sources import load_dataset


def examine(market, identities=2, images=2):
    data = load_dataset("folder", market.root)
    return doctor.examine(data, identities=identities, images=images, progress=False)


def found(report, check):
    """The findings of one check, as (level, names)."""
    return [(f.level, f.names) for f in report.findings if f.check == check]


def test_healthy(market):
    report = examine(market)
    assert report.healthy
    assert report.findings == ()
    assert report.splits["gallery"] == {
        "images": 6,
        "identities": 2,
        "junk": 1,
        "distractors": 1,
        "cameras": {
            "1": {"images": 4, "identities": 2},
            "2": {"images": 2, "identities": 2},
        },
    }
    assert report.sizes["train"] == {
        "different": 1,
        "smallest": [16, 8],
        "median": [16, 8],
        "largest": [16, 8],
    }
    assert "no errors, no other findings" in doctor.format_report(report)


def test_counts_against_the_published(market, monkeypatch):
    report = doctor.examine(
        load_dataset("market1501", market.root), identities=2, images=2, progress=False
    )
    messages = [f.message for f in report.findings if f.check == "counts"]
    assert len(messages) == 3
    assert messages[0] == (
        "train: 5 images (published: 12,936), 2 identities (published: 751), "
        "3 cameras (published: 6)"
    )
    assert report.healthy  # a subset is no error
    text = doctor.format_report(report)
    assert "19,732" in text
    exact = {
        "train": Published(5, 2, 3),
        "query": Published(3, 2, 2),
        "gallery": Published(6, 2, 2),
    }
    monkeypatch.setitem(PUBLISHED, "market1501", exact)
    market.write("distractors_500k", "0000_c1s1_000151_01.jpg")
    data = load_dataset("market1501", market.root, distractors_500k=True)
    assert doctor.examine(data, identities=2, images=2, progress=False).findings == ()


def test_few_images_and_few_identities(market):
    report = examine(market, identities=2, images=3)
    assert found(report, "few images") == [("warning", ("2",))]
    assert not examine(market, identities=3, images=1).healthy
    assert found(examine(market, identities=3, images=1), "identities") == [("fatal", ())]
    assert found(examine(market, identities=2, images=4), "images") == [("fatal", ())]


def test_queries_without_match(market):
    market.write("query", "0009_c1s1_000001_00.jpg", "0010_c2s1_000001_00.jpg")
    market.write("bounding_box_test", "0010_c2s1_000002_00.jpg")
    report = examine(market)
    findings = [f for f in report.findings if f.check == "queries without a match"]
    assert [f.level for f in findings] == ["warning", "warning"]
    assert (
        "1 of 5 queries cannot match: their identity is not in the gallery" in findings[0].message
    )
    assert findings[0].names == ("0009_c1s1_000001_00.jpg",)
    assert "in their own camera only" in findings[1].message
    assert findings[1].names == ("0010_c2s1_000001_00.jpg",)
    assert report.healthy


def test_one_camera_is_fatal(market):
    for folder in ("query", "bounding_box_test"):
        for path in list((market.root / folder).glob("*_c2*")):
            path.unlink()
    report = examine(market)
    (finding,) = [f for f in report.findings if f.check == "no valid query"]
    assert finding.level == "fatal"
    assert "all images are of camera 1" in finding.message


def test_queries_of_nobody(market):
    market.write("query", "-1_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg")
    ((level, names),) = found(examine(market), "queries of nobody")
    assert level == "error"
    assert set(names) == {"-1_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg"}


def test_identity_in_train_and_test(market):
    market.write("bounding_box_train", "0003_c1s1_000001_00.jpg")
    assert found(examine(market), "identities in train and test") == [("error", ("3",))]


def test_identical_images(market):
    root = market.root
    source = (root / "bounding_box_train" / "0002_c1s1_000451_03.jpg").read_bytes()
    (root / "bounding_box_train" / "0002_c1s1_000451_99.jpg").write_bytes(source)
    (root / "bounding_box_test" / "0000_c1s1_000451_98.jpg").write_bytes(source)
    query = (root / "query" / "0001_c1s1_001051_00.jpg").read_bytes()
    (root / "bounding_box_test" / "0001_c1s1_001051_97.jpg").write_bytes(query)
    gallery = (root / "bounding_box_test" / "0000_c1s1_000151_01.jpg").read_bytes()
    (root / "bounding_box_test" / "0000_c1s1_000151_96.jpg").write_bytes(gallery)
    report = examine(market)
    assert found(report, "identical images") == [
        (
            "error",
            (
                "train/0002_c1s1_000451_03.jpg = train/0002_c1s1_000451_99.jpg = "
                "gallery/0000_c1s1_000451_98.jpg",
            ),
        ),
        ("warning", ("query/0001_c1s1_001051_00.jpg = gallery/0001_c1s1_001051_97.jpg",)),
        ("note", ("gallery/0000_c1s1_000151_01.jpg = gallery/0000_c1s1_000151_96.jpg",)),
    ]
    assert not report.healthy


def test_unreadable_images_modes_and_sizes(market, encode, random_pixels):
    root = market.root / "bounding_box_train"
    path = root / "0002_c1s1_000451_03.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (root / "0007_c2s3_071052_01.jpg").write_bytes(b"not an image")
    (root / "0007_c3s3_077419_03.jpg").write_bytes(encode(random_pixels(0)[..., 0]))
    (root / "0007_c3s3_077420_03.jpg").write_bytes(encode(random_pixels(0, 40, 20)))
    report = examine(market)
    ((level, names),) = found(report, "unreadable images")
    assert level == "error"
    assert [name.split(" ")[0] for name in names] == [
        "0002_c1s1_000451_03.jpg",
        "0007_c2s3_071052_01.jpg",
    ]
    assert found(report, "colour modes") == [("warning", ("0007_c3s3_077419_03.jpg",))]
    assert report.sizes["train"]["different"] == 2
    assert report.sizes["train"]["largest"] == [40, 20]


def run(capsys, monkeypatch, *arguments):
    argv = ["doctor", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    code = doctor.main(argv)
    return code, capsys.readouterr()


def test_command_line(market, capsys, monkeypatch):
    common = ("--dataset", "market1501", "--root", market.root, "--images", 2)
    code, output = run(capsys, monkeypatch, *common, "--identities", 2)
    assert code == 0
    assert "WARNING counts: train: 5 images" in output.out
    assert "2 (2)" in output.out  # images and identities per camera
    code, output = run(capsys, monkeypatch, *common, "--identities", 3)
    assert code == 1
    assert "FATAL   identities: 2 training identities, and a batch needs 3" in output.out


def test_command_line_json(market, capsys, monkeypatch):
    market.write("query", "person.jpg")
    code, output = run(
        capsys,
        monkeypatch,
        "--dataset",
        "folder",
        "--root",
        market.root,
        "--identities=2",
        "--images=2",
        "--json",
    )
    report = json.loads(output.out)
    assert code == 1
    assert report["healthy"] is False
    assert report["splits"]["train"]["images"] == 5
    assert "person.jpg" in report["findings"][0]["message"]
    assert report["findings"][0]["level"] == "error"


CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config():
    config = ConfigDict()
    config.dataset = ConfigDict(
        {"name": "market1501", "root": config_dict.placeholder(str), "preset": "small", "seed": 3}
    )
    config.batch = ConfigDict({"identities": 2, "images": 2})
    return config
"""


def test_command_line_with_a_config(market, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.py").write_text(CONFIG)
    config = f"--config={tmp_path / 'config.py'}"
    root = f"--config.dataset.root={market.root}"
    code, output = run(capsys, monkeypatch, config, root)
    assert code == 0
    assert "data set market1501" in output.out
    code, output = run(capsys, monkeypatch, config, root, "--config.batch.identities=5")
    assert code == 1
    code, output = run(capsys, monkeypatch, config, "--config.dataset.name=synthetic")
    assert code == 0
    assert "data set synthetic" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --dataset or --config"),
        (["--dataset", "market1501"], "no root was given"),
        (["--dataset", "market1501", "--root", "/nowhere"], "nothing usable at /nowhere"),
        (["--dataset", "mars", "--root", "/"], "unknown data set 'mars'"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_command_line_errors(arguments, message, capsys, monkeypatch):
    code, output = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in output.err


def test_cheap_check(market, caplog, monkeypatch):
    absl_logging.get_absl_logger().addHandler(caplog.handler)
    try:
        data = load_dataset("market1501", market.root)
        # It must not read images.
        monkeypatch.setattr("mros_jax.data.datasets.checks.decode_image", lambda data: 1 / 0)
        with caplog.at_level(logging.WARNING):
            findings = doctor.check_cheap(data, identities=2, images=3 - 1)
        assert {f.check for f in findings} == {"counts"}
        assert "12,936" in caplog.text
        with pytest.raises(ValueError, match=r"not fit for training:\n  identities: 2 .* needs 8"):
            doctor.check_cheap(data, identities=8, images=4)
    finally:
        absl_logging.get_absl_logger().removeHandler(caplog.handler)


def test_rendered_data_set():
    data = load_dataset("synthetic", preset="small")
    report = doctor.examine(data, identities=4, images=4, progress=False)
    assert report.healthy
    assert report.splits["gallery"]["junk"] > 0
    assert report.sizes["query"]["largest"] == list(data.query.pixels().shape[1:3])
    assert np.all([f.level != "error" for f in report.findings])
