"""What a GPU would be given: programs are made for one where there is none. None is run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mros_jax.parallel import AXIS
from mros_jax.training import recipe
from tests.training import make_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_the_training_step_has_a_program(platform, tmp_path):
    """All of it is known to the platform; nothing calls the host or a library of another one."""
    config = make_config(tmp_path)
    parts = recipe.build(config, num_classes=12, steps_per_epoch=10)
    data = {
        "images": jax.ShapeDtypeStruct((72, 128, 64, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((72,), jnp.int32),
    }
    batch = {"indices": jax.ShapeDtypeStruct((8,), jnp.int32)}
    whole = PartitionSpec()
    step = jax.shard_map(
        parts.step,
        mesh=Mesh(np.array(jax.devices()[:1]), (AXIS,)),
        in_specs=(whole, whole, PartitionSpec(AXIS)),
        out_specs=whole,
        check_vma=False,
    )
    traced = jax.jit(step).trace(parts.state, data, batch)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Forward, and backward by images and by kernels, but for the first, whose images are data.
    kernels = [x for x in jax.tree.leaves(parts.state.params["network"]["trunk"]) if x.ndim == 4]
    assert text.count("stablehlo.convolution") == 3 * len(kernels) - 1
    assert not re.findall(r"custom_call @(\w+)", text)
