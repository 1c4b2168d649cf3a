"""TriNet on Market-1501: "In Defense of the Triplet Loss" (Hermans et al., 2017, 1703.07737).

    python -m mros_jax.train --config configs/trinet.py --workdir runs/trinet \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 69.14, Rank-1 84.92, with ten crops at test and the average precision of Market-1501's
MATLAB code. 25,738,432 numbers to learn with ResNet-50, whatever the number of identities.

An argument after a colon picks a data set:

    --config configs/trinet.py:duke           on DukeMTMC-reID

Each value is marked with whose it is: [P] the paper, [M] remembered of it and not looked up, [C]
the authors' code (triplet-reid) where the paper is silent, [D] this project's default.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("",)
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 25_738_432}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` may name a data set."""
    _, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = "trinet"
    config.num_steps = 25_000  # [P]; 139.7 epochs of 179 steps
    config.batch.identities = 18  # [P]
    config.batch.images = 4  # [P]
    config.input.height = 256  # [P]
    config.input.width = 128  # [P]
    config.augment.resize = (288, 144)  # [P]
    config.augment.flip = 0.5  # [P]
    config.augment.pad = 0  # [P]
    config.augment.erase = 0.0  # [P]

    config.network.name = "trinet"
    config.network.trunk = "resnet50"  # [P]
    config.network.last_stride = 2  # [P]
    config.network.reduced = 1024  # [P]
    config.network.embedded = 128  # [P]

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": ("e",),  # [P]
                "weight": 1.0,  # [P]
                "soft_margin": True,  # [P]
            }
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [P]
                "lr": 3e-4,  # [P]
                "weight_decay": 0.0,  # [C]
                "b1": 0.9,  # [P]
                "b1_changes": ((15_000, 0.5),),  # [M]; [C]: ()
                "eps": 1e-8,  # [P]
            }
        }
    )
    config.schedule.warmup_epochs = 0  # [P]
    config.schedule.decay = "exponential"  # [P]
    config.schedule.decay_start = 15_000  # [P]
    config.schedule.decay_length = 10_000  # [P]: to the end of the run
    config.schedule.decay_factor = 0.001  # [P]
    config.eval.resize = (288, 144)  # [P]
    config.eval.crops = "ten"  # [P]
    config.eval.metric = "euclidean"  # [P]
    config.eval.normalize = False  # [P]
    config.eval.ap = "trapezoid"  # [P]
    return config
