"""Learning-rate schedules, and groups of parameters with an optimizer each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mros_jax.errors import UserError

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def make_schedule(
    *,
    lr: float = 1e-3,
    steps_per_epoch: int,
    warmup_epochs: int = 10,
    warmup_factor: float = 0.01,
    warmup_per: Literal["epoch", "iteration"] = "epoch",
    warmup: Literal["linear", "exponential"] = "linear",
    decay: Literal["steps", "exponential", "cosine_restarts"] = "steps",
    decay_epochs: Sequence[int] = (30, 60, 90),
    decay_start: int = 0,
    decay_length: int = 1,
    decay_factor: float = 0.1,
    cycle_epochs: int = 10,
    cycle_growth: int = 2,
) -> Schedule:
    """Make the learning rate: a warm-up, then down.

    In a "linear" warm-up, epoch e (from 0) runs at lr * (warmup_factor * (1 - e/E) + e/E), E =
    `warmup_epochs`, in an "exponential" one at lr * warmup_factor^(1 - e/E); per "iteration" e is
    the fractional epoch. With decay by "steps" the rate is multiplied by `decay_factor` from each
    epoch in `decay_epochs` on; with "exponential" decay it is multiplied by
    decay_factor^((t - t0) / l) from training step t0 = `decay_start` on, l = `decay_length`. With
    "cosine_restarts" cycles follow the warm-up, the first of `cycle_epochs` epochs, each
    `cycle_growth` times as long as the one before; epoch e (from 0) of a cycle of c epochs runs at
    lr * (1 + cos(pi * e / c)) / 2 (SGDR; Loshchilov & Hutter, 2017, Eq. 5).

    Args:
        lr: the rate after warm-up (1e-3 in the paper).
        steps_per_epoch: training steps (batches) in an epoch.
        warmup_epochs: E; 0 = no warm-up.
        warmup_factor: first epoch's share of the rate.
        warmup_per: the rate changes with every "epoch" or every "iteration" of the warm-up.
        warmup: the rate grows by equal differences ("linear") or by equal ratios ("exponential").
        decay: "steps", "exponential" or "cosine_restarts".
        decay_epochs: increasing epochs, counted from 0; of "steps".
        decay_start: training step, counted from 0, up to which the rate stays; of "exponential".
        decay_length: training steps in which the rate is multiplied by the factor; of
            "exponential".
        decay_factor: of the rate at each of the epochs, or in each length.
        cycle_epochs: length of the first cycle; of "cosine_restarts".
        cycle_growth: a whole number, 1: all cycles are of one length; of "cosine_restarts".

    Returns:
        Function of the integer training step, usable under `jit`.

    Raises:
        UserError: numbers that make no schedule.
    """
    milestones = tuple(int(epoch) for epoch in decay_epochs)
    if lr <= 0 or steps_per_epoch < 1 or warmup_epochs < 0:
        raise UserError(
            f"lr {lr} must be above 0, steps_per_epoch {steps_per_epoch} at least 1 and "
            f"warmup_epochs {warmup_epochs} at least 0"
        )
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise UserError(f"decay_epochs {milestones} must be increasing epochs of 1 or more")
    if not 0 < warmup_factor <= 1 or not 0 < decay_factor <= 1:
        raise UserError(
            f"warmup_factor {warmup_factor} and decay_factor {decay_factor} must be above 0 and at "
            "most 1"
        )
    if warmup_per not in ("epoch", "iteration"):
        raise UserError(f"warmup_per is {warmup_per!r}; it must be 'epoch' or 'iteration'")
    if warmup not in ("linear", "exponential"):
        raise UserError(f"warmup is {warmup!r}; it must be 'linear' or 'exponential'")
    if decay not in ("steps", "exponential", "cosine_restarts"):
        raise UserError(
            f"decay is {decay!r}; it must be 'steps', 'exponential' or 'cosine_restarts'"
        )
    if decay != "steps" and milestones:
        raise UserError(f"decay_epochs {milestones} are of decay 'steps'; {decay!r} needs ()")
    if decay_start < 0 or decay_length < 1:
        raise UserError(
            f"decay_start {decay_start} must not be negative, and decay_length {decay_length} at "
            "least 1 training step"
        )
    if cycle_epochs < 1 or cycle_growth < 1:
        raise UserError(
            f"cycle_epochs {cycle_epochs} and cycle_growth {cycle_growth} must be 1 or more"
        )

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        epoch = step // steps_per_epoch
        passed = jnp.sum(epoch >= jnp.array(milestones, jnp.int32))
        # A table, not a power: exactly lr * decay**n in float32.
        levels = np.float32(lr) * np.float32(decay_factor) ** np.arange(len(milestones) + 1)
        rate = jnp.asarray(levels, jnp.float32)[passed]
        if decay == "exponential":
            lengths = jnp.maximum(step - decay_start, 0) / decay_length
            rate = rate * jnp.float32(decay_factor) ** lengths.astype(jnp.float32)
        elif decay == "cosine_restarts":
            done = jnp.maximum(epoch - warmup_epochs, 0)
            left = _find_rest_of_cycle(done, cycle_epochs, cycle_growth)
            # (1 + cos(pi * (1 - left))) / 2, without its cancellation near the end of a cycle.
            rate = rate * jnp.sin(jnp.float32(np.pi / 2) * left) ** 2
        if warmup_epochs == 0:
            return rate
        done = epoch if warmup_per == "epoch" else step / steps_per_epoch
        progress = jnp.minimum(done / warmup_epochs, 1.0).astype(jnp.float32)
        if warmup == "exponential":
            rate = rate * jnp.float32(warmup_factor) ** (1 - progress)
        else:
            rate = rate * (warmup_factor * (1 - progress) + progress)
        return rate

    return schedule


def _find_rest_of_cycle(epoch: Int[Array, ""], first: int, growth: int) -> Float[Array, ""]:
    """The share of its cycle that is left at an epoch: all of it at the cycle's first."""
    if growth == 1:
        start, length = epoch // first * first, jnp.asarray(first)
    else:
        largest = np.iinfo(np.int32).max
        lengths = [first]
        while sum(lengths) + lengths[-1] * growth <= largest:
            lengths.append(lengths[-1] * growth)
        starts = jnp.asarray(np.cumsum([0, *lengths[:-1]]), jnp.int32)
        cycle = jnp.sum(epoch >= starts) - 1
        start, length = starts[cycle], jnp.asarray(lengths, jnp.int32)[cycle]
    return ((start + length - epoch) / length).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Group:
    """How a group of parameters is updated.

    Attributes:
        params: paths, as "network/trunk" or "objective/center". A parameter belongs to the group
            with the longest path above it; "" is above all.
        kind: "adam" adds weight_decay * parameter to the gradient before the moments, as PyTorch's
            `Adam(weight_decay=...)` does; "adamw" decays the parameter directly (Loshchilov &
            Hutter, 2019); "sgd" as PyTorch's, decay before momentum; "frozen" changes nothing at
            all.
        lr: learning rate after warm-up, before any decay.
        scheduled: follow the run's schedule, or keep the rate.
        weight_decay: strength of the L2 term or of the decay.
        decay_norm_and_bias: decay all parameters (PyTorch's default), or only kernels.
        momentum: of "sgd".
        nesterov: of "sgd".
        b1: decay of the first moment of "adam" and "adamw".
        b1_changes: (training step, b1) of each change: from that step, counted from 0, on. The
            bias of the first moment is corrected by the present b1 alone, as where PyTorch's
            `betas` are changed.
        b2: decay of their second moment.
        eps: added to the root of their second moment.
        amsgrad: they divide by the root of the largest second moment so far (Reddi et al., 2018),
            in PyTorch's variant, see `scale_by_amsgrad`.
    """

    params: tuple[str, ...]
    kind: Literal["adam", "adamw", "sgd", "frozen"] = "adam"
    lr: float = 1e-3
    scheduled: bool = True
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True
    momentum: float = 0.0
    nesterov: bool = False
    b1: float = 0.9
    b1_changes: tuple[tuple[int, float], ...] = ()
    b2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind not in ("adam", "adamw", "sgd", "frozen"):
            raise UserError(f"kind is {self.kind!r}; expected 'adam', 'adamw', 'sgd' or 'frozen'")
        if not self.params:
            raise UserError("params names no parameters; give paths such as 'network/trunk'")
        if self.lr <= 0 or self.weight_decay < 0 or self.eps <= 0:
            raise UserError(
                f"lr {self.lr} and eps {self.eps} must be above 0, and weight_decay "
                f"{self.weight_decay} must not be negative"
            )
        if self.b1_changes:
            steps, values = zip(*self.b1_changes, strict=True)
            if self.kind not in ("adam", "adamw"):
                raise UserError(f"b1_changes is for 'adam' and 'adamw'; kind is {self.kind!r}")
            if list(steps) != sorted(set(steps)) or steps[0] < 1 or not all(map(_below_1, values)):
                raise UserError(
                    f"b1_changes is {self.b1_changes}; expected increasing steps of 1 or more, "
                    "each with a b1 from 0 to below 1"
                )
        if not all(map(_below_1, (self.momentum, self.b1, self.b2))):
            raise UserError(
                f"momentum {self.momentum}, b1 {self.b1} and b2 {self.b2} must be from 0 to below 1"
            )
        if self.nesterov and not self.momentum:
            raise UserError("nesterov needs a momentum above 0")
        if self.amsgrad and self.kind not in ("adam", "adamw"):
            raise UserError(f"amsgrad is for kind 'adam' and 'adamw'; kind is {self.kind!r}")

    def b1_at(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The decay of the first moment at a training step."""
        b1 = jnp.asarray(self.b1)
        for start, value in self.b1_changes:
            b1 = jnp.where(step < start, b1, value)
        return b1

    def make(
        self, rate: Schedule | None, by_update: Callable[[Schedule], Schedule] = lambda x: x
    ) -> optax.GradientTransformation:
        """The optax chain.

        Args:
            rate: learning rate by the number of updates so far, None where frozen.
            by_update: makes a function of the training step one of the number of updates so far.
        """
        if self.kind == "frozen" or rate is None:
            return optax.set_to_zero()
        mask = None if self.decay_norm_and_bias else is_kernel
        decay = optax.add_decayed_weights(float(self.weight_decay), mask)
        chain = [decay] if self.weight_decay else []
        if self.kind == "sgd":
            if self.momentum:
                chain.append(optax.trace(float(self.momentum), nesterov=self.nesterov))
        else:
            scale = scale_by_amsgrad if self.amsgrad else optax.scale_by_adam
            fixed = {"b2": float(self.b2), "eps": float(self.eps)}
            if self.b1_changes:
                by_b1 = optax.inject_hyperparams(lambda b1: scale(b1=b1, **fixed))
                adam = by_b1(b1=by_update(self.b1_at))
            else:
                adam = scale(b1=float(self.b1), **fixed)
            chain = [*chain, adam] if self.kind == "adam" else [adam, *chain]
        return optax.chain(*chain, optax.scale_by_learning_rate(rate))


def _below_1(value: float) -> bool:
    return 0 <= value < 1


class AmsgradState(NamedTuple):
    """State of `scale_by_amsgrad`: number of updates, both moments, the largest second moment."""

    count: Any
    mu: Any
    nu: Any
    nu_max: Any


def scale_by_amsgrad(
    *, b1: float | Float[Array, ""], b2: float, eps: float
) -> optax.GradientTransformation:
    """Rescale updates as PyTorch's `Adam(amsgrad=True)` does.

    It takes the maximum of the second moment first and corrects its bias then. optax's own corrects
    first, which lets the uncertain first steps dominate the maximum, or does not correct at all.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    def init(params: Any) -> AmsgradState:
        mu, nu, nu_max = (optax.tree.zeros_like(params) for _ in range(3))
        return AmsgradState(jnp.zeros((), jnp.int32), mu, nu, nu_max)

    def update(updates: Any, state: AmsgradState, params: Any = None) -> tuple[Any, AmsgradState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        first = optax.tree.bias_correction(mu, b1, count)
        second = optax.tree.bias_correction(nu_max, b2, count)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return scaled, AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


def make_groups(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Group]:
    """The groups that a config's `optimizer` section describes.

    Raises:
        UserError: an unknown field, or a value out of range; names it.
    """
    known = [field.name for field in dataclasses.fields(Group)]
    groups = {}
    for name, section in sections.items():
        if unknown := sorted(set(section) - set(known)):
            raise UserError(
                f"optimizer.{name} has no field {', '.join(unknown)}; there are {', '.join(known)}"
            )
        try:
            # A config read from JSON has lists for tuples.
            tuples = {"params": tuple(section.get("params", ()))}
            tuples["b1_changes"] = tuple(tuple(pair) for pair in section.get("b1_changes", ()))
            groups[name] = Group(**{**section, **tuples})
        except UserError as error:
            raise UserError(f"optimizer.{name}: {error}") from error
    return groups


def make_schedules(
    groups: Mapping[str, Group], *, steps_per_epoch: int, **schedule: Any
) -> dict[str, Schedule]:
    """Learning rate by training step of each group that moves.

    Args:
        groups: of `make_groups`.
        steps_per_epoch: training steps in an epoch.
        schedule: the other keyword arguments of `make_schedule`, for groups that are scheduled.
    """
    schedules = {}
    for name, group in groups.items():
        if group.kind == "frozen":
            continue
        own = schedule if group.scheduled else {"warmup_epochs": 0, "decay_epochs": ()}
        schedules[name] = make_schedule(lr=group.lr, steps_per_epoch=steps_per_epoch, **own)
    return schedules


def label_params(params: Any, groups: Mapping[str, Group]) -> Any:
    """The name of the group of each parameter, as a tree of the same structure.

    Args:
        params: nested dicts, `{"network": ..., "objective": ...}` (values are not looked at).
        groups: of `make_groups`.

    Raises:
        UserError: a parameter that no group or that two groups match, or a group without a
            parameter; lists what there is.
    """
    paths = {path: name for name, group in groups.items() for path in group.params}
    if len(paths) < sum(len(group.params) for group in groups.values()):
        raise UserError(f"two groups of the optimizer have the same path: {_show(groups)}")
    used: set[str] = set()

    def find(path: tuple[Any, ...], _: Any) -> str:
        words = [str(entry.key) for entry in path]
        for length in range(len(words), -1, -1):
            above = "/".join(words[:length])
            if above in paths:
                used.add(above)
                return paths[above]
        raise UserError(
            f"no group of the optimizer matches the parameter {'/'.join(words)}; the groups' "
            f"params are {_show(groups)}"
        )

    labels = jax.tree_util.tree_map_with_path(find, params)
    if not params["objective"]:
        used.add("objective")  # the terms may have no parameters, as with a weight of 0
    if idle := sorted(set(paths) - used):
        top = [f"{a}/{b}" for a in params for b in params[a]]
        raise UserError(
            f"no parameter belongs to {', '.join(map(repr, idle))} of the optimizer's group "
            f"{paths[idle[0]]}; there are {', '.join(top)}"
        )
    return labels


def stop_frozen(params: Any, groups: Mapping[str, Group]) -> Any:
    """The parameters, those of frozen groups cut off from the gradient.

    It is then 0 and not computed, and has no part in the gradient's norm.
    """
    labels = label_params(params, groups)
    return jax.tree.map(
        lambda x, name: jax.lax.stop_gradient(x) if groups[name].kind == "frozen" else x,
        params,
        labels,
    )


def _show(groups: Mapping[str, Group]) -> str:
    return "; ".join(f"{name}: {', '.join(group.params)}" for name, group in groups.items())


def make_optimizer(
    groups: Mapping[str, Group],
    schedules: Mapping[str, Schedule],
    *,
    clip_norm: float | None = None,
    accumulate_steps: int = 1,
) -> optax.GradientTransformation:
    """Make the optimizer of all parameters, `{"network": ..., "objective": ...}`.

    Args:
        groups: of `make_groups`.
        schedules: of `make_schedules`. With accumulation they are still asked for the training
            step, not for the number of updates.
        clip_norm: clip the global norm of the network's gradient (before weight decay) to this;
            None = off.
        accumulate_steps: average the gradients of this many training steps into one update.

    Returns:
        An optax transformation; `update` needs the parameters.

    Raises:
        UserError: numbers out of range; on `init`, as `label_params`.
    """
    if clip_norm is not None and clip_norm <= 0:
        raise UserError(f"clip_norm is {clip_norm}; it must be above 0 (None = no clipping)")
    if accumulate_steps < 1:
        raise UserError(f"accumulate_steps is {accumulate_steps}; it must be 1 or more")

    def by_update(schedule: Schedule) -> Schedule:
        # An update happens in the last training step of its group of steps.
        return lambda count: schedule(count * accumulate_steps + (accumulate_steps - 1))

    rules = {
        name: group.make(by_update(schedules[name]) if group.kind != "frozen" else None, by_update)
        for name, group in groups.items()
    }
    chain = optax.partition(rules, lambda params: label_params(params, groups))
    if clip_norm is not None:
        clip = optax.masked(
            optax.clip_by_global_norm(float(clip_norm)),
            {"network": True, "objective": False},
        )
        chain = optax.chain(clip, chain)
    if accumulate_steps == 1:
        return chain
    return optax.MultiSteps(chain, accumulate_steps).gradient_transformation()


def is_kernel(params: Any) -> Any:
    """Tell, for each parameter of a tree, whether it is a convolution's or classifier's kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )
