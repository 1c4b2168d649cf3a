"""What every network returns, and what the rest of the library asks of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp

from mros_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    Tensor = jax.Array
else:
    # Trees of shapes, of gradients and of None pass through the same class.
    Tensor = Any


@flax.struct.dataclass
class Pairs:
    """Scores of pairs of images of a training batch, that of all devices together.

    Attributes:
        logits: (S, R, C, 2), of S kinds, that the pair is of two identities and that it is of one;
            at least float32.
        rows: (R,) places of the images in the batch.
        columns: (C,) places of those that they are compared with.
    """

    logits: Tensor
    rows: Tensor
    columns: Tensor


@flax.struct.dataclass
class Outputs:
    """Everything that a network computes, by name.

    Attributes:
        descriptor: (B, D), what is compared at test time; at least float32.
        embeddings: name -> (B, S, D), S vectors of one kind, for metric losses; at least float32.
        logits: name -> (B, S, N), S classifiers of one kind; at least float32.
        maps: name -> feature maps or attention, to look at; never trained on.
        exits: names of the embeddings that are descriptors by themselves, such as those of early
            exits of a network. They are evaluated too.
        pairs: name -> scores of pairs of images of a training batch.
    """

    descriptor: Tensor
    embeddings: dict[str, Tensor]
    logits: dict[str, Tensor]
    maps: dict[str, Tensor]
    exits: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    pairs: dict[str, Pairs] = flax.struct.field(default_factory=dict)

    def descriptors(self) -> dict[str, Tensor]:
        """All that can be compared at test time: each exit's vectors (B, D), and `descriptor`."""
        exits = {name: self.embeddings[name] for name in self.exits}
        joined = {name: x.reshape(x.shape[0], -1) for name, x in exits.items()}
        return {**joined, "descriptor": self.descriptor}

    def vectors(self, name: str) -> Tensor:
        """The vectors (B, S, D) that a metric loss may look at: embeddings, or the descriptor.

        Raises:
            UserError: there is no such output; lists those that there are.
        """
        if name == "descriptor":
            return self.descriptor[:, None]
        if name not in self.embeddings:
            there = ", ".join(("descriptor", *self.embeddings))
            raise UserError(f"the network has no output {name!r} for a metric loss; it has {there}")
        return self.embeddings[name]

    def scores(self, name: str) -> Tensor:
        """The logits (B, S, N) of a name.

        Raises:
            UserError: there are no such logits; lists those that there are.
        """
        if name not in self.logits:
            there = ", ".join(self.logits) or "none"
            raise UserError(f"the network has no logits {name!r}; it has {there}")
        return self.logits[name]

    def compared(self, name: str) -> Pairs:
        """The scores of pairs of a name.

        Raises:
            UserError: there are no such pairs; lists those that there are.
        """
        if name not in self.pairs:
            there = ", ".join(self.pairs) or "none"
            raise UserError(f"the network has no pairs {name!r}; it has {there}")
        return self.pairs[name]


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of numbers in the descriptor, and the part of the image that it describes.

    Attributes:
        group: parts of one kind, such as "t4".
        size: how many numbers of the descriptor.
        top: upper edge as a share of the image's height.
        bottom: lower edge; 1 is the bottom of the image.
    """

    group: str
    size: int
    top: float = 0.0
    bottom: float = 1.0


@runtime_checkable
class Network(Protocol):
    """What the library asks of a network, a Flax module; one file a paper, in `mros_jax.systems`.

    Beside its own fields it has `num_classes`, `dtype` (of the computation; parameters, statistics
    and outputs other than maps are at least float32) and `bn_axis_name` (axis over which batch
    statistics are shared; None: every device its own).

    A network that compares images of a training batch with each other has `axis_name`, too (axis of
    the devices that share the batch), and `fold_heads(variables)`: the arrays by which a re-ranking
    compares pairs of its descriptors, see `mros_jax.retrieval.descriptors`.
    """

    @property
    def init(self) -> Callable[..., Any]: ...  # noqa: D102

    @property
    def init_with_output(self) -> Callable[..., Any]: ...  # noqa: D102

    @property
    def apply(self) -> Callable[..., Any]: ...  # noqa: D102

    def __call__(self, images: Any, *, train: bool, keys: Any = None) -> Outputs:
        """Compute all outputs.

        Args:
            images: (B, H, W, 3) float, normalized (see `mros_jax.data.augment`).
            train: batch statistics (apply with `mutable=["batch_stats"]`) and dropout, or running
                statistics and none.
            keys: (B,) one random key an example, for dropout; None where `train` is False.
        """
        ...

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """What the descriptor is made of, in its order; the sizes add up to its length."""
        ...

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """The torchvision module whose ImageNet weights a module starts from, None: at random.

        Args:
            path: the names of the Flax modules, outermost first.
        """
        ...


def check_images(images: Any) -> None:
    """Refuse what is no batch of normalized images.

    Raises:
        UserError: another rank, channel number or type.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images have shape {images.shape}; expected (B, H, W, 3)")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images are {images.dtype}; expected normalized floating point pixels "
            "(mros_jax.data.augment.preprocess makes them from uint8)"
        )
