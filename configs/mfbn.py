"""MFBN on Market-1501: multi-granularity feature boosting network (He et al., 2019).

    python -m mros_jax.train --config configs/mfbn.py --workdir runs/mfbn \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

The authors' repository prints no numbers; MROS's paper has mAP 84.9, Rank-1 93.9, re-ranked 93.2,
95.2. 71,136,431 numbers to learn with ResNet-50 and 751 identities.

An argument after a colon names a data set:

    --config configs/mfbn.py:duke             on DukeMTMC-reID

The repository's figure multiplies the attended maps of the branches and has 6 vectors; its code,
which goes with its weights, adds them and has 8. This is the code.

Each value is marked with whose it is: [C] the authors' code
(hsyi/Multi-granularity-Feature-Boosting-Network), [D] this project's default. Of the code's epoch
one thing is not here: its last batch, of the 15 identities that are left, is dropped [D].
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("",)
NUM_PARAMETERS = {"": 71_136_431}  # numbers to learn in the network, for 751 identities


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` may name a data set."""
    _, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = "mfbn"
    config.num_epochs = 600  # [C]
    config.batch.sampler = "identities_once"  # [C]
    config.batch.identities = 16  # [C]
    config.batch.images = 4  # [C]
    config.input.height = 384  # [C]
    config.input.width = 128  # [C]
    config.input.interpolation = "bicubic"  # [C]
    config.augment.flip = 0.5  # [C]
    config.augment.pad = 20  # [C]
    config.augment.erase = 0.5  # [C]
    config.augment.erase_area = (0.02, 0.4)  # [C]
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # [C]
    config.augment.erase_fill = "mean"  # [C]
    config.batch_norm = "per_device"  # [C]: of 32 images on each of two GPUs

    config.network.name = "mfbn"
    config.network.trunk = "resnet50"  # [C]
    config.network.stripes = (1, 2, 3)  # [C]
    config.network.ratio = 8  # [C]
    config.network.reduced = 256  # [C]

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": ("descriptor",),  # [C]
                "weight": 2.0,  # [C]
                "margin": 1.2,  # [C]
                "soft_margin": False,  # [C]
                "reduction": "mean",  # [C]
            },
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("global",),  # [C]
                "weight": 1.0,  # [C]
                "smoothing": 0.0,  # [C]
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [C]
                "amsgrad": True,  # [C]
                "lr": 2e-3,  # [C]
                "weight_decay": 5e-4,  # [C]
                "decay_norm_and_bias": True,  # [C]
            }
        }
    )
    # A tenth of the rate more with each of the first ten epochs, whose last begins the first cycle.
    config.schedule.warmup_epochs = 9  # [C]
    config.schedule.warmup_factor = 0.1  # [C]
    config.schedule.decay = "cosine_restarts"  # [C]
    config.schedule.cycle_epochs = 10  # [C]
    config.schedule.cycle_growth = 2  # [C]
    config.eval.flip_test = True  # [C]
    config.eval.metric = "cosine"  # [C]
    config.eval.rerank = ("k_reciprocal",)  # [D]
    config.eval.every_epochs = 50  # [D]
    return config
