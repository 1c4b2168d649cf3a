"""MROS on Market-1501: the paper's full recipe (Okay et al., 2019, arXiv 1910.12322).

    python -m mros_jax.train --config configs/mros.py --workdir runs/market \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper (two GTX 1080 Ti, 120 epochs assumed): mAP 84.2, Rank-1 94.4; with ECN 93.5, 95.5.
35,066,262 numbers to learn with ResNet-50 and 751 identities, and 11,535,360 of centers.

An argument after a colon picks a setting of the paper's Table 1 and a data set, in any order:

    --config configs/mros.py:III              setting III (no T3)
    --config configs/mros.py:duke,IV          setting IV on DukeMTMC-reID
    --config configs/mros.py:synthetic        the embedded data set at Market-1501's full size

| setting | stripes        | levels | triplet and center loss on | mAP  | Rank-1 |
|---------|----------------|--------|----------------------------|------|--------|
| I       | 6              | T4     | each stripe                | 81.8 | 93.2   |
| II      | 5, overlapping | T4     | each stripe                | 82.8 | 93.5   |
| III     | 5, overlapping | T4     | their concatenation G      | 84.0 | 94.2   |
| IV      | 5, overlapping | T3, T4 | their concatenation G      | 84.2 | 94.4   |

Values marked "default" are ours where the paper is silent; all others are the paper's.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("IV", "III", "II", "I")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"IV": 35_066_262, "III": 31_212_267, "II": 31_212_267, "I": 32_753_114}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of one setting and one data set."""
    setting, dataset = choose(arg, VARIANTS)
    levels = ("t3", "t4") if setting == "IV" else ("t4",)
    metric_on = ("g_t4",) if setting in ("I", "II") else ("descriptor",)

    config = base(dataset)
    config.name = f"mros-{setting}"
    config.num_epochs = 120  # default
    config.batch.identities = 32  # P
    config.batch.images = 4  # K
    config.input.height = 384  # default
    config.input.width = 128  # default
    config.augment.erase_area = (0.02, 0.4)  # default
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # default
    config.augment.erase_fill = "mean"  # default

    config.network.name = "mros"
    config.network.trunk = "resnet50"
    config.network.levels = levels
    config.network.overlap = setting != "I"
    config.network.num_stripes = 6
    config.network.last_stride = 1  # default
    config.network.neck_bias = False  # default

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": metric_on,
                "weight": 1.0,
                "margin": 0.3,  # default
                "soft_margin": False,
                "reduction": "mean",  # default; "sum": Eq. 1 as written
            },
            "center": {
                "loss": "center",
                "on": metric_on,
                "weight": 0.0005,  # beta
                "reduction": "mean",  # default; "sum": Eq. 2 as written
            },
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": levels,
                "weight": 1.0,
                "smoothing": 0.1,  # default
                "heads": "mean",  # default
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",
                "lr": 1e-3,
                "weight_decay": 5e-4,  # default
                "decay_norm_and_bias": True,  # default, as PyTorch; False: only kernels
            },
            # Public code: plain SGD on the unweighted center loss.
            "centers": {"params": ("objective",), "kind": "sgd", "lr": 0.5, "scheduled": False},
        }
    )
    config.schedule.warmup_epochs = 10
    config.schedule.warmup_factor = 0.01
    config.schedule.warmup_per = "epoch"  # default
    config.schedule.decay_epochs = (30, 60, 90)  # after every 30 epochs
    config.schedule.decay_factor = 0.1
    return config
