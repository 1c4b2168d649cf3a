"""PCB on Market-1501: "Beyond Part Models" (Sun et al., ECCV 2018, arXiv 1711.09349).

    python -m mros_jax.train --config configs/pcb.py --workdir runs/pcb \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 77.4, Rank-1 92.3, Rank-5 97.2, Rank-10 98.2. 25,190,874 numbers to learn with ResNet-50
and 751 identities.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/pcb.py:own               an embedding of its own for each stripe
    --config configs/pcb.py:duke              on DukeMTMC-reID

The variant "own" is the network of a public reimplementation, beyond-part-models: mAP 78.5, Rank-1
92.9; 27,816,410 numbers to learn.

Each value is marked with whose it is: [P] the paper, [C] the authors' code where the paper is
silent (for the variant "own" its public code), [D] this project's default.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "own")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 25_190_874, "own": 27_816_410}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a variant and a data set."""
    variant, dataset = choose(arg, VARIANTS)
    own = variant == "own"
    config = base(dataset)
    config.name = f"pcb-{variant}" if variant else "pcb"
    config.num_epochs = 60  # [P]
    config.batch = ConfigDict({"sampler": "shuffled", "size": 64})  # [P]
    config.input.height = 384  # [P]
    config.input.width = 128  # [P]
    config.augment.flip = 0.5  # [P]
    config.augment.pad = 0  # [C]: no crop
    config.augment.erase = 0.0  # [C]: no erasing

    config.network.name = "pcb"
    config.network.trunk = "resnet50"  # [P]
    config.network.num_stripes = 6  # [P]
    config.network.last_stride = 1  # [P]
    config.network.dropout = 0.0 if own else 0.5  # [C]
    config.network.reduced = 256  # [P]
    config.network.shared_embedding = not own  # [C]
    config.network.embedding_bias = own  # [C]
    config.network.descriptor = "h" if own else "g"  # [P]: g

    config.objective = ConfigDict(
        {
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("h",),  # [P]
                "weight": 1.0,  # [P]
                "heads": "sum",  # [P]
                "smoothing": 0.0,  # [P]
            }
        }
    )
    sgd = {
        "kind": "sgd",  # [P]
        "momentum": 0.9,  # [C]
        "nesterov": not own,  # [C]
        "weight_decay": 5e-4,  # [C]
        "decay_norm_and_bias": True,  # [C]
    }
    config.optimizer = ConfigDict(
        {
            "trunk": {"params": ("network/trunk",), "lr": 0.01, **sgd},  # [P]
            "heads": {"params": ("network",), "lr": 0.1, **sgd},  # [P]
        }
    )
    config.schedule.warmup_epochs = 0  # [P]
    config.schedule.decay_epochs = (40,)  # [P]
    config.schedule.decay_factor = 0.1  # [P]
    config.eval.metric = "cosine"  # [C]
    return config
