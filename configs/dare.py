"""DaRe on Market-1501: "Resource Aware Person Re-identification" (Wang et al., 2018, 1805.08805).

    python -m mros_jax.train --config configs/dare.py --workdir runs/dare \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Every stage of the trunk has an embedding, trained as a descriptor by itself; the descriptor is
their sum with learned weights. What each stage alone scores, and the multiply-adds that it takes,
stand in the run's results. 27,977,284 numbers to learn with ResNet-50, whatever the number of
identities.

An argument after a colon picks a variant and a data set, in any order:

    --config configs/dare.py:densenet201      python -m mros_jax.fetch_weights densenet201 first
    --config configs/dare.py:duke             on DukeMTMC-reID

| variant                | in the paper | mAP [R] | Rank-1 [R] | re-ranked [R] |
|------------------------|--------------|---------|------------|---------------|
|                        | DaRe(R)+RE   | 74.2    | 88.5       | 85.9 / 90.8   |
| no-erasing             | DaRe(R)      | 69.3    | 86.4       |               |
| densenet201            | DaRe(De)+RE  | 76.0    | 89.0       | 86.7 / 90.9   |
| densenet201-no-erasing | DaRe(De)     | 69.9    | 86.0       |               |

The authors' log of ResNet-50 with erasing ends at Rank-1 88.69, and 65.44 of the first stage alone
[C]. Other papers that compare with "DaRe" print the row of DenseNet-201, with a re-ranked Rank-1 of
89.0.

Numbers are with ten crops at test, distances of descriptors as they are, and the average precision
of Market-1501's MATLAB code. The authors re-rank descriptors of unit length [C]:

    python -m mros_jax.evaluate --run runs/dare --no-unnormalized --rerank=k_reciprocal

Each value is marked with whose it is: [C] the authors' code (mileyan/DARENet), [R] remembered of
the paper and not looked up, [D] this project's default. Of the code's erasing one thing is not
here: a rectangle as wide as the image is drawn anew, where the code would take it [D].
"""

from ml_collections import ConfigDict

from mros_jax.config import base, choose

VARIANTS = ("", "no-erasing", "densenet201", "densenet201-no-erasing")
_OF_DENSENET = 23_222_660
# Numbers to learn in the network, for 751 identities.
NUM_PARAMETERS = {
    "": 27_977_284,
    "no-erasing": 27_977_284,
    "densenet201": _OF_DENSENET,
    "densenet201-no-erasing": _OF_DENSENET,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of one variant and one data set."""
    variant, dataset = choose(arg, VARIANTS)
    config = base(dataset)
    config.name = f"dare-{variant}" if variant else "dare"
    config.num_steps = 60_000  # [C]; 1,463 epochs of 41 steps
    config.batch.sampler = "identities_once"  # [C]
    config.batch.identities = 18  # [C]
    config.batch.images = 4  # [C]
    config.input.height = 256  # [C]
    config.input.width = 128  # [C]
    config.augment.resize = (288, 144)  # [C]
    config.augment.flip = 0.5  # [C]
    config.augment.pad = 0  # [C]
    config.augment.erase = 0.0 if variant.endswith("no-erasing") else 0.5  # [C]
    config.augment.erase_area = (0.02, 0.2)  # [C]
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # [C]
    config.augment.erase_fill = "noise"  # [C]

    config.network.name = "dare"
    config.network.trunk = "densenet201" if variant.startswith("densenet201") else "resnet50"  # [C]
    config.network.last_stride = 2  # [C]
    config.network.reduced = 1024  # [C]
    config.network.embedded = 128  # [C]

    # The plain sum over the stages and their fusion [C].
    outputs = {f"stage{i}": f"stage{i}" for i in (1, 2, 3, 4)} | {"fused": "descriptor"}
    config.objective = ConfigDict(
        {
            name: {
                "loss": "triplet",
                "on": (output,),
                "weight": 1.0,
                "soft_margin": True,  # [C]
            }
            for name, output in outputs.items()
        }
    )
    config.optimizer = ConfigDict(
        {
            "network": {
                "params": ("network",),
                "kind": "adam",  # [C]
                "lr": 3e-4,  # [C]
                "weight_decay": 1e-4,  # [C]
                "decay_norm_and_bias": True,  # [C]
                "b1": 0.9,  # [C]
                "b1_changes": ((30_000, 0.5),),  # [C]
                "eps": 1e-8,  # [C]
            }
        }
    )
    config.schedule.warmup_epochs = 0  # [C]
    config.schedule.decay = "exponential"  # [C]
    config.schedule.decay_start = 30_000  # [C]
    config.schedule.decay_length = 30_000  # [C]: to the end of the run
    config.schedule.decay_factor = 0.001  # [C]
    config.eval.resize = (288, 144)  # [C]
    config.eval.crops = "ten"  # [C]
    config.eval.metric = "euclidean"  # [C]
    config.eval.normalize = False  # [C]
    config.eval.ap = "trapezoid"  # [C]
    config.eval.rerank = ("k_reciprocal",)  # [C]
    config.eval.every_epochs = 100  # [D]
    config.checkpoint_every_epochs = 25  # [D]
    return config
