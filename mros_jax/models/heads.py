"""What networks put on pooled features: classifiers, reductions, dropout, unit length."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mros_jax.errors import UserError
from mros_jax.models.layers import widen
from mros_jax.models.resnet import BatchNorm

# As the BNNeck baseline (Luo et al., 2019) starts its classifiers.
_classifier_init = nn.initializers.normal(0.001)

# Uniform within 1 / sqrt(inputs), PyTorch's default of linear layers and convolutions.
uniform_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# As public code of MGN and MFBN starts reductions: normal, of variance 2 / inputs; and the scales
# of their normalization: N(1, 0.02).
kaiming_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def near_one_init(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """N(1, 0.02)."""
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


class Classifiers(nn.Module):
    """One linear layer for each of S vectors.

    Attributes:
        num_classes: N.
        use_bias: with a bias, started at 0.
        kernel_init: of all of them, (S, C, N).
    """

    num_classes: int
    use_bias: bool = True
    kernel_init: Any = _classifier_init

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S N"]:
        """Apply classifier s to vector s."""
        shape = (*x.shape[1:], self.num_classes)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = jnp.einsum("bsc,scn->bsn", x, kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (shape[0], shape[2]), jnp.float32)
        return y


class GeneralizedMean(nn.Module):
    """The p-th root of the mean of p-th powers, between mean and maximum ("GeM").

    Radenovic et al., TPAMI 2019. p is learned, one for all channels, and starts at 3; numbers below
    1e-6 are taken as that.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
        """Pool each channel."""
        p = self.param("p", nn.initializers.constant(3.0), (1,), jnp.float32)
        powers = jnp.maximum(widen(x), 1e-6) ** p
        return jnp.mean(powers, axis=(1, 2)) ** (1 / p)


class CosineClassifiers(nn.Module):
    """The cosine of each of S vectors and the vector of each class, times a scale.

    A softmax over these logits classifies on the sphere (SphereReID, Fan et al., 2019): the loss
    sees directions alone.

    Attributes:
        num_classes: N.
        scale: s, the largest logit.
    """

    num_classes: int
    scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S N"]:
        """Compare vector s with the classes of classifier s."""
        shape = (*x.shape[1:], self.num_classes)
        init = _each(nn.initializers.glorot_normal())
        kernel = self.param("kernel", init, shape, jnp.float32)
        classes = to_unit_length(jnp.swapaxes(kernel, 1, 2))  # (S, N, C)
        return self.scale * jnp.einsum("bsc,snc->bsn", to_unit_length(x), classes)


class Reduction(nn.Module):
    """Linear layer, batch normalization and an activation on each of S vectors.

    Attributes:
        features: numbers that come out, F.
        shared: one layer for all vectors, its statistics over all of them; or one for each.
        use_bias: of the linear layer.
        kernel_init: of the linear layer.
        scale_init: of the batch normalization's scale.
        activation: what the normalized numbers pass last.
        bn_axis_name: axis over which batch statistics are shared.
        dtype: of the normalization's result.
    """

    features: int
    shared: bool
    use_bias: bool = False
    kernel_init: Any = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    scale_init: Any = nn.initializers.ones
    activation: Callable[[Array], Array] = nn.relu
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], *, train: bool) -> Float[Array, "B S F"]:
        """Reduce each vector."""
        own = () if self.shared else (x.shape[1],)
        kernel_init = self.kernel_init if self.shared else _each(self.kernel_init)
        kernel = self.param("kernel", kernel_init, (*own, x.shape[2], self.features), jnp.float32)
        y = jnp.einsum("bsc,cf->bsf" if self.shared else "bsc,scf->bsf", x, kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (*own, self.features), jnp.float32)
        norm = BatchNorm(
            feature_axes=1 if self.shared else 2,
            scale_init=self.scale_init,
            axis_name=self.bn_axis_name,
            dtype=self.dtype,
            name="bn",
        )
        return self.activation(norm(y, train=train))


def _each(init: Callable[..., Array]) -> Callable[..., Array]:
    """An initializer of S stacked layers from that of one: its fans are those of one layer."""

    def stacked(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        keys = jax.random.split(key, shape[0])
        layers: Array = jax.vmap(lambda k: init(k, shape[1:], dtype))(keys)
        return layers

    return stacked


def dropout(
    x: Float[Array, "B *rest"],
    rate: float,
    keys: Key[Array, "B"] | None,
    *,
    train: bool,
    salt: int = 0,
) -> Float[Array, "B *rest"]:
    """In training, set each number to 0 with probability `rate`; scale the others by 1/(1 - rate).

    Every example has a key of its own, so a batch is treated alike on any number of devices
    (Srivastava et al., JMLR 2014).

    Args:
        x: (B, ...).
        rate: from 0 to below 1; 0 changes nothing.
        keys: (B,) random keys; needed only where something is dropped.
        train: False changes nothing.
        salt: another number for each dropout of a network.

    Raises:
        UserError: the rate is out of range.
        ValueError: no keys in training.
    """
    if not 0 <= rate < 1:
        raise UserError(f"the dropout rate is {rate}; it must be from 0 to below 1")
    if not train or rate == 0:
        return x
    if keys is None:
        raise ValueError(f"a dropout of {rate} in training needs keys, one an example; got None")

    chance = np.float32(1 - rate)  # a float64 would draw other numbers

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), chance, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), 0)


def to_unit_length(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Divide each vector by its Euclidean norm; a zero vector stays zero, with a gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))
