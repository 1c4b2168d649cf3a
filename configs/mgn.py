"""MGN on Market-1501: the paper's full recipe (Wang et al., ACM MM 2018, arXiv 1804.01438).

    python -m mros_jax.train --config configs/mgn.py --workdir runs/mgn \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper (80 epochs, mean of image and mirror image): mAP 86.9, Rank-1 95.7; re-ranked 94.2, 96.6.
74,383,168 numbers to learn with ResNet-50 and 751 identities.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/mgn.py:public            as public PyTorch code trains it
    --config configs/mgn.py:duke              the paper's on DukeMTMC-reID

| variant | whole maps' heads see | optimizer    | loss             | erasing | resize   | epochs |
|---------|-----------------------|--------------|------------------|---------|----------|--------|
|         | z (2048), no bias     | SGD 0.01     | CE + triplet     | no      | bilinear | 80     |
| public  | f (256), bias         | AMSGrad 2e-4 | CE + 2 * triplet | 0.5     | bicubic  | 93     |

The public reimplementations (seathiefwang/MGN-pytorch, GNAYUOHZ/ReID-MGN) report mAP 86.2, Rank-1
95.0 (re-ranked 94.3, 95.6), and say that the paper's own recipe ended below that. Their 400 and 500
epochs visit each identity once (47 steps); 93 of our 202 steps are as many as the former's 400.

Values marked "public" are those codes', "default" ours, where the paper is silent; all others are
the paper's, and in the variant "public" those in an `if` are the public code's.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "public")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 74_383_168, "public": 70_351_800}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of one variant and one data set."""
    variant, dataset = choose(arg, VARIANTS)
    public = variant == "public"

    config = base(dataset)
    config.name = "mgn-public" if public else "mgn"
    config.num_epochs = 93 if public else 80
    config.batch.identities = 16  # P, public
    config.batch.images = 4  # K, public
    config.input.height = 384
    config.input.width = 128
    config.input.interpolation = "bicubic" if public else "bilinear"
    config.augment.pad = 0
    config.augment.erase = 0.5 if public else 0.0
    config.augment.erase_area = (0.02, 0.4)  # public
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # public
    config.augment.erase_fill = "mean"  # public

    config.network.name = "mgn"
    config.network.trunk = "resnet50"
    config.network.stripes = (2, 3)
    config.network.reduced = 256
    config.network.global_heads = "f" if public else "z"
    config.network.head_bias = public

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": ("f_global",),
                "weight": 2.0 if public else 1.0,
                "margin": 1.2,
                "soft_margin": False,
                "reduction": "mean",  # default
            },
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("global", "part2", "part3"),
                "weight": 1.0,
                "smoothing": 0.0,
                "heads": "mean",  # default, as public code
            },
        }
    )
    rule = (
        {"kind": "adam", "amsgrad": True, "lr": 2e-4}
        if public
        else {
            "kind": "sgd",
            "lr": 0.01,  # public
            "momentum": 0.9,  # public
            "nesterov": False,  # public
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "weight_decay": 5e-4,  # public
                "decay_norm_and_bias": True,  # default, as PyTorch; False: only kernels
                **rule,
            }
        }
    )
    config.schedule.warmup_epochs = 0  # public
    config.schedule.decay_epochs = (75, 88) if public else (40, 60)  # both public
    config.schedule.decay_factor = 0.1  # public

    config.eval.flip_test = True
    return config
