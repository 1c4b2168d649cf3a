"""TFDS builders: the original image bytes as ArrayRecord, without TensorFlow.

    python -m mros_jax.data.tfds_builders --dataset market1501 --root MANUAL_DIR --out DATA_DIR

Then `--config.dataset.root=DATA_DIR` reads the records instead of the directory, with the same
result. With TFDS alone: `tfds.data_source("market1501/plain", split="query", data_dir=DATA_DIR)`,
after `import mros_jax.data.tfds_builders`.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from mros_jax.data import layouts, sources
from mros_jax.data.splits import Dataset, Split, relabel

_READ_AT_ONCE = 256
_SPLITS = ("train", "query", "gallery")


@dataclasses.dataclass
class ReidConfig(tfds.core.BuilderConfig):
    """Which data set of `sources.DATASETS` is stored, and with which options."""

    dataset: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class _ReidBuilder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Stores every image as its original bytes, in the reader's order (feature `index`)."""

    VERSION = tfds.core.Version("1.0.0")
    CITATION: ClassVar[str] = ""
    # Nothing is downloaded. (Looking for checksums, TFDS 4.9.10 imports importlib_resources, which
    # its dependencies do not always bring.)
    url_infos: ClassVar[dict[str, Any]] = {}
    # What a builder of TFDS takes no argument for; `prepare` sets it.
    on_bad_image: layouts.OnBadImage = "error"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.builder_config.dataset}: person re-identification.",
            citation=self.CITATION,
            homepage="https://github.com/tensorflow/datasets",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "index": tfds.features.Scalar(dtype=np.int64),
                    "name": tfds.features.Text(),
                    "pid": tfds.features.Scalar(dtype=np.int32),
                    "camid": tfds.features.Scalar(dtype=np.int32),
                    "sequence": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        config = self.builder_config
        dataset = sources.load_dataset(
            config.dataset,
            dl_manager.manual_dir,
            on_bad_image=self.on_bad_image,
            **config.options,
        )
        return {split.name: self._generate_examples(split) for split in dataset.splits}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, Any]]:
        for i in range(len(split)):
            yield (
                i,
                {
                    "image": split.read(i),
                    "index": i,
                    "name": str(split.names[i]),
                    "pid": int(split.pids[i]),
                    "camid": int(split.camids[i]),
                    "sequence": int(split.sequences[i]),
                },
            )


def _instructions(name: str) -> str:
    origin = layouts.ORIGINS[name]
    return f"Available from {origin.source}. The manual directory must have {origin.layout}."


class Market1501(_ReidBuilder):
    """Market-1501."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("market1501")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = [
        ReidConfig(name="plain", dataset="market1501"),
        ReidConfig(
            name="distractors_500k", dataset="market1501", options={"distractors_500k": True}
        ),
    ]


class Dukemtmc(_ReidBuilder):
    """DukeMTMC-reID."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("dukemtmc")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = [ReidConfig(name="plain", dataset="dukemtmc")]


class Msmt17(_ReidBuilder):
    """MSMT17, versions 1 and 2."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("msmt17")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = [
        ReidConfig(
            name=name + ("" if val else "_without_val"),
            dataset=dataset,
            options={} if val else {"include_val": False},
        )
        for name, dataset in (("v1", "msmt17"), ("v2", "msmt17_v2"))
        for val in (True, False)
    ]


class Cuhk03(_ReidBuilder):
    """CUHK03: new protocol, and the 20 test sets of the classic one."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("cuhk03_labeled")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = [
        ReidConfig(name=kind, dataset=f"cuhk03_{kind}") for kind in ("labeled", "detected")
    ] + [
        ReidConfig(
            name=f"{kind}_classic_{number:02d}",
            dataset=f"cuhk03_{kind}_classic",
            options={"test_set": number},
        )
        for kind in ("labeled", "detected")
        for number in range(20)
    ]


BUILDERS: tuple[type[_ReidBuilder], ...] = (Market1501, Dukemtmc, Msmt17, Cuhk03)
# Options that are what a reader does anyway; they select no other records.
_DEFAULTS = {"distractors_500k": False, "include_val": True}


def make_builder(
    name: str, data_dir: str | os.PathLike[str], **options: Any
) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder for a data set and the reader's options.

    Raises:
      ValueError: there is no such builder.
    """
    wanted = {key: value for key, value in options.items() if _DEFAULTS.get(key) != value}
    if name.endswith("_classic"):
        wanted.setdefault("test_set", 0)
    known = []
    for builder in BUILDERS:
        for config in builder.BUILDER_CONFIGS:
            known.append(f"{config.dataset} {config.options or ''}".strip())
            if (config.dataset, config.options) == (name, wanted):
                return builder(
                    data_dir=os.fspath(data_dir), config=config.name, file_format="array_record"
                )
    raise ValueError(
        f"no TFDS builder for data set {name!r} with options {wanted}; there are {', '.join(known)}"
    )


def prepare(
    name: str,
    root: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    on_bad_image: layouts.OnBadImage = "error",
    **options: Any,
) -> pathlib.Path:
    """Stores a data set as ArrayRecord, once; TFDS writes to a temporary directory and renames it.

    Args:
      name: as for `sources.load_dataset`.
      root: the directory as distributed (the "manual directory" of TFDS).
      data_dir: where TFDS keeps its data sets.
      on_bad_image: what the reader does about names that it cannot read.
      **options: the reader's own.

    Returns:
      The directory with the records.

    Raises:
      ValueError: no such data set; a misnamed file.
      FileNotFoundError: no data at `root`.
    """
    builder = make_builder(name, data_dir, **options)
    builder.on_bad_image = on_bad_image
    path = pathlib.Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(layouts.missing(name, path, "no such directory"))
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=os.fspath(path))
    )
    return pathlib.Path(builder.data_path)


def load_prepared(name: str, data_dir: str | os.PathLike[str], **options: Any) -> Dataset:
    """Reads what `prepare` stored; equal to reading the directory.

    Raises:
      FileNotFoundError: it was not prepared with these options.
    """
    builder = make_builder(name, data_dir, **options)
    if not (pathlib.Path(builder.data_path) / "features.json").is_file():
        raise FileNotFoundError(
            f"{data_dir} has no prepared records for data set {name!r} with options {options} "
            f"(expected {builder.data_path}); make them: python -m mros_jax.data.tfds_builders "
            f"--dataset {name} --root MANUAL_DIR --out {data_dir}"
        )
    train, query, gallery = (_read_split(builder, split) for split in _SPLITS)
    return Dataset(name, train, query, gallery, pid_of_label=relabel(train.pids)[1])


def _read_split(builder: tfds.core.DatasetBuilder, name: str) -> Split:
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    columns: dict[str, list[Any]] = {
        field: [] for field in ("index", "name", "pid", "camid", "sequence")
    }
    with tqdm(total=len(source), desc=f"indexing {name}", unit=" images", disable=None) as bar:
        for start in range(0, len(source), _READ_AT_ONCE):
            rows = range(start, min(start + _READ_AT_ONCE, len(source)))
            for example in source.__getitems__(list(rows)):
                for field, column in columns.items():
                    column.append(example[field])
            bar.update(len(rows))
    order = np.argsort(columns["index"])
    record_of = order.tolist()
    pids, camids, sequences = (
        np.array(columns[field], np.int32)[order] for field in ("pid", "camid", "sequence")
    )
    return Split(
        name=name,
        names=np.array([text.decode() for text in columns["name"]])[order],
        pids=pids,
        camids=camids,
        sequences=sequences,
        labels=relabel(pids)[0] if name == "train" else None,
        reader=lambda i: source[record_of[i]]["image"],
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m mros_jax.data.tfds_builders")
    names = sorted({config.dataset for builder in BUILDERS for config in builder.BUILDER_CONFIGS})
    parser.add_argument("--dataset", required=True, choices=names)
    parser.add_argument("--root", required=True, help="directory with the data as distributed")
    parser.add_argument("--out", required=True, help="TFDS data directory to write to")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument("--distractors_500k", action="store_true", help="market1501 only")
    parser.add_argument("--without_val", action="store_true", help="msmt17 and msmt17_v2 only")
    parser.add_argument("--test_set", type=int, help="classic CUHK03 only: 0..19")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {}
    if args.distractors_500k:
        options["distractors_500k"] = True
    if args.without_val:
        options["include_val"] = False
    if args.test_set is not None:
        options["test_set"] = args.test_set
    print(prepare(args.dataset, args.root, args.out, on_bad_image=args.on_bad_image, **options))


if __name__ == "__main__":
    main()
