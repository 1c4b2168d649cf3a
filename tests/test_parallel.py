"""Data parallelism: any number of devices trains the same model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mros_jax import config as configs
from mros_jax import parallel
from mros_jax.data import augment
from mros_jax.training import recipe
from mros_jax.training.feed import Feed
from tests.training import assert_close, make_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 10


def _train(config, num_devices, steps=STEPS, *, float64=False):
    """The state and the metrics of every step on `num_devices` devices."""
    devices = jax.local_devices()[:num_devices]
    dataset = configs.load_dataset(config)
    feed = Feed(config, dataset)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(float64):
        if float64:
            patch.setitem(configs.DTYPES, config.dtype, jnp.float64)
        parts = recipe.build(config, dataset.num_classes, feed.sizes.steps_per_epoch)
        step = parallel.MappedStep(parts.step, devices)
        state = parts.state
        if float64:
            state = jax.tree.map(lambda x: x.astype("f8") if x.dtype == "f4" else x, state)
        state = parallel.replicate(state, devices)
        data = parallel.replicate(jax.device_get(feed.data), devices)
        history = []
        for i in range(steps):
            epoch, first = divmod(i, feed.sizes.steps_per_epoch)
            indices = np.asarray(next(feed.epoch(epoch, first))["indices"]).reshape(-1)
            batch = parallel.split({"indices": indices}, devices)
            state, metrics = step(state, data, batch)
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


@pytest.fixture(scope="module")
def synchronised(cache_dir):
    # A low rate: the test is of arithmetic, not of how training amplifies rounding. And in float64:
    # in float32 some input of a ReLU comes within rounding of its corner, where gradients jump.
    values = {"batch_norm": "synchronised", "optimizer.network.lr": 1e-5}
    return make_config(cache_dir, **values, num_epochs=12)


@pytest.fixture(scope="module")
def one_device(synchronised):
    return _train(synchronised, 1, float64=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4])
def test_synchronised_devices_equal_one(synchronised, one_device, num_devices):
    state, history = _train(synchronised, num_devices, float64=True)
    for here, there in zip(history, one_device[1], strict=True):
        assert_close(here, there, 1e-8)
    assert_close(state.params, one_device[0].params, 1e-8)
    assert_close(state.batch_stats, one_device[0].batch_stats, 1e-8)


@pytest.mark.slow
def test_per_device_statistics_are_data_parallels(cache_dir):
    """DataParallel: each replica normalises its share by itself, losses see the whole batch, and
    the running statistics kept are the first replica's."""
    config = make_config(cache_dir, **{"optimizer.network.lr": 1e-3, "schedule.warmup_epochs": 0})
    after, (metrics,) = _train(config, 2, steps=1)

    dataset = configs.load_dataset(config)
    feed = Feed(config, dataset)
    parts = recipe.build(config, dataset.num_classes, feed.sizes.steps_per_epoch)
    before = parts.state
    indices = np.asarray(jax.device_get(next(feed.epoch(0))["indices"])).reshape(-1)
    data = jax.device_get(feed.data)
    labels = jnp.asarray(data["labels"][indices])
    images = augment.augment_batch(
        data["images"][indices],
        augment.example_keys(config.seed, 0, np.arange(len(indices))),
        **config.input.to_dict(),
        **config.augment.to_dict(),
    )

    def data_parallel_loss(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        apply = functools.partial(
            parts.network.apply, variables, train=True, mutable=["batch_stats"]
        )
        replicas = [apply(share) for share in jnp.split(images, 2)]
        gathered = jax.tree.map(lambda *x: jnp.concatenate(x), *(out for out, _ in replicas))
        total, _ = parts.objective(before.params["objective"], gathered, labels)
        return total, replicas[0][1]["batch_stats"]

    (total, batch_stats), grads = jax.jit(jax.value_and_grad(data_parallel_loss, has_aux=True))(
        before.params["network"]
    )
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert_close(after.batch_stats, batch_stats, 1e-5)
    # The second replica saw other images: keeping its statistics, or a mean, would show.
    whole, _ = _train(config.copy_and_resolve_references(), 1, steps=1)
    with pytest.raises(AssertionError):
        assert_close(whole.batch_stats, batch_stats, 1e-3)


def test_images_from_host_memory_are_the_same(cache_dir):
    config = make_config(cache_dir, **{"num_epochs": 2})
    feeds = []
    for fraction in (0.5, 0.0):
        with config.unlocked():
            config.dataset.device_fraction = fraction
        feeds.append(Feed(config, configs.load_dataset(config)))
    resident, hosted = feeds
    assert resident.data is not None
    assert hosted.data is None
    data = jax.device_get(resident.data)
    for a, b in zip(resident.epoch(1, 1), hosted.epoch(1, 1), strict=True):
        indices = jax.device_get(a["indices"])
        np.testing.assert_array_equal(data["images"][indices], b["images"])
        np.testing.assert_array_equal(data["labels"][indices], b["labels"])


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="batch of 6 cannot be split over its 4 devices"):
        parallel.split({"indices": np.arange(6)})


def test_second_compilation_is_refused():
    step = parallel.MappedStep(lambda state, data, batch: (state, {"sum": batch.sum() * 0}))
    state = parallel.replicate(np.zeros(()))
    state, _ = step(state, None, parallel.split(np.arange(4.0, dtype=np.float32)))
    state, _ = step(state, None, parallel.split(np.arange(4.0, dtype=np.float32)))
    with pytest.raises(RuntimeError, match="second time"):
        step(state, None, parallel.split(np.arange(8.0, dtype=np.float32)))


def test_step_donates_its_state():
    step = parallel.MappedStep(lambda state, data, batch: (state + 1, {}))
    source = np.zeros(3, np.float32)
    state = parallel.replicate(source)
    step(state, None, parallel.split(np.arange(4)))
    assert state.is_deleted()
    np.testing.assert_array_equal(source, 0)


def test_half_an_address_is_refused():
    with pytest.raises(ValueError, match="go together"):
        parallel.initialize("localhost:1234")
