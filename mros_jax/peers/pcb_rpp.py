"""syfafterzy/PCB_RPP_for_reID: PCB and PCB with refined part pooling by their authors.

Each part's 2,048 numbers come before those of the next here; there the parts of a channel are
neighbours. Distances are the same.
"""

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Peer, Plan, count, drop, name_resnet


def _plan(state: StateDict) -> Plan:
    refined = "local_mask.weight" in state
    changes = {
        "network.trunk": name_resnet(state, "base."),
        "network.num_stripes": count(state, r"instance(\d+)\."),
        "network.reduced": state["local_conv.weight"].shape[0],
    }
    names = (
        (r"trunk\.", "base."),
        (r"embedding\.bn\.", "feat_bn2d."),
        (r"embedding\.", "local_conv."),
        (r"part_classifier\.", "local_mask."),
        (r"classifier\.(\d+)\.", r"instance\1."),
    )
    config = "configs/pcb_rpp.py:authors" if refined else "configs/pcb.py"
    # ImageNet's classifier is still in the trunk, unused.
    rest = drop(state, r"base\.fc\.(weight|bias)")
    return Plan(config, changes, names, rest, state["instance0.weight"].shape[0])


PEER = Peer(
    "syfafterzy/PCB_RPP_for_reID",
    (r"base\.conv1\.weight", r"local_conv\.weight", r"instance0\.weight"),
    _plan,
)
