"""The losses of MROS as pure functions, float32, safe at zero distance and for masked examples.

Total loss (paper, Section 3.3): L = L_triplet + beta * L_centre + L'_cross.

With an `axis_name` each loss is that of the *global* batch of all devices on that axis, and equal
on all of them; the mean (`lax.pmean`) of the devices' gradients is the gradient one device would
get from the whole batch.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from mros_jax.systems.mros import SETTINGS, MROSOutputs

Reduction = Literal["mean", "sum"]
_Scalar = Float[Array, ""]
_Mask = Bool[Array, "B"] | None


def batch_hard_triplet(
    features: Float[Array, "B D"],
    labels: Int[Array, "B"],
    *,
    margin: float | int | None = 0.3,
    reduction: Reduction = "mean",
    mask: _Mask = None,
    axis_name: str | None = None,
) -> _Scalar:
    """Triplet loss with the hardest positive and negative of the batch (paper, Eq. 1).

    Per anchor: max(0, margin + max_p ||a - p|| - min_n ||a - n||), Euclidean, not squared; where
    the distance is 0 its gradient is 0. An anchor is not its own positive. Anchors without a
    positive or without a negative, and masked examples, contribute nothing.

    Args:
        features: (B, D) descriptors.
        labels: (B,) identities.
        margin: of the hinge; None = soft margin, log(1 + exp(d_p - d_n)) (Hermans et al., 2017).
        reduction: "mean" over the valid anchors, or their "sum" (as Eq. 1 is written).
        mask: (B,), True where the example takes part.
        axis_name: mine over the global batch of this axis.

    Returns:
        The loss; 0 if no anchor is valid.

    Raises:
        ValueError: shapes that do not fit, or another reduction.
    """
    _check_batch(features, labels, mask, "features", rank=2)
    _check_reduction(reduction)
    features, labels, mask = _gather((features, labels, mask), axis_name)
    features = _keep(_wide(features), mask)
    positive, negative, valid = _mine(lax.stop_gradient(features), labels, mask)
    # Only mined pairs are measured, by their difference: no cancellation, no B x B gradient.
    hardest_positive = _distance(features, features[positive])
    hardest_negative = _distance(features, features[negative])
    gap = hardest_positive - hardest_negative
    loss = jax.nn.softplus(gap) if margin is None else jax.nn.relu(gap + margin)
    return _reduce(loss, valid, reduction)


def center_loss(
    features: Float[Array, "B D"],
    labels: Int[Array, "B"],
    centers: Float[Array, "N D"],
    *,
    reduction: Reduction = "mean",
    mask: _Mask = None,
    axis_name: str | None = None,
) -> _Scalar:
    """Squared distance of each descriptor to the centre of its identity (paper, Eq. 2).

    Args:
        features: (B, D) descriptors.
        labels: (B,) identities, 0..N-1; another value gives NaN (see `check_labels`).
        centers: (N, D).
        reduction: "mean" of the squared distances (what public code computes), or half their
            "sum" (as Eq. 2 is written).
        mask: (B,), True where the example takes part.
        axis_name: reduce over the global batch of this axis.

    Returns:
        The loss; 0 if every example is masked.

    Raises:
        ValueError: shapes that do not fit, or another reduction.
    """
    _check_batch(features, labels, mask, "features", rank=2)
    _check_reduction(reduction)
    if centers.ndim != 2 or centers.shape[1] != features.shape[1]:
        raise ValueError(
            f"centers have shape {centers.shape}; expected (N, {features.shape[1]}) for features "
            f"of shape {features.shape}"
        )
    features, labels, mask = _gather((features, labels, mask), axis_name)
    own = _take_rows(_wide(centers), labels, mask)  # (B, D)
    squared = jnp.sum(jnp.square(_keep(_wide(features), mask) - own), axis=1)
    loss = _reduce(squared, mask, reduction)
    return loss if reduction == "mean" else loss / 2


def smoothed_cross_entropy(
    logits: Float[Array, "B *heads N"],
    labels: Int[Array, "B"],
    *,
    smoothing: float | int = 0.1,
    mask: _Mask = None,
    axis_name: str | None = None,
) -> _Scalar:
    """Cross-entropy with label smoothing, (1 - eps) * onehot + eps / N (paper, Eq. 3 and 4).

    Args:
        logits: (B, N) or (B, S, N): the mean is taken over examples and heads.
        labels: (B,) identities, 0..N-1; another value gives NaN (see `check_labels`).
        smoothing: eps, from 0 to 1.
        mask: (B,), True where the example takes part.
        axis_name: mean over the global batch of this axis.

    Returns:
        The loss; 0 if every example is masked.

    Raises:
        ValueError: shapes that do not fit, or eps outside 0..1.
    """
    _check_batch(logits, labels, mask, "logits")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}; it must be from 0 to 1")
    log_p = jax.nn.log_softmax(_keep(_wide(logits), mask), axis=-1)
    log_p = log_p.reshape(log_p.shape[0], -1, log_p.shape[-1])  # (B, S, N)
    index = _index(labels, mask, log_p.shape[-1])[:, None, None]
    own = jnp.take_along_axis(log_p, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    loss = -(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1)  # (B, S)
    # Logits are not gathered: sums of scalars are enough here.
    return _reduce(jnp.mean(loss, axis=1), mask, "mean", axis_name)


def mros_loss(
    outputs: MROSOutputs,
    labels: Int[Array, "B"],
    centers: Float[Array, "M N D"],
    *,
    setting: str = "IV",
    beta: float | int = 0.0005,
    margin: float | int | None = 0.3,
    smoothing: float | int = 0.1,
    triplet_reduction: Reduction = "mean",
    center_reduction: Reduction = "mean",
    axis_name: str | None = None,
    mask: _Mask = None,
) -> tuple[_Scalar, dict[str, _Scalar]]:
    """Total loss of a setting and its unweighted parts.

    Settings I and II take triplet and centre loss of each local g and average them over the
    stripes; III and IV take them of G, the concatenation. Cross-entropy is the mean over all
    stripe classifiers.

    Args:
        outputs: of `MROS.apply`.
        labels: (B,) identities, 0..N-1.
        centers: (M, N, D) of `init_centers`.
        setting: "I" to "IV".
        beta: weight of the centre loss.
        margin: of the triplet loss; None = soft margin.
        smoothing: of the labels.
        triplet_reduction: see `batch_hard_triplet`.
        center_reduction: see `center_loss`.
        axis_name: the losses see the global batch of this axis.
        mask: (B,), True where the example takes part.

    Returns:
        The total, and {"triplet", "center", "cross_entropy"}.

    Raises:
        ValueError: shapes that do not fit each other or the setting.
    """
    features, labels_all, mask_all = _metric_inputs(outputs, labels, mask, setting, axis_name)
    _check_centers(centers, features)

    def metric_losses(x: Array, c: Array) -> tuple[Array, Array]:
        triplet = batch_hard_triplet(
            x, labels_all, margin=margin, reduction=triplet_reduction, mask=mask_all
        )
        return triplet, center_loss(x, labels_all, c, reduction=center_reduction, mask=mask_all)

    triplets, center_losses = jax.vmap(metric_losses)(features, centers)
    logits = jnp.concatenate([outputs.logits[level] for level in SETTINGS[setting].levels], axis=1)
    if logits.shape[-1] != centers.shape[1]:
        raise ValueError(
            f"the model has {logits.shape[-1]} classes and there are centers of {centers.shape[1]}"
        )
    parts = {
        "triplet": jnp.mean(triplets),
        "center": jnp.mean(center_losses),
        "cross_entropy": smoothed_cross_entropy(
            logits, labels, smoothing=smoothing, mask=mask, axis_name=axis_name
        ),
    }
    return parts["triplet"] + beta * parts["center"] + parts["cross_entropy"], parts


def center_gradient(
    outputs: MROSOutputs,
    labels: Int[Array, "B"],
    centers: Float[Array, "M N D"],
    *,
    setting: str = "IV",
    center_reduction: Reduction = "mean",
    axis_name: str | None = None,
    mask: _Mask = None,
) -> Float[Array, "M N D"]:
    """Gradient of the *unweighted* centre loss by the centres, for `optimizers.update_centers`.

    Arguments as in `mros_loss`. With `axis_name` it is the global batch's, equal on all devices:
    it needs no further reduction.
    """
    features, labels, mask = _metric_inputs(outputs, labels, mask, setting, axis_name)
    _check_centers(centers, features)

    def loss(c: Array) -> Array:
        one = jax.vmap(
            lambda x, y: center_loss(x, labels, y, reduction=center_reduction, mask=mask)
        )
        return jnp.mean(one(features, c))

    return jax.grad(loss)(_wide(centers))


def init_centers(
    key: PRNGKeyArray, num_classes: int, outputs: MROSOutputs, *, setting: str = "IV"
) -> Float[Array, "M N D"]:
    """Draw the class centres from N(0, 1).

    Args:
        key: random key.
        num_classes: N.
        outputs: of `MROS.apply`, or only their shapes (`jax.eval_shape`).
        setting: "I" to "IV".

    Returns:
        (M, N, D): M = 1 centre of G per class in settings III and IV, M = S local ones in I and II.
    """
    _check_setting(setting)
    if SETTINGS[setting].local_metric:
        _, groups, dims = outputs.g[SETTINGS[setting].levels[0]].shape
    else:
        groups, dims = 1, outputs.descriptor.shape[-1]
    return jax.random.normal(key, (groups, num_classes, dims), jnp.float32)


def check_labels(labels: Shaped[np.ndarray | Array, "..."], num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1; on the host, where compiled code cannot raise.

    Raises:
        ValueError: naming the first bad label and its place.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; expected whole numbers (int32)")
    bad = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"label {labels[first]} at {first if len(first) > 1 else first[0]} is not in "
            f"0..{num_classes - 1} ({len(bad)} bad of {labels.size}); "
            f"relabel the identities, or set num_classes to what they are"
        )


def check_finite(**arrays: Shaped[np.ndarray | Array, "..."]) -> None:
    """Refuse NaN and Inf in named arrays; on the host, where compiled code cannot raise.

    Raises:
        ValueError: naming the array, how many of its values are bad, and the first one's place.
    """
    for name, array in arrays.items():
        bad = ~np.isfinite(np.asarray(array))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name} of shape {bad.shape} has {int(bad.sum())} values that are NaN or "
                f"infinite, the first at {first}; look at the input images, the loaded weights "
                "and the learning rate"
            )


def _mine(
    features: Float[Array, "B D"], labels: Int[Array, "B"], mask: _Mask
) -> tuple[Int[Array, "B"], Int[Array, "B"], Bool[Array, "B"]]:
    """Indices of each example's farthest positive and nearest negative, and whether it has both."""
    # Distances do not change with the origin; a near one keeps rounding errors small.
    x = features - jnp.mean(features, axis=0)
    norms = jnp.sum(jnp.square(x), axis=1)
    squared = norms[:, None] + norms[None, :] - 2 * jnp.matmul(x, x.T, precision="highest")
    same = labels[:, None] == labels[None, :]
    usable = jnp.ones_like(same) if mask is None else mask[:, None] & mask[None, :]
    positives = same & usable & ~jnp.eye(len(labels), dtype=bool)
    negatives = ~same & usable
    positive = jnp.argmax(jnp.where(positives, squared, -jnp.inf), axis=1)
    negative = jnp.argmin(jnp.where(negatives, squared, jnp.inf), axis=1)
    return positive, negative, positives.any(axis=1) & negatives.any(axis=1)


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32, whatever the compute dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _distance(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> Float[Array, "B"]:
    """Euclidean distance of rows; its gradient is 0 where it is 0 (two `where`: never NaN)."""
    squared = jnp.sum(jnp.square(a - b), axis=1)
    zero = squared == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))


def _reduce(
    losses: Float[Array, "B"], valid: _Mask, reduction: Reduction, axis_name: str | None = None
) -> _Scalar:
    valid = jnp.ones(losses.shape, bool) if valid is None else valid
    total, count = jnp.sum(jnp.where(valid, losses, 0.0)), jnp.sum(valid)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1) if reduction == "mean" else total


def _keep(x: Float[Array, "B *rest"], mask: _Mask) -> Float[Array, "B *rest"]:
    """Zero in place of masked examples, so that a NaN there spoils neither value nor gradient."""
    return x if mask is None else jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def _index(labels: Int[Array, "B"], mask: _Mask, num_classes: int) -> Int[Array, "B"]:
    """Masked labels as 0; negative ones as N, which `fill` turns into NaN (they would wrap)."""
    labels = labels if mask is None else jnp.where(mask, labels, 0)
    return jnp.where(labels < 0, num_classes, labels)


def _take_rows(
    rows: Float[Array, "N D"], labels: Int[Array, "B"], mask: _Mask
) -> Float[Array, "B D"]:
    index = _index(labels, mask, len(rows))
    return _keep(rows.at[index].get(mode="fill", fill_value=jnp.nan), mask)


def _gather(
    arrays: tuple[Array, Array, Array | None], axis_name: str | None
) -> tuple[Array, Array, Array | None]:
    if axis_name is None:
        return arrays
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, axis=0, tiled=True), arrays)


def _metric_inputs(
    outputs: MROSOutputs,
    labels: Int[Array, "B"],
    mask: _Mask,
    setting: str,
    axis_name: str | None,
) -> tuple[Float[Array, "M G D"], Int[Array, "G"], Bool[Array, "G"] | None]:
    """What triplet and centre loss look at, of the global batch: local g's (M = S) or G (M = 1)."""
    _check_setting(setting)
    missing = [level for level in SETTINGS[setting].levels if level not in outputs.logits]
    if missing:
        raise ValueError(
            f"setting {setting} needs levels {SETTINGS[setting].levels}, the model gave "
            f"{tuple(outputs.logits)}; train with the setting the model was made for"
        )
    _check_batch(outputs.descriptor, labels, mask, "descriptor", rank=2)
    if SETTINGS[setting].local_metric:
        local = outputs.g[SETTINGS[setting].levels[0]]  # (B, S, C)
    else:
        local = outputs.descriptor[:, None]  # (B, 1, D)
    local, labels, mask = _gather((local, labels, mask), axis_name)
    return jnp.moveaxis(local, 1, 0), labels, mask


def _check_batch(
    values: Array, labels: Array, mask: _Mask, name: str, rank: int | None = None
) -> None:
    if values.ndim < 2 or (rank is not None and values.ndim != rank):
        raise ValueError(f"{name} have shape {values.shape}; expected {rank or '2 or more'} axes")
    if labels.shape != values.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}; expected {values.shape[:1]}")
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(f"mask has shape {mask.shape}; expected {labels.shape}")


def _check_centers(centers: Array, features: Array) -> None:
    groups, _, dims = features.shape
    if centers.ndim != 3 or (centers.shape[0], centers.shape[2]) != (groups, dims):
        raise ValueError(
            f"centers have shape {centers.shape}; expected ({groups}, N, {dims}) "
            "(init_centers makes them for a setting)"
        )


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")


def _check_setting(setting: str) -> None:
    if setting not in SETTINGS:
        raise ValueError(f"setting is {setting!r}; it must be one of {tuple(SETTINGS)}")
