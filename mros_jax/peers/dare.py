"""mileyan/DARENet: DaRe by its authors, on ResNet-50 and on DenseNet-201."""

from typing import Any

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Names, Peer, Plan, name_densenet, name_resnet


def _plan(state: StateDict) -> Plan:
    dense = "features.conv0.weight" in state
    # Stages are counted from 0 with one trunk, from 1 with the other.
    heads = [f"layer_fc{i}" for i in range(4)] if dense else [f"layer{i}_fc" for i in range(1, 5)]
    changes: dict[str, Any] = {
        "network.trunk": name_densenet(state) if dense else name_resnet(state),
        "network.reduced": state[f"{heads[0]}.0.weight"].shape[0],
        "network.embedded": state[f"{heads[0]}.4.weight"].shape[0],
    }
    names: Names = [
        (r"trunk\.", ""),
        *(
            pair
            for level, head in enumerate(heads, start=1)
            for pair in (
                (rf"norm_t{level}\.", f"avgpool{level - 1}.0."),
                (rf"reduction_t{level}\.bn\.", f"{head}.1."),
                (rf"reduction_t{level}\.", f"{head}.0."),
                (rf"embedding_t{level}\.", f"{head}.4."),
            )
        ),
        (r"fusion\.", "fusion_conv."),
    ]
    config = "configs/dare.py:densenet201" if dense else "configs/dare.py"
    return Plan(config, changes, names, state, 0)


PEER = Peer(
    "mileyan/DARENet",
    (
        r"(conv1|features\.conv0)\.weight",
        r"(layer1_fc|layer_fc0)\.4\.weight",
        r"fusion_conv\.weight",
    ),
    _plan,
)
