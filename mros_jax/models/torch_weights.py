"""Weights in from PyTorch (ImageNet) and out to PyTorch (a whole trained network).

A name on the PyTorch side is the path of the Flax module: `neck_t4.3.weight` is scale 3 of
`neck_t4`, whose S normalizations are S modules there. Modules of a trunk have torchvision's names.
Nothing here needs PyTorch, except reading a `.pth` file.
"""

import os
import pathlib
import pickle
import re
import warnings
import zipfile
import zlib
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

# Entries that training codes put a state dict under.
WRAPPERS = ("state_dict", "model", "net", "network", "model_state_dict")

StateDict = dict[str, np.ndarray]
_Path = tuple[str, ...]

# Flax's name -> PyTorch's, by collection, for a batch normalization and a convolution or linear.
_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("params", "p"): "p",
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
    state = {
        name: value
        for name, value in read_state_dict(path).items()
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


def from_foreign_state_dict(
    state: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    name_of: Callable[[str], str],
    *,
    source: str,
) -> dict[str, Any]:
    """Fill all of `variables` from the state dict of the same network in other code.

    Args:
        state: name -> array. A linear layer may be a 1x1 convolution there.
        variables: of the network's `init` (values are not looked at, only shapes).
        name_of: from a tensor's name in `to_torch_state_dict` to its name there. Several of ours
            may be filled from one of theirs.
        source: what the message of an error calls it.

    Returns:
        New variables, float32.

    Raises:
        WeightsError: tensors missing, unexpected or misshapen, the first few of each listed by
            their names there; or a bias other than 0 where it is fixed at 0 here.
    """
    return _fill(variables, dict(state), module_name, source=source, rename=name_of, most=6)


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
    """Read a state dict: safetensors or NumPy's `.npz` without PyTorch, anything else with it.

    Nothing in a file is executed: PyTorch reads weights only, NumPy no objects. Wrappers that
    training codes put around a state dict are taken off: an entry of `WRAPPERS`, and the prefix of
    all names where they share one of `module.`, `model.`, `backbone.`, `base.`. Of a DenseNet's
    layers "norm.1" is today's "norm1".

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
    elif path.suffix == ".npz":
        state = _read_npz(path)
    else:
        state = _read_pth(path)
    return {_OLD_NAME.sub(r"\1\2.", name): value for name, value in _strip_prefix(state).items()}


def _read_npz(path: pathlib.Path) -> StateDict:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)
    # NumPy lets any of these through; the fourth of a .npy file, which is one array.
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is not a whole .npz file of arrays: {error}; "
            "download or convert it again"
        ) from error


def _read_pth(path: pathlib.Path) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading this file needs PyTorch (pip install torch); "
            "a .safetensors file does not"
        ) from error
    try:
        # Training codes keep scores beside the weights, as NumPy's numbers; those of Python 2 as
        # its strings, of which PyTorch says that it does not take their encoding, and does.
        numbers = torch.serialization.safe_globals(_numpy_numbers())
        with numbers, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pickle_load_args", category=UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
    except Exception as error:  # torch has many: RuntimeError, UnpicklingError, EOFError, ...
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            why = (
                "it holds Python objects, perhaps a whole model, which are not read; save "
                "model.state_dict() with the code that wrote it"
            )
        else:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            why = f"{first}; download it again"
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is not a whole PyTorch weights file: {why}"
        ) from error
    for wrapper in WRAPPERS:
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


def _numpy_numbers() -> list[Any]:
    """What PyTorch needs to read NumPy's numbers, under the module's former name too."""
    make = np.float64(0).__reduce__()[0]
    kinds = ("float32", "float64", "int32", "int64", "bool")
    types = [type(np.dtype(kind)) for kind in kinds]
    return [np.dtype, *types, (make, "numpy.core.multiarray.scalar"), make]


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
    rename: Callable[[str], str] | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """Fill the variables whose module `name_of` names from tensors of that name, strictly.

    With `rename` the names are those of other code, where a linear layer may be a 1x1 convolution.
    An error lists `most` names of each kind.
    """
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
            name = rename(name) if rename else name
            used.add(name)
            if name not in state:
                missing.append(f"{name} {shape}")
                continue
            found = state[name]
            if rename and found.shape[len(shape) :] == (1,) * (found.ndim - len(shape)):
                found = found.reshape(found.shape[: len(shape)])
            if found.shape != shape:
                misshapen.append(f"{name} {found.shape}, expected {shape}")
            else:
                arrays.append(np.asarray(found, np.float32))
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
        raise WeightsError(_explain(source, missing, unexpected, misshapen, most))
    whole: dict[str, Any] = traverse_util.unflatten_dict(filled)
    return whole


def _explain(
    source: str,
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    most: int | None,
) -> str:
    lines = [f"{source} does not fit this network (another depth, width or number of classes?)"]
    for title, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
    ):
        lines += [f"  {title} ({len(names)}):"] * bool(names)
        lines += [f"    {name}" for name in names[:most]]
        if most is not None and len(names) > most:
            lines.append(f"    and {len(names) - most} more")
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
