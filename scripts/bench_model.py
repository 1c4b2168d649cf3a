"""Speed of MROS: forward and training step, JAX beside the same model in PyTorch, in one run.

    python scripts/bench_model.py                                  # ResNet-50, 384x128, float32
    python scripts/bench_model.py --batch 128 --dtype bfloat16     # on a GPU
    python scripts/bench_model.py --markdown table.md

The training step is the whole recipe's: forward, losses, backward, Adam with L2, centre update.
PyTorch runs the model of the parity tests, eagerly with both memory layouts and, on a GPU or with
`--compile`, compiled. Frameworks take turns; a row is the median of its rounds.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mros_jax import losses
from mros_jax.runs import provenance
from mros_jax.systems.mros import MROS
from mros_jax.training import optimizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "parity"))

Step = Callable[[], None]
HEADER = ("framework", "what", "images/s", "range", "CPU s/image")


def make_batch(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    shape = (arguments.batch, arguments.height, arguments.width, 3)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return images, (np.arange(arguments.batch) // 4).astype(np.int32)


def make_jax_steps(arguments: argparse.Namespace) -> dict[str, Step]:
    images, labels = (jnp.asarray(x) for x in make_batch(arguments))
    model = MROS(
        arguments.classes, arguments.setting, arguments.backbone, dtype=jnp.dtype(arguments.dtype)
    )
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    shapes = jax.eval_shape(lambda: model.apply(variables, images, train=False))
    centers = losses.init_centers(
        jax.random.key(1), arguments.classes, shapes, setting=arguments.setting
    )
    optimizer = optimizers.make_optimizer(optimizers.make_schedule(steps_per_epoch=100))
    # The training step gives its buffers away; forward keeps its own.
    own = jax.tree.map(jnp.copy, variables)
    state = [own, centers, optimizer.init(own["params"])]

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> jax.Array:
        outputs: Any = model.apply(variables, images, train=False)
        return outputs.descriptor

    def step(
        variables: Any, centers: jax.Array, moments: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, jax.Array, Any]:
        def loss(params: Any) -> Any:
            outputs, updated = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            total, _ = losses.mros_loss(outputs, labels, centers, setting=arguments.setting)
            return total, (outputs, updated["batch_stats"])

        gradients, (outputs, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(gradients, moments, variables["params"])
        params = jax.tree.map(jnp.add, variables["params"], updates)
        slope = losses.center_gradient(outputs, labels, centers, setting=arguments.setting)
        centers = optimizers.update_centers(centers, slope)
        return {"params": params, "batch_stats": stats}, centers, moments

    compiled_step = jax.jit(step, donate_argnums=(0, 1, 2))

    def train() -> None:
        state[:] = compiled_step(*state, images, labels)
        jax.block_until_ready(state)

    return {
        "forward": lambda: jax.block_until_ready(forward(variables, images)),
        "training step": train,
    }


def make_torch_steps(
    arguments: argparse.Namespace, *, channels_last: bool, compiled: bool
) -> dict[str, Step]:
    import torch
    from torch.nn import functional as F
    from torch_mros import TorchMROS

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = TorchMROS(arguments.classes, arguments.setting, arguments.backbone)
    model = model.to(device, memory_format=layout)
    images, labels = (torch.from_numpy(x).to(device) for x in make_batch(arguments))
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels = labels.long()
    dtype = getattr(torch, arguments.dtype)
    # Same-size stand-in per metric group, as in the JAX step.
    with torch.no_grad():
        groups = _torch_groups(model.eval()(images[:2]), arguments.setting)
    centers = torch.randn(len(groups), arguments.classes, groups[0].shape[1], device=device)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-3, weight_decay=5e-4)
    call = torch.compile(model) if compiled else model

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run() -> Any:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return call(images)

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            run()
        wait()

    def train() -> None:
        model.train()
        out = run()
        same = labels[:, None] == labels[None]
        eye = torch.eye(len(labels), dtype=torch.bool, device=device)
        triplet, center = torch.zeros((), device=device), torch.zeros((), device=device)
        gradient = torch.empty_like(centers)
        for i, group in enumerate(groups_of(out)):
            d = torch.cdist(group, group)
            positive = d.masked_fill(~same | eye, -torch.inf).amax(1)
            negative = d.masked_fill(same, torch.inf).amin(1)
            triplet = triplet + F.relu(positive - negative + 0.3).mean()
            difference = group - centers[i][labels]
            center = center + difference.square().sum(1).mean()
            with torch.no_grad():
                gradient[i] = 0
                gradient[i].index_add_(0, labels, -2 * difference / len(labels))
        heads = [z.float() for level in out["logits"].values() for z in level]
        cross = sum(F.cross_entropy(z, labels, label_smoothing=0.1) for z in heads) / len(heads)
        optimizer.zero_grad()
        (triplet / len(centers) + 0.0005 * center / len(centers) + cross).backward()
        optimizer.step()
        with torch.no_grad():
            centers.sub_(gradient, alpha=0.5 / len(centers))
        wait()

    def groups_of(out: Any) -> list[Any]:
        return [x.float() for x in _torch_groups(out, arguments.setting)]

    return {"forward": forward, "training step": train}


def _torch_groups(out: Any, setting: str) -> list[Any]:
    return [out["descriptor"]] if setting in ("III", "IV") else out["g"]["t4"]


def measure(
    steps: dict[str, dict[str, Step]], rounds: int, calls: int
) -> list[tuple[str, str, list[float], list[float]]]:
    """Wall and CPU seconds of each framework's steps; frameworks take turns in every round."""
    rows = []
    for what in ("forward", "training step"):
        walls: dict[str, list[float]] = {name: [] for name in steps}
        cpus: dict[str, list[float]] = {name: [] for name in steps}
        for name in steps:
            steps[name][what]()  # compilation, caches
        for _ in range(rounds):
            for name in steps:
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    steps[name][what]()
                walls[name].append((time.perf_counter() - wall) / calls)
                cpus[name].append((time.process_time() - cpu) / calls)
        rows += [(name, what, walls[name], cpus[name]) for name in steps]
    return rows


def describe(arguments: argparse.Namespace, with_torch: bool) -> str:
    packages = ["flax"]
    threads = ""
    if with_torch:
        import torch

        packages.append("torch")
        threads = f" ({torch.get_num_threads()} threads)"
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return (
        f"MROS {arguments.setting}, {arguments.backbone}, {arguments.height}x{arguments.width}, "
        f"batch {arguments.batch}, {arguments.dtype}; "
        f"{provenance.describe_machine(*packages)}{threads}{load}; "
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}"
    )


def render(rows: list[tuple[str, str, list[float], list[float]]], batch: int) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|---|---|"]
    for name, what, walls, cpus in rows:
        speed, low, high = (batch / x for x in (statistics.median(walls), max(walls), min(walls)))
        lines.append(
            f"| {name} | {what} | {speed:.1f} | {low:.1f}-{high:.1f} | "
            f"{statistics.median(cpus) / batch:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--setting", default="IV", choices=("I", "II", "III", "IV"))
    parser.add_argument("--backbone", default="resnet50", choices=("tiny", "resnet18", "resnet50"))
    parser.add_argument("--classes", type=int, default=751)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each framework")
    parser.add_argument("--calls", type=int, default=1, help="steps in a turn")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU as well")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if arguments.batch < 8 or arguments.batch % 4:
        parser.error("--batch must be a multiple of 4 and at least 8 (identities x 4 images)")

    steps = {"JAX": make_jax_steps(arguments)}
    if not arguments.no_torch:
        eager: dict[str, Any] = {"compiled": False}
        steps["PyTorch"] = make_torch_steps(arguments, channels_last=False, **eager)
        steps["PyTorch, channels last"] = make_torch_steps(arguments, channels_last=True, **eager)
        if arguments.compile or jax.default_backend() == "gpu":
            steps["PyTorch, channels last, compiled"] = make_torch_steps(
                arguments, channels_last=True, compiled=True
            )
    rows = measure(steps, arguments.rounds, arguments.calls)
    text = f"{describe(arguments, not arguments.no_torch)}\n\n{render(rows, arguments.batch)}\n"
    print(text)
    if arguments.markdown:
        temporary = arguments.markdown.with_name(arguments.markdown.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(arguments.markdown)


if __name__ == "__main__":
    main()
