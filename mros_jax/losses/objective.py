"""What a network is trained for: named loss terms, each with its weight.

A term says what it looks at by the names of the network's outputs (`on`). To add a loss, write its
function in a file of this room, a term around it here, and its name in `TERMS`; a config then lists
it with its fields as keyword arguments.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mros_jax.errors import UserError, check_choice
from mros_jax.losses.center import center_loss
from mros_jax.losses.classification import smoothed_cross_entropy
from mros_jax.losses.mutual import mutual_divergence
from mros_jax.losses.pairs import pair_cross_entropy
from mros_jax.losses.reduce import Reduction, Scalar, check_reduction, check_share
from mros_jax.losses.triplet import batch_hard_triplet
from mros_jax.models.outputs import Outputs

Params = dict[str, Any]
Labels = Int[Array, "B"]


@runtime_checkable
class Term(Protocol):
    """A loss as part of an objective: a frozen dataclass whose fields a config sets.

    Attributes:
        weight: of the term in the total; its own parameters see it unweighted.
        on: names of the outputs that it looks at.
    """

    @property
    def weight(self) -> float: ...  # noqa: D102

    @property
    def on(self) -> tuple[str, ...]: ...  # noqa: D102

    def init(self, key: Any, outputs: Outputs, num_classes: int) -> Params:
        """The term's own parameters, {} for most; of `outputs` only the shapes matter."""
        ...

    def __call__(
        self, params: Params, outputs: Outputs, labels: Any, *, axis_name: str | None
    ) -> Any:
        """The unweighted loss of the global batch of all devices on the axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Base:
    """What every term has: outputs, a weight, and no parameters unless it makes some."""

    on: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.on:
            raise UserError(f"the loss {type(self).__name__} is on no output; name at least one")
        if not self.weight > 0:
            raise UserError(f"weight is {self.weight}; it must be above 0")

    def init(self, key: Key[Array, ""], outputs: Outputs, num_classes: int) -> Params:
        """No parameters."""
        return {}


@dataclasses.dataclass(frozen=True)
class Triplet(Base):
    """Batch-hard triplet loss, the mean over all vectors of the named outputs.

    Attributes:
        margin: of the hinge.
        soft_margin: log(1 + exp(d_p - d_n)) in place of the hinge; `margin` is not looked at.
        reduction: see `batch_hard_triplet`.
    """

    margin: float = 0.3
    soft_margin: bool = False
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_reduction(self.reduction)
        if self.margin < 0:
            raise UserError(f"margin is {self.margin}; it must not be negative")

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> Scalar:
        """Compute the unweighted loss."""
        loss = functools.partial(
            batch_hard_triplet,
            labels=labels,
            margin=None if self.soft_margin else self.margin,
            reduction=self.reduction,
            axis_name=axis_name,
        )
        values = [jax.vmap(loss, in_axes=1)(outputs.vectors(name)) for name in self.on]
        return jnp.mean(jnp.concatenate(values))


@dataclasses.dataclass(frozen=True)
class Center(Base):
    """Center loss, the mean over all vectors of the named outputs; each has centers of its own.

    The centers start from N(0, 1) and are parameters, `objective/NAME/OUTPUT`: (S, N, D), or (N, D)
    where the output is one vector (a first axis of 1 would cost a TPU copies of all of them).

    Attributes:
        reduction: see `center_loss`.
    """

    weight: float = 0.0005
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_reduction(self.reduction)

    def init(self, key: Key[Array, ""], outputs: Outputs, num_classes: int) -> Params:
        """Draw the centers."""
        shapes = {}
        for name in self.on:
            _, count, size = outputs.vectors(name).shape
            shapes[name] = (num_classes, size) if count == 1 else (count, num_classes, size)
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        drawn = jax.random.normal(key, (int(ends[-1]),), jnp.float32)
        pieces = jnp.split(drawn, ends[:-1])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> Scalar:
        """Compute the unweighted loss."""

        def loss(x: Float[Array, "B D"], centers: Float[Array, "N D"]) -> Scalar:
            return center_loss(x, labels, centers, reduction=self.reduction, axis_name=axis_name)

        values = []
        for name in self.on:
            x, centers = outputs.vectors(name), jnp.asarray(params[name])
            if centers.ndim == 2:
                values.append(loss(x[:, 0], centers)[None])
            else:
                values.append(jax.vmap(loss, in_axes=(1, 0))(x, centers))
        return jnp.mean(jnp.concatenate(values))


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Base):
    """Cross-entropy with label smoothing over all classifiers of the named outputs.

    Attributes:
        smoothing: eps, from 0 to 1.
        heads: the "mean" over the classifiers, or their "sum".
        share: of the batch's examples, those with the largest loss, that the loss is the mean of.
    """

    smoothing: float = 0.1
    heads: Literal["mean", "sum"] = "mean"
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.heads not in ("mean", "sum"):
            raise UserError(f"heads is {self.heads!r}; it must be 'mean' or 'sum'")
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"smoothing is {self.smoothing}; it must be from 0 to 1")
        check_share(self.share)

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> Scalar:
        """Compute the unweighted loss."""
        logits = jnp.concatenate([outputs.scores(name) for name in self.on], axis=1)  # (B, S, N)
        loss = smoothed_cross_entropy(
            logits, labels, smoothing=self.smoothing, share=self.share, axis_name=axis_name
        )
        return loss * logits.shape[1] if self.heads == "sum" else loss


@dataclasses.dataclass(frozen=True)
class Mutual(Base):
    """What all classifiers of the named outputs learn from each other; see `mutual_divergence`."""

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> Scalar:
        """Compute the unweighted loss."""
        logits = jnp.concatenate([outputs.scores(name) for name in self.on], axis=1)  # (B, S, N)
        return mutual_divergence(logits, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class PairCrossEntropy(Base):
    """Cross-entropy of two classes, the mean over all pairs of the named outputs."""

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> Scalar:
        """Compute the unweighted loss."""
        if axis_name is not None:
            labels = lax.all_gather(labels, axis_name, tiled=True)
        total, count = jnp.zeros(()), 0
        for pairs in map(outputs.compared, self.on):
            same = labels[pairs.rows][:, None] == labels[pairs.columns]
            total += pair_cross_entropy(pairs.logits, same) * pairs.logits.size
            count += pairs.logits.size
        return total / count


# What `config.objective.NAME.loss` may say. The rest of the section are the term's fields.
TERMS: dict[str, Callable[..., Term]] = {
    "center": Center,
    "cross_entropy": CrossEntropy,
    "mutual": Mutual,
    "pairs": PairCrossEntropy,
    "triplet": Triplet,
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The sum of weighted terms.

    A term's own parameters (such as centers) see it unweighted, whatever it weighs for the network:
    the public code of the center loss divides its gradient by the weight again for the same effect.
    """

    terms: Mapping[str, Term]

    def init(self, key: Key[Array, ""], outputs: Outputs, num_classes: int) -> Params:
        """The terms' own parameters by name of the term; terms without any are left out.

        Args:
            key: random key.
            outputs: of the network, for one image or more; only their shapes matter.
            num_classes: N.
        """
        made = {
            name: term.init(jax.random.fold_in(key, i), outputs, num_classes)
            for i, (name, term) in enumerate(sorted(self.terms.items()), start=1)
        }
        return {name: params for name, params in made.items() if params}

    def __call__(
        self, params: Params, outputs: Outputs, labels: Labels, *, axis_name: str | None = None
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """The total, and the unweighted terms by name.

        Args:
            params: of `init`.
            outputs: of the network.
            labels: (B,) identities, 0..N-1.
            axis_name: the terms see the global batch of all devices on this axis.

        Raises:
            UserError: a term is on an output that the network does not have.
        """
        total: Float[Array, ""] = jnp.zeros((), jnp.promote_types(outputs.descriptor.dtype, "f4"))
        parts: dict[str, Any] = {}
        for name, term in self.terms.items():
            own = params.get(name, {})
            parts[name] = term(lax.stop_gradient(own), outputs, labels, axis_name=axis_name)
            total = total + term.weight * parts[name]
            if own:
                # Adds 0 to the total, and to the gradient that of the unweighted term.
                seen = term(own, lax.stop_gradient(outputs), labels, axis_name=axis_name)
                total = total + (seen - lax.stop_gradient(seen))
        return total, parts


def make_objective(sections: Mapping[str, Mapping[str, Any]]) -> Objective:
    """The objective that a config's `objective` section describes.

    Args:
        sections: name of a term -> {"loss": a key of `TERMS`, and the term's fields}. A term of
            weight 0 is left out.

    Raises:
        UserError: no term is left, an unknown loss or field, or a value out of range; names it.
    """
    terms = {}
    for name, section in sections.items():
        fields = dict(section)
        kind = fields.pop("loss", None)
        check_choice(f"objective.{name}.loss", kind, TERMS)
        if fields.get("weight") == 0:
            continue
        known = list(inspect.signature(TERMS[kind]).parameters)
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(
                f"objective.{name} has no field {', '.join(unknown)}; {kind} has {', '.join(known)}"
            )
        try:
            terms[name] = TERMS[kind](**{**fields, "on": tuple(fields.get("on", ()))})
        except UserError as error:
            raise UserError(f"objective.{name}: {error}") from error
    if not terms:
        raise UserError("the objective has no term of weight above 0")
    return Objective(terms)
