"""Time a config's network and training step, beside the same network in PyTorch, in one run.

    python -m scripts.bench_model --config configs/mros.py --config.batch.identities=2
    python -m scripts.bench_model --config configs/mros.py --config.dtype=bfloat16    # on a GPU

JAX takes the step that training runs, on one device and on images that are ready: forward, losses,
backward, optimizer. PyTorch takes the network of the parity tests, where there is one, with the
config's loss terms and optimizer; eagerly with both memory layouts and, on a GPU or with
`--compile`, compiled. Frameworks take turns, each of which begins with a call that is not timed;
a row is the median of its repeats. On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves both of
them the time in which memory is mapped.

Of a training in stages it is the last one. Beside PyTorch there is no dropout on either side: the
networks of the parity tests are given their masks.
"""

import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.losses import make_objective
from mros_jax.models.outputs import Outputs
from mros_jax.training import recipe
from scripts import common

Step = Callable[[], Any]
Steps = Mapping[str, Step]
HEADER = ("framework", "what", "images/s", "range", "CPU s/image")


def make_batch(config: ConfigDict, num_classes: int) -> dict[str, np.ndarray]:
    """Normalized images of noise, and labels as the config's sampler draws them."""
    sampler = make_sampler(config.batch.to_dict())
    people = np.arange(max(8 * num_classes, sampler.size), dtype=np.int32) % num_classes
    labels = people[sampler.plan(people, np.zeros_like(people), seed=config.seed, epoch=0)[0]]
    shape = (sampler.size, config.input.height, config.input.width, 3)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return {"images": images, "labels": labels}


def make_jax_steps(config: ConfigDict, num_classes: int) -> Steps:
    """Forward pass and training step in JAX."""
    batch = make_batch(config, num_classes)
    network = configs.make_network(config, num_classes)
    variables = recipe.init_variables(network, config)
    images = jax.device_put(batch["images"])
    devices = jax.devices()[:1]

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> jax.Array:
        outputs: Outputs = network.apply(variables, images, train=False)
        return outputs.descriptor

    train = common.Step(
        config,
        num_classes,
        None,
        parallel.split(batch, devices),
        augment_batch=common.keep_images,
        devices=devices,
    )
    return {
        "forward": lambda: jax.block_until_ready(forward(variables, images)),
        "training step": train,
    }


class TorchSystem(NamedTuple):
    """A network of the parity tests, and how it is trained.

    Attributes:
        network: the module.
        prepare: of the network on its device and some images, the loss (outputs, labels) -> total,
            the optimizers, and what is done between gradients and steps.
    """

    network: Any
    prepare: Callable[[Any, Any], tuple[Callable[[Any, Any], Any], list[Any], Callable[[], None]]]


def make_parity_system(config: ConfigDict, num_classes: int) -> TorchSystem:
    """A system as the parity tests have it, with its losses and optimizers.

    Raises:
        UserError: they do not have this variant.
    """
    import torch

    from tests.parity import test_mgn, test_systems

    cases = {**test_systems.CASES, **test_mgn.CASES}
    name = config.name.removesuffix("-reconstruction")
    if name not in cases:
        raise UserError(f"tests/parity has no {config.name}; --no_torch leaves PyTorch out")
    case = cases[name]

    def prepare(network: Any, images: Any) -> Any:
        shapes = find_own_shapes(config, num_classes)
        device = images.device
        own = {k: torch.randn(s, device=device, requires_grad=True) for k, s in shapes.items()}
        optimizers = [optimizer for optimizer, _ in case.optimizers(network, own)]

        def loss(out: Any, labels: Any) -> Any:
            return case.loss(out, labels, own)[0]

        return loss, optimizers, lambda: case.finish(own)

    return TorchSystem(case.theirs(config.network, num_classes), prepare)


def find_own_shapes(config: ConfigDict, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the config's losses, by name."""
    network: Any = configs.make_network(config, num_classes)
    objective = make_objective(config.objective.to_dict())
    image = jax.ShapeDtypeStruct((8, config.input.height, config.input.width, 3), np.float32)
    key = jax.random.key(0)
    init = functools.partial(network.init_with_output, train=False)
    outputs, _ = jax.eval_shape(init, key, image)
    own = jax.eval_shape(lambda x: objective.init(key, x, num_classes), outputs)
    flat = traverse_util.flatten_dict(own, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def make_torch_mros(config: ConfigDict, num_classes: int) -> Any:
    """MROS, and how the config's names are found in what it returns: name -> list of (B, D)."""
    from tests.parity.torch_mros import TorchMROS

    fields = config.network
    settings = {(False, 1): "I", (True, 1): "III", (True, 2): "IV"}
    if (fields.overlap, len(fields.levels)) not in settings:
        raise UserError("only settings I to IV of MROS are in PyTorch; --no_torch leaves it out")
    setting = settings[fields.overlap, len(fields.levels)]
    network = TorchMROS(
        num_classes, setting, fields.trunk, fields.num_stripes, last_stride=fields.last_stride
    )

    def name_vectors(out: Any) -> dict[str, Any]:
        return {f"{kind}_{level}": out[kind][level] for kind in "gh" for level in out[kind]}

    return network, name_vectors


def make_mros_system(config: ConfigDict, num_classes: int) -> TorchSystem:
    """MROS in any of its settings, with the losses that a config has."""
    import torch

    network, name_vectors = make_torch_mros(config, num_classes)

    def prepare(network: Any, images: Any) -> Any:
        with torch.no_grad():
            out = network.eval()(images)
        named = {"descriptor": [out["descriptor"]], **name_vectors(out)}
        centers = {
            name: [
                torch.randn(num_classes, x.shape[1], device=images.device, requires_grad=True)
                for key in term.on
                for x in named[key]
            ]
            for name, term in config.objective.items()
            if term.loss == "center" and term.weight
        }

        def finish() -> None:
            for name, own in centers.items():
                for center in own:
                    center.grad /= config.objective[name].weight  # they see the term unweighted

        loss = make_torch_loss(config, centers, name_vectors)
        return loss, make_torch_optimizers(config, network, centers), finish

    return TorchSystem(network, prepare)


def make_torch_loss(config: ConfigDict, centers: Mapping[str, Any], name_vectors: Any) -> Any:
    """The config's objective in PyTorch: (outputs, labels) -> total.

    Options that take no time, such as a loss's reduction, are left out.
    """
    import torch
    from torch.nn import functional as F

    def triplet(x: Any, labels: Any, margin: float) -> Any:
        same = labels[:, None] == labels[None]
        eye = torch.eye(len(labels), dtype=torch.bool, device=x.device)
        distances = torch.cdist(x, x)
        positive = distances.masked_fill(~same | eye, -torch.inf).amax(1)
        negative = distances.masked_fill(same, torch.inf).amin(1)
        return F.relu(positive - negative + margin).mean()

    def loss(out: Any, labels: Any) -> Any:
        named = {"descriptor": [out["descriptor"]], **name_vectors(out)}
        total = torch.zeros((), device=labels.device)
        for name, term in config.objective.items():
            if not term.weight:
                continue
            if term.loss == "cross_entropy":
                heads = [z.float() for key in term.on for z in out["logits"][key]]
                smoothing = term.smoothing
                values = [F.cross_entropy(z, labels, label_smoothing=smoothing) for z in heads]
            elif term.loss == "triplet":
                vectors = [x.float() for key in term.on for x in named[key]]
                values = [triplet(x, labels, term.margin) for x in vectors]
            elif term.loss == "center":
                vectors = [x.float() for key in term.on for x in named[key]]
                values = [
                    (x - own[labels]).square().sum(1).mean()
                    for x, own in zip(vectors, centers[name], strict=True)
                ]
            else:
                raise UserError(f"no loss {term.loss!r} for PyTorch here; --no_torch leaves it out")
            mean = sum(values) / (1 if term.get("heads") == "sum" else len(values))
            total = total + term.weight * mean
        return total

    return loss


def find_torch_device(platform: str) -> str:
    """PyTorch's name of the device that JAX has, "cpu" or "cuda".

    Args:
        platform: JAX's name of its kind.

    Raises:
        UserError: PyTorch is not installed, or does not see the device.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed (pip install torch)")
    import torch

    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} does not see JAX's {platform}")
    return "cuda"


def make_torch_steps(
    config: ConfigDict, num_classes: int, device: str, *, channels_last: bool, compiled: bool
) -> tuple[Steps, Step]:
    """Forward pass and training step of the same network in PyTorch; and what waits for their end.

    Args:
        config: what is trained; in bfloat16 by automatic casts.
        num_classes: training identities.
        device: "cpu" or "cuda".
        channels_last: memory layout of network and images.
        compiled: the network by `torch.compile`.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    make = make_mros_system if config.network.name == "mros" else make_parity_system
    system = make(config, num_classes)
    network = system.network.to(device, memory_format=layout)
    batch = {k: torch.from_numpy(v).to(device) for k, v in make_batch(config, num_classes).items()}
    images = batch["images"].permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels = batch["labels"].long()
    dtype = getattr(torch, config.dtype)
    loss, optimizers, finish = system.prepare(network, images[:2])
    call = torch.compile(network) if compiled else network

    def run() -> Any:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return call(images)

    def forward() -> None:
        network.eval()
        with torch.inference_mode():
            run()

    def train() -> None:
        network.train()
        total = loss(run(), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        finish()
        for optimizer in optimizers:
            optimizer.step()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return {"forward": forward, "training step": train}, wait


def make_waiting(start: Step, wait: Step) -> Step:
    """A step that is over when it returns."""

    def step() -> None:
        start()
        wait()

    return step


def make_torch_optimizers(
    config: ConfigDict, network: Any, centers: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """One optimizer of the network, of the kind of its first group, and SGD of the centers.

    Groups that differ in numbers only take the same time.
    """
    import torch

    groups = (g for g in config.optimizer.values() if g.params[0].startswith("network"))
    group = next(g for g in groups if g.kind != "frozen")
    weights = [p for p in network.parameters() if p.requires_grad]
    options = {"lr": group.lr, "weight_decay": group.get("weight_decay", 0.0)}
    if group.kind == "sgd":
        options |= {
            "momentum": group.get("momentum", 0.0),
            "nesterov": group.get("nesterov", False),
        }
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    if group.kind not in kinds:
        raise UserError(f"no optimizer {group.kind!r} for PyTorch here; --no_torch leaves it out")
    made = [kinds[group.kind](weights, **options)]
    if own := [center for of_term in centers.values() for center in of_term]:
        made.append(torch.optim.SGD(own, lr=0.5))
    return made


def measure(
    steps: Mapping[str, Steps], repeats: int, calls: int
) -> list[tuple[str, str, list[float], list[float]]]:
    """Wall and CPU seconds of each framework's steps; frameworks take turns in every repeat."""
    rows = []
    for what in ("forward", "training step"):
        walls: dict[str, list[float]] = {name: [] for name in steps}
        cpus: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name in steps:
                steps[name][what]()  # compiles; takes memory back that others had in their turn
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    steps[name][what]()
                walls[name].append((time.perf_counter() - wall) / calls)
                cpus[name].append((time.process_time() - cpu) / calls)
        rows += [(name, what, walls[name], cpus[name]) for name in steps]
    return rows


def describe(config: ConfigDict, with_torch: bool) -> str:
    """What is measured, and on what."""
    packages = ["flax"]
    threads = ""
    if with_torch:
        import torch

        packages.append("torch")
        threads = f" ({torch.get_num_threads()} threads)"
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return (
        f"{common.describe_config(config)}; {common.describe_machine(*packages)}{threads}{load}; "
        + ", ".join(f"{x}={os.environ.get(x, '')!r}" for x in ("XLA_FLAGS", "GLIBC_TUNABLES"))
    )


def make_rows(
    measured: Sequence[tuple[str, str, list[float], list[float]]], batch: int
) -> list[tuple[str, ...]]:
    """The cells of `HEADER`."""
    rows: list[tuple[str, ...]] = []
    for name, what, walls, cpus in measured:
        speed, low, high = (batch / x for x in (statistics.median(walls), max(walls), min(walls)))
        cpu = f"{statistics.median(cpus) / batch:.3f}"
        rows.append((name, what, f"{speed:.1f}", f"{low:.1f}-{high:.1f}", cpu))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--classes", type=console.count, default=751, help="identities")
    common.add_repeats(parser, 5)
    parser.add_argument("--calls", type=console.count, default=1, help="steps in a repeat")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU as well")
    parser.add_argument("--no_torch", action="store_true", help="JAX alone")
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    config.weights = "none"  # they take no other time
    # Else JAX takes three quarters of a GPU's memory at once, and PyTorch has to do with the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = list(configs.split_stages(config).values())[-1]
    there = importlib.util.find_spec(f"tests.parity.torch_{config.network.name}") is not None
    with_torch = not args.no_torch and there
    if not args.no_torch and not with_torch:
        print(f"tests/parity has no {config.network.name}: JAX alone", file=sys.stderr)

    if with_torch:
        dropouts = {name: 0.0 for name in config.network if name.endswith("dropout")}
        config.network.update(dropouts)
    steps = {"JAX": make_jax_steps(config, args.classes)}
    if with_torch:
        variants = {"PyTorch": (False, False), "PyTorch, channels last": (True, False)}
        if args.compile or jax.default_backend() == "gpu":
            variants["PyTorch, channels last, compiled"] = (True, True)
        device = find_torch_device(jax.default_backend())
        for name, (channels_last, compiled) in variants.items():
            started, wait = make_torch_steps(
                config, args.classes, device, channels_last=channels_last, compiled=compiled
            )
            steps[name] = {what: make_waiting(start, wait) for what, start in started.items()}
    measured = measure(steps, args.repeats, args.calls)
    table = common.format_table(
        HEADER, make_rows(measured, make_sampler(config.batch.to_dict()).size)
    )
    common.publish(f"{describe(config, with_torch)}\n\n{table}", args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
