"""VisualComputingInstitute/triplet-reid: TriNet by its authors, as NumPy arrays.

Two forms of it are published: that of the paper, for Theano and Lasagne, as arrays in the order of
its layers ("arr_0", "arr_1", ...); and a TensorFlow checkpoint, whose variables docs/import.md says
how to save. Both take grey levels 0..255 from which a mean is subtracted, and place strides
otherwise than torchvision; the former takes blue first and has a bias in its first convolution.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mros_jax.errors import UserError
from mros_jax.models.resnet import TrunkSpec
from mros_jax.models.torch_weights import StateDict
from mros_jax.models.trunks import TRUNKS
from mros_jax.peers.plan import Names, Peer, Plan, drop, name_resnet

# Means of grey levels in each channel, as both codes have them.
_LASAGNE_MEAN = (103.0626238, 115.90288257, 123.15163084)
_SLIM_MEAN = (123.68, 116.78, 103.94)

_EPSILON = 1e-5  # of batch normalization here; Lasagne's, 1e-4, is in what it keeps

_NAMES: Names = ((r"trunk\.", ""),)


def _plan(state: StateDict) -> Plan:
    lasagne = "arr_0" in state
    named = _read_lasagne(state) if lasagne else _read_slim(state)
    mean = _LASAGNE_MEAN if lasagne else _SLIM_MEAN
    changes: dict[str, Any] = {
        "network.trunk": name_resnet(named),
        "network.stem_pool": "end",
        "network.strides": "1x1" if lasagne else "last",
        "network.reduced": named["reduction.weight"].shape[0],
        "network.embedded": named["embedding.weight"].shape[0],
        "input.mean": tuple(level / 255 for level in mean),
        "input.std": (1 / 255, 1 / 255, 1 / 255),
        "input.channels": "bgr" if lasagne else "rgb",
    }
    return Plan("configs/trinet.py", changes, _NAMES, named, 0)


def _read_lasagne(state: StateDict) -> StateDict:
    """Name the arrays: a block's shortcut comes before its three convolutions."""
    blocks = _find_blocks(len(state))
    arrays = iter([state[f"arr_{i}"] for i in range(len(state))])
    named: StateDict = {"conv1.weight": next(arrays)}
    bias = next(arrays)
    named |= _read_norm("bn1", arrays)
    # Before a normalization: the same as another mean of what is normalized.
    named["bn1.running_mean"] = named["bn1.running_mean"] - bias
    for stage, size in enumerate(blocks, start=1):
        for block in range(size):
            name = f"layer{stage}.{block}"
            layers = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
            if block == 0:
                layers.insert(0, ("downsample.0", "downsample.1"))
            for convolution, norm in layers:
                named[f"{name}.{convolution}.weight"] = next(arrays)
                named |= _read_norm(f"{name}.{norm}", arrays)
    named["reduction.weight"] = next(arrays).T
    named |= _read_norm("reduction.bn", arrays)
    named["embedding.weight"] = next(arrays).T
    named["embedding.bias"] = next(arrays)
    return named


def _find_blocks(count: int) -> tuple[int, ...]:
    """Blocks of each stage: 15 arrays a block, 5 a shortcut, 13 before and after all of them."""
    counts = {
        15 * sum(spec.stage_sizes) + 33: spec.stage_sizes
        for spec in TRUNKS.values()
        if isinstance(spec, TrunkSpec) and spec.block == "bottleneck"
    }
    if count not in counts:
        raise UserError(f"it holds {count} arrays; TriNet on ResNet-50 has 273")
    return counts[count]


def _read_norm(name: str, arrays: Iterator[np.ndarray]) -> StateDict:
    """Lasagne keeps 1 / sqrt(variance + its epsilon)."""
    bias, weight, mean, inverse = itertools.islice(arrays, 4)
    if not np.all(inverse > 0):
        raise UserError(f"the inverse standard deviations of {name} are no deviations")
    variance = 1 / np.square(inverse.astype(np.float64)) - _EPSILON
    return {
        f"{name}.weight": weight,
        f"{name}.bias": bias,
        f"{name}.running_mean": mean,
        f"{name}.running_var": variance.astype(np.float32),
    }


_SLIM_LEAVES = {
    "weights": "weight",
    "biases": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _read_slim(state: StateDict) -> StateDict:
    """Name TensorFlow's variables as PyTorch does, and bring kernels to its order."""
    kept = drop(state, r"global_step|.*/Adam(_1)?|beta\d_power|(.*/)?learning_rate")
    named: StateDict = {}
    for name, value in kept.items():
        *scopes, leaf = name.split("/")
        norm = scopes[-1] == "BatchNorm"
        module = "/".join(scopes[:-1] if norm else scopes)
        place = _name_slim(module, norm)
        if leaf == "weights":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        named[f"{place}.{_SLIM_LEAVES.get(leaf, leaf)}"] = value
    return named


def _name_slim(module: str, norm: bool) -> str:
    if module == "fully_connected":
        return "reduction.bn" if norm else "reduction"
    if module == "emb":
        return "embedding"
    module = re.sub(r"^resnet_v1_\d+/", "", module)
    match = re.fullmatch(r"block(\d)/unit_(\d+)/bottleneck_v1/(\w+)", module)
    block = f"layer{match[1]}.{int(match[2]) - 1}." if match else ""
    layer = match[3] if match else module
    if layer == "shortcut":
        return f"{block}downsample.{int(norm)}"
    return f"{block}{layer.replace('conv', 'bn') if norm else layer}"


PEER = Peer(
    "VisualComputingInstitute/triplet-reid",
    (r"arr_0|emb/weights", r"arr_1|fully_connected/weights"),
    _plan,
)
