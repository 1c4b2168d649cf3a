import contextlib
import io
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax.errors import NotFoundError, UserError
from mros_jax.retrieval import descriptors

GOOD: dict[str, Any] = {
    "query_features": np.eye(2, 3, dtype=np.float32),
    "gallery_features": np.eye(3, dtype=np.float32),
    "query_pids": np.arange(2),
    "gallery_pids": np.arange(3),
    "query_camids": np.zeros(2, int),
    "gallery_camids": np.ones(3, int),
}


def save(path, **changes):
    np.savez(path, **{k: v for k, v in (GOOD | changes).items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pids": None}, "lacks query_pids; it holds query_features"),
        (
            {"gallery_features": np.eye(3).astype(ml_dtypes.bfloat16)},
            r"gallery_features has type \|V2, .*bfloat16.*np.asarray\(features, np.float32\)",
        ),
        ({"query_features": np.eye(2, dtype=object)}, "query_features holds Python objects"),
        ({"query_features": np.ones(2)}, r"query_features has shape \(2,\) .*\(images, features\)"),
        ({"query_features": np.ones((2, 0))}, r"query_features has shape \(2, 0\)"),
        ({"query_features": np.array([["a"]] * 2)}, "query_features has .* type <U1"),
        ({"query_features": np.ones((2, 3), complex)}, "complex128"),
        (
            {"query_pids": np.array([1, 10**19], np.uint64)},
            r"query_pids\[1\] is 10000000000000000000",
        ),
        ({"gallery_camids": np.zeros(2)}, r"gallery_camids has shape \(2,\); expected \(3,\)"),
        ({"query_names": np.array(["a"])}, r"query_names has shape \(1,\)"),
        ({"query_names": np.arange(2)}, "query_names has .* expected text"),
        ({"gallery_names": np.array(["a", "b", "a"])}, "gallery_names has 'a' in rows 0 and 2"),
    ],
)
def test_odd_arrays_are_named(tmp_path, changes, message):
    path = save(tmp_path / "odd.npz", **changes)
    with pytest.raises(UserError, match=message) as error:
        descriptors.load_features(path)
    assert str(path) in str(error.value)


def test_labels_of_any_whole_type_come_as_int64(tmp_path):
    path = save(tmp_path / "a.npz", query_pids=np.array(["01", "2"]))
    assert descriptors.load_features(path)["query_pids"].tolist() == [1, 2]


def test_what_is_no_archive_of_arrays(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        descriptors.load_features(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"lacks query_features, .*; it holds nothing"):
        descriptors.load_features(tmp_path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(UserError, match="is one array"):
        descriptors.load_features(tmp_path / "one.npy")
    twice = tmp_path / "twice.npz"
    save(twice)
    with zipfile.ZipFile(twice, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("query_pids.npy", b"")
    with pytest.raises(UserError, match="holds query_pids 2 times"):
        descriptors.load_features(twice)
    text = tmp_path / "text.npz"
    save(text, query_pids=None)
    with zipfile.ZipFile(text, "a") as file:
        file.writestr("query_pids.npy", b"1 2 3")
    with pytest.raises(UserError, match="query_pids"):
        descriptors.load_features(text)


BUFFER = io.BytesIO()
np.savez(BUFFER, **GOOD)
BYTES = BUFFER.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_user_errors_or_whole(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    content = bytearray(BYTES)
    kind = data.draw(st.sampled_from(["cut", "bytes", "random", "stored"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "random":
        content = data.draw(st.binary(max_size=200))
    elif kind == "bytes":
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    if kind == "stored":  # a sound archive of unsound arrays
        with zipfile.ZipFile(path, "w") as file:
            for name in GOOD:
                array = io.BytesIO()
                np.save(array, GOOD[name])
                own = bytearray(array.getvalue())
                own[data.draw(st.integers(0, len(own) - 1))] = data.draw(st.integers(0, 255))
                file.writestr(f"{name}.npy", bytes(own))
    # Anything but a UserError ends the test.
    with contextlib.suppress(UserError):
        assert set(descriptors.ARRAYS) <= set(descriptors.load_features(path))


def test_saved_is_loaded(tmp_path):
    descriptors.save_features(tmp_path / "a.npz", GOOD)
    loaded = descriptors.load_features(tmp_path / "a.npz")
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in GOOD.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_directory_of_arrays_is_mapped(tmp_path):
    for name, array in GOOD.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "notes.txt").write_text("no array")
    mapped = descriptors.load_features(tmp_path)
    assert set(mapped) == set(GOOD)
    for name, array in GOOD.items():
        np.testing.assert_array_equal(mapped[name], array)
    features = mapped["gallery_features"]
    assert isinstance(features.base, np.memmap)
    assert not features.flags.writeable
    (tmp_path / "gallery_features.npy").write_bytes(b"1 2 3")
    with pytest.raises(UserError, match=r"gallery_features\.npy is not a complete \.npy file"):
        descriptors.load_features(tmp_path)


def save_matlab(path, **changes):
    arrays = dict(zip(descriptors.MATLAB_ARRAYS, GOOD.values(), strict=True)) | changes
    scipy.io.savemat(path, {k: v for k, v in arrays.items() if v is not None})
    return path


def test_matlab_files_are_read(tmp_path):
    """Labels as a Python list or a vector become a row there."""
    path = save_matlab(tmp_path / "pytorch_result.mat", query_label=[-1, 7], query_cam=[[3], [4]])
    arrays = descriptors.load_features(path)
    assert arrays.keys() == GOOD.keys()
    expected = GOOD | {"query_pids": np.array([-1, 7]), "query_camids": np.array([3, 4])}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


def test_matlab_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "result.mat"
    with pytest.raises(NotFoundError, match="does not exist"):
        descriptors.load_features(path)
    with pytest.raises(UserError, match="lacks gallery_cam; expected are query_f, gallery_f"):
        descriptors.load_features(save_matlab(path, gallery_cam=None))
    with pytest.raises(UserError, match=r"gallery_pids has shape \(2,\); expected \(3,\)"):
        descriptors.load_features(save_matlab(path, gallery_label=[1, 2]))
    data = save_matlab(path).read_bytes()
    path.write_bytes(data[:124] + b"\x00\x02" + data[126:])
    with pytest.raises(UserError, match=r"version 7.3; save it without -v7.3"):
        descriptors.load_features(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="is not a complete MATLAB file"):
        descriptors.load_features(path)
