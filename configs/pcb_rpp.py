"""PCB with refined part pooling on Market-1501 (Sun et al., ECCV 2018, arXiv 1711.09349).

    python -m mros_jax.train --config configs/pcb_rpp.py --workdir runs/pcb_rpp \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 81.6, Rank-1 93.8, Rank-5 97.5, Rank-10 98.5. 25,203,162 numbers to learn with ResNet-50
and 751 identities.

It is trained in stages: as PCB; then its part classifier alone; then all. Each begins with a new
optimizer. In the second, batch normalization uses and updates the statistics of its batches, and
dropout is on, though the trunk is frozen. [C] A field of a stage is set as any other:
--config.stages.stage2.epochs=10 --config.num_epochs=80. From a PCB that is trained already:

    --config.init.run=runs/pcb --config.stages.stage1.epochs=0 --config.num_epochs=15

It is evaluated with refined parts in all stages: scores are low until the second.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/pcb_rpp.py:authors       network and stages of the authors' code
    --config configs/pcb_rpp.py:duke          on DukeMTMC-reID

The authors' code has another part classifier and trains all at once after 20 epochs of PCB: mAP
81.5, Rank-1 93.5; 25,192,416 numbers to learn.

Each value is marked with whose it is: [P] the paper, [C] public code where the paper is silent, the
authors' or, for the length of the second stage, ReID-PCB_RPP (for the variant "authors" their code
throughout), [D] this project's default. What is not here is as in `configs/pcb.py`.
"""

import pathlib

from ml_collections import ConfigDict

from mros_jax.config import choose, read

_PCB = pathlib.Path(__file__).with_name("pcb.py")
VARIANTS = ("", "authors")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 25_203_162, "authors": 25_192_416}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a variant and a data set."""
    variant, dataset = choose(arg, VARIANTS)
    authors = variant == "authors"
    config = read(_PCB, dataset).unlock()
    config.name = f"pcb_rpp-{variant}" if variant else "pcb_rpp"
    config.num_epochs = 50 if authors else 75  # of all stages

    config.network.name = "pcb_rpp"
    config.network.pooling = "refined"  # [P]
    config.network.part_classifier = "authors" if authors else "paper"
    config.network.part_dropout = 0.5 if authors else 0.0  # [C]; [P]
    config.network.temperature = 1.0  # [P]

    # What the stages share; a rate is that of the last stage.
    groups = config.optimizer
    groups.part_classifier = ConfigDict(
        {**groups.heads.to_dict(), "params": ("network/part_classifier",), "lr": 0.01}  # [P]
    )
    groups.heads.lr = 0.01  # [P]
    groups.trunk.lr = 0.01 if authors else 0.001  # [C]; [P]
    # Each stage counts from its own first epoch.
    config.schedule.decay_epochs = (20,) if authors else (40,)  # [C]; [P]

    as_pcb = {
        "network": {"pooling": "stripes"},
        "optimizer": {
            "part_classifier": {"kind": "frozen"},
            "heads": {"lr": 0.1},  # [P]
            "trunk": {"lr": 0.01},  # [P]
        },
    }
    if authors:
        config.stages = ConfigDict(
            {
                "stage1": {"epochs": 20, **as_pcb},  # [C]
                "stage2": {"epochs": 30},  # [C]: all at once
            }
        )
        return config
    part_classifier_alone = {
        "optimizer": {"heads": {"kind": "frozen"}, "trunk": {"kind": "frozen"}}  # [P]
    }
    config.stages = ConfigDict(
        {
            "stage1": {"epochs": 60, **as_pcb},  # [P]
            "stage2": {"epochs": 5, **part_classifier_alone},  # [C]; [P]: to convergence
            "stage3": {"epochs": 10},  # [D], as the paper is quoted
        }
    )
    return config
