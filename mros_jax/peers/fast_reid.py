"""JDAI-CV/fast-reid: BoT, AGW and SBS on a plain ResNet.

Images are resized bicubically. Names tell releases apart: up to September 2020, and so of the
published weights, which are of v0.1.1, the neck is "bnneck" and the stem's maximum is centered;
later it is "bottleneck.0", and from November 2020 on the maximum begins with the first pixel. The
classifier is "classifier.weight", and "weight" since March 2021.
"""

from typing import Any

import numpy as np

from mros_jax.errors import UserError
from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Peer, Plan, count, drop, name_resnet

_POWER = "heads.pool_layer.p"  # of GeM


def _plan(state: StateDict) -> Plan:
    neck = "heads.bnneck." if "heads.bnneck.weight" in state else "heads.bottleneck.0."
    if state[f"{neck}weight"].ndim > 1:
        raise UserError(
            "its head has an embedding layer before the neck, which no network here has"
        )
    head = next(n for n in ("heads.weight", "heads.classifier.weight") if n in state)
    blocks = _find_non_local(state)
    if blocks and _POWER not in state:  # AGW's is a constant of its code since September 2020
        state = {**state, _POWER: np.full(1, 3.0, np.float32)}
    changes: dict[str, Any] = {
        "input.interpolation": "bicubic",
        "network.trunk": name_resnet(state, "backbone."),
        "network.stem_pool": "centered" if neck == "heads.bnneck." else "end",
        "network.non_local": tuple(blocks),
        "network.pooling": "gem" if _POWER in state else "mean",
    }
    if changes["network.pooling"] == "gem":
        changes["name"] = "fast-reid-gem"  # AGW or SBS, which their weights do not tell
    for name in ("mean", "std"):
        if f"pixel_{name}" in state:  # of grey levels; some releases keep them with the weights
            levels = state[f"pixel_{name}"].reshape(-1)
            changes[f"input.{name}"] = tuple(round(float(level) / 255, 6) for level in levels)
    names = (
        *(
            (rf"trunk\.nonlocal_{block.replace('_', '.')}\.{ours}\.", f"{place}.{theirs}.")
            for block, place in blocks.items()
            for ours, theirs in (("out", "W.0"), ("bn", "W.1"), (r"(\w+)", r"\1"))
        ),
        (r"trunk\.", "backbone."),
        (r"gem\.", "heads.pool_layer."),
        (r"neck\.", neck),
        (r"classifier\.0\.", head.removesuffix("weight")),
    )
    classes = state[head].shape[0]
    return Plan("configs/strong.py", changes, names, drop(state, r"pixel_(mean|std)"), classes)


def _find_non_local(state: StateDict) -> dict[str, str]:
    """The blocks that a non-local one follows, the last ones of their stages, and its name."""
    found: dict[str, str] = {}
    for stage in range(1, 5):
        blocks = count(state, rf"backbone\.layer{stage}\.(\d+)\.")
        first = blocks - count(state, rf"backbone\.NL_{stage}\.(\d+)\.")
        for block in range(first, blocks):
            found[f"layer{stage}_{block}"] = f"backbone.NL_{stage}.{block - first}"
    return found


PEER = Peer(
    "JDAI-CV/fast-reid",
    (
        r"backbone\.conv1\.weight",
        r"heads\.(bnneck|bottleneck\.0)\.weight",
        r"heads\.(classifier\.)?weight",
    ),
    _plan,
)
