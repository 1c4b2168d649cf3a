"""The benchmark of the data path."""

import re

import pytest

from scripts import bench_data
from tests.least import write_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_decoding_and_plans(tmp_path, capsys):
    table = tmp_path / "data.md"
    words = [
        "--config=configs/mros.py",
        "--part=decode,plan",
        "--images=8",
        "--repeats=1",
        "--workers=2",
    ]
    assert bench_data.main([*words, "--big=64", f"--markdown={table}"]) == 0
    printed = capsys.readouterr().out
    assert re.findall("decode into one array, 2 threads, (.*?) ", printed) == [
        "Pillow",
        "simplejpeg",
    ]
    assert "| Market-1501 | 12,936 | 101 |" in printed
    assert "jax" in table.read_text()


@pytest.mark.slow
def test_the_step_of_a_config(tmp_path, cache_dir, monkeypatch, capsys):
    words = write_config(tmp_path, cache_dir, monkeypatch)
    assert bench_data.main([*words, "--part=step", "--repeats=1", "--images=8"]) == 0
    printed = capsys.readouterr().out
    assert "mean, mean, 96 x 32, batch 8" in printed
    assert "| training step, pictures ready |" in printed
    assert printed.count("100.00 %") >= 1


@pytest.mark.slow
def test_extraction_from_files(tmp_path, cache_dir, monkeypatch, capsys):
    words = write_config(tmp_path, cache_dir, monkeypatch)
    assert bench_data.main([*words, "--part=extract", "--repeats=1", "--images=8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| from files \| [\d,]+ \| [\d,]+ ms for 8 \|", printed)
    assert re.search(r"\| of the decoding hidden behind the network \| +\| -?\d+ % \|", printed)


def test_an_unknown_part(capsys):
    with pytest.raises(SystemExit):
        bench_data.main(["--config=configs/mros.py", "--part=steps"])
    assert (
        "no part steps; there are decode, augment, plan, step, extract" in capsys.readouterr().err
    )
