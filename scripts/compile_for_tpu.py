r"""Compile a system's programs for TPUs that are not there, and say what each of them needs.

    python -m scripts.compile_for_tpu --config configs/mros.py --topology v5e:2x2 \
        --config.dtype=bfloat16

Needs libtpu (pip install 'mros_jax[tpu]') and Linux, and no TPU: nothing is run. Compiled are the
training step, the extraction of descriptors, and the searches and rankings of an evaluation, at the
published size of the config's data set. Several hosts are a larger topology, such as v5e:4x4; of
them one does extraction and search, as in a run.

The roofline is what the chip could do at best: the longer of the time for all arithmetic at peak
and for all bytes of main memory at full bandwidth. The compiler's own estimate counts cycles too.
Loops whose length the compiled text does not tell count as one round (ten crops do so on TPUs).
"""

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, inference, parallel
from mros_jax.data import augment
from mros_jax.data.batches import make_sampler
from mros_jax.data.datasets import records
from mros_jax.errors import UserError
from mros_jax.retrieval import (
    blocks,
    distances,
    gathers,
    jitted,
    metrics,
    neighbors,
    rerank,
    rescore,
)
from mros_jax.training import optimizers, recipe
from scripts import common
from scripts.hlo import Move, Program

STEPS = ("train", "extract", "search")
STORED = (128, 64)  # pixels of a stored image, as in Market-1501

# libtpu asks for these where there is no TPU; the topology decides what is compiled for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


class Chip(NamedTuple):
    """Peaks of one chip: bfloat16 FLOP/s, bytes/s of main memory, and its bytes."""

    flops: float
    bandwidth: float
    memory: float


# By `device_kind`; cloud.google.com/tpu/docs/v4, v5e, v5p and v6e ("System architecture").
CHIPS = {
    "TPU v4": Chip(275e12, 1228e9, 32 * 2**30),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * 2**30),
    "TPU v5": Chip(459e12, 2765e9, 95 * 2**30),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * 2**30),
}

HEADER = (
    *("program", "images a device", "arguments GB", "temporaries GB", "output GB"),
    *("largest batch", "TFLOP", "bytes accessed GB", "moved GB", "main memory GB"),
    *("roofline images/s", "Mcycles", "all-reduces", "all-reduced"),
)


class Job(NamedTuple):
    """A program to compile.

    Attributes:
        name: in the table.
        lower: the program for so many images a device.
        batch: images a device; 0 where there are none.
        devices: that it runs on.
        learned: numbers whose gradients the devices must share.
    """

    name: str
    lower: Callable[[int], jax.stages.Lowered]
    batch: int
    devices: int
    learned: int = 0


def find_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology such as "v5e:2x2"; they are not there.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        if "not installed" in why:
            why = "libtpu is not installed: pip install 'mros_jax[tpu]'"
        raise UserError(
            f"--topology is {topology!r}; expected one that libtpu knows, such as v5e:2x2, "
            f"v5e:4x4, v6e:2x2, v5p:2x2x1 or v4:2x2x1 ({why})"
        ) from error


def find_chip(devices: Sequence[jax.Device]) -> Chip:
    """Peaks of one device: of a chip, or its share where a chip is several devices.

    Raises:
        UserError: they are not in `CHIPS`.
    """
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise UserError(f"no peaks are known of {kind!r}; CHIPS has those of {', '.join(CHIPS)}")
    cores = len({getattr(device, "core_on_chip", 0) for device in devices})
    return Chip(*(peak / cores for peak in CHIPS[kind]))


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def find_counts(config: ConfigDict) -> dict[str, int]:
    """Published images of each split, and training identities as "classes"; Market-1501's else."""
    counts = records.find_record("market1501").counts({})
    options = records.pick_options(config.dataset.to_dict())
    own = records.find_record(config.dataset.name).counts(options)
    counts |= {name: count for name, count in own.items() if count.images is not None}
    sizes = {name: int(count.images or 0) for name, count in counts.items()}
    return sizes | {"classes": counts["train"].identities}


def make_jobs(
    config: ConfigDict, devices: Sequence[jax.Device], batch: int | None, steps: Sequence[str]
) -> Iterator[Job]:
    """The programs of these steps."""
    config = config.copy_and_resolve_references()
    config.weights = "none"
    counts = find_counts(config)
    host = [device for device in devices if device.process_index == devices[0].process_index]
    if "train" in steps:
        yield from make_trainings(config, devices, batch, counts)
    if "extract" in steps:
        yield make_extraction(config, host, batch, counts["classes"])
    if "search" in steps:
        yield from make_searches(config, host, counts)


def make_trainings(
    config: ConfigDict, devices: Sequence[jax.Device], batch: int | None, counts: dict[str, int]
) -> Iterator[Job]:
    """The training step of each stage."""
    whole = make_sampler(config.batch.to_dict()).size
    if batch is None and whole % len(devices):
        raise UserError(
            f"a batch of {whole} images cannot be split over {len(devices)} devices; say --batch"
        )
    parts = recipe.build(config, counts["classes"], steps_per_epoch=100)
    data = {
        "images": jax.ShapeDtypeStruct((counts["train"], *STORED, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((counts["train"],), jnp.int32),
    }

    def lower(stage: recipe.Stage, images: int) -> jax.stages.Lowered:
        indices = jax.ShapeDtypeStruct((len(devices), images), jnp.int32)
        state = shapes_of(stage.begin(parts.state))
        return parallel.MappedStep(stage.step, devices).lower(state, data, {"indices": indices})

    for stage, section in zip(parts.stages, configs.split_stages(config).values(), strict=True):
        yield Job(
            f"train {stage.name}".strip(),
            functools.partial(lower, stage),
            batch or whole // len(devices),
            len(devices),
            count_learned(parts.state.params, section),
        )


def count_learned(params: Any, section: ConfigDict) -> int:
    """Numbers that are not frozen in a stage."""
    groups = optimizers.make_groups(section.optimizer.to_dict())
    names = optimizers.label_params(params, groups)
    sizes = jax.tree.map(
        lambda leaf, name: 0 if groups[name].kind == "frozen" else leaf.size, params, names
    )
    return sum(jax.tree.leaves(sizes))


def make_extraction(
    config: ConfigDict, devices: Sequence[jax.Device], batch: int | None, num_classes: int
) -> Job:
    network = configs.make_network(config, num_classes)
    height, width = configs.find_size(config, config.eval)
    crop = (config.input.height, config.input.width)
    preprocess = functools.partial(
        augment.preprocess,
        height=height,
        width=width,
        interpolation=config.input.interpolation,
        **configs.find_normalization(config),
    )
    embed = inference.make_embed(network, preprocess, crop, devices)
    image = jax.ShapeDtypeStruct((1, *crop, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: network.init(key, x, train=False), jax.random.key(0), image
    )

    def lower(images: int) -> jax.stages.Lowered:
        stored = jax.ShapeDtypeStruct((len(devices), images, *STORED, 3), jnp.uint8)
        options = config.eval.flip_test, config.eval.crops
        lowered: jax.stages.Lowered = embed.lower(variables, stored, *options)
        return lowered

    return Job("extract", lower, batch or -(-config.eval.batch_size // len(devices)), len(devices))


def make_searches(
    config: ConfigDict, devices: Sequence[jax.Device], counts: dict[str, int]
) -> Iterator[Job]:
    """Programs of `mros_jax.retrieval`: a block of each that works on blocks, and whole ones."""
    network = configs.make_network(config, counts["classes"])
    features = sum(part.size for part in network.parts(*configs.find_size(config, config.eval)))
    gallery = counts["gallery"]
    both = counts["query"] + gallery
    width = 64  # matches of a query, and images that are not compared with it
    ecn = rerank.ECN(**config.eval.rerank_options.ecn.to_dict())

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def job(
        name: str, function: Callable[..., Any], rows: Sequence[Any], shared: Sequence[Any] = ()
    ) -> Job:
        return Job(name, lambda _: blocks.lower(function, rows, shared, devices), 0, len(devices))

    def block(columns: int) -> int:
        return blocks.choose_block(columns, features) * len(devices)

    for kind, (measure, _) in distances.KINDS.items():
        columns = both if kind == "similarity" else gallery
        shared = [shape(columns, features), shape(columns)]
        yield job(f"distances, {kind}", measure, [shape(block(columns), features)], shared)
    rows = block(gallery)
    lists = [shape(rows, width, dtype=jnp.int32)] * 2
    ranked = [shape(rows, gallery), *lists]
    yield job("ranks", metrics.count_ranks, ranked)
    rows = block(both)
    searched = [shape(rows, both), shape(rows, dtype=jnp.int32)]
    yield job(f"neighbors, k = {ecn.k}", neighbors.make_look(ecn.k), searched)
    orders = gathers.make_order(ecn.k, ecn.t, ecn.q)
    indices = [shape(size, dtype=jnp.int32) for size in (rows, gallery)]
    found = shape(both, ecn.list_length, dtype=jnp.int32)
    images = [shape(size, features) for size in (counts["query"], gallery)]
    shared = [*images, shape(gallery), found, indices[1]]
    yield job(f"ECN, k = {ecn.k}", orders, indices[:1], shared)
    methods = {"": None, " after ECN": ecn, " after k-reciprocal": rerank.KReciprocal()}
    for name, method in methods.items():
        lower = functools.partial(lower_evaluation, devices, counts, features, method, width)
        yield Job(f"scores{name}, one program", lower, 0, len(devices))
    aqe = rerank.AQE()
    rows = block(gallery)
    yield job(
        "expanded queries",
        lambda query, near: gathers.expand_queries(query, near, float(aqe.alpha)),
        [shape(rows, features), shape(rows, aqe.k, features)],
    )
    if hasattr(network, "fold_heads"):
        gsrw = rerank.GSRW(**config.eval.rerank_options.gsrw.to_dict())
        groups = config.network.groups
        nearest = shape(rows, gsrw.top, dtype=jnp.int32)
        heads = shape(groups, features // groups, 2), shape(groups, 2)
        yield job(
            f"walks, top = {gsrw.top}",
            rescore.make_rescore(gsrw.alpha),
            [shape(rows, features), nearest],
            [shape(gallery, features), *heads],
        )


def lower_evaluation(
    devices: Sequence[jax.Device],
    counts: dict[str, int],
    features: int,
    method: rerank.ECN | rerank.KReciprocal | None,
    most_per_pid: int,
    _: int,
) -> jax.stages.Lowered:
    """A whole evaluation as one program, each device doing a share of it."""
    whole, axis = PartitionSpec(), "rows"
    mesh = Mesh(np.asarray(devices), (axis,))
    function = functools.partial(
        jitted.evaluate, most_per_pid=most_per_pid, rerank=method, axis_name=axis
    )
    shared = jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    sizes = counts["query"], counts["gallery"]
    shapes: list[tuple[tuple[int, ...], Any]]
    shapes = [((size, features), jnp.float32) for size in sizes]
    shapes += [((size,), jnp.int32) for size in sizes * 2]
    sharding = NamedSharding(mesh, whole)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    return jax.jit(shared).lower(*arguments)


class Memory(NamedTuple):
    """Bytes that a program takes of a device's memory; `output` is what is not donated input."""

    arguments: int
    temporaries: int
    output: int


def find_memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler has planned."""
    plan: Any = compiled.memory_analysis()
    return Memory(
        plan.argument_size_in_bytes,
        plan.temp_size_in_bytes,
        plan.output_size_in_bytes - plan.alias_size_in_bytes,
    )


def describe(job: Job, chip: Chip, fit: bool) -> tuple[list[Any], str]:
    """One line of the table; and the text of the compiled program."""
    compiled = job.lower(job.batch).compile()
    text = compiled.as_text() or ""
    program = Program(text)
    moves = program.moves()
    everywhere = sum(move.size for move in Program(text, everywhere=True).moves())
    memory = find_memory(compiled)
    cost: Any = compiled.cost_analysis()
    once, repeated = program.count_products()
    flops = cost["flops"] + repeated - once
    moved = sum(move.size for move in moves)
    seconds = max(flops / chip.flops, moved / chip.bandwidth)
    reduces, shared = program.count_collectives().get("all-reduce", (0, 0))
    missing = " MISSING" if shared < job.learned and job.devices > 1 else ""
    line = [
        job.name,
        job.batch or "",
        *(f"{size / 1e9:.3f}" for size in memory),
        find_largest(job, memory, chip, fit) if job.batch else "",
        f"{flops / 1e12:.3f}",
        f"{cost['bytes accessed'] / 1e9:.2f}",
        f"{everywhere / 1e9:.2f}",
        f"{moved / 1e9:.2f}",
        f"{job.devices * job.batch / seconds:.0f}" if job.batch else "",
        f"{sum(move.cycles for move in moves) / 1e6:.2f}",
        reduces if job.learned else "",
        f"{shared / 1e6:.1f} of {job.learned / 1e6:.1f} M{missing}" if job.learned else "",
    ]
    return line, text


def find_largest(job: Job, memory: Memory, chip: Chip, fit: bool) -> str:
    """The largest batch that a device can hold.

    Without `fit` all but the arguments is taken to grow with the batch, which says less than would
    fit. With it, a compilation of half the batch makes a line through two points, and one more
    tries what the line says. A program whose temporaries all stay on the chip has no such line yet.
    """
    if not fit:
        grows = (memory.temporaries + memory.output) / job.batch
        return f">= {math.floor((chip.memory - memory.arguments) / grows)}" if grows else ""
    half = max(job.batch // 2, 1)
    small = find_memory(job.lower(half).compile())
    slope = (sum(memory) - sum(small)) / max(job.batch - half, 1)
    if slope <= 0:
        return ""
    largest = math.floor(job.batch + (chip.memory - sum(memory)) / slope)
    try:
        job.lower(largest).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"{largest} by the line; compiled, it does not fit"
    return f"{largest}, compiled"


def format_moves(program: Program, count: int) -> str:
    """Where the bytes go, most first: single instructions, and all of each kind."""
    moves = program.moves()
    whole = max(sum(move.size for move in moves), 1)
    kinds: dict[str, list[Move]] = {}
    for move in moves:
        kinds.setdefault(move.instruction.opcode, []).append(move)
    groups = [(name_source(move), move.instruction.opcode, [move]) for move in moves[:count]]
    groups += sorted(
        ((f"all {len(group)}", kind, group) for kind, group in kinds.items()),
        key=lambda row: -sum(move.size for move in row[2]),
    )[:count]
    rows = []
    for name, kind, group in groups:
        size, cycles = (sum(getattr(move, x) for move in group) for x in ("size", "cycles"))
        share = f"{100 * size / whole:.1f}"
        rows.append((name, kind, f"{size / 1e6:.1f}", share, f"{cycles / 1e3:.0f}"))
    return common.format_table(("from", "instruction", "MB", "%", "kcycles"), rows)


def name_source(move: Move) -> str:
    """The operation that an instruction comes from, without what all of them have in common."""
    name = move.instruction.source or move.instruction.name
    name = re.sub(r"transpose\(jvp\(\w+\)\)", "backward", name)
    name = re.sub(r"jvp\(\w+\)", "forward", name)
    left_out = ("jit(_fun)", "shard_map", "cond", "branch_0_fun", "transpose(jvp())", "jvp()")
    return "/".join(word for word in name.split("/") if word not in left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--topology", default="v5e:2x2", help="chips, by libtpu's names")
    parser.add_argument("--step", choices=(*STEPS, "all"), default="all", help="what to compile")
    parser.add_argument(
        "--batch", type=console.count, help="images a device; default: the config's"
    )
    parser.add_argument(
        "--fit", action="store_true", help="find the largest batch, by two more compilations"
    )
    parser.add_argument(
        "--by-fusion", type=console.count, default=0, metavar="N", help="list N largest movements"
    )
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    jax.config.update("jax_platforms", "cpu")
    devices = find_devices(args.topology)
    chip = find_chip(devices)
    steps = STEPS if args.step == "all" else (args.step,)
    lines, lists = [], []
    for job in make_jobs(config, devices, args.batch, steps):
        line, text = describe(job, chip, args.fit)
        lines.append(line)
        for memory, everywhere in (("main memory", False), ("any memory", True)):
            if args.by_fusion:
                moves = format_moves(Program(text, everywhere), args.by_fusion)
                lists.append(f"{job.name}, {memory}:\n\n{moves}")
    what = (
        f"{common.describe_config(config)}; compiled for {args.topology}, {len(devices)} x "
        f"{devices[0].device_kind}; jax {jax.__version__}"
    )
    table = common.format_table(HEADER, lines)
    common.publish("\n\n".join([what, table, *lists]), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
