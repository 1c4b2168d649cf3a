"""What PyTorch computed, in `tests/data/pytorch`, for machines without it.

Small results are kept whole, see `recorded` in `tests/conftest.py`. Of a whole system, see
`tests/test_recorded.py`, each tensor is kept as a digest.
"""

import importlib.util
import json
import os
import pathlib
import re
import zlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parent / "data" / "pytorch"
SYSTEMS = DIRECTORY / "systems"
TORCH = importlib.util.find_spec("torch") is not None


def look_up(nodeid, compute):
    """What `compute` returns, a dict of arrays: kept in the test's own file where it cannot run.

    Where PyTorch is installed the file is compared with what is computed now, and written anew if
    the environment has MROS_RECORD=1.
    """
    name = re.sub(r"[^\w.]+", "-", nodeid.removeprefix("tests/")).strip("-")
    path = DIRECTORY / f"{name}.npz"
    command = f"MROS_RECORD=1 python -m pytest {nodeid!r}"
    if not TORCH:
        assert path.exists(), f"{path} is missing; where PyTorch is installed: {command}"
        return load(path)
    computed = {key: np.asarray(value) for key, value in compute().items()}
    if os.environ.get("MROS_RECORD") == "1":
        save(path, computed)
    assert path.exists(), f"{path} is missing: {command}"
    kept = load(path)
    assert kept.keys() == computed.keys(), f"{path} holds something else: {command}"
    for key, value in computed.items():
        np.testing.assert_allclose(
            kept[key],
            value,
            rtol=1e-5,
            atol=1e-5 * np.abs(value).max(),
            err_msg=f"{key} of {path} is not what PyTorch computes now; if it should be: {command}",
        )
    return computed


def save(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def load(path):
    with np.load(path) as file:
        return dict(file)


def seeded(name):
    """A generator of random numbers that depends on a name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(name, shape):
    """Values of a variable by its path in Flax, of the sizes that a trained network's have."""
    rng, leaf = seeded(name), name.rpartition("/")[2]
    ranges = {"scale": (0.5, 1.5), "bias": (-0.3, 0.3), "mean": (-0.3, 0.3), "var": (0.5, 2)}
    if leaf in ranges:
        return rng.uniform(*ranges[leaf], shape)
    values = rng.standard_normal(shape)
    if leaf == "kernel":
        convolution = len(shape) == 4
        fan_in = np.prod(shape[:-1]) if convolution else shape[-2]
        values *= ((2 if convolution else 1) / fan_in) ** 0.5
    return values


def digest(name, array):
    """Norm of an array, and its products with three random directions.

    The products of a difference are as large as its norm, whatever it looks like.
    """
    values = np.asarray(array, np.float64).ravel()
    directions = seeded(name).standard_normal((3, values.size))
    return np.array([np.linalg.norm(values), *(directions @ values)])


# Kind of a tensor -> largest error as a share of its norm, and the least norm as a share of the
# largest: a bias before a batch normalization has rounding in place of a gradient. The rates of
# the steps are float32 on our side.
_BOUNDS = {
    "evaluation": (1e-9, 0.0),
    "loss": (1e-9, 0.0),
    "statistics": (1e-9, 0.0),
    "gradients": (1e-9, 1e-4),
    "steps": (1e-6, 1e-6),
}


def compare(ours, theirs):
    """Check tables of digests by name, "KIND/NAME", against each other."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    for kind, (tolerance, least) in _BOUNDS.items():
        names = [name for name in theirs if name.startswith(f"{kind}/")]
        assert names, f"no {kind}"
        floor = least * max(theirs[name][0] for name in names)
        for name in names:
            error = np.abs(ours[name] - theirs[name]).max() / max(theirs[name][0], floor, 1e-30)
            assert error <= tolerance, (name, error)


def save_system(name, case, table):
    """Write digests by name, and what the system is (a dict for JSON)."""
    names = sorted(table)
    digests = np.array([table[key] for key in names])
    save(SYSTEMS / f"{name}.npz", {"case": json.dumps(case), "names": names, "digests": digests})


def load_system(name):
    """(what the system is, digests by name)."""
    kept = load(SYSTEMS / f"{name}.npz")
    names = kept["names"].tolist()
    return json.loads(str(kept["case"])), dict(zip(names, kept["digests"], strict=True))
