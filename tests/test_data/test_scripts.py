import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_show_batch(tmp_path):
    out = tmp_path / "batch.png"
    options = ["--dataset=folder", f"--root={ROOT / 'tests/data/pedestrians'}", f"--out={out}"]
    size = ["--identities=2", "--images=2", "--height=48", "--width=16"]
    text = run("scripts/show_batch.py", *options, *size, XDG_CACHE_HOME=str(tmp_path))
    assert f"{out}: step 0 (epoch 0)" in text
    with Image.open(out) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * (48 + 4), 4 * (16 + 4), 3)  # P rows of K pairs, 4 pixels between
    assert not list(tmp_path.glob(".*.tmp"))


def test_bench_data(tmp_path):
    table = tmp_path / "data.md"
    text = run(
        "scripts/bench_data.py",
        "--part=decode",
        "--part=plan",
        "--images=8",
        "--repeats=1",
        "--big=64",
        f"--markdown={table}",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert "| decode into one array" in text
    assert "| Market-1501 | 12,936 | 101 |" in text
    assert "jax" in table.read_text()
