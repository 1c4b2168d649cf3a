"""KaiyangZhou/deep-person-reid (Torchreid): resnet*, resnet50_fc512, densenet*, pcb_p*, hacnn.

Descriptors are compared as they are, by Euclidean distance. The plain networks are no paper's
system and are called by their names there.
"""

from typing import Any

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Names, Peer, Plan, count, name_densenet, name_resnet

_RAW: dict[str, Any] = {"eval.metric": "euclidean", "eval.normalize": False}


def _plan(state: StateDict) -> Plan:
    if "ha1.hard_attn.fc.weight" in state:
        return _plan_hacnn(state)
    if "conv5.layers.0.weight" in state:
        return _plan_pcb(state)
    return _plan_global(state)


def _plan_global(state: StateDict) -> Plan:
    """A trunk, global average pooling, perhaps a linear layer, and a classifier."""
    dense = "features.conv0.weight" in state
    trunk = name_densenet(state) if dense else name_resnet(state)
    embedded = "fc.0.weight" in state
    name = f"torchreid-{trunk}"
    names: Names = ((r"trunk\.", ""), (r"classifier\.0\.", "classifier."))
    classes = state["classifier.weight"].shape[0]
    if not embedded:
        changes = {
            "name": name,
            "network.trunk": trunk,
            "network.last_stride": 2,
            "network.neck": False,
            "network.head_bias": True,
            "network.descriptor": "f_i",
        }
        return Plan("configs/strong.py", changes | _RAW, names, state, classes)
    # The linear layer is that of PCB with one stripe.
    features = state["fc.0.weight"].shape[0]
    changes = {
        "name": f"{name}_fc{features}",
        "input.height": 256,
        "input.width": 128,
        "network.trunk": trunk,
        "network.last_stride": 2 if dense else 1,
        "network.num_stripes": 1,
        "network.dropout": 0.0,
        "network.reduced": features,
        "network.embedding_bias": True,
        "network.descriptor": "h",
    }
    names = (*names, (r"embedding\.bn\.", "fc.1."), (r"embedding\.", "fc.0."))
    return Plan("configs/pcb.py", changes | _RAW, names, state, classes)


def _plan_pcb(state: StateDict) -> Plan:
    changes = {
        "network.trunk": name_resnet(state),
        "network.num_stripes": count(state, r"classifier\.(\d+)\."),
        "network.reduced": state["conv5.layers.0.weight"].shape[0],
    }
    names = (
        (r"trunk\.", ""),
        (r"embedding\.bn\.", "conv5.layers.1."),
        (r"embedding\.", "conv5.layers.0."),
    )
    classes = state["classifier.0.weight"].shape[0]
    return Plan("configs/pcb.py", changes | _RAW, names, state, classes)


def _plan_hacnn(state: StateDict) -> Plan:
    levels = (1, 2, 3)
    changes = {
        "network.stem": state["conv.conv.weight"].shape[0],
        "network.widths": tuple(state[f"ha{i}.hard_attn.fc.weight"].shape[1] for i in levels),
        "network.embedded": state["fc_global.0.weight"].shape[0],
    }

    def streams(ours: str, theirs: str) -> Names:
        """The blocks of an Inception, counted from 1 here and from 0 there."""
        kinds = (("short", "1"), ("long", "2"), (r"chain(\d)", r"\2"))
        steps = [
            (rf"{ours}\.{kind}_{step}\.", rf"{theirs}.stream{number}.{step - 1}.")
            for kind, number in kinds
            for step in (1, 2, 3)
        ]
        return steps

    names: Names = (
        (r"stem\.", "conv."),
        (r"inception(\d)_a\.pool\.", r"inception\1.0.stream4.1."),
        (r"inception(\d)_b\.pool\.", r"inception\1.1.stream3.1."),
        (r"local(\d)\.pool\.", r"local_conv\1.stream3.1."),
        *streams(r"inception(\d)_a", r"inception\1.0"),
        *streams(r"inception(\d)_b", r"inception\1.1"),
        *streams(r"local(\d)", r"local_conv\1"),
        (r"hard(\d)\.linear\.", r"ha\1.hard_attn.fc."),
        (r"soft(\d)\.place_(\d)\.", r"ha\1.soft_attn.spatial_attn.conv\2."),
        (r"soft(\d)\.channel_(\d)\.", r"ha\1.soft_attn.channel_attn.conv\2."),
        (r"soft(\d)\.join\.", r"ha\1.soft_attn.conv."),
        (r"embedding_(\w+)\.bn\.", r"fc_\1.1."),
        (r"embedding_(\w+)\.", r"fc_\1.0."),
        (r"classifier_(\w+)\.0\.", r"classifier_\1."),
    )
    classes = state["classifier_global.weight"].shape[0]
    return Plan("configs/hacnn.py", changes, names, state, classes)


PEER = Peer(
    "KaiyangZhou/deep-person-reid",
    (
        r"(conv1|features\.conv0|conv\.conv)\.weight",
        r"classifier(_global|\.0)?\.weight",
    ),
    _plan,
)
