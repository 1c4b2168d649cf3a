import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mros_jax.models import torch_weights
from mros_jax.models.torch_weights import WeightsError
from mros_jax.systems.mros import MROS

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = np.zeros((2, 96, 32, 3), np.float32)


def init(**fields):
    model = MROS(**{"num_classes": 5, "trunk": "tiny", **fields})
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def variables():
    return init()


@pytest.fixture(scope="module")
def imagenet(variables):
    """Another tiny trunk under torchvision's names, with a classifier as torchvision has."""
    exported = torch_weights.to_torch_state_dict(variables)
    rng = np.random.default_rng(0)
    state = {
        name.removeprefix("trunk."): rng.uniform(0.5, 1, value.shape).astype(value.dtype)
        for name, value in exported.items()
        if name.startswith("trunk.")
    }
    return state | {"fc.weight": np.ones((10, 128), np.float32), "fc.bias": np.ones(10, np.float32)}


def load_imagenet(path, variables):
    name_of = MROS(num_classes=5, trunk="tiny").torchvision_name
    return torch_weights.load_imagenet(path, variables, name_of)


@pytest.fixture(params=[".safetensors", ".pth"])
def file(request, imagenet, tmp_path):
    """Weights as torchvision has them, in a file of either kind."""
    path = tmp_path / f"w{request.param}"
    if request.param == ".pth":
        torch = request.getfixturevalue("torch")
        torch.save({k: torch.from_numpy(v) for k, v in imagenet.items()}, path)
    else:
        save_file(imagenet, path)
    return path


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_through_a_file(variables, tmp_path):
    path = tmp_path / "mros.safetensors"
    torch_weights.save_torch_state_dict(path, variables)
    state = torch_weights.read_state_dict(path)
    same(torch_weights.from_torch_state_dict(state, init()), variables)
    assert [p.name for p in tmp_path.iterdir()] == ["mros.safetensors"]


def test_imagenet_weights_fill_the_trunk_only(file, variables, imagenet):
    loaded = load_imagenet(file, variables)
    for collection in ("params", "batch_stats"):
        for part in variables[collection]:
            if part != "trunk":
                same(loaded[collection][part], variables[collection][part])
    out = torch_weights.to_torch_state_dict(loaded)
    for name, value in imagenet.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(out[f"trunk.{name}"], value)


def test_published_v1_file_has_no_counters(variables, imagenet, tmp_path):
    state = {k: v for k, v in imagenet.items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_imagenet(tmp_path / "w.safetensors", variables)


def test_safetensors_need_no_torch(imagenet, tmp_path):
    save_file(imagenet, tmp_path / "w.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mros_jax.models import torch_weights as w\n"
        f"print(len(w.read_state_dict({str(tmp_path / 'w.safetensors')!r})))\n"
        "try: w.read_state_dict(__file__ if False else sys.argv[1])\n"
        "except ValueError as e: print(e)"
    )
    (tmp_path / "w.pth").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.pth")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert str(len(imagenet)) in done.stdout
    assert "needs PyTorch" in done.stdout


def test_everything_wrong_is_listed(variables, imagenet, tmp_path):
    state = dict(imagenet)
    del state["layer2.0.conv1.weight"], state["bn1.running_var"]
    state["layer9.0.conv1.weight"] = np.zeros(3, np.float32)
    state["conv1.weight"] = np.zeros((16, 3, 3, 3), np.float32)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_imagenet(tmp_path / "w.safetensors", variables)
    text = str(caught.value)
    assert "w.safetensors does not fit" in text
    assert "missing (2):" in text
    assert "layer2.0.conv1.weight (32, 16, 3, 3)" in text
    assert "bn1.running_var (16,)" in text
    assert "unexpected (1):\n    layer9.0.conv1.weight (3,)" in text
    assert "conv1.weight (16, 3, 3, 3), expected (16, 3, 7, 7)" in text


def test_another_network(variables, tmp_path):
    state = torch_weights.to_torch_state_dict(init(trunk="resnet18"))
    with pytest.raises(WeightsError, match=r"unexpected[\s\S]*layer1.1.conv1"):
        torch_weights.from_torch_state_dict(state, variables)


def test_another_number_of_classes(variables):
    state = torch_weights.to_torch_state_dict(init(num_classes=6))
    with pytest.raises(WeightsError, match=r"classifier_t3.0.weight \(6, 64\), expected \(5, 64\)"):
        torch_weights.from_torch_state_dict(state, variables)


def test_a_learned_neck_bias_needs_a_model_that_has_one(variables):
    state = torch_weights.to_torch_state_dict(variables)
    assert not state["neck_t4.0.bias"].any()
    state["neck_t4.0.bias"] = state["neck_t4.0.bias"] + 1
    with pytest.raises(WeightsError, match=r"neck_t4.0.bias is not 0, and is fixed at 0"):
        torch_weights.from_torch_state_dict(state, variables)
    loaded = torch_weights.from_torch_state_dict(state, init(neck_bias=True))
    np.testing.assert_array_equal(loaded["params"]["neck_t4"]["bias"][0], 1)


def test_imported_weights_do_not_share_memory(variables):
    state = torch_weights.to_torch_state_dict(variables)
    loaded = torch_weights.from_torch_state_dict(state, variables)
    for value in state.values():
        value[...] = 9
    same(loaded, init())


@pytest.mark.parametrize("keep", [0, 4, 0.5])
def test_truncated_files(keep, file):
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(WeightsError, match=rf"{file.name} \(\d+ bytes\) is not a whole"):
        torch_weights.read_state_dict(file)


def test_other_files(tmp_path, torch):
    with pytest.raises(FileNotFoundError, match="fetch_weights"):
        torch_weights.read_state_dict(tmp_path / "none.pth")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(WeightsError, match=r"w\.onnx \(0 bytes\) is not a whole PyTorch"):
        torch_weights.read_state_dict(tmp_path / "w.onnx")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        torch_weights.read_state_dict(tmp_path / "list.pth")


def test_a_pickle_that_runs_code_is_refused(tmp_path, torch):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "owned",))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="not a whole PyTorch weights file"):
        torch_weights.read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_failed_save_leaves_nothing(variables, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        torch_weights.save_torch_state_dict(tmp_path / "w.safetensors", variables)
    assert list(tmp_path.iterdir()) == []


def test_variables_with_other_collections(variables):
    with pytest.raises(WeightsError, match="expected params and batch_stats"):
        torch_weights.to_torch_state_dict({**variables, "ema": {}})


@pytest.mark.parametrize("wrap", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "base.", "backbone.", ""])
def test_wrappers_and_prefixes_of_training_codes(prefix, wrap, imagenet, tmp_path, torch):
    state = {prefix + name: torch.from_numpy(value) for name, value in imagenet.items()}
    path = tmp_path / "w.pth.tar-60"
    torch.save({wrap: state, "epoch": 60} if wrap else state, path)
    same(torch_weights.read_state_dict(path), imagenet)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_weights_are_widened(name, imagenet, tmp_path, torch):
    dtype = getattr(torch, name)
    state = {name: torch.from_numpy(value).to(dtype) for name, value in imagenet.items()}
    torch.save(state, tmp_path / "w.bin")
    loaded = torch_weights.read_state_dict(tmp_path / "w.bin")
    same(loaded, {name: value.float().numpy() for name, value in state.items()})


def test_a_single_stripe_is_still_a_stack():
    model_variables = init(num_stripes=1, overlap=False, levels=("t4",))
    state = torch_weights.to_torch_state_dict(model_variables)
    assert state["classifier_t4.0.weight"].shape == (5, 128)
    same(torch_weights.from_torch_state_dict(state, model_variables), model_variables)
