"""Search for the cells of Auto-ReID: DARTS with the retrieval loss (Quan et al., ICCV 2019).

    python -m scripts.search_auto_reid --config configs/auto_reid.py:small --out runs/search
    python -m mros_jax.train --config configs/auto_reid.py:runs/search/genotype.toml \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

A network in which every edge of a cell is all operations at once, weighted, is trained on half of
the training identities; the weights of the operations on the other half, in turns of one batch each
(first order). Both have the loss balance * cross-entropy + (1 - balance) * batch-hard triplet; the
classifier is of all identities and learns in both turns. What the cells have become is written to
`genotype.toml` after every epoch. Data, batches, images, sizes of the network and terms of the loss
are the config's. Ctrl-C saves the state; the same command goes on from there.

`--compare N` then trains the genotype that was found and N random ones, all by the config's own
recipe, and scores them on the data set's queries and gallery: `compare.md`.

Of the search, rates are of public code (unofficial), as are the momentum and the schedule, cosine
down to 0.001; weight decay, clipping and the Adam of the operations' weights are DARTS's.
"""

import contextlib
import functools
import logging
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax import train as training
from mros_jax.data import store
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.losses import make_objective
from mros_jax.models.cells import CELLS, Nodes, choose_edges, draw_cell, format_cell, write_genotype
from mros_jax.runs import checkpoints, features, provenance
from mros_jax.runs.logs import Writer
from mros_jax.runs.run import Run
from mros_jax.systems.auto_reid import AutoReIDSearch
from mros_jax.training import optimizers, recipe
from mros_jax.training.feed import Sizes
from mros_jax.training.loop import Logger, Stop
from mros_jax.training.state import TrainState, make_state
from mros_jax.training.step import Step, make_train_step
from scripts import common

LAST_RATE = 0.001  # of the cosine
CLIP_NORM = 5.0
WEIGHTS = {"kind": "sgd", "momentum": 0.9, "weight_decay": 3e-4}
ALPHAS = {"kind": "adam", "b1": 0.5, "b2": 0.999, "weight_decay": 1e-3}
TURNS = ("", "validation/")  # what the halves' figures are named with in the log
Genotype = dict[str, Nodes]

log = logging.getLogger("mros_jax.search")


def halve(pids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one half of the identities, drawn by the seed, and those of the other half."""
    order = np.random.default_rng(seed).permutation(np.unique(pids))
    first = np.isin(pids, order[: (len(order) + 1) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


class Halves:
    """The training images, on the devices, and batches of either half of the identities.

    Attributes:
        data: of all images; None where batches carry theirs.
        sizes: of a batch of each half together, and steps of an epoch, one batch of each half.
        dataset: of both halves.
    """

    def __init__(self, config: ConfigDict):
        self.dataset = configs.load_dataset(config)
        images = configs.load_images(config, self.dataset.train)
        self._labels = store.labels_of(images)
        self._camids = images.split.camids
        self._rows = halve(self._labels, config.seed)
        self._sampler = make_sampler(config.batch.to_dict())
        self._seed = config.seed
        for rows in self._rows:  # refuses a half that is too small for a batch
            self._plan(rows, 0)
        steps = self._sampler.steps(self._labels[self._rows[0]])
        self.sizes = Sizes(len(TURNS) * self._sampler.size, steps, config.num_epochs * steps)
        self._placed = store.place(
            images, fraction=config.dataset.device_fraction, replicate=parallel.replicate
        )
        log.info("Training images: %s", self._placed.reason)
        self.data = self._placed.data

    def batches(self, start: int) -> Iterator[tuple[Any, ...]]:
        """A batch of each half, from a step on, without end."""
        return zip(*(self._repeat(rows, start) for rows in self._rows), strict=True)

    def _repeat(self, rows: np.ndarray, start: int) -> Iterator[Any]:
        epoch, first = divmod(start, self._sampler.steps(self._labels[rows]))
        while True:
            yield from self._placed.batches(self._plan(rows, epoch)[first:], parallel.split)
            epoch, first = epoch + 1, 0

    def _plan(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Indices of an epoch of one half."""
        labels, camids = self._labels[rows], self._camids[rows]
        plan: np.ndarray = rows[self._sampler.plan(labels, camids, seed=self._seed, epoch=epoch)]
        return plan


def take_turns(*rules: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that is one rule after another, each with a state of its own."""

    def init(params: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        return jnp.zeros((), jnp.int32), tuple(rule.init(params) for rule in rules)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count, states = state

        def take(turn: int) -> tuple[Any, tuple[Any, ...]]:
            updates, own = rules[turn].update(gradients, states[turn], params)
            return updates, (*states[:turn], own, *states[turn + 1 :])

        turns = [functools.partial(take, turn) for turn in range(len(rules))]
        updates, states = jax.lax.switch(count % len(rules), turns)
        return updates, (count + 1, states)

    return optax.GradientTransformation(init, update)


def make_search(config: ConfigDict, num_classes: int, steps: int) -> tuple[TrainState, Step]:
    """Build network, losses and optimizer.

    Args:
        config: of `make_config`.
        num_classes: training identities of both halves.
        steps: of the search, each one turn of each half.

    Returns:
        The state before the first turn, and what takes a turn, for one device.
    """
    network = AutoReIDSearch(
        num_classes=num_classes,
        cells=tuple(config.network.cells),
        width=config.network.width,
        dtype=configs.DTYPES[config.dtype],
        bn_axis_name=configs.BATCH_NORMS[config.batch_norm],
    )
    rate = config.search.lr
    weights = {**WEIGHTS, "lr": rate}

    def fall(step: Any) -> jax.Array:
        """The cosine from the first rate to the last."""
        height = (1 + jnp.cos(jnp.pi * step / steps)) / 2
        return jnp.asarray(LAST_RATE + (rate - LAST_RATE) * height, jnp.float32)

    def keep(step: Any) -> jax.Array:
        return jnp.asarray(config.search.alpha_lr, jnp.float32)

    turns = [
        {
            "weights": {"params": ("network",), **weights},
            "others": {"params": ("network/alphas",), "kind": "frozen"},
        },
        {
            "alphas": {"params": ("network/alphas",), "lr": config.search.alpha_lr, **ALPHAS},
            "classifier": {"params": ("network/classifier",), **weights},
            "others": {"params": ("network",), "kind": "frozen"},
        },
    ]
    schedules = {"weights": fall, "classifier": fall, "alphas": keep}
    rules = [
        optimizers.make_optimizer(optimizers.make_groups(sections), schedules, clip_norm=CLIP_NORM)
        for sections in turns
    ]
    optimizer = take_turns(*rules)
    step = make_train_step(
        network,
        make_objective(config.objective.to_dict()),
        optimizer,
        augment=recipe.make_augment(config),
        seed=config.seed,
    )
    images = jnp.zeros((1, config.input.height, config.input.width, 3), jnp.float32)
    init = jax.jit(functools.partial(network.init, train=False))
    return make_state(init(jax.random.key(config.seed), images), {}, optimizer), step


def read_genotype_of(params: Mapping[str, Any]) -> tuple[Genotype, float]:
    """What the cells have become; and the mean weight of an edge's strongest operation."""
    weights = {name: np.asarray(jax.nn.softmax(params["alphas"][name])) for name in CELLS}
    sure = np.mean([weights[name].max(axis=1).mean() for name in CELLS])
    return {name: choose_edges(weights[name]) for name in CELLS}, float(sure)


def search(config: ConfigDict, workdir: pathlib.Path, file: pathlib.Path) -> Genotype | None:
    """Search, or go on with a search.

    Args:
        config: of `make_config`.
        workdir: of the search's state and logs.
        file: where the genotype is written after every epoch.

    Returns:
        The genotype, None where the search was stopped.

    Raises:
        UserError: data, config or directory do not fit.
        DivergedError: the loss became NaN or infinite.
    """
    run = Run(workdir)
    run.check_free(config)
    halves = Halves(config)
    sizes = halves.sizes
    start, step = make_search(config, halves.dataset.num_classes, sizes.total_steps)
    with contextlib.ExitStack() as stack:
        fingerprint = features.fingerprint(halves.dataset)
        record = provenance.describe_run(halves.dataset, fingerprint)
        stack.enter_context(run.claim(config, record))
        saved = checkpoints.Checkpoints(run.checkpoints)
        stack.callback(saved.close)
        state = saved.restore(lambda _: start) or start
        done = int(state.step) // len(TURNS)
        last_saved = done or None
        stop = stack.enter_context(Stop())
        writer = Writer(run, done)
        stack.callback(writer.close)
        bar = console.progress(total=sizes.total_steps, initial=done, desc="search")
        logger = Logger(writer, stack.enter_context(bar), sizes)
        take_turn = parallel.MappedStep(step)
        state = parallel.replicate(state)
        batches = halves.batches(done)
        while done < sizes.total_steps and not stop.agreed:
            found: dict[str, Any] = {}
            for prefix, batch in zip(TURNS, next(batches), strict=True):
                state, metrics = take_turn(state, halves.data, batch)
                found |= {prefix + name: value for name, value in metrics.items()}
            done += 1
            logger.add(done, found)
            stop.poll(at_log_point=True)
            epoch, rest = divmod(done, sizes.steps_per_epoch)
            if rest == 0 or stop.agreed or done % config.log_every_steps == 0:
                logger.flush(last_saved)
            if rest == 0 or stop.agreed:
                saved.save(state)
                last_saved = done
            if rest == 0:
                _report(jax.device_get(state.params["network"]), epoch, config, file)
        if done < sizes.total_steps:
            log.info("Stopped after step %d; the same command goes on from there", done)
            return None
    genotype, _ = read_genotype_of(jax.device_get(state.params["network"]))
    return genotype


def _report(params: Mapping[str, Any], epoch: int, config: ConfigDict, file: pathlib.Path) -> None:
    """Write what the cells have become, and say it."""
    found, sure = read_genotype_of(params)
    made = provenance.describe()
    about = (
        f"Found by scripts/search_auto_reid.py on {config.dataset.name} after {epoch} of "
        f"{config.num_epochs} epochs, seed {config.seed}, commit {made['commit']}:\n"
        f"{made['command']}"
    )
    write_genotype(file, found, about)
    log.info("Epoch %d, mean weight of the strongest operation %.3f", epoch, sure)
    for name in CELLS:
        log.info("  %s: %s", name, format_cell(found[name]))


def compare(config: ConfigDict, found: Genotype, count: int, out: pathlib.Path) -> str | None:
    """Train the genotype and random ones by the config's recipe; returns the table.

    None where it was stopped; finished trainings are not repeated.

    Raises:
        UserError: a directory has a training by another recipe.
    """
    rows: list[tuple[str, float, float, str]] = []
    for i in range(count + 1):
        rng = np.random.default_rng([config.seed, i])
        genotype = {name: draw_cell(rng) for name in CELLS} if i else found
        label = f"random {i}" if i else "found"
        own = config.copy_and_resolve_references()
        own.network.update({name: format_cell(genotype[name]) for name in CELLS})
        name = label.replace(" ", "")
        own.name = f"auto_reid-{name}"
        own.report = False
        run = Run(out / name)
        log.info("%s: %s", label, run.path)
        run.check_free(own.lock())  # what is finished there may be of another recipe
        results = run.results if run.results_file.is_file() else training.train(own, run.path)
        if results is None:
            return None
        plain = results["results"][0]
        text = "; ".join(format_cell(genotype[name]) for name in CELLS)
        rows.append((label, 100 * plain["mAP"], 100 * plain["cmc"][0], text))
    others = [row for row in rows if row[0] != "found"]
    for title, mean in (("mean of random", statistics.mean), ("deviation", statistics.stdev)):
        if title != "deviation" or len(others) > 1:
            rows.append((title, mean(r[1] for r in others), mean(r[2] for r in others), ""))
    header = ("genotype", "mAP", "Rank-1", "normal; reduce")
    return common.format_table(header, [(r[0], f"{r[1]:.1f}", f"{r[2]:.1f}", r[3]) for r in rows])


def make_config(config: ConfigDict, *, epochs: int, balance: float, **rates: float) -> ConfigDict:
    """The config of the search from that of a training.

    Raises:
        UserError: a config of another system, or a number out of range.
    """
    if config.network.name != "auto_reid":
        raise UserError(f"the config is of {config.name}; give configs/auto_reid.py")
    if not 0 <= balance <= 1:
        raise UserError(f"--balance is {balance}; it must be from 0 to 1")
    for name, rate in rates.items():
        if not rate > 0:
            raise UserError(f"--{name} is {rate}; it must be above 0")
    config = config.copy_and_resolve_references().unlock()
    config.name = "auto_reid-search"
    config.num_epochs = epochs
    config.search = ConfigDict({"balance": balance, **rates})
    config.objective.cross_entropy.weight = balance
    config.objective.triplet.weight = 1 - balance
    for name in CELLS:
        del config.network[name]
    return config.lock()


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the search")
    parser.add_argument("--epochs", type=console.count, default=50, help="of the search")
    parser.add_argument("--balance", type=float, default=0.5, help="share of the cross-entropy")
    parser.add_argument("--lr", type=float, default=0.1, help="first rate of the weights")
    parser.add_argument("--alpha_lr", type=float, default=0.02, help="of the operations' weights")
    parser.add_argument(
        "--compare",
        type=console.count,
        default=0,
        metavar="N",
        help="train it, and N random genotypes",
    )
    config, args = common.parse_with_config(parser, argv)
    recipe.check_config(config)
    rates = {"lr": args.lr, "alpha_lr": args.alpha_lr}
    own = make_config(config, epochs=args.epochs, balance=args.balance, **rates)
    out = args.out.absolute()
    parallel.use_compilation_cache()
    file = out / "genotype.toml"
    found = search(own, out / "search", file)
    if found is None:
        return 0
    print(file)
    if args.compare:
        table = compare(config.unlock(), found, args.compare, out)
        if table is not None:
            common.publish(table, out / "compare.md")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
