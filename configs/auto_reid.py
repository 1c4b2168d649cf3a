"""Auto-ReID on Market-1501: cells that were searched for (Quan et al., ICCV 2019, 1903.09776).

    python -m mros_jax.train --config configs/auto_reid.py --workdir runs/auto_reid \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper: mAP 85.1, Rank-1 94.5; re-ranked 94.2, 95.4. That cannot be expected here: the paper's trunk
was trained on ImageNet first, and no such weights are public. Start from a run of your own on other
data with `--config.init.run=RUN`. 11,418,496 numbers to learn with 751 identities.

Public are the cells of three searches. Number and widths of cells, stem, head and recipe are not.

An argument after a colon picks a genotype and a data set, in any order:

    --config configs/auto_reid.py:darts_baseline    the genotype of plain DARTS
    --config configs/auto_reid.py:found.toml        of a file, as scripts/search_auto_reid.py writes
    --config configs/auto_reid.py:duke              on DukeMTMC-reID
    --config configs/auto_reid.py:small             at the size of configs/demo.py, for laptops

| variant        | searched with the retrieval loss | part-aware operation | trunk's parameters |
|----------------|----------------------------------|----------------------|--------------------|
|                | yes                              | yes                  | 9,878,400          |
| reid_space     | no                               | yes                  | 9,441,728          |
| darts_baseline | no                               | no                   | 10,310,080         |

Each value is marked with whose it is: [P] the paper's, recalled and not checked against its text;
[C] the authors' code; [D] this project's default, those of `configs/mros.py` where MROS has them.
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose, shrink
from mros_jax.errors import UserError
from mros_jax.models.cells import read_genotype

VARIANTS = ("", "reid_space", "darts_baseline")
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {"": 11_418_496, "reid_space": 10_981_824, "darts_baseline": 11_850_176}

# Nodes from 2 on, two edges each: an operation, and in brackets the map that it is applied to. [C]
GENOTYPES = {
    "": {
        "normal": "sep(0) skip(1), dil(2) dil(0), dil(3) sep(2), dil(4) dil(3)",
        "reduce": "max(0) part(1), sep(0) dil(2), dil(2) max(0), dil(4) dil(3)",
    },
    "reid_space": {
        "normal": "dil(0) skip(1), max(2) sep(0), max(3) sep(1), sep(2) dil(3)",
        "reduce": "skip(1) part(0), avg(2) part(0), sep(1) avg(2), skip(4) max(3)",
    },
    "darts_baseline": {
        "normal": "dil(1) dil(0), dil(1) sep(2), dil(2) sep(1), sep(2) sep(3)",
        "reduce": "sep(1) skip(0), max(2) dil(1), max(0) dil(2), skip(0) dil(4)",
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of a genotype, a data set and "small"."""
    words = (arg or "").split(",")
    files = [word for word in words if word.endswith(".toml")]
    rest = [word for word in words if word not in (*files, "small")]
    variant, dataset = choose(",".join(rest), VARIANTS)
    if len(files) + bool(variant) > 1:
        raise UserError(f"the config argument {arg!r} names several genotypes; give one")
    config = base(dataset)
    config.name = "-".join(filter(None, ("auto_reid", variant)))
    genotype = GENOTYPES[variant]
    if files:
        genotype, config.name = read_genotype(files[0]), "auto_reid-own"
    config.num_epochs = 120  # [D]
    config.batch.identities = 32  # [D]
    config.batch.images = 4  # [D]
    config.input.height = 384  # [P]
    config.input.width = 128  # [P]
    config.augment.erase_area = (0.02, 0.4)  # [D]
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # [D]
    config.augment.erase_fill = "mean"  # [D]

    config.weights = "none"  # [D]: there are none
    config.network.name = "auto_reid"
    config.network.normal = genotype["normal"]
    config.network.reduce = genotype["reduce"]
    config.network.cells = (2, 2, 2, 2)  # [D]
    config.network.width = 64  # [D]

    config.objective = ConfigDict(
        {
            "triplet": {
                "loss": "triplet",
                "on": ("g",),  # [D]
                "weight": 1.0,  # [D]
                "margin": 0.3,  # [P]
                "soft_margin": False,  # [P]
                "reduction": "mean",  # [D]
            },
            "cross_entropy": {
                "loss": "cross_entropy",
                "on": ("global",),  # [P]
                "weight": 1.0,  # [D]
                "smoothing": 0.1,  # [D]
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [D]
                "lr": 1e-3,  # [D]
                "weight_decay": 5e-4,  # [D]
                "decay_norm_and_bias": True,  # [D]
            }
        }
    )
    config.schedule.warmup_epochs = 10  # [D]
    config.schedule.warmup_factor = 0.01  # [D]
    config.schedule.warmup_per = "epoch"  # [D]
    config.schedule.decay_epochs = (30, 60, 90)  # [D]
    config.schedule.decay_factor = 0.1  # [D]
    config.eval.rerank = ("k_reciprocal",)  # [D]
    return shrink(config) if "small" in words else config
