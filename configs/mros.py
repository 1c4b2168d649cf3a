"""MROS on Market-1501: the paper's full recipe (Okay et al., 2019, arXiv 1910.12322).

    python -m mros_jax.train --config configs/mros.py --workdir runs/market \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Paper (two GTX 1080 Ti, 120 epochs assumed): mAP 84.2, Rank-1 94.4; with ECN 93.5, 95.5.

An argument after a colon picks a setting of the paper's Table 1 and a data set, in any order:

    --config configs/mros.py:III              setting III (no T3)
    --config configs/mros.py:duke,IV          setting IV on DukeMTMC-reID
    --config configs/mros.py:synthetic        the embedded data set at Market-1501's full size

| setting | stripes        | levels | triplet and centre loss on | mAP  | Rank-1 |
|---------|----------------|--------|----------------------------|------|--------|
| I       | 6              | T4     | each stripe                | 81.8 | 93.2   |
| II      | 5, overlapping | T4     | each stripe                | 82.8 | 93.5   |
| III     | 5, overlapping | T4     | their concatenation G      | 84.0 | 94.2   |
| IV      | 5, overlapping | T3, T4 | their concatenation G      | 84.2 | 94.4   |

Values marked "default" are ours where the paper is silent; all others are the paper's.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SETTINGS = ("I", "II", "III", "IV")
DATASETS = {
    "market": "market1501",
    "duke": "dukemtmc",
    "msmt17": "msmt17",
    "msmt17_v2": "msmt17_v2",
    "cuhk03_labeled": "cuhk03_labeled",
    "cuhk03_detected": "cuhk03_detected",
    "cuhk03_labeled_classic": "cuhk03_labeled_classic",
    "cuhk03_detected_classic": "cuhk03_detected_classic",
    "folder": "folder",
    "synthetic": "synthetic",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; `arg` is a comma-separated choice of one setting and one data set."""
    setting, dataset = "IV", "market"
    for word in filter(None, (arg or "").split(",")):
        if word in SETTINGS:
            setting = word
        elif word in DATASETS:
            dataset = word
        else:
            raise ValueError(
                f"unknown config argument {word!r}: expected a setting {SETTINGS} "
                f"or a data set {tuple(DATASETS)}, as in configs/mros.py:duke,III"
            )

    config = ConfigDict()
    config.seed = 0
    config.num_epochs = 120  # default

    config.dataset = ConfigDict()
    config.dataset.name = DATASETS[dataset]
    config.dataset.root = placeholder(str)  # where the data set lies
    config.dataset.on_bad_image = "error"  # or "skip": leave unreadable images out, and say so
    config.dataset.cache_dir = placeholder(str)  # decoded images; None: the user's cache directory
    config.dataset.device_fraction = 0.5  # keep images on the device up to this share of its memory
    config.dataset.distractors_500k = False  # Market-1501 only: with the 500,000 distractors
    config.dataset.include_val = True  # MSMT17 only: train on the validation list too, as published
    config.dataset.test_set = 0  # classic CUHK03 only: which of the 20 splits
    config.dataset.preset = "market"  # synthetic only: its size, "market", "demo" or "small"
    config.dataset.seed = 0  # synthetic only: other seed, other people

    config.batch = ConfigDict()
    config.batch.identities = 32  # P
    config.batch.images = 4  # K

    config.input = ConfigDict()
    config.input.height = 384  # default
    config.input.width = 128  # default

    config.augment = ConfigDict()
    config.augment.flip = 0.5  # probability
    config.augment.pad = 10  # pixels, zero, then a random crop back to size
    config.augment.erase = 0.5  # probability
    config.augment.erase_area = (0.02, 0.4)  # default; share of the image
    config.augment.erase_aspect = (0.3, 1 / 0.3)  # default
    config.augment.erase_fill = "mean"  # default; "public": as the public lineage fills

    config.model = ConfigDict()
    config.model.setting = setting
    config.model.backbone = "resnet50"
    # ImageNet weights: a file; "none": a random start; "auto": what scripts/fetch_weights.py has
    # fetched, else a warning and a random start.
    config.model.weights = "auto"
    config.model.num_stripes = 6
    config.model.last_stride = 1  # default
    config.model.neck_bias = False  # default
    config.model.dtype = "float32"  # or "bfloat16": compute only, parameters stay float32
    # "per_device" as the paper's DataParallel; "synchronised": over the global batch
    config.model.batch_norm = "per_device"

    config.loss = ConfigDict()
    config.loss.margin = 0.3  # default
    config.loss.soft_margin = False  # True: softplus instead of the hinge, no margin
    config.loss.triplet_reduction = "mean"  # default; "sum": Eq. 1 as written
    config.loss.center_reduction = "mean"  # default; "sum": Eq. 2 as written
    config.loss.center_weight = 0.0005  # beta
    config.loss.smoothing = 0.1  # default

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # coupled L2, as PyTorch's Adam; or "adamw"
    config.optimizer.lr = 1e-3
    config.optimizer.weight_decay = 5e-4  # default
    config.optimizer.decay_norm_and_bias = True  # default, as PyTorch; False: only kernels
    config.optimizer.warmup_epochs = 10
    config.optimizer.warmup_factor = 0.01
    config.optimizer.warmup_per = "epoch"  # default; or "iteration"
    config.optimizer.decay_epochs = (30, 60, 90)  # after every 30 epochs
    config.optimizer.decay_factor = 0.1
    config.optimizer.center_lr = 0.5  # default; plain SGD on the unweighted centre loss
    config.optimizer.clip_norm = 0.0  # largest global gradient norm; 0: no clipping
    config.optimizer.accumulate_steps = 1  # batches averaged into one update
    config.optimizer.ema_decay = 0.0  # moving average of parameters for evaluation; 0: none

    config.eval = ConfigDict()
    config.eval.every_epochs = 10  # and at the end, then with re-ranking
    config.eval.batch_size = 128  # images
    config.eval.metric = "cosine"  # or "euclidean"
    config.eval.ap = "standard"  # or "trapezoid", the Market-1501 MATLAB code's
    config.eval.flip_test = False
    config.eval.keep_junk = False
    config.eval.rerank = ("ecn",)  # at the end; any of the following
    config.eval.rerank_options = ConfigDict(
        {
            "ecn": {"k": 25, "t": 3, "q": 8, "method": "rankdist"},
            "k_reciprocal": {"k1": 20, "k2": 6, "lambda_value": 0.3},
            "aqe": {},
        }
    )

    config.checkpoint_every_epochs = 5  # and whenever the run is evaluated or stopped
    config.log_every_steps = 20  # metrics are fetched from the device this often
    config.report = True  # write report.html at the end
    return config
