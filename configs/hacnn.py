"""HA-CNN on Market-1501: harmonious attention, from scratch (Li et al., CVPR 2018, 1802.08122).

    python -m mros_jax.train --config configs/hacnn.py --workdir runs/hacnn \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 75.7, Rank-1 91.2. The default is the recipe of the public reimplementation torchreid,
which reports 75.6, 90.9. 3,699,638 numbers to learn with 751 identities.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/hacnn.py:paper           the paper's optimizer, and no augmentation
    --config configs/hacnn.py:duke            on DukeMTMC-reID

| variant | optimizer     | epochs | rate x 0.1 at | augmentation                    | smoothing |
|---------|---------------|--------|---------------|---------------------------------|-----------|
|         | SGD 0.03, 0.9 | 300    | 150, 225      | mirror; enlarge by 1/8 and crop | 0.1       |
| paper   | Adam 5e-4     | 150    | never         | none                            | 0         |

torchreid's maintainer says that Adam stays far below; its users report mAP 61.2, Rank-1 82.1.

Each value is marked with whose it is: [P] the paper's, recalled and not checked against its text
where it is a value of the recipe; [C] torchreid's code; [D] this project's default.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "paper")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 3_699_638, "paper": 3_699_638}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a variant and a data set."""
    variant, dataset = choose(arg, VARIANTS)
    paper = variant == "paper"
    config = base(dataset)
    config.name = "hacnn-paper" if paper else "hacnn"
    config.num_epochs = 150 if paper else 300  # [P]; [C]
    config.batch = ConfigDict({"sampler": "shuffled", "size": 32})  # [P] size; [C]
    config.input.height = 160  # [P]
    config.input.width = 64  # [P]
    config.augment.flip = 0.0 if paper else 0.5  # [P]; [C]
    # [C] enlarges and crops every other image only, at random; [D]: every one
    config.augment.resize = () if paper else (180, 72)  # [P]; [D]
    config.augment.pad = 0  # [P]; [C]
    config.augment.erase = 0.0  # [P]; [C]

    config.weights = "none"  # [P]; [C]: from scratch, there are no ImageNet weights for it
    config.network.name = "hacnn"
    config.network.stem = 32  # [P]
    config.network.widths = (128, 256, 384)  # [P]
    config.network.region = (24, 28)  # [P]
    # [D] As PyTorch sampled when torchreid's numbers were made; False: its default since 1.3, with
    # which torchreid runs today. scripts/compare_torchreid.py compares both.
    config.network.align_corners = True
    config.network.embedded = 512  # [P]

    config.objective = ConfigDict(
        {
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("global", "local"),  # [P]
                "weight": 1.0,  # [P]
                "smoothing": 0.0 if paper else 0.1,  # [P]; [C]
                "heads": "mean",  # [C]
            }
        }
    )
    rule = (
        {
            "kind": "adam",  # [P]
            "lr": 5e-4,  # [P]
            "b1": 0.9,  # [P]
            "b2": 0.999,  # [P]
            "weight_decay": 0.0,  # [D]
        }
        if paper
        else {
            "kind": "sgd",  # [C]
            "lr": 0.03,  # [C]
            "momentum": 0.9,  # [C]
            "nesterov": False,  # [C]
            "weight_decay": 5e-4,  # [C]
            "decay_norm_and_bias": True,  # [C]
        }
    )
    config.optimizer = ConfigDict({"network": {"params": ("network",), **rule}})
    config.schedule.warmup_epochs = 0  # [D]; [C]
    config.schedule.decay_epochs = () if paper else (150, 225)  # [D]; [C]
    config.schedule.decay_factor = 0.1  # [C]
    config.eval.metric = "euclidean"  # [C]; all descriptors have one norm
    return config
