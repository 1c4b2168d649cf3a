"""A trained model in use: images in, descriptors out.

from mros_jax.inference import load_model
model = load_model("runs/market")
descriptors = model.embed(images)  # uint8 (N, H, W, 3), arrays of any sizes, or paths -> (N, D)
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from mros_jax import console, parallel
from mros_jax.config import find_normalization, find_size, make_network
from mros_jax.data import augment, decoding
from mros_jax.data.prefetch import prefetch
from mros_jax.errors import UserError, check_choice
from mros_jax.models.counting import count_multiply_adds
from mros_jax.models.outputs import Network, Outputs
from mros_jax.retrieval import blocks
from mros_jax.runs.checkpoints import describe_difference, load_variables
from mros_jax.runs.run import Run

CROPS = ("none", "ten")
Image = np.ndarray | jax.Array | PIL.Image.Image | str | os.PathLike[str]
Preprocess = Callable[[Any], jax.Array]  # images as they are stored -> the network's input


class Embedder:
    """A network with its variables, ready to turn images into descriptors on all local devices.

    The variables are placed on the devices once.

    Attributes:
        network: the Flax module.
        variables: its parameters and running statistics, on the host.
        config: the run's resolved config, where it came from a run.
        checkpoint_id: names the weights: descriptors of another id are not these.

    Args:
        height: images are resized to this height, in pixels.
        width: and to this width.
        interpolation: of that resize, "bilinear" or "bicubic".
        crop: height and width of each of ten crops; None: those of the images.
        normalization: of pixels: `mean`, `std` and `channels` of `augment.preprocess`.
    """

    def __init__(
        self,
        network: Network,
        variables: dict[str, Any],
        *,
        height: int,
        width: int,
        interpolation: str = "bilinear",
        crop: tuple[int, int] | None = None,
        normalization: Mapping[str, Any] | None = None,
        config: ConfigDict | None = None,
        checkpoint_id: str = "",
    ):
        self.network = network
        self.variables = variables
        self.config = config
        self.checkpoint_id = checkpoint_id
        self._height, self._width = height, width
        self._resize: dict[str, Any] = {
            "height": height,
            "width": width,
            "interpolation": interpolation,
        }
        self._placed = parallel.replicate(variables)
        self._input_size = crop or (height, width)
        preprocess: Preprocess = functools.partial(
            augment.preprocess, **self._resize, **(normalization or {})
        )
        self._embed = make_embed(network, preprocess, self._input_size)
        self._apply = jax.jit(lambda v, x: network.apply(v, preprocess(x), train=False))

    def replace_variables(self, variables: dict[str, Any]) -> None:
        """Use other variables of the same shapes, without compiling again."""
        self.variables = variables
        self._placed = parallel.replicate(variables)

    def embed(self, images: np.ndarray | jax.Array | Sequence[Image], **options: Any) -> np.ndarray:
        """Descriptors of images, not normalized: float32 (N, D).

        Args:
            images: as `embed_all` takes them.
            options: of `embed_all`.

        Raises:
            UserError: as `embed_all`.
        """
        return self.embed_all(images, **options)["descriptor"]

    def embed_all(
        self,
        images: np.ndarray | jax.Array | Sequence[Image],
        *,
        batch_size: int = 128,
        fill: bool = False,
        flip_test: bool = False,
        crops: str = "none",
        progress: bool = False,
        together: bool = False,
    ) -> dict[str, np.ndarray]:
        """All descriptors of images by name, not normalized, in one pass.

        Args:
            images: uint8 (N, H, W, 3) RGB, any size; or a sequence of uint8 (H, W, 3) arrays of
                different sizes, PIL images or image files. They are resized to one size.
            batch_size: images per call, rounded up to a multiple of the local devices.
            fill: fill up a call with fewer images than that, so that calls with different numbers
                of images share one compiled program.
            flip_test: mean of the descriptors of image and mirror image.
            crops: "none": of whole images; "ten": mean of the descriptors of five crops of the
                image and of its mirror image.
            progress: show a progress bar.
            together: all processes of the run make the same call; each takes a share of the
                batches, and all get the descriptors of all images.

        Returns:
            float32 (N, D) of "descriptor" and of each of the network's exits.

        Raises:
            UserError: images of another type or rank, files that cannot be read, images that the
                crops cannot be cut from, or a flip test of ten crops.
        """
        check_choice("crops", crops, CROPS)
        if flip_test and crops == "ten":
            raise UserError("ten crops have mirror images already; use them without the flip test")
        if isinstance(images, str | os.PathLike | PIL.Image.Image):
            raise UserError(f"expected several images or files, got one: {images}; give [it]")
        if isinstance(images, jax.Array):
            images = np.asarray(images)
        if isinstance(images, np.ndarray) and (
            images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8
        ):
            raise UserError(
                f"expected uint8 images (N, H, W, 3), got {images.dtype} {images.shape}"
            )
        devices = jax.local_device_count()
        if not fill:
            batch_size = min(batch_size, max(len(images), 1))
        batch_size = -(-batch_size // devices) * devices

        def load(start: int) -> np.ndarray:
            return self._load(images[start : start + batch_size])

        def embed_batch(batch: np.ndarray) -> dict[str, np.ndarray]:
            padding = batch_size - len(batch)
            padded = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0)))
            out = self._embed(self._placed, parallel.split(padded), flip_test, crops)
            # (devices, b, D) -> (batch_size, D)
            rows = {name: np.asarray(x).reshape(batch_size, -1) for name, x in out.items()}
            return {name: x[: len(batch)] for name, x in rows.items()}

        def work(starts: Sequence[int]) -> list[dict[str, np.ndarray]]:
            hidden = {"leave": False, "disable": not progress, "total": len(starts)}
            batches = prefetch(starts, load)  # files are decoded while the network is busy
            return [embed_batch(x) for x in console.progress(batches, desc="descriptors", **hidden)]

        starts = range(0, len(images), batch_size)
        parts = parallel.share(starts, work) if together else work(starts)
        if not parts:
            return {k: np.zeros((0, size), np.float32) for k, size in self.descriptor_sizes.items()}
        return {name: blocks.concatenate([part[name] for part in parts]) for name in parts[0]}

    @functools.cached_property
    def descriptor_sizes(self) -> dict[str, int]:
        """Numbers in each descriptor by name: those of the network's exits, and "descriptor"."""
        image = jax.ShapeDtypeStruct((1, *self._input_size, 3), jnp.float32)

        def describe(key: jax.Array, image: jax.Array) -> dict[str, jax.Array]:
            outputs: Outputs
            outputs, _ = self.network.init_with_output(key, image, train=False)
            return outputs.descriptors()

        shapes = jax.eval_shape(describe, jax.random.key(0), image)
        return {name: x.shape[1] for name, x in shapes.items()}

    def count_multiply_adds(self) -> dict[str, int]:
        """What each descriptor takes, see `mros_jax.models.counting`.

        It is that of one pass: the flip test has two of them, and ten crops have ten.
        """
        return count_multiply_adds(self.network, *self._input_size)

    def fold_heads(self) -> dict[str, np.ndarray]:
        """What a re-ranking compares pairs of descriptors with, of a network that has it; else {}.

        The arrays are those that `mros_jax.retrieval.descriptors` describes.
        """
        fold = getattr(self.network, "fold_heads", None)
        return {} if fold is None else fold(self.variables)

    def outputs(self, images: np.ndarray | Sequence[Image]) -> Outputs:
        """All named outputs of the network for a few images, given as to `embed`."""
        outputs: Outputs = self._apply(self.variables, self._load(images))
        return outputs

    def _load(self, images: np.ndarray | jax.Array | Sequence[Image]) -> np.ndarray:
        """Bring images that are not in one array to the input's size."""
        if isinstance(images, np.ndarray):
            return images
        return decoding.load_images([_to_array(image) for image in images], **self._resize)


def _to_array(image: Image) -> np.ndarray | str | os.PathLike[str]:
    """PIL and JAX images as arrays; arrays and paths as they are."""
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.convert("RGB"))
    return np.asarray(image) if isinstance(image, jax.Array) else image


def make_embed(
    network: Network,
    preprocess: Preprocess,
    crop: tuple[int, int],
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """`embed(variables, images, flip_test, crops)` of (devices, b, H, W, 3) uint8 images.

    Args:
        network: the Flax module.
        preprocess: of a device's images, see `augment.preprocess`.
        crop: height and width of each of ten crops.
        devices: those of one process; None: of this one. In a run of many processes each may embed
            what it likes.
    """

    @functools.partial(
        jax.pmap,
        axis_name=parallel.AXIS,
        in_axes=(None, 0),
        static_broadcasted_argnums=(2, 3),
        devices=devices or jax.local_devices(),
    )
    def embed(
        variables: dict[str, Any], images: jax.Array, flip_test: bool, crops: str
    ) -> dict[str, jax.Array]:
        def describe(inputs: jax.Array) -> dict[str, jax.Array]:
            outputs: Outputs = network.apply(variables, inputs, train=False)
            return outputs.descriptors()

        inputs = preprocess(images)
        if crops == "ten":
            # One after another: ten times the batch would not fit where the batch just does.
            views = augment.ten_crops(inputs, height=crop[0], width=crop[1])
            each: dict[str, jax.Array] = jax.lax.map(describe, views)
            return {name: jnp.mean(x, axis=0) for name, x in each.items()}
        if not flip_test:
            return describe(inputs)
        plain, mirrored = describe(inputs), describe(inputs[:, :, ::-1])
        return {name: (x + mirrored[name]) / 2 for name, x in plain.items()}

    return embed


def load_model(run: str | os.PathLike[str], checkpoint: str = "last") -> Embedder:
    """The model of a run.

    Args:
        run: the run's directory (its `--workdir`).
        checkpoint: "last", which the paper's numbers correspond to, or "best" by mAP.

    Raises:
        NotFoundError: `run` is not a run directory, or holds no complete checkpoint.
        UserError: the run or its checkpoint is damaged, of another version or another network.
    """
    opened = Run.open(run)
    config = ConfigDict(opened.config)
    network = make_network(config, opened.num_classes)
    variables, step = load_variables(opened.checkpoints, checkpoint)
    image = jax.ShapeDtypeStruct((1, config.input.height, config.input.width, 3), jnp.float32)
    init = functools.partial(network.init, train=False)
    wanted = jax.eval_shape(init, jax.random.key(0), image)
    if difference := describe_difference(variables, wanted):
        raise UserError(
            f"the checkpoint {checkpoint!r} of {opened} is of another network than its config's "
            f"{config.network.name}: {difference}"
        )
    return make_embedder(
        config,
        network,
        variables,
        checkpoint_id=make_checkpoint_id(checkpoint, step, variables),
    )


def choose_test(
    section: ConfigDict, flip_test: bool | None = None, crops: str | None = None
) -> tuple[bool, str]:
    """Flip test and crops: those asked for, else those of a config's `eval` section.

    Who asks for one of the two and says nothing of the other gets it alone.
    """
    if flip_test is None:
        flip_test = section.flip_test and crops in (None, "none")
    if crops is None:
        crops = "none" if flip_test else section.crops
    return flip_test, crops


def make_embedder(
    config: ConfigDict, network: Network, variables: dict[str, Any], *, checkpoint_id: str = ""
) -> Embedder:
    """An embedder of images in the sizes that a config tests with."""
    height, width = find_size(config, config.eval)
    return Embedder(
        network,
        variables,
        height=height,
        width=width,
        interpolation=config.input.interpolation,
        crop=(config.input.height, config.input.width),
        normalization=find_normalization(config),
        config=config,
        checkpoint_id=checkpoint_id,
    )


def make_checkpoint_id(checkpoint: str, step: int, variables: Any) -> str:
    """Names the weights of a checkpoint by its name, its step and a digest of their values."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).data)
    return f"{checkpoint}-{step}-{digest.hexdigest()[:12]}"
