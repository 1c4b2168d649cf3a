"""Multiply-adds of a network, counted from the shapes of its convolutions and matrix products."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mros_jax.models.outputs import Network, Outputs


def count_multiply_adds(network: Network, height: int, width: int) -> dict[str, int]:
    """Count what each descriptor of an image takes, all that it does not depend on left out.

    The program is traced, not compiled: one multiply-add is a product of an input and a weight,
    added up. Normalizations, ReLUs and pooling are not counted.

    Args:
        network: to be counted.
        height: of the image.
        width: of the image.

    Returns:
        Name of the descriptor (see `Outputs.descriptors`) -> multiply-adds of one image.
    """
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    init = functools.partial(network.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)

    def describe(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
        outputs: Outputs = network.apply(variables, image, train=False)
        return outputs.descriptors()

    closed, shapes = jax.make_jaxpr(describe, return_shape=True)(variables, image)
    # A dict is flattened in the order of its sorted keys.
    results = dict(zip(sorted(shapes), closed.jaxpr.outvars, strict=True))
    return {name: _count_back(closed.jaxpr, results[name]) for name in shapes}


def _count_back(jaxpr: Jaxpr, result: Any) -> int:
    """Multiply-adds of the equations that a result depends on."""
    needed, total = {result}, 0
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(x for x in equation.invars if not isinstance(x, Literal))
            total += _count(equation)
    return total


def _count(equation: Any) -> int:
    """Multiply-adds of one equation."""
    params = equation.params
    made: int = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape: tuple[int, ...] = equation.invars[0].aval.shape
        summed: int = math.prod(shape[axis] for axis in contracted)
        return made * summed
    if equation.primitive.name == "conv_general_dilated":
        out_axis: int = params["dimension_numbers"].rhs_spec[0]
        kernel: tuple[int, ...] = equation.invars[1].aval.shape
        return made * math.prod(kernel[:out_axis] + kernel[out_axis + 1 :])
    if equation.primitive.name == "cond":  # of which one is taken: a platform's
        return max(sum(map(_count, branch.jaxpr.eqns)) for branch in params["branches"])
    inner = [value.jaxpr for value in params.values() if isinstance(value, ClosedJaxpr)]
    once = sum(_count(each) for jaxpr in inner for each in jaxpr.eqns)
    times: int = params.get("length", 1)
    return once * times
