"""What the heads of SphereReID and TriNet start from; a ResNet's start is tested with MROS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.systems.spherereid import SphereReID
from mros_jax.systems.trinet import TriNet

IMAGES = jnp.zeros((1, 64, 32, 3))
CHANNELS = 128  # of the tiny trunk


def start(network, module):
    """What a module starts from; the rest is not compiled."""
    init = functools.partial(network.init, train=False)
    return jax.jit(lambda: init(jax.random.key(0), IMAGES)["params"][module])()


def test_trinets_embedding_is_orthogonal():
    params = start(TriNet(num_classes=3, trunk="tiny"), "embedding")
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (1024, 128)
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(128), atol=1e-5)
    np.testing.assert_array_equal(params["bias"], 0)


def test_trinets_reduction_has_glorots_uniform_distribution():
    kernel = np.asarray(start(TriNet(num_classes=3, trunk="tiny"), "reduction")["kernel"])
    limit = (6 / (CHANNELS + 1024)) ** 0.5
    assert kernel.shape == (CHANNELS, 1024)
    np.testing.assert_allclose([kernel.min(), kernel.max()], [-limit, limit], rtol=0.01)
    np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.01)  # of a uniform one


def test_sphereids_embedding_has_the_variance_of_its_inputs():
    params = start(SphereReID(num_classes=3, trunk="tiny"), "embedding")
    kernel = np.asarray(params["kernel"])
    np.testing.assert_allclose(kernel.std(), CHANNELS**-0.5, rtol=0.02)
    np.testing.assert_allclose(abs(kernel).max() * CHANNELS**0.5, 4.5, atol=1.5)  # normal, no cut
    np.testing.assert_array_equal(params["bias"], 0)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (SphereReID(num_classes=3, trunk="tiny", scale=0.0), "scale 0.0; both must be above 0"),
        (SphereReID(num_classes=3, trunk="tiny", embedded=0), "embedded is 0"),
        (TriNet(num_classes=3, trunk="tiny", reduced=0), "reduced is 0"),
    ],
)
def test_fields_that_make_no_network(network, message):
    with pytest.raises(UserError, match=message):
        start(network, "embedding")
