"""The benchmark compares like with like: its formulas and ours give the same numbers."""

import functools
import os
import subprocess
import sys

import pytest

from mros_jax.retrieval import ECN
from scripts import bench_retrieval as bench
from scripts import common


@pytest.fixture(scope="module")
def data():
    made = bench.make_data(30, 150, 16)
    bench.add_distance(made)
    return made


def test_scores_agree(data):
    assert bench.ours_distances(data) == pytest.approx(bench.sorted_distances(data), abs=1e-12)
    assert bench.ours_features(data) == pytest.approx(bench.sorted_features(data), abs=1e-6)


@pytest.mark.slow
def test_reranked_distances_agree(data):
    assert bench.ours_reranked("ecn")(data) == pytest.approx(bench.dense_ecn(data), rel=1e-5)
    expected = bench.dense_k_reciprocal(data)
    assert bench.ours_reranked("k_reciprocal")(data) == pytest.approx(expected, abs=1e-6)
    half = ECN().distances(data["query_features"], data["gallery_features"], dtype="float32")
    assert half.dtype == "float32"


@pytest.mark.slow
def test_scores_after_ecn_agree(data):
    expected = bench.ours_rerank_scores("ecn")(data)
    assert bench.ours_jitted(data) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_every_case_has_its_own_process(tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "scripts.bench_retrieval", "--quick"]
    done = subprocess.run(
        [*command, "--only=scores,scores-sort,msmt17-scores", f"--markdown={table}"],
        cwd=common.ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("|") for line in table.read_text().splitlines() if "matrix" in line]
    assert [row[4].strip() for row in rows] == ["ours", "argsort (formula)"]
    assert rows[0][7] == rows[1][7]
    assert "MSMT17" in table.read_text()
    assert "failed" not in done.stderr


@pytest.mark.slow
def test_another_commits_package_takes_turns(tmp_path):
    """Known by what it says: a package that cannot compute anything."""
    package = tmp_path / "mros_jax"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the other package')\n")
    command = [sys.executable, "-m", "scripts.bench_retrieval", "--quick", "--only=ecn"]
    run = functools.partial(
        subprocess.run, cwd=common.ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True
    )
    done = run([*command, f"--before={tmp_path}"], text=True)
    assert done.returncode == 0, done.stderr
    assert "| ours, float64 |" in done.stdout
    assert "ecn-before failed: RuntimeError: the other package" in done.stderr
    refused = run([*command, f"--before={tmp_path / 'nowhere'}"], text=True)
    assert refused.returncode == 2
    assert "is no clone of this project" in refused.stderr
