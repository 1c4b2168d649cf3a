"""Losses as pure functions, float32, safe at zero distance and for masked examples.

With an `axis_name` each loss is that of the *global* batch of all devices on that axis, and equal
on all of them; the mean (`lax.pmean`) of the devices' gradients is the gradient one device would
get from the whole batch.
"""

from mros_jax.losses.center import center_loss
from mros_jax.losses.classification import smoothed_cross_entropy
from mros_jax.losses.mutual import mutual_divergence
from mros_jax.losses.objective import Objective, make_objective
from mros_jax.losses.pairs import pair_cross_entropy
from mros_jax.losses.reduce import check_labels
from mros_jax.losses.triplet import batch_hard_triplet

__all__ = [
    "Objective",
    "batch_hard_triplet",
    "center_loss",
    "check_labels",
    "make_objective",
    "mutual_divergence",
    "pair_cross_entropy",
    "smoothed_cross_entropy",
]
