"""SphereReID on Market-1501: "Deep Hypersphere Manifold Embedding" (Fan et al., JVCIR 2019).

    python -m mros_jax.train --config configs/spherereid.py --workdir runs/spherereid \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper (arXiv 1807.00537): mAP 83.6, Rank-1 94.4, Rank-5 98.0, Rank-10 98.7.
26,381,376 numbers to learn with ResNet-50 and 751 identities.

An argument after a colon picks a data set:

    --config configs/spherereid.py:duke       on DukeMTMC-reID

Each value is marked with whose it is: [P] the paper, [C] a public reimplementation (CoinCheung,
mAP 83.0, Rank-1 93.1) where the paper is silent, [D] this project's default.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("",)
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 26_381_376}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` may name a data set."""
    _, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = "spherereid"
    # [P]. The paper does not say how long an epoch is; [D]: all images once, 202 steps here.
    config.num_epochs = 140
    config.batch.identities = 16  # [P]
    config.batch.images = 4  # [P]
    config.input.height = 256  # [P]
    config.input.width = 128  # [P]
    config.augment.resize = (288, 144)  # [P]
    config.augment.flip = 0.5  # [C]
    config.augment.pad = 0  # [P]
    config.augment.erase = 0.0  # [P]

    config.network.name = "spherereid"
    config.network.trunk = "resnet50"  # [P]
    config.network.last_stride = 2  # [P]; 1 is among the additions of [C]
    config.network.dropout = 0.5  # [P]
    config.network.embedded = 1024  # [P]
    config.network.scale = 14.0  # [C]

    config.objective = ConfigDict(
        {
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("e",),  # [P]
                "weight": 1.0,  # [P]
                "smoothing": 0.0,  # [P]
                "share": 1.0,  # [P]; [C] takes the worst 0.8 of the batch
            }
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [P]
                "lr": 1e-3,  # [P]
                "weight_decay": 0.0,  # [C]
                "b2": 0.999,  # [D]; the paper calls 0.99 the default, which it is not
            }
        }
    )
    config.schedule.warmup_epochs = 20  # [P]: from 5e-5
    config.schedule.warmup_factor = 0.05  # [P]
    config.schedule.warmup = "linear"  # [P]; [C]: exponential from 1e-5
    config.schedule.decay_epochs = (80, 100)  # [P]
    config.schedule.decay_factor = 0.1  # [P]
    config.eval.resize = (288, 144)  # [C]: the whole image in that size; (): 256 x 128
    config.eval.metric = "cosine"  # [P]
    return config
