"""hsyi/Multi-granularity-Feature-Boosting-Network: MFBN by its authors."""

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.mgn import name_cut_resnet, name_shared, name_tails
from mros_jax.peers.plan import Peer, Plan


def _plan(state: StateDict) -> Plan:
    shared, squeezed = state["att1.fc.2.weight"].shape
    changes = {
        "network.trunk": name_cut_resnet(state, "backone."),
        "network.ratio": shared // squeezed,
        "network.reduced": state["reduction_0.0.weight"].shape[0],
    }
    names = (
        *name_shared("backone."),
        *name_tails({f"tail_{k}": f"p{k}" for k in (1, 2, 3)}),
        (r"attention_(\d)\.squeeze\.", r"att\1.fc.0."),
        (r"attention_(\d)\.excite\.", r"att\1.fc.2."),
        (r"reduction\.bn\.(\d)\.", r"reduction_\1.1."),
        (r"reduction\.(\d)\.", r"reduction_\1.0."),
        (r"classifier\.0\.", "fc_id_2048."),
    )
    classes = state["fc_id_2048.weight"].shape[0]
    return Plan("configs/mfbn.py", changes, names, state, classes)


PEER = Peer(
    "hsyi/Multi-granularity-Feature-Boosting-Network",
    (r"backone\.0\.weight", r"att1\.fc\.2\.weight", r"fc_id_2048\.weight"),
    _plan,
)
