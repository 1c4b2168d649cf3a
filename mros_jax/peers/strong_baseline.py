"""michuanhaohao/reid-strong-baseline: the bag of tricks by its authors (Luo et al., 2019).

Its ResNet lacks the ReLU after the first batch normalization. Without BNNeck the classifier has a
bias and the pooled feature is the descriptor.
"""

from typing import Any

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Peer, Plan, name_resnet


def _plan(state: StateDict) -> Plan:
    neck = "bottleneck.weight" in state
    changes: dict[str, Any] = {
        "network.trunk": name_resnet(state, "base."),
        "network.neck": neck,
        "network.head_bias": not neck,
        "network.descriptor": "f_i",
    }
    names = (
        (r"trunk\.", "base."),
        (r"neck\.", "bottleneck."),
        (r"classifier\.0\.", "classifier."),
    )
    classes = state["classifier.weight"].shape[0]
    return Plan("configs/strong.py:authors", changes, names, state, classes)


PEER = Peer(
    "michuanhaohao/reid-strong-baseline",
    (r"base\.conv1\.weight", r"base\.layer4\..*", r"classifier\.weight"),
    _plan,
)
