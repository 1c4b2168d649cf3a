"""The trunks that networks are built on, by name."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mros_jax.errors import UserError
from mros_jax.models.densenet import DenseNetSpec
from mros_jax.models.resnet import ResNet, TrunkSpec


@runtime_checkable
class Trunk(Protocol):
    """What a network asks of a trunk, whose stages are named "t1" to "t4"."""

    @property
    def smallest(self) -> str:
        """The name of the smallest trunk of this kind, for tests and laptops."""
        ...

    def channels(self, level: str) -> int:
        """Channels of a stage."""
        ...

    def stride(self, level: str, last_stride: int = 1) -> int:
        """Pixels of the image for one of a stage's map."""
        ...

    def activated(self, level: str) -> bool:
        """Whether a stage's map has passed a normalization and a ReLU."""
        ...

    def make(self, **fields: Any) -> Any:
        """The Flax module, (images, train=...) -> maps by the name of their stage.

        Args:
            fields: `last_stride`, `dtype`, `bn_axis_name` and `name`, see `ResNet`.
        """
        ...


# What `config.network.trunk` may say.
TRUNKS: dict[str, Trunk] = {
    "tiny": TrunkSpec((1, 1, 1, 1), 16, "basic"),
    "resnet18": TrunkSpec((2, 2, 2, 2), 64, "basic"),
    "resnet34": TrunkSpec((3, 4, 6, 3), 64, "basic"),
    "resnet50": TrunkSpec((3, 4, 6, 3), 64, "bottleneck"),
    "resnet101": TrunkSpec((3, 4, 23, 3), 64, "bottleneck"),
    "resnet152": TrunkSpec((3, 8, 36, 3), 64, "bottleneck"),
    "tiny_densenet": DenseNetSpec((1, 2, 2, 1), 8, 16),
    "densenet121": DenseNetSpec((6, 12, 24, 16), 32, 64),
    "densenet201": DenseNetSpec((6, 12, 48, 32), 32, 64),
}


def find_trunk(name: str) -> Trunk:
    """The entry of `TRUNKS`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TRUNKS:
        raise UserError(f"trunk is {name!r}; it must be one of {', '.join(TRUNKS)}")
    return TRUNKS[name]


def find_trunk_with(name: str, fields: Mapping[str, Any]) -> tuple[Trunk, dict[str, Any]]:
    """The entry of `TRUNKS`, and those of its fields that only a ResNet has and that are changed.

    Args:
        name: of the trunk.
        fields: of `ResNet`, with the values that they are to have.

    Raises:
        UserError: there is no trunk of that name, or a field is changed of one that is no ResNet.
    """
    changed = {key: value for key, value in fields.items() if value != getattr(ResNet, key)}
    return (find_resnet(name) if changed else find_trunk(name)), changed


def find_resnet(name: str) -> TrunkSpec:
    """The entry of `TRUNKS`, for a network that takes a ResNet apart.

    Raises:
        UserError: there is none of that name, or it is another kind of network.
    """
    spec = find_trunk(name)
    if not isinstance(spec, TrunkSpec):
        resnets = ", ".join(name for name, other in TRUNKS.items() if isinstance(other, TrunkSpec))
        raise UserError(f"trunk is {name!r}; this network needs a ResNet: {resnets}")
    return spec
