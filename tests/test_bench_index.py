"""The benchmarks of the index and of tracking: their numbers are those of the library."""

import numpy as np
import pytest
from PIL import Image

from mros_jax.gallery import segment
from mros_jax.retrieval import ECN, compute_distances, evaluate
from scripts import bench_index as bench
from scripts import bench_tracking
from tests.training import TINY

pytest.importorskip("faiss")


@pytest.fixture
def data(tmp_path):
    bench.make_data(tmp_path, 40, 600)
    return tmp_path


def read_table(text):
    """Rows of the first table in a text, by the header's names."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_precision_of_whole_lists_is_that_of_the_evaluation(data):
    query, gallery = bench.load_data(data, 40)
    rows = np.argsort(compute_distances(query.features, gallery.features), axis=1, kind="stable")
    found = bench.average_precision(rows, query, gallery)
    assert found == pytest.approx(evaluate(query, gallery).mAP, abs=1e-9)
    # What is not on the list is not found.
    assert 0 < bench.average_precision(rows[:, :5], query, gallery) < found


@pytest.mark.slow
def test_quality(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segment, "_LEAST_APPROXIMATE", 500)
    monkeypatch.setattr(bench, "EFFORTS", {"ivf": (1, 64)})
    words = ["--gallery=600", "--queries=40", "--kinds=flat,ivf", "--whole_ecn"]
    picture = tmp_path / "quality.png"
    assert bench.main([*words, "--part=quality", f"--plot={picture}"]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 600
    rows = read_table(capsys.readouterr().out)
    assert [(row["kind"], row["effort"]) for row in rows] == [
        ("flat", ""),
        ("ivf", "1"),
        ("ivf", "64"),
    ]
    scores = {name: [float(row[name]) for row in rows] for name in rows[0] if "mAP" in name}
    bench.make_data(tmp_path, 40, 600)
    query, gallery = bench.load_data(tmp_path, 40)
    expected = 100 * evaluate(query, gallery, rerank=ECN()).mAP
    assert scores["mAP, ECN over the gallery"][0] == pytest.approx(expected, abs=0.01)
    assert float(rows[0]["recall of 25"]) == float(rows[2]["recall of 25"]) == 1
    for values in scores.values():  # 64 is more clusters than there are
        assert values[0] == values[2]
    assert scores["mAP, ECN over the gallery"][1] < expected


@pytest.mark.slow
def test_times(capsys):
    words = ["--part=time", "--gallery=1200", "--queries=20", "--kinds=flat"]
    assert bench.main(words) == 0
    rows = read_table(capsys.readouterr().out)
    assert [row["by"] for row in rows] == ["ours", "faiss"]
    assert [row["recall"] for row in rows] == ["1.000", "1.000"]
    assert all(rows[0].values())


@pytest.mark.slow
def test_whole(capsys, tmp_path):
    assert bench.main(["--part=whole", "--gallery=2400", "--queries=40"]) == 0
    plain, *with_ecn = read_table(capsys.readouterr().out)
    bench.make_data(tmp_path, 40, 2400)
    query, gallery = bench.load_data(tmp_path, 40)
    assert float(plain["mAP"]) == pytest.approx(100 * evaluate(query, gallery).mAP, abs=0.005)
    # Threads that build a graph together do not build the same one again: one query of 40.
    near = {"IVF62,Flat:nprobe=32": 0.005, "HNSW32,Flat:efSearch=128": 2.6}
    assert [row["what"] for row in with_ecn] == [f"with ECN, faiss:{lists}" for lists in near]
    for row, (lists, tolerance) in zip(with_ecn, near.items(), strict=True):
        found = evaluate(query, gallery, rerank=ECN(neighbors=f"faiss:{lists}"))
        assert float(row["mAP"]) == pytest.approx(100 * found.mAP, abs=tolerance)
        assert float(row["Rank-1"]) == pytest.approx(100 * found.cmc[0], abs=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_tracking(capsys, tmp_path):
    words = ["--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in TINY.items())]
    assert bench_tracking.main([*words, "--repeats=1", "--boxes=1,20"]) == 0
    rows = read_table(capsys.readouterr().out)
    assert [row["boxes"] for row in rows] == ["1", "20"]
    assert all(float(row["ms a frame"]) > float(row["of it cut and resized, ms"]) for row in rows)
    boxes = bench_tracking.make_boxes(50)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [bench_tracking.WIDTH, bench_tracking.HEIGHT]).all()
