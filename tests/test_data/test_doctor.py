import dataclasses
import json
import re

import pytest

from mros_jax import doctor
from mros_jax.data import examination
from mros_jax.data.datasets.records import DATASETS, Counts
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def examine(market, identities=2, images=2):
    data = load_dataset("folder", market.root)
    return examination.examine(data, identities=identities, images=images, progress=False)


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
    assert "no errors, no other findings" in examination.format_report(report)


def test_counts_against_the_published(market, monkeypatch):
    report = examination.examine(
        load_dataset("market1501", market.root), identities=2, images=2, progress=False
    )
    messages = [f.message for f in report.findings if f.check == "counts"]
    assert len(messages) == 3
    assert messages[0] == (
        "train: 5 images (published: 12,936), 2 identities (published: 751), "
        "3 cameras (published: 6)"
    )
    assert report.healthy  # a subset is no error
    text = examination.format_report(report)
    assert "19,732" in text
    exact = {
        "train": Counts(5, 2, 3),
        "query": Counts(3, 2, 2),
        "gallery": Counts(6, 2, 2),
    }
    record = dataclasses.replace(DATASETS["market1501"], published=exact)
    monkeypatch.setitem(DATASETS, "market1501", record)
    market.write("distractors_500k", "0000_c1s1_000151_01.jpg")
    data = load_dataset("market1501", market.root, distractors_500k=True)
    assert examination.examine(data, identities=2, images=2, progress=False).findings == ()


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


def test_queries_without_identity(market):
    market.write("query", "-1_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg")
    ((level, names),) = found(examine(market), "queries without identity")
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
    assert found(report, "converted images") == [("warning", ("0007_c3s3_077419_03.jpg",))]
    assert report.sizes["train"]["different"] == 2
    assert report.sizes["train"]["largest"] == [40, 20]


def test_skipping_checks_what_is_left(market):
    """With on_bad_image="skip" training loses these images, and no query keeps a match."""
    for name in ("0001_c1s1_001051_00.jpg", "0003_c1s6_015971_00.jpg", "0003_c2s1_000151_00.jpg"):
        (market.root / "query" / name).write_bytes(b"damaged")
    market.write("query", "0009_c1s1_000001_00.jpg")
    data = load_dataset("folder", market.root)
    levels = {}
    for choice in ("error", "skip"):
        report = examination.examine(
            data, identities=2, images=2, on_bad_image=choice, progress=False
        )
        levels[choice] = {(f.check, f.level) for f in report.findings}
    assert ("unreadable images", "error") in levels["error"]
    assert ("no valid query", "fatal") not in levels["error"]
    assert {("unreadable images", "warning"), ("no valid query", "fatal")} <= levels["skip"]


def test_no_image_at_all(market):
    for path in (market.root / "query").iterdir():
        path.write_bytes(b"")
    report = examine(market)
    assert found(report, "no image") == [("fatal", ())]


def test_place_for_decoded_images(market, tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = load_dataset("folder", market.root)
    report = examination.examine(
        data, identities=2, images=2, cache_dir=tmp_path / "file" / "below", progress=False
    )
    [finding] = [f for f in report.findings if f.check == "cache"]
    assert "is a file" in finding.message


def run(capsys, *arguments):
    code = doctor.main([*map(str, arguments)])
    return code, capsys.readouterr()


def test_command_line(market, capsys):
    common = ("--dataset", "market1501", "--root", market.root, "--images", 2)
    code, output = run(capsys, *common, "--identities", 2)
    assert code == 0
    assert "WARNING counts: train: 5 images" in output.out
    assert "2 (2)" in output.out  # images and identities per camera
    code, output = run(capsys, *common, "--identities", 3)
    assert code == 1
    assert "FATAL   identities: 2 training identities, and a batch needs 3" in output.out


def test_command_line_json(market, capsys):
    market.write("query", "person.jpg")
    common = ("--dataset=folder", f"--root={market.root}", "--identities=2", "--images=2", "--json")
    code, output = run(capsys, *common)
    report = json.loads(output.out)
    assert code == 1
    assert report["healthy"] is False
    assert report["splits"]["train"]["images"] == 5
    assert report["findings"][0]["names"] == ["person.jpg"]
    assert report["findings"][0]["level"] == "error"
    code, output = run(capsys, *common, "--on_bad_image=skip")
    assert code == 0
    assert json.loads(output.out)["findings"][0]["level"] == "warning"


CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=None):
    config = ConfigDict()
    config.dataset = ConfigDict({
        "name": "market1501", "root": config_dict.placeholder(str), "on_bad_image": "error",
        "cache_dir": config_dict.placeholder(str), "device_fraction": 0.5,
        "distractors_500k": False, "include_val": True, "test_set": 0, "preset": "small", "seed": 0,
    })
    config.batch = ConfigDict({"identities": 2, "images": 2})
    config.input = ConfigDict({"height": 16, "width": 8})
    return config
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path / 'config.py'}"


def test_every_option_of_a_config_is_obeyed(market, layout, config, capsys):
    root = f"--config.dataset.root={market.root}"
    code, output = run(capsys, config, root)
    assert code == 0
    assert "data set market1501 distractors_500k=False" in output.out
    assert run(capsys, config, root, "--config.batch.identities=5")[0] == 1
    market.write("images", "a_frame.jpg")
    code, output = run(capsys, config, root, "--config.dataset.distractors_500k=True")
    assert re.search(r"gallery +7 ", output.out)
    market.write("query", "person.jpg")
    assert run(capsys, config, root)[0] == 1
    assert run(capsys, config, root, "--config.dataset.on_bad_image=skip")[0] == 0
    cache_dir = f"--config.dataset.cache_dir={layout.root / 'readme.txt'}"
    output = run(capsys, config, root, cache_dir)[1]
    assert "readme.txt is a file" in output.out
    with pytest.raises(UserError, match="'market1501' has no option test_set"):
        doctor.main([config, root, "--config.dataset.test_set=3"])
    synthetic = ("--config.dataset.name=synthetic", "--config.dataset.seed=3")
    code, output = run(capsys, config, *synthetic)
    assert code == 0
    assert "data set synthetic preset=small seed=3" in output.out


@pytest.mark.parametrize("by_config", [True, False])
def test_msmt17_without_its_validation_list(layout, config, capsys, by_config):
    line = "0000/0000_000_01_0303morning_0015_0.jpg 0"
    for folder in ("train", "test"):
        layout.write(folder, line.split()[0])
    for name in ("train", "val", "query", "gallery"):
        (layout.root / f"list_{name}.txt").write_text(line if name != "val" else "nonsense")
    arguments = ["--dataset=msmt17", f"--root={layout.root}", "--include_val=False"]
    if by_config:
        fields = [argument.removeprefix("--") for argument in arguments[1:]]
        sections = [f"--config.dataset.{field}" for field in fields]
        arguments = [config, "--config.dataset.name=msmt17", *sections]
    (layout.root / "list_val.txt").write_text(line.replace("_0015", "_0016"))
    _, output = run(capsys, *arguments)
    assert re.search(r"train +1 +30,248 ", output.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --dataset NAME or --config FILE"),
        (["--dataset", "market1501"], "no root was given"),
        (["--dataset", "market1501", "--root", "/nowhere"], "nothing usable at /nowhere"),
        (["--dataset", "mars", "--root", "/"], "unknown data set 'mars'"),
        (["--dataset", "synthetic", "--preset=huge"], "option preset is 'huge'"),
        (["--dataset", "dukemtmc", "--root=/", "--test_set=3"], "has no option test_set"),
        (["--dataset", "synthetic", "--on_bad_image=ignore"], "got 'ignore'"),
    ],
)
def test_command_line_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        doctor.main(arguments)


def test_checks_of_names_read_no_image(market, messages, monkeypatch):
    data = load_dataset("market1501", market.root)
    monkeypatch.setattr("mros_jax.data.images.decode_image", lambda data: 1 / 0)
    findings = examination.check_names(data, identities=2, images=2)
    assert {f.check for f in findings} == {"counts"}
    assert "12,936" in messages[0]
    with pytest.raises(ValueError, match=r"not fit for training:\n  identities: 2 .* needs 8"):
        examination.check_names(data, identities=8, images=4)


def test_rendered_data_set():
    data = load_dataset("synthetic", preset="small")
    report = examination.examine(data, identities=4, images=4, progress=False)
    assert report.healthy
    assert report.splits["gallery"]["junk"] > 0
    assert report.sizes["query"]["largest"] == [128, 64]


def test_identities_and_cameras_of_64_bits(market):
    market.write("query", "3000000000_c20240101123000s1_x.jpg")
    market.write("bounding_box_test", "3000000000_c2s1_x.jpg")
    report = examine(market)
    assert report.healthy
    assert report.splits["query"]["cameras"]["20240101123000"] == {"images": 1, "identities": 1}
