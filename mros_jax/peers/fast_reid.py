"""JDAI-CV/fast-reid: BoT, and other global features of a plain ResNet.

Images are resized bicubically. Names tell releases apart: up to September 2020, and so of the
published weights, which are of v0.1.1, the neck is "bnneck" and the stem's maximum is centered;
later it is "bottleneck.0", and from November 2020 on the maximum begins with the first pixel. The
classifier is "classifier.weight", and "weight" since March 2021.
"""

from typing import Any

from mros_jax.errors import UserError
from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Peer, Plan, drop, name_resnet, refuse_foreign


def _plan(state: StateDict) -> Plan:
    refuse_foreign(state)
    neck = "heads.bnneck." if "heads.bnneck.weight" in state else "heads.bottleneck.0."
    if state[f"{neck}weight"].ndim > 1:
        raise UserError(
            "its head has an embedding layer before the neck, which no network here has"
        )
    head = next(n for n in ("heads.weight", "heads.classifier.weight") if n in state)
    changes: dict[str, Any] = {
        "input.interpolation": "bicubic",
        "network.trunk": name_resnet(state, "backbone."),
        "network.stem_pool": "centered" if neck == "heads.bnneck." else "end",
        "network.pooling": "gem" if "heads.pool_layer.p" in state else "mean",
    }
    for name in ("mean", "std"):
        if f"pixel_{name}" in state:  # of grey levels; some releases keep them with the weights
            levels = state[f"pixel_{name}"].reshape(-1)
            changes[f"input.{name}"] = tuple(round(float(level) / 255, 6) for level in levels)
    names = (
        (r"trunk\.", "backbone."),
        (r"gem\.", "heads.pool_layer."),
        (r"neck\.", neck),
        (r"classifier\.0\.", head.removesuffix("weight")),
    )
    classes = state[head].shape[0]
    return Plan("configs/strong.py", changes, names, drop(state, r"pixel_(mean|std)"), classes)


PEER = Peer(
    "JDAI-CV/fast-reid",
    (
        r"backbone\.conv1\.weight",
        r"heads\.(bnneck|bottleneck\.0)\.weight",
        r"heads\.(classifier\.)?weight",
    ),
    _plan,
)
