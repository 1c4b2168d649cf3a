"""GSRW on Market-1501: deep group-shuffling random walk (Shen et al., CVPR 2018).

    python -m mros_jax.train --config configs/gsrw.py --workdir runs/gsrw \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 82.5, Rank-1 92.7, Rank-5 96.9, Rank-10 98.1, all after the walk, which looks at pairs of
gallery images as re-rankings do. 23,516,232 numbers to learn with ResNet-50, whatever the number of
identities.

An argument after a colon picks a variant, a data set, or both:

    --config configs/gsrw.py:k2               two groups, as the authors' code has them
    --config configs/gsrw.py:duke             on DukeMTMC-reID

The first stage trains pairs without the walk, the second with it. At the end and by
`python -m mros_jax.evaluate --run RUN --rerank=gsrw` the walk re-ranks the nearest 75 images of
each query with the heads of the checkpoint; the plain row is the distance of pooled features alone.

Not the same as published in two places. The authors' code, but not the paper's plain GSRW, compares
probes with gallery images by Kronecker product matching of their maps; that is not here, see
docs/evaluation.md. And the code takes every image of a query identity for a query (about 16,500 of
them), where this is the official protocol of 3,368; which of them the published numbers are of is
not known.

Each value is marked with whose it is: [C] the authors' code (YantaoShen/kpm_rw_person_reid), of the
second stage; [A] its author, asked about a start from ImageNet weights; [M] remembered of the paper
and not looked up; [D] this project's default. Two slips of the code are not taken over [D]: it
erases with probability 0.75, and at the wrong place. To have them:
`--config.augment.erase=0.75 --config.augment.erase_place=corner`.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "k2")
# Numbers to learn in the network, for any number of identities.
NUM_PARAMETERS = {"": 23_516_232, "k2": 23_516_228}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a variant and a data set."""
    variant, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = f"gsrw-{variant}" if variant else "gsrw"
    config.num_epochs = 70  # of both stages
    config.batch = ConfigDict(
        {"sampler": "probes_and_gallery", "probes": 22, "gallery": 3}  # [C]
    )
    config.input.height = 384  # [C]
    config.input.width = 128  # [C]
    config.augment.flip = 0.5  # [C]
    config.augment.pad = 0  # [C]
    config.augment.erase = 0.5  # [D]; [C]: 0.75
    config.augment.erase_area = (0.02, 0.2)  # [C]
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # [C]
    config.augment.erase_fill = "color"  # [C]
    config.augment.erase_place = "uniform"  # [D]; [C]: "corner"

    config.network.name = "gsrw"
    config.network.trunk = "resnet50"  # [C]
    config.network.last_stride = 2  # [C]
    config.network.groups = 2 if variant == "k2" else 4  # [C]; [M]
    config.network.dropout = 0.8  # [C]
    config.network.alpha = 0.95  # [C]
    config.network.gallery = config.batch.get_ref("gallery")  # one number

    config.objective = ConfigDict(
        {
            "pairs": {
                "loss": "pairs",
                "on": ("p2g", "g2g"),  # [C]
                "weight": 1.0,  # [C]
            }
        }
    )
    # Those of the second stage.
    adam = {"kind": "adam", "weight_decay": 0.0}  # [C]
    config.optimizer = ConfigDict(
        {
            "heads": {"params": ("network",), "lr": 1e-5, **adam},  # [C]
            "trunk": {"params": ("network/trunk",), "lr": 1e-6, **adam},  # [C]
        }
    )
    sgd = {"kind": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}  # [A] rate; [D]
    config.stages = ConfigDict(
        {
            "stage1": {
                "epochs": 60,  # [D]
                "network": {"alpha": 0.0},  # [D]
                "optimizer": {"heads": sgd, "trunk": dict(sgd)},
                "schedule": {"decay_epochs": (40,)},  # [C]: in steps of 40 epochs
            },
            "stage2": {"epochs": 10},  # [C]
        }
    )
    config.eval.metric = "euclidean"  # [C]
    config.eval.normalize = False  # [C]
    config.eval.rerank = ("gsrw",)  # [C]
    config.eval.rerank_options.gsrw = ConfigDict({"top": 75, "alpha": 0.95})  # [C]
    return config
