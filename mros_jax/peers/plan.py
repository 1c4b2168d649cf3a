"""Of a peer's checkpoint: which config of ours it is, and what its tensors are called."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mros_jax.errors import UserError
from mros_jax.models.densenet import DenseNetSpec
from mros_jax.models.resnet import Block, TrunkSpec
from mros_jax.models.torch_weights import StateDict
from mros_jax.models.trunks import TRUNKS

# The beginning of a tensor's name here, and what it is there: (pattern, replacement).
Names = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

# Layers that some peers have and no network here: part of a name, and what it tells.
_FOREIGN = {
    ".IN.": "instance normalization (IBN)",
    ".se": "squeeze-and-excitation",
    "conv2.conv1.": "split attention (ResNeSt)",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a run.

    Attributes:
        config: a file and perhaps a variant, such as "configs/strong.py:authors".
        changes: what the checkpoint's code does otherwise, by the dotted name of a field.
        names: what tensors are called there; the first pattern that fits is taken.
        state: its tensors, without those that no descriptor and no training needs.
        num_classes: identities that its classifiers know; 0 where it has none.
    """

    config: str
    changes: Mapping[str, Any]
    names: Names
    state: StateDict
    num_classes: int

    def name_of(self, name: str) -> str:
        """The name there of a tensor that is called `name` here."""
        for pattern, replacement in self.names:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name


@dataclasses.dataclass(frozen=True)
class Peer:
    """Public code whose checkpoints are read.

    Attributes:
        repository: where it is, on GitHub.
        marks: patterns of whole names; a checkpoint has a tensor for each.
        plan: what to do with a checkpoint's tensors; raises UserError where no network here fits.
    """

    repository: str
    marks: tuple[str, ...]
    plan: Callable[[StateDict], Plan]

    def knows(self, state: StateDict) -> bool:
        """Whether tensors are those of a checkpoint of this code."""
        return not self.find_missing(state)

    def find_missing(self, state: StateDict) -> list[str]:
        """The marks that no tensor has."""
        return [m for m in self.marks if not any(re.fullmatch(m, name) for name in state)]


def drop(state: StateDict, pattern: str) -> StateDict:
    """The tensors whose whole names do not fit a pattern."""
    return {name: value for name, value in state.items() if not re.fullmatch(pattern, name)}


def count(state: StateDict, pattern: str) -> int:
    """The number of different values of a pattern's group at the beginning of names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def name_resnet(state: StateDict, prefix: str = "") -> str:
    """The key of `TRUNKS` of a ResNet whose tensors have torchvision's names after a prefix.

    Raises:
        UserError: there is none of these blocks and this width.
    """
    start = re.escape(prefix)
    sizes = [count(state, rf"{start}layer{stage}\.(\d+)\.") for stage in range(1, 5)]
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    return find_resnet(state, sizes, f"{prefix}conv1.weight", bottleneck=bottleneck)


def find_resnet(state: StateDict, sizes: Sequence[int], stem: str, *, bottleneck: bool) -> str:
    """The key of `TRUNKS` of a ResNet.

    Args:
        state: a checkpoint's tensors.
        sizes: blocks of each stage.
        stem: the name of the first convolution.
        bottleneck: whether its blocks are.

    Raises:
        UserError: there is none; or the checkpoint has layers that no network here has.
    """
    _refuse_foreign(state)
    block: Block = "bottleneck" if bottleneck else "basic"
    first, second, third, fourth = sizes
    spec = TrunkSpec((first, second, third, fourth), state[stem].shape[0], block)
    layers = f"{', '.join(map(str, sizes))} {block} blocks of width {spec.width}"
    return _find_trunk(spec, layers, "ResNets")


def name_densenet(state: StateDict) -> str:
    """The key of `TRUNKS` of a DenseNet whose tensors have torchvision's names.

    Raises:
        UserError: there is none of these layers.
    """
    sizes = [
        count(state, rf"features\.denseblock{stage}\.(denselayer\d+)\.") for stage in range(1, 5)
    ]
    first, second, third, fourth = sizes
    growth = state["features.denseblock1.denselayer1.conv2.weight"].shape[0]
    stem = state["features.conv0.weight"].shape[0]
    spec = DenseNetSpec((first, second, third, fourth), growth, stem)
    layers = f"{', '.join(map(str, sizes))} dense layers of growth {growth}"
    return _find_trunk(spec, layers, "DenseNets")


def _find_trunk(spec: TrunkSpec | DenseNetSpec, layers: str, kind: str) -> str:
    known = {name: one for name, one in TRUNKS.items() if isinstance(one, type(spec))}
    for name, one in known.items():
        if one == spec:
            return name
    raise UserError(f"its trunk has {layers}; the {kind} here are {', '.join(known)}")


def _refuse_foreign(state: StateDict) -> None:
    """Refuse a checkpoint with layers that no network here has.

    Raises:
        UserError: names one, and what it is.
    """
    for part, what in _FOREIGN.items():
        if name := next((name for name in state if part in name), None):
            raise UserError(f"it has {what}, such as {name}, which no network here has")
