"""Weights in from PyTorch (ImageNet) and out to PyTorch (a whole trained MROS).

Names on the PyTorch side: torchvision's for the backbone (under `backbone.` in a whole MROS), and
`necks.<level>.<stripe>` (BatchNorm1d), `classifiers.<level>.<stripe>` (Linear) for the heads.
Nothing here needs PyTorch, except reading a `.pth` file.
"""

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as dump_safetensors

StateDict = dict[str, np.ndarray]
_Path = tuple[str, ...]

# Flax's name -> PyTorch's, by collection, for a batch normalisation and a convolution or linear.
_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


class WeightsError(ValueError):
    """Weights that do not fit the network, or a file that holds none."""


def load_imagenet(path: str | os.PathLike[str], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the backbone of `variables` from a torchvision ResNet's weights.

    Args:
        path: `.safetensors`, or `.pth`/`.pt` where PyTorch is installed.
        variables: of `MROS.init`; heads are kept as they are.

    Returns:
        New variables, float32, backbone from the file. torchvision's classifier (`fc.*`) is left
        out on purpose; every other tensor is used and every backbone parameter filled.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: truncated or foreign file; or tensors missing, unexpected or misshapen, all
            of them listed.
    """
    state = read_state_dict(path)
    state = {f"backbone.{k}": v for k, v in state.items() if k not in ("fc.weight", "fc.bias")}
    return _fill(variables, state, prefix="backbone.", source=str(path))


def from_torch_state_dict(
    state: Mapping[str, np.ndarray], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill all of `variables` from a whole MROS's state dict, the inverse of `to_torch_state_dict`.

    Args:
        state: name -> array.
        variables: of `MROS.init` for the same network (values are not looked at, only shapes).

    Returns:
        New variables, float32.

    Raises:
        WeightsError: tensors missing, unexpected or misshapen, all of them listed; or a neck bias
            other than 0 for a model whose neck bias is fixed at 0.
    """
    return _fill(variables, dict(state), prefix="", source="state dict")


def to_torch_state_dict(variables: Mapping[str, Any]) -> StateDict:
    """Name every tensor of a whole MROS as PyTorch would, convolutions as (out, in, h, w).

    Args:
        variables: {"params", "batch_stats"} of an MROS, without a device axis.

    Returns:
        name -> float32 array (`num_batches_tracked`: int64 0), ready for
        `load_state_dict(strict=True)` of a module with these names. Neck biases that are fixed
        at 0 are written as zeros.
    """
    state: StateDict = {}
    for path, value in sorted(_flatten(variables).items()):
        for name, array in _to_torch(path, np.asarray(value)):
            state[name] = np.array(array, order="C")  # a copy: the caller may write to it
    for name in list(state):
        if name.endswith(".running_mean"):
            bn = name.removesuffix("running_mean")
            state[bn + "num_batches_tracked"] = np.zeros((), np.int64)
            state.setdefault(bn + "bias", np.zeros_like(state[name]))
    return dict(sorted(state.items()))


def save_torch_state_dict(path: str | os.PathLike[str], variables: Mapping[str, Any]) -> None:
    """Write `to_torch_state_dict(variables)` as safetensors, by a temporary name and a rename."""
    path = pathlib.Path(path)
    data = dump_safetensors(to_torch_state_dict(variables), {"format": "pt", "model": "mros_jax"})
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read a state dict: safetensors without PyTorch, `.pth`/`.pt` with it (weights only).

    Raises:
        FileNotFoundError: no such file.
        ImportError: a `.pth` file and no PyTorch.
        WeightsError: truncated or foreign file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file (scripts/fetch_weights.py downloads weights)"
        )
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(path.read_bytes())
        except (SafetensorError, json.JSONDecodeError, KeyError, ValueError) as error:
            raise WeightsError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}; "
                "download or export it again"
            ) from error
    if path.suffix in (".pth", ".pt"):
        return _read_pth(path)
    raise WeightsError(f"{path}: weights must be .safetensors, .pth or .pt, not {path.suffix!r}")


def _read_pth(path: pathlib.Path) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading a {path.suffix} file needs PyTorch (pip install torch); "
            "a .safetensors file does not"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many: RuntimeError, UnpicklingError, EOFError, ...
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is not a whole PyTorch weights file: {error}; "
            "download it again"
        ) from error
    if not isinstance(state, Mapping) or not all(hasattr(v, "numpy") for v in state.values()):
        raise WeightsError(
            f"{path} holds a {type(state).__name__}, not a state dict of tensors by name; save "
            "model.state_dict()"
        )
    return {str(k): v.detach().numpy() for k, v in state.items()}


def _fill(
    variables: Mapping[str, Any], state: StateDict, *, prefix: str, source: str
) -> dict[str, Any]:
    """Fill the variables whose PyTorch name starts with `prefix`, strictly."""
    filled = dict(_flatten(variables))
    used: set[str] = set()
    missing: list[str] = []
    misshapen: list[str] = []
    for path, value in filled.items():
        target = np.zeros(np.shape(value), np.float32)
        names = [(name, part.shape) for name, part in _to_torch(path, target)]
        names = [(name, shape) for name, shape in names if name.startswith(prefix)]
        arrays = []
        for name, shape in names:
            used.add(name)
            if name not in state:
                missing.append(f"{name} {shape}")
            elif state[name].shape != shape:
                misshapen.append(f"{name} {state[name].shape}, expected {shape}")
            else:
                arrays.append(np.asarray(state[name], np.float32))
        if names and len(arrays) == len(names):
            filled[path] = _from_torch(path, arrays)
    unexpected = []
    for name in sorted(set(state) - used):
        if name.endswith(".num_batches_tracked"):
            continue  # a counter of PyTorch's that its arithmetic ignores when momentum is set
        if re.fullmatch(r"necks\.\w+\.\d+\.bias", name) and name[:-4] + "weight" in used:
            if np.any(state[name]):
                misshapen.append(f"{name} is not 0; make the model with neck_bias=True")
            continue
        unexpected.append(f"{name} {state[name].shape}")
    if missing or unexpected or misshapen:
        raise WeightsError(_explain(source, missing, unexpected, misshapen))
    return traverse_util.unflatten_dict(filled)


def _explain(source: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    lines = [f"{source} does not fit this network (another depth, width or number of classes?)"]
    for title, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
    ):
        lines += [f"  {title} ({len(names)}):"] * bool(names)
        lines += [f"    {name}" for name in names]
    return "\n".join(lines)


def _flatten(variables: Mapping[str, Any]) -> dict[_Path, Any]:
    unknown = set(variables) - {"params", "batch_stats"}
    if unknown or "params" not in variables:
        raise WeightsError(
            f"variables have the collections {sorted(variables)}; expected params and batch_stats"
        )
    return traverse_util.flatten_dict({k: dict(v) for k, v in variables.items()})


def _to_torch(path: _Path, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """PyTorch's names and layouts of one variable; a head is one module per stripe there."""
    leaf = _LEAVES[path[0], path[-1]]
    if path[1] == "backbone":
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
        return [(f"backbone.{_torchvision_name(path[2:-1])}.{leaf}", value)]
    kind, level = path[1].split("_")
    module = {"neck": "necks", "classifier": "classifiers"}[kind]
    if path[-1] == "kernel":
        value = value.transpose(0, 2, 1)  # (S, in, out) -> (S, out, in)
    return [(f"{module}.{level}.{i}.{leaf}", part) for i, part in enumerate(value)]


def _from_torch(path: _Path, arrays: list[np.ndarray]) -> np.ndarray:
    """Inverse of `_to_torch` for the arrays of one variable."""
    # Always copied: PyTorch would go on changing the memory of its tensors in place.
    if path[1] == "backbone":
        return (arrays[0].transpose(2, 3, 1, 0) if path[-1] == "kernel" else arrays[0]).copy("C")
    value = np.stack(arrays)
    return value.transpose(0, 2, 1).copy("C") if path[-1] == "kernel" else value


def _torchvision_name(path: _Path) -> str:
    """("layer3_0", "downsample_bn") -> "layer3.0.downsample.1"."""
    name = ".".join(path).replace("downsample_conv", "downsample.0")
    return re.sub(r"^(layer\d+)_(\d+)", r"\1.\2", name.replace("downsample_bn", "downsample.1"))
