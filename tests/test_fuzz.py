"""Whatever a run or a weight file is damaged into, it says `UserError`: no traceback, no hang.

As `tests/test_data/test_fuzz.py` does for images, tables and data sets.
"""

import contextlib
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from mros_jax.errors import UserError
from mros_jax.gallery import Features, Index
from mros_jax.models.torch_weights import read_state_dict
from mros_jax.runs.checkpoints import load_variables
from mros_jax.runs.run import Run
from tests.runs import copy_run
from tests.test_data.test_fuzz import SECONDS, SLOWEST, mutate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def try_for_a_while(read, path, share, seed):
    """Damages a file again and again, until some reads were refused."""
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    refused = 0
    end = time.monotonic() + SECONDS * share
    while time.monotonic() < end or not refused:
        path.write_bytes(mutate(rng, whole))
        since = time.monotonic()
        try:
            read()
        except UserError:
            refused += 1
        finally:
            path.write_bytes(whole)
        assert time.monotonic() - since < SLOWEST


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights(tmp_path, suffix, request):
    path = tmp_path / f"w{suffix}"
    state = {"conv1.weight": np.ones((4, 3, 2, 2), np.float32), "fc.bias": np.ones(3, np.float32)}
    if suffix == ".pth":
        torch = request.getfixturevalue("torch")
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    else:
        save_file(state, path)
    try_for_a_while(lambda: read_state_dict(path), path, 0.2, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    return copy_run(tmp_path_factory.mktemp("fuzz") / "run", cache_dir)


@pytest.mark.parametrize("name", ["config.json", "run.json", "results.json", "metrics.jsonl"])
def test_files_of_a_run(run, name):
    def read():
        opened = Run.open(run)
        return opened.results, opened.rankings, opened.train_records, opened.features

    try_for_a_while(read, run / name, 0.1, seed=1)


@pytest.mark.parametrize(
    "name", ["index.json", *(f"segments/000001/{x}" for x in ("vectors.npy", "rows.npy"))]
)
def test_files_of_an_index(tmp_path, name):
    pytest.importorskip("faiss")
    features = np.random.default_rng(0).standard_normal((20, 8), np.float32)
    images = Features(features, [f"{i}.jpg" for i in range(20)], {"checkpoint": "a"})
    Index.build(tmp_path / "gallery.index", images)

    def read():
        opened = Index(tmp_path / "gallery.index")
        return list(opened), opened.search(images, 3).records, "3.jpg" in opened

    try_for_a_while(read, tmp_path / "gallery.index" / name, 0.05, seed=3)


def test_records_of_an_index(tmp_path):
    """Whatever their bytes become, not only those of another size."""
    pytest.importorskip("faiss")
    path = tmp_path / "gallery.index"
    Index.build(path, Features(np.eye(4, dtype=np.float32), list("abcd"), {"checkpoint": "a"}))
    records = path / "segments" / "000001" / "records.jsonl"
    whole, told = records.read_bytes(), []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        records.write_bytes(changed)
        try:
            list(Index(path))
        except UserError as error:
            told.append(str(error))
    assert len(told) > len(whole) // 2
    assert all("is damaged in row" in message for message in told)


# What tensorstore's other reads say after one has failed; `console` drops it, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints(run, tmp_path):
    directory = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    rng = np.random.default_rng(2)
    files = sorted(p for p in (directory / "last").rglob("*") if p.is_file())
    load_variables(directory)
    end = time.monotonic() + SECONDS * 0.4
    while time.monotonic() < end:
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        path.write_bytes(mutate(rng, whole))
        since = time.monotonic()
        with contextlib.suppress(UserError):
            load_variables(directory)
        assert time.monotonic() - since < SLOWEST
        path.write_bytes(whole)
