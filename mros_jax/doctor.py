"""Data set doctor: what is wrong with a data set, before a day of training tells.

    python -m mros_jax.doctor --dataset market1501 --root PATH
    python -m mros_jax.doctor --config configs/mros.py --config.dataset.root=PATH

Exit code 0: nothing wrong (warnings may be printed); 1: something is; 2: the data cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data.datasets import layouts, records, sources
from mros_jax.data.examination import examine, format_report
from mros_jax.errors import UserError


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict | None]:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.doctor",
        description="Say what is wrong with a data set, before a day of training tells.",
        epilog="With --config FILE, and --config.FIELD=VALUE, everything is taken from a training "
        "config instead: data set, options, batch, input size.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", help=f"one of {', '.join(sorted(records.DATASETS))}")
    parser.add_argument("--root", help="directory with the data")
    parser.add_argument("--on_bad_image", help="what training will do: error (default) or skip")
    parser.add_argument("--cache_dir", help="where training will keep decoded images")
    # Two: what a triplet needs. A config says how many a batch really has.
    parser.add_argument("--identities", type=int, help="P: identities in a batch (default: 2)")
    parser.add_argument("--images", type=int, help="K: images of each (default: 4)")
    records.add_arguments(parser, records.DATASETS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config, rest = configs.parse_config(argv)
    args = parser.parse_args(rest)
    if (config is None) == (args.dataset is None):
        raise UserError("give either --dataset NAME or --config FILE; see --help")
    return args, config


def main(argv: Sequence[str] | None = None) -> int:
    """Examine a data set; see `--help`.

    Returns:
        0 if nothing is wrong, 1 if something is.
    """
    args, config = _parse(sys.argv[1:] if argv is None else argv)
    settings: dict[str, Any] = {"identities": 2, "images": 4}
    if config is not None:
        settings |= {"dataset": config.dataset.name, **config.dataset.to_dict()}
        settings |= {
            key: config.batch[key] for key in ("identities", "images") if key in config.batch
        }
        settings["input_size"] = (config.input.height, config.input.width)
    settings |= {key: value for key, value in vars(args).items() if value is not None}
    on_bad_image = settings.get("on_bad_image", "error")
    layouts.check_choice(on_bad_image)
    dataset = sources.load_dataset(
        settings["dataset"],
        settings.get("root"),
        on_bad_image="skip",
        **records.pick_options(settings),
    )
    report = examine(
        dataset,
        identities=settings["identities"],
        images=settings["images"],
        on_bad_image=on_bad_image,
        input_size=settings.get("input_size", (384, 128)),
        cache_dir=settings.get("cache_dir"),
    )
    print(report.to_json() if args.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
