"""Compare HA-CNN with that of the PyPI package torchreid: same weights, same images.

    pip install --no-deps --target build/torchreid torchreid==0.2.5
    PYTHONPATH=build/torchreid python -m scripts.compare_torchreid

Weights, running statistics and images are random. Descriptors and logits with running statistics
are compared in float32; the logits, the loss and all gradients of a training step in float64.
torchreid leaves the sampling of regions to PyTorch's default, align_corners=False since PyTorch
1.3; for True its calls of PyTorch are given the argument. Ends with 1 where a difference is above
its bound.
"""

import argparse
import functools
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mros_jax import console
from mros_jax.errors import NotFoundError
from mros_jax.losses.classification import smoothed_cross_entropy
from mros_jax.models import torch_weights
from mros_jax.systems.hacnn import HACNN
from scripts import common
from scripts.bench_retrieval import load_module

BOUND = 1e-5  # in float32, of running statistics
BOUND_64 = 1e-9
NUM_CLASSES = 751
HEIGHT, WIDTH = 160, 64  # torchreid's HA-CNN takes no other images
BRANCHES = ("global", "local")

# What a name of ours starts with -> the same of torchreid's. Numbers in brackets count from 0.
NAMES = (
    (r"stem\.", r"conv."),
    (r"inception(\d)_a\.chain(\d)_(\d)\.", r"inception\1.0.stream\2.[\3]."),
    (r"inception(\d)_a\.pool\.", r"inception\1.0.stream4.1."),
    (r"inception(\d)_b\.", r"inception\1.1."),
    (r"local(\d)\.", r"local_conv\1."),
    (r"(inception\d\.1|local_conv\d)\.short_(\d)\.", r"\1.stream1.[\2]."),
    (r"(inception\d\.1|local_conv\d)\.long_(\d)\.", r"\1.stream2.[\2]."),
    (r"(inception\d\.1|local_conv\d)\.pool\.", r"\1.stream3.1."),
    (r"soft(\d)\.place_(\d)\.", r"ha\1.soft_attn.spatial_attn.conv\2."),
    (r"soft(\d)\.channel_(\d)\.", r"ha\1.soft_attn.channel_attn.conv\2."),
    (r"soft(\d)\.join\.", r"ha\1.soft_attn.conv."),
    (r"hard(\d)\.linear\.", r"ha\1.hard_attn.fc."),
    (r"embedding_(\w+)\.bn\.", r"fc_\1.1."),
    (r"embedding_(\w+)\.", r"fc_\1.0."),
    (r"classifier_(\w+)\.0\.", r"classifier_\1."),
)


def rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of our export by torchreid's names."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in NAMES:
            name = re.sub(f"^{ours}", theirs, name)
        renamed[re.sub(r"\[(\d)\]", lambda match: str(int(match[1]) - 1), name)] = value
    return renamed


def draw_variables(network: HACNN, images: np.ndarray, seed: int) -> Any:
    """Random weights and running statistics; regions that differ from image to image."""
    init = functools.partial(network.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name, shape = path[-1].key, leaf.shape
        values: np.ndarray
        if name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "kernel":
            values = rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
        else:
            values = rng.uniform(-0.3, 0.3, shape)
        # Numbers that float32 holds: PyTorch's network is made in it before it is widened.
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def difference(ours: Any, theirs: Any, least: float = 0.0) -> float:
    """Largest difference as a share of the largest number, or of `least` where that is more."""
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), least))


def cast(tree: Any, dtype: Any) -> Any:
    """All arrays in one type."""
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def compare(module: Any, *, align_corners: bool, batch: int, seed: int) -> dict[str, float]:
    """What differs, and by how much.

    Args:
        module: torchreid's file with HA-CNN.
        align_corners: of the sampling, on both sides.
        batch: images.
        seed: draws weights and images.
    """
    import torch

    functional = torch.nn.functional
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, HEIGHT, WIDTH, 3))
    labels = jnp.arange(batch) % NUM_CLASSES
    network = HACNN(NUM_CLASSES, align_corners=align_corners)
    variables = draw_variables(network, images, seed)
    theirs = module.HACNN(NUM_CLASSES, use_gpu=False)
    state = rename(torch_weights.to_torch_state_dict(variables))
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    sampling: dict[str, Any] = {
        name: functools.partial(getattr(functional, name), align_corners=align_corners)
        for name in ("affine_grid", "grid_sample")
    }
    with mock.patch.multiple(functional, **sampling):
        theirs.eval()
        with torch.no_grad():
            their_descriptor = theirs(pictures.float())
            theirs.training = True  # of the network alone: logits come out, of running statistics
            their_logits = theirs(pictures.float())
        # torchreid builds its sampling grids in the default type.
        torch.set_default_dtype(torch.float64)
        theirs.double().train()
        their_step = theirs(pictures)
        target = torch.tensor(labels.tolist())
        smoothed = functools.partial(functional.cross_entropy, label_smoothing=0.1)
        their_loss: Any = sum(smoothed(logits, target) for logits in their_step) / 2
        their_loss.backward()
        torch.set_default_dtype(torch.float32)

    apply = jax.jit(functools.partial(network.apply, train=False))
    outputs = apply(variables, images.astype(np.float32))
    found = {"descriptor": difference(outputs.descriptor, their_descriptor)}
    for name, logits in zip(BRANCHES, their_logits, strict=True):
        found[f"logits of {name}"] = difference(outputs.logits[name][:, 0], logits)
    with jax.enable_x64(True):
        wide = network.clone(dtype=jnp.float64)

        def loss(params: Any) -> Any:
            collections = {**variables, "params": params}
            out, _ = wide.apply(collections, images, train=True, mutable=["batch_stats"])
            terms = (smoothed_cross_entropy(out.logits[name], labels) for name in BRANCHES)
            return sum(terms) / 2, out.logits

        variables = cast(variables, np.float64)
        differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (our_loss, our_logits), gradients = differentiate(variables["params"])
    for name, logits in zip(BRANCHES, their_step, strict=True):
        key = f"logits of {name}, training, float64"
        found[key] = difference(our_logits[name][:, 0], logits.detach())
    found["loss, float64"] = difference(our_loss, their_loss.detach())
    parameters = dict(theirs.named_parameters())
    # A bias before a batch normalization has gradient 0, and rounding in its place.
    least = 1e-2 * max(float(p.grad.abs().max()) for p in parameters.values())
    named = rename(torch_weights.to_torch_state_dict({"params": gradients, "batch_stats": {}}))
    found[f"{len(parameters)} gradients, float64"] = max(
        difference(named[name], parameter.grad, least) for name, parameter in parameters.items()
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--batch", type=console.count, default=8, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    common.add_markdown(parser)
    args: argparse.Namespace = parser.parse_args(argv)
    try:
        version = importlib.metadata.version("torchreid")
        module = load_module("torchreid:torchreid/reid/models/hacnn.py")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError, ImportError) as error:
        raise NotFoundError(
            f"PyTorch and torchreid are compared with: {error}; pip install torch, and "
            "pip install --no-deps torchreid==0.2.5 (its other requirements are not needed here)"
        ) from error
    columns = [
        compare(module, align_corners=value, batch=args.batch, seed=args.seed)
        for value in (False, True)
    ]
    rows = [(name, *(f"{column[name]:.1e}" for column in columns)) for name in columns[0]]
    header = ("largest difference, relative", "align_corners False (torchreid's)", "True")
    print(f"torchreid {version} with {common.describe_machine('torch')}")
    common.publish(common.format_table(header, rows), args.markdown)
    within = (
        value <= (BOUND_64 if name.endswith("float64") else BOUND)
        for column in columns
        for name, value in column.items()
    )
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
