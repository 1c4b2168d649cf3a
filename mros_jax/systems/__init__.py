"""One file for each paper's network, and the one dict of them."""

from collections.abc import Callable

from mros_jax.models.outputs import Network
from mros_jax.systems.auto_reid import AutoReID
from mros_jax.systems.dare import DaRe
from mros_jax.systems.gsrw import GSRW
from mros_jax.systems.hacnn import HACNN
from mros_jax.systems.mfbn import MFBN
from mros_jax.systems.mgn import MGN
from mros_jax.systems.mros import MROS
from mros_jax.systems.pcb import PCB
from mros_jax.systems.pcb_rpp import PCBRPP
from mros_jax.systems.spherereid import SphereReID
from mros_jax.systems.strong import StrongBaseline
from mros_jax.systems.tbn_plus import TBNPlus
from mros_jax.systems.trinet import TriNet

# What `config.network.name` may say. The rest of the section are the module's fields.
NETWORKS: dict[str, Callable[..., Network]] = {
    "auto_reid": AutoReID,
    "dare": DaRe,
    "gsrw": GSRW,
    "hacnn": HACNN,
    "mfbn": MFBN,
    "mgn": MGN,
    "mros": MROS,
    "pcb": PCB,
    "pcb_rpp": PCBRPP,
    "spherereid": SphereReID,
    "strong": StrongBaseline,
    "tbn_plus": TBNPlus,
    "trinet": TriNet,
}
