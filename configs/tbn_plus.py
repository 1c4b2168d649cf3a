"""A reconstruction of TBN+ on Market-1501: the tree branch network (Li et al., 2019, 1904.00355).

    python -m mros_jax.train --config configs/tbn_plus.py --workdir runs/tbn_plus \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

A reconstruction from the paper's abstract, and never TBN+'s result: the abstract says that the
backbone's maps are cut recursively into pieces, with a bottleneck after each, and that all levels
together are the descriptor. Everything else is this project's default, also what "+" may add. For
TBN+ MROS's paper has mAP 83.0, Rank-1 93.2 (re-ranked 91.3, 95.4); nothing says that this recipe
comes near. 55,308,233 numbers to learn with ResNet-50 and 751 identities.

An argument after a colon names a data set:

    --config configs/tbn_plus.py:duke         on DukeMTMC-reID

Values marked [P] are the abstract's; all others are this project's, those of `configs/mros.py`
where MROS has them. MROS's paper says that TBN+ learns mutually. That may or may not mean peers
that learn from each other (Zhang et al., CVPR 2018), and is off:

    --config.objective.mutual.weight=1.0
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("",)
NUM_PARAMETERS = {"": 55_308_233}  # numbers to learn in the network, for 751 identities


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` may name a data set."""
    _, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = "tbn_plus-reconstruction"
    config.num_epochs = 120
    config.batch.identities = 32
    config.batch.images = 4
    config.input.height = 384
    config.input.width = 128
    config.augment.erase_area = (0.02, 0.4)
    config.augment.erase_aspect = (0.3, 1 / 0.3)
    config.augment.erase_fill = "mean"

    config.network.name = "tbn_plus"
    config.network.trunk = "resnet50"
    config.network.depth = 3  # levels; pieces of pieces, each after a bottleneck [P]
    config.network.reduced = 256

    config.objective = ConfigDict(
        {
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("nodes",),  # local and global, learned jointly [P]
                "weight": 1.0,
                "smoothing": 0.1,
                "heads": "mean",
            },
            "mutual": {"loss": "mutual", "on": ("nodes",), "weight": 0.0},
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",
                "lr": 1e-3,
                "weight_decay": 5e-4,
                "decay_norm_and_bias": True,
            }
        }
    )
    config.schedule.warmup_epochs = 10
    config.schedule.warmup_factor = 0.01
    config.schedule.warmup_per = "epoch"
    config.schedule.decay_epochs = (30, 60, 90)
    config.schedule.decay_factor = 0.1
    config.eval.flip_test = True
    config.eval.rerank = ("k_reciprocal",)
    return config
