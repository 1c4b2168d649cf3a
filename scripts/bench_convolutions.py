"""Time the convolutions of a config's network alone, each with both gradients, beside PyTorch's.

    python -m scripts.bench_convolutions --config configs/mros.py --config.batch.identities=2

Says what of a training step is in them, and which kind of them another library computes faster:
XLA's CPU backend and PyTorch's oneDNN each have kernels of their own. The convolutions are those of
a batch as the network's program has them, of noise, in float32; PyTorch's memory layout is channels
last. Frameworks take turns, each begins with a call that is not timed, and times are the best of
the repeats. What the network does in between (normalizations, ReLUs, pooling) is not in it. Of
the gradients by images, training does not need that of the first convolution.
"""

import collections
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.models import layers
from scripts import bench_model, common

Work = Callable[[], Any]
PASSES = ("forward", "gradient by images", "gradient by kernel")
HEADER = ("kernel", "number", "GFLOP", "what", "JAX, ms", "PyTorch, ms", "JAX, GFLOP/s", "PyTorch")


class Convolution(NamedTuple):
    """A convolution of NHWC images with an HWIO kernel, padded by the same on both sides."""

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of what it makes."""
        sides = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                self.images[1:3], self.padding, self.kernel, self.strides, strict=False
            )
        )
        return (self.images[0], *sides, self.kernel[3])

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass."""
        return 2 * math.prod(self.result) * math.prod(self.kernel[:3])

    def in_jax(self, images: jax.Array, kernel: jax.Array) -> jax.Array:
        """As the networks here compute it on a CPU."""
        if self.kernel[:2] == (1, 1) and self.groups == 1:
            return layers.convolve_1x1_on_cpu(images, kernel, self.strides[0])
        return lax.conv_general_dilated(
            images,
            kernel,
            self.strides,
            [(pad, pad) for pad in self.padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


def find_convolutions(config: ConfigDict, classes: int) -> dict[Convolution, int]:
    """The convolutions of a training step's forward pass, and how often each is there."""
    network = configs.make_network(config, classes)
    size = make_sampler(config.batch.to_dict()).size
    shape = (size, config.input.height, config.input.width, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    variables = jax.eval_shape(
        functools.partial(network.init, train=False), jax.random.key(0), images
    )
    apply = functools.partial(network.apply, train=False)
    with layers.plainly():
        program = jax.make_jaxpr(apply)(variables, images)
    return collections.Counter(_walk(program.jaxpr))


def _walk(program: Any) -> Iterator[Convolution]:
    for equation in program.eqns:
        if equation.primitive.name != "conv_general_dilated":
            for inner in equation.params.values():
                if isinstance(inner, ClosedJaxpr):
                    yield from _walk(inner.jaxpr)
            continue
        params = equation.params
        if any(low != high for low, high in params["padding"]):
            raise UserError(f"a padding of {params['padding']} is not the same on both sides")
        images, kernel = (x.aval.shape for x in equation.invars)
        yield Convolution(
            images,
            kernel,
            params["window_strides"],
            tuple(low for low, _ in params["padding"]),
            params["feature_group_count"],
        )


def make_arrays(convolution: Convolution) -> Iterator[np.ndarray]:
    """Noise: images, kernel, and a gradient of the result."""
    rng = np.random.default_rng(0)
    for shape in (convolution.images, convolution.kernel, convolution.result):
        yield rng.standard_normal(shape, np.float32)


def make_jax_passes(convolution: Convolution) -> dict[str, Work]:
    """Each of `PASSES` in JAX; they return what they compute."""
    images, kernel, dy = map(jax.device_put, make_arrays(convolution))

    def pull(wanted: int, images: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        by = (lambda x: convolution.in_jax(x, kernel), lambda x: convolution.in_jax(images, x))
        gradient: jax.Array = jax.vjp(by[wanted], (images, kernel)[wanted])[1](dy)[0]
        return gradient

    calls = [functools.partial(jax.jit(convolution.in_jax), images, kernel)]
    calls += [
        functools.partial(jax.jit(pull, static_argnums=0), i, images, kernel, dy) for i in (0, 1)
    ]
    return {
        name: functools.partial(_finish, call) for name, call in zip(PASSES, calls, strict=True)
    }


def _finish(call: Work) -> jax.Array:
    result: jax.Array = jax.block_until_ready(call())
    return result


def make_torch_passes(convolution: Convolution) -> dict[str, Work]:
    """Each of `PASSES` in PyTorch; they return what they compute, as PyTorch orders it."""
    import torch

    images, kernel, dy = map(torch.from_numpy, make_arrays(convolution))
    images, dy = (x.permute(0, 3, 1, 2) for x in (images, dy))  # channels last by their strides
    kernel = kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    strides, padding, groups = convolution.strides, convolution.padding, convolution.groups

    def forward() -> Any:
        return torch.nn.functional.conv2d(
            images, kernel, stride=strides, padding=padding, groups=groups
        )

    def backward(wanted: int) -> Any:
        mask = [i == wanted for i in range(3)]
        return torch.ops.aten.convolution_backward(
            *(dy, images, kernel, None, strides, padding, (1, 1), False, (0, 0), groups, mask)
        )[wanted]

    calls = (forward, functools.partial(backward, 0), functools.partial(backward, 1))
    return dict(zip(PASSES, calls, strict=True))


def measure(work: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Seconds of each, the best of the repeats; they take turns."""
    best = dict.fromkeys(work, math.inf)
    for _ in range(repeats):
        for name, run in work.items():
            run()
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def add_up(
    found: Mapping[Convolution, int],
    makers: Mapping[str, Callable[[Convolution], dict[str, Work]]],
    repeats: int,
) -> dict[tuple[str, str, str], float]:
    """Seconds of all convolutions with one kernel: (kernel, pass, framework) -> sum."""
    seconds: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for convolution, times in found.items():
        made = {name: make(convolution) for name, make in makers.items()}
        for what in PASSES:
            taken = measure({name: passes[what] for name, passes in made.items()}, repeats)
            for name, value in taken.items():
                seconds[name_kernel(convolution), what, name] += times * value
    return seconds


def name_kernel(convolution: Convolution) -> str:
    """Its size and stride, as the table has it."""
    high, wide, *_ = convolution.kernel
    stride = f" / {convolution.strides[0]}" * (convolution.strides[0] > 1)
    groups = ", depthwise" if convolution.groups > 1 else ""
    return f"{high} x {wide}{stride}{groups}"


def make_rows(
    found: Mapping[Convolution, int], seconds: Mapping[tuple[str, str, str], float]
) -> list[tuple[str, ...]]:
    """The cells of `HEADER`: each kernel's passes, then all of them."""
    flops: dict[str, int] = collections.Counter()
    number: dict[str, int] = collections.Counter()
    for convolution, times in found.items():
        for kernel in (name_kernel(convolution), "all"):
            flops[kernel] += times * convolution.flops
            number[kernel] += times
    rows = []
    for kernel in (*sorted(set(number) - {"all"}), "all"):
        for what in PASSES:
            taken = [
                sum(
                    s
                    for (k, *of), s in seconds.items()
                    if of == [what, name] and kernel in (k, "all")
                )
                for name in ("JAX", "PyTorch")
            ]
            rows.append(
                (
                    *(kernel, str(number[kernel]), f"{flops[kernel] / 1e9:.2f}", what),
                    *(f"{1e3 * s:.1f}" if s else "" for s in taken),
                    *(f"{flops[kernel] / s / 1e9:.0f}" if s else "" for s in taken),
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_repeats(parser, 3)
    parser.add_argument("--no_torch", action="store_true", help="JAX alone")
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    makers = {"JAX": make_jax_passes}
    if not args.no_torch:
        bench_model.find_torch_device("cpu")
        makers["PyTorch"] = make_torch_passes
    found = find_convolutions(config, classes=4)
    rows = make_rows(found, add_up(found, makers, args.repeats))
    packages = () if args.no_torch else ("torch",)
    about = f"{common.describe_config(config)}; {common.describe_machine(*packages)}"
    common.publish(f"{about}\n\n{common.format_table(HEADER, rows)}", args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
