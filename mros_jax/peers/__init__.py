"""Trained checkpoints of other public code: one file for each code, and the one dict of them."""

from mros_jax.peers import (
    dare,
    fast_reid,
    mfbn,
    mgn,
    pcb_rpp,
    strong_baseline,
    torchreid,
    triplet_reid,
)
from mros_jax.peers.plan import Peer, Plan

__all__ = ["PEERS", "Peer", "Plan"]

# What `python -m mros_jax.import_weights --from` may say.
PEERS: dict[str, Peer] = {
    "strong-baseline": strong_baseline.PEER,
    "fast-reid": fast_reid.PEER,
    "torchreid": torchreid.PEER,
    "pcb-rpp": pcb_rpp.PEER,
    "mgn": mgn.PEER,
    "triplet-reid": triplet_reid.PEER,
    "mfbn": mfbn.PEER,
    "dare": dare.PEER,
}
