"""Two real processes evaluate as one does, each with a share of the work."""

import importlib.util
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from mros_jax import evaluate, extract, parallel
from mros_jax.data import store
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.images import EncodedImages
from mros_jax.errors import UserError
from mros_jax.files import read_json
from mros_jax.retrieval import AQE, ECN, GSRW, KReciprocal, Placement
from mros_jax.retrieval import evaluate as rank
from mros_jax.retrieval.neighbors import search_neighbors
from mros_jax.retrieval.rescore import PairHeads
from tests.runs import make_run
from tests.training import JAX_CONFIG, ROOT

pytestmark = [  # three processes
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_compilation"),
]

HEADS = PairHeads(
    *(np.random.default_rng(1).standard_normal((4, *n)).astype(np.float32) for n in ((4, 2), (2,)))
)
METHODS = {
    "plain": None,
    "ecn": ECN(k=6, t=2, q=3),
    "k_reciprocal": KReciprocal(k1=5, k2=3),
    "aqe": AQE(k=3),
    "gsrw": GSRW(top=9, heads=HEADS),
}
if importlib.util.find_spec("faiss"):
    METHODS["faiss"] = ECN(k=6, t=2, q=3, neighbors="faiss")


# What a process of its own does; in a pair both do it.


def work(folder: pathlib.Path, words: list[str]) -> dict[str, object]:
    """Evaluate, extract, rank and read images; returns what is to be the same in one and in two."""
    shares = _spy_on_shares()
    run = ["--run", str(folder / "run")]
    options = ["--rerank=ecn,aqe", '--rerank_options={"ecn": {"k": 5}}', "--batch_size=8"]
    evaluate.main([*run, *options, "--out", str(folder / "scores.json"), "--json", *words])
    listed = ["--images", str(folder.parent / "images")]
    extract.main([*run, *listed, "--out", str(folder / "features.npz"), "--on_bad_image=skip"])
    return {
        "ranked": _rank(),
        "images": _read_images(folder),
        "failures": _fail(),
        "shares": shares,
    }


def _spy_on_shares() -> list[tuple[int, int]]:
    shares: list[tuple[int, int]] = []
    share = parallel.share

    def spy(items, work):
        def noted(own):
            shares.append((len(own), len(items)))
            return work(own)

        return share(items, noted)

    parallel.share = spy
    return shares


def _rank() -> dict[str, object]:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((30, 16))
    pids = [rng.integers(0, 30, n) for n in (130, 260)]
    features = [centers[p] + 1.5 * rng.standard_normal((len(p), 16)) for p in pids]
    camids = [rng.integers(0, 3, len(p)) for p in pids]
    placement = Placement(block_size=32, together=True)
    found: dict[str, object] = {}
    for name, method in METHODS.items():
        result = rank(
            *features, *pids, *camids, rerank=method, distractor_pid=None, placement=placement
        )
        found[name] = (result.mAP, result.cmc, result.ap, result.first_match_rank)
    stacked = np.concatenate(features).astype(np.float32)
    found["neighbors"] = tuple(search_neighbors(stacked, 9, placement))
    return found


def _read_images(folder: pathlib.Path) -> dict[str, object]:
    """Images from a cache that all share, from one that each has of its own, and of other data."""
    me = jax.process_index()
    decoded: list[str] = []
    decode = store.decode_split

    def decode_noted(split, *size, **options):
        decoded.append(split.name)
        return decode(split, *size, **options)

    store.decode_split = decode_noted
    digest = EncodedImages.digest
    checked: list[int] = []

    def digest_noted(self, **options):
        checked.append(1)
        return digest(self, **options)

    EncodedImages.digest = digest_noted  # type: ignore[method-assign]
    split = load_dataset("market1501", folder.parent / "people").gallery

    def load(split, cache_dir):
        return store.load_store(split, height=8, width=4, cache_dir=cache_dir, progress=False)

    shared, again = (load(split, folder / "shared") for _ in range(2))
    reads = (len(decoded), len(checked), isinstance(shared.images, np.memmap))
    own = load(split, folder / f"own-{me}")
    other = split.select(np.arange(len(split))[:: 1 - 2 * me])
    failure = None
    try:
        load(other, folder / f"other-{me}")
    except UserError as error:
        failure = str(error)
    pixels = [np.asarray(x.images) for x in (shared, again, own)]
    return {"pixels": pixels, "reads": reads, "decoded": len(decoded), "other": failure}


def _fail() -> list[str]:
    """What each process is told where the last one fails."""
    told = []
    last = jax.process_count() - 1

    def fail(*_):
        if jax.process_index() == last:
            raise UserError("no such luck")
        return [0]

    for attempt in (
        lambda: parallel.share([1, 2], fail),
        lambda: parallel.from_main(fail),
        lambda: parallel.run_on_main(fail),
    ):
        try:
            attempt()
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told


def main() -> None:
    folder, out, *words = sys.argv[1:]
    pathlib.Path(out).write_bytes(pickle.dumps(work(pathlib.Path(folder), words)))


# What is expected of it.

TOLD = "process 1 has ended with an error; its messages say which"


def start(folder, out, words):
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": JAX_CONFIG.jax_compilation_cache_dir,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.test_hosts", str(folder), str(out), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_images(folder: pathlib.Path) -> None:
    """A folder of 300 images, one of them damaged; and a small data set."""
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    for i in range(300):
        Image.fromarray(rng.integers(0, 256, (12, 8, 3), np.uint8)).save(
            folder / "images" / f"{i:03d}.png"
        )
    (folder / "images" / "007.png").write_bytes(b"no image")
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (folder / "people" / part).mkdir(parents=True)
        for pid in (1, 2):
            for camera in (1, 2):
                pixels = rng.integers(0, 256, (8, 4, 3), np.uint8)
                name = f"{pid:04d}_c{camera}s1_000001_00.jpg"
                Image.fromarray(pixels).save(folder / "people" / part / name)


@pytest.fixture(scope="module")
def done(tmp_path_factory, cache_dir):
    """Folder and outcome of each process: of one by itself, and of two that work together."""
    root = tmp_path_factory.mktemp("hosts")
    make_images(root)
    for name in ("single", "pair"):
        make_run(root / name / "run", cache_dir)
        (root / name / "run" / "features.npz").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    together = [f"--coordinator_address={address}", "--num_processes=2"]
    commands = {
        "single-0": [],
        "pair-0": [*together, "--process_id=0"],
        "pair-1": [*together, "--process_id=1"],
    }
    processes = {
        name: start(root / name.partition("-")[0], root / name, words)
        for name, words in commands.items()
    }
    printed = {}
    for name, process in processes.items():
        printed[name], errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    outcomes = {name: pickle.loads((root / name).read_bytes()) for name in commands}
    return root, outcomes, printed


def test_scores_and_ranked_lists_are_those_of_one(done):
    _, outcomes, _ = done
    for name in ("pair-0", "pair-1"):
        np.testing.assert_equal(outcomes[name]["ranked"], outcomes["single-0"]["ranked"])


def test_each_process_works_on_its_share(done):
    _, outcomes, _ = done
    shares = [outcomes[f"pair-{i}"]["shares"] for i in range(2)]
    for (here, of), (there, of_others) in zip(*shares, strict=True):
        assert of == of_others == here + there
        assert here - there in (0, 1)
    assert sum(of > 2 for _, of in shares[0]) > 10


def test_commands_leave_and_print_what_one_does(done):
    root, _, printed = done
    expected, found = (
        read_json(root / name / "scores.json")["results"] for name in ("single", "pair")
    )
    assert [entry["name"] for entry in found] == ["plain", "ecn", "aqe"]
    assert found == expected
    shown, nothing = (
        [line for line in printed[f"pair-{i}"].splitlines() if not line.startswith("[Gloo]")]
        for i in range(2)
    )
    assert json.loads(shown[0])["results"] == expected
    assert nothing == []
    for file in ("features.npz", "run/features.npz"):
        with np.load(root / "single" / file) as one, np.load(root / "pair" / file) as two:
            np.testing.assert_equal(dict(two), dict(one))
    with np.load(root / "pair" / "features.npz") as extracted:
        names = [f"{i:03d}.png" for i in range(300) if i != 7]
        assert extracted["names"].tolist() == names


def test_only_one_process_reads_what_all_can_map(done):
    _, outcomes, _ = done
    one, first, second = (outcomes[name]["images"] for name in ("single-0", "pair-0", "pair-1"))
    np.testing.assert_equal(first["pixels"], one["pixels"])
    np.testing.assert_equal(second["pixels"], one["pixels"])
    assert one["reads"] == first["reads"] == (1, 2, True)
    assert second["reads"] == (0, 0, True)
    assert first["decoded"] == one["decoded"] == 3
    assert second["decoded"] == 1  # into a cache of its own
    assert first["other"] == TOLD
    assert "4 images that process 1 has are not those of process 0" in second["other"]


def test_all_fail_where_one_fails(done):
    _, outcomes, _ = done
    assert outcomes["pair-0"]["failures"] == [TOLD, "", ""]
    assert outcomes["pair-1"]["failures"] == ["no such luck", "", ""]
    assert outcomes["single-0"]["failures"] == ["no such luck"] * 3


if __name__ == "__main__":
    main()
