"""Strong baseline, "bag of tricks", on Market-1501 (Luo et al., CVPR Workshops 2019, 1903.07071).

    python -m mros_jax.train --config configs/strong.py --workdir runs/strong \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 85.9, Rank-1 94.5; without the center loss 85.7, 94.1; with k-reciprocal re-ranking 94.2,
95.4. 25,048,128 numbers to learn with ResNet-50 and 751 identities, and 1,538,048 of centers.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/strong.py:authors        as the authors' code: no ReLU in the stem, its warm-up
    --config configs/strong.py:duke           on DukeMTMC-reID

Each value is marked with whose it is: [P] the paper, [C] the authors' code where the paper is
silent, [D] this project's default.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "authors")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 25_048_128, "authors": 25_048_128}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a variant and a data set."""
    variant, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = f"strong-{variant}" if variant else "strong"
    config.num_epochs = 120  # [P]
    config.batch.identities = 16  # [P]
    config.batch.images = 4  # [P]
    config.input.height = 256  # [P]
    config.input.width = 128  # [P]
    config.augment.flip = 0.5  # [P]
    config.augment.pad = 10  # [P]
    config.augment.erase = 0.5  # [P]
    config.augment.erase_area = (0.02, 0.4)  # [P]
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # [P]
    config.augment.erase_fill = "public"  # [C]

    config.network.name = "strong"
    config.network.trunk = "resnet50"  # [P]
    config.network.last_stride = 1  # [P]
    # The paper describes the usual stem; its numbers were made without this ReLU.
    config.network.stem_relu = variant != "authors"  # [D]

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": ("f_t",),  # [P]
                "weight": 1.0,  # [P]
                "margin": 0.3,  # [P]
            },
            "center": {
                "loss": "center",
                "on": ("f_t",),  # [P]
                "weight": 0.0005,  # [P]; 0: without
                "reduction": "mean",  # [C]
            },
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("f_i",),  # [P]
                "weight": 1.0,  # [P]
                "smoothing": 0.1,  # [P]
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [P]
                "lr": 3.5e-4,  # [P]
                "weight_decay": 5e-4,  # [C]
                "decay_norm_and_bias": True,  # [C]
            },
            # [C]: SGD on the unweighted center loss
            "centers": {"params": ("objective",), "kind": "sgd", "lr": 0.5, "scheduled": False},
        }
    )
    # [P]: in epoch t = 1, 2, ... 3.5e-4 t / 10 up to t = 10, then 3.5e-4 to 40, 3.5e-5 to 70 and
    # 3.5e-6, with the misprint of the first that the authors confirmed. [C] starts at 3.5e-6 and
    # reaches 3.5e-4 one epoch later.
    config.schedule.warmup_epochs = 10 if variant == "authors" else 9
    config.schedule.warmup_factor = 0.01 if variant == "authors" else 0.1
    config.schedule.decay_epochs = (40, 70)
    config.schedule.decay_factor = 0.1
    config.eval.metric = "cosine"  # [P]
    config.eval.rerank = ("ecn", "k_reciprocal")  # [P] the second; [D] the first
    return config
