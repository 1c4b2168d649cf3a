"""Weights in from PyTorch (ImageNet) and out to PyTorch (a whole trained network).

A name on the PyTorch side is the path of the Flax module: `neck_t4.3.weight` is scale 3 of
`neck_t4`, whose S normalizations are S modules there. Modules of a trunk have torchvision's names.
Nothing here needs PyTorch, except reading a `.pth` file.
"""

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as dump_safetensors

from mros_jax.errors import NotFoundError, UserError
from mros_jax.files import write_atomically
from mros_jax.models.resnet import torchvision_name as module_name

StateDict = dict[str, np.ndarray]
_Path = tuple[str, ...]

# Flax's name -> PyTorch's, by collection, for a batch normalization and a convolution or linear.
_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}

# Of a DenseNet's layers in the files that torchvision publishes: "norm.1" is today's "norm1".
_OLD_NAME = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")


class WeightsError(UserError):
    """Weights that do not fit the network, or a file that holds none."""


def load_imagenet(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    torchvision_name: Callable[[_Path], str | None],
) -> dict[str, Any]:
    """Fill what starts from ImageNet with the weights of a torchvision network.

    Args:
        path: `.safetensors`, or `.pth`/`.pt` where PyTorch is installed.
        variables: of the network's `init`; what has no torchvision name is kept as it is.
        torchvision_name: the network's, see `mros_jax.models.outputs.Network`. Several modules may
            start from one tensor.

    Returns:
        New variables, float32. torchvision's classifier (`fc.*`, `classifier.*`) is left out on
        purpose; every other tensor is used and everything with a torchvision name filled.

    Raises:
        NotFoundError: no such file.
        WeightsError: truncated or foreign file; or tensors missing, unexpected or misshapen, all
            of them listed.
    """
    state = read_state_dict(path)
    state = {
        _OLD_NAME.sub(r"\1\2.", name): value
        for name, value in state.items()
        if not re.fullmatch(r"(fc|classifier)\.(weight|bias)", name)
    }
    return _fill(variables, state, torchvision_name, source=str(path))


def from_torch_state_dict(
    state: Mapping[str, np.ndarray], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill all of `variables` from a network's state dict, the inverse of `to_torch_state_dict`.

    Args:
        state: name -> array.
        variables: of the same network's `init` (values are not looked at, only shapes).

    Returns:
        New variables, float32.

    Raises:
        WeightsError: tensors missing, unexpected or misshapen, all of them listed; or a bias other
            than 0 for a batch normalization whose bias is fixed at 0.
    """
    return _fill(variables, dict(state), module_name, source="state dict")


def to_torch_state_dict(variables: Mapping[str, Any]) -> StateDict:
    """Name every tensor of a network as PyTorch would, convolutions as (out, in, h, w).

    Args:
        variables: {"params", "batch_stats"} of a network, without a device axis.

    Returns:
        name -> float32 array (`num_batches_tracked`: int64 0), ready for
        `load_state_dict(strict=True)` of a module with these names. Biases of batch normalizations
        that are fixed at 0 are written as zeros.
    """
    state: StateDict = {}
    for path, value in sorted(_flatten(variables).items()):
        name = module_name(path[1:-1])
        for suffix, array in _to_torch(path, np.asarray(value)):
            state[name + suffix] = np.array(array, order="C")  # a copy: the caller may write to it
    for name in list(state):
        if name.endswith(".running_mean"):
            bn = name.removesuffix("running_mean")
            state[bn + "num_batches_tracked"] = np.zeros((), np.int64)
            state.setdefault(bn + "bias", np.zeros_like(state[name]))
    return dict(sorted(state.items()))


def save_torch_state_dict(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `to_torch_state_dict(variables)` as safetensors, atomically.

    Args:
        path: the file.
        variables: as there.
        metadata: for the file's header.
    """
    header = {"format": "pt", "model": "mros_jax", **(metadata or {})}
    data = dump_safetensors(to_torch_state_dict(variables), header)
    with write_atomically(path, "wb") as file:
        file.write(data)


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read a state dict: safetensors without PyTorch, anything else with it (weights only).

    Wrappers that training codes put around it are taken off: a `state_dict` or `model` entry, and
    the prefix of all names where they share one of `module.`, `backbone.`, `base.`.

    Raises:
        NotFoundError: no such file.
        UserError: a file that only PyTorch can read, and no PyTorch.
        WeightsError: truncated or foreign file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file (mros_jax.fetch_weights downloads weights)")
    if path.suffix == ".safetensors":
        try:
            state = load_safetensors(path.read_bytes())
        # Its reader lets any of these through, for one damaged header or another.
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}; "
                "download or export it again"
            ) from error
    else:
        state = _read_pth(path)
    return _strip_prefix(state)


def _read_pth(path: pathlib.Path) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading this file needs PyTorch (pip install torch); "
            "a .safetensors file does not"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many: RuntimeError, UnpicklingError, EOFError, ...
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is not a whole PyTorch weights file: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            "download it again"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise WeightsError(
            f"{path} holds a {type(state).__name__}, not a state dict of tensors by name; save "
            "model.state_dict()"
        )
    floating = {torch.bfloat16, torch.float16}  # NumPy has no bfloat16; parameters are float32
    return {
        str(name): (value.float() if value.dtype in floating else value).detach().numpy()
        for name, value in state.items()
    }


def _strip_prefix(state: StateDict) -> StateDict:
    for prefix in ("module.", "model.", "backbone.", "base.") * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _fill(
    variables: Mapping[str, Any],
    state: StateDict,
    name_of: Callable[[_Path], str | None],
    *,
    source: str,
) -> dict[str, Any]:
    """Fill the variables whose module `name_of` names from tensors of that name, strictly."""
    filled = dict(_flatten(variables))
    used: set[str] = set()
    missing: list[str] = []
    misshapen: list[str] = []
    for path, value in filled.items():
        module = name_of(path[1:-1])
        if module is None:
            continue
        template = np.broadcast_to(np.float32(0), np.shape(value))
        arrays = []
        parts = [(module + suffix, part.shape) for suffix, part in _to_torch(path, template)]
        for name, shape in parts:
            used.add(name)
            if name not in state:
                missing.append(f"{name} {shape}")
            elif state[name].shape != shape:
                misshapen.append(f"{name} {state[name].shape}, expected {shape}")
            else:
                arrays.append(np.asarray(state[name], np.float32))
        if len(arrays) == len(parts):
            filled[path] = _from_torch(path, arrays, np.shape(value))
    unexpected = []
    for name in sorted(set(state) - used):
        if name.endswith(".num_batches_tracked"):
            continue  # a counter of PyTorch's that its arithmetic ignores when momentum is set
        if name.endswith(".bias") and name.removesuffix("bias") + "running_mean" in used:
            if np.any(state[name]):
                misshapen.append(f"{name} is not 0, and is fixed at 0 in this network")
            continue
        unexpected.append(f"{name} {state[name].shape}")
    if missing or unexpected or misshapen:
        raise WeightsError(_explain(source, missing, unexpected, misshapen))
    whole: dict[str, Any] = traverse_util.unflatten_dict(filled)
    return whole


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
    flat: dict[_Path, Any] = traverse_util.flatten_dict({k: dict(v) for k, v in variables.items()})
    return flat


def _to_torch(path: _Path, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """PyTorch's leaf names and layouts of one variable; S stacked layers are S modules there."""
    leaf = _LEAVES[path[0], path[-1]]
    if path[-1] == "kernel" and value.ndim == 4:
        return [(f".{leaf}", value.transpose(3, 2, 0, 1))]  # (h, w, in, out) -> (out, in, h, w)
    if path[-1] == "kernel":
        value = np.swapaxes(value, -1, -2)  # ([S,] in, out) -> ([S,] out, in)
    stacked = value.ndim == (3 if path[-1] == "kernel" else 2)
    return (
        [(f".{i}.{leaf}", part) for i, part in enumerate(value)]
        if stacked
        else [(f".{leaf}", value)]
    )


def _from_torch(path: _Path, arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `_to_torch` for the arrays of one variable of this shape."""
    # Always copied: PyTorch would go on changing the memory of its tensors in place.
    if path[-1] == "kernel" and len(shape) == 4:
        return arrays[0].transpose(2, 3, 1, 0).copy("C")
    value = np.stack(arrays)
    if path[-1] == "kernel":
        value = np.swapaxes(value, -1, -2)
    return value.reshape(shape).copy("C")
