"""The benchmark of growth: every point is measured as it says, and drawn."""

import argparse
import dataclasses

import pytest
from PIL import Image

from mros_jax.errors import UserError
from scripts import bench_growth as bench


def test_points_of_an_axis(monkeypatch):
    def note(kind, point, args):
        return {"kind": kind, **dataclasses.asdict(point)}

    monkeypatch.setattr(bench, "spawn", note)
    points = bench.measure_axis("gallery", argparse.Namespace())
    sizes = [point["gallery"] for point in points if point["kind"] == bench.PLAIN]
    assert sizes == list(bench.AXES["gallery"])
    assert max(point["gallery"] for point in points if point["kind"] == bench.ECN) == 100_000
    assert {point["devices"] for point in points} == {1}
    assert len(bench.measure_axis("devices", argparse.Namespace())) == 8


def test_unknown_axis(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--part=queries"])
    assert "no part queries; there are gallery, numbers, devices" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_are_the_same_on_any_number_of_devices(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.AXES, "devices", (1, 3))
    words = ["--quick", "--part=devices", "--repeats=1", f"--plots={tmp_path}"]
    assert bench.main(words) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        [devices, kind] for kind in bench.KINDS for devices in ("1", "3")
    ]
    assert rows[0][-1] == rows[1][-1]
    assert rows[2][-1] == rows[3][-1]
    with Image.open(tmp_path / "growth_devices.png") as drawn:
        assert drawn.width > 600


@pytest.mark.slow
def test_a_point_that_fails_says_which():
    args = argparse.Namespace(repeats=1, quick=True)
    with pytest.raises(UserError, match=r"Point\(gallery=0.*failed with exit code"):
        bench.spawn(bench.PLAIN, bench.Point(gallery=0), args)
