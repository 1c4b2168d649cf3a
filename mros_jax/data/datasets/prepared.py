"""TFDS builders: the original image bytes as ArrayRecord, without TensorFlow.

    python -m mros_jax.data.prepare --dataset market1501 --root MANUAL_DIR --out DATA_DIR

Then `DATA_DIR` as the root of the data set reads the records instead of the directory, with the
same result. With TFDS alone, after `import mros_jax.data.datasets.prepared`:
`tfds.data_source("market1501/plain", split="query", data_dir=DATA_DIR)`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from mros_jax import console, extras
from mros_jax.data import fingerprint
from mros_jax.data.datasets import layouts, records
from mros_jax.data.images import ContentDigest, EncodedImages, hash_bytes
from mros_jax.data.splits import Dataset, Split, relabel
from mros_jax.errors import NotFoundError, UserError

extras.require("tfds", "a data set prepared as records")
import tensorflow_datasets as tfds  # noqa: E402

_READ_AT_ONCE = 256
_SPLITS = ("train", "query", "gallery")


@dataclasses.dataclass
class ReidConfig(tfds.core.BuilderConfig):
    """Which data set of `records.DATASETS` is stored, and with which options."""

    dataset: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class _ReidBuilder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Store every image as its original bytes, in the reader's order (feature `index`).

    The metadata keep for each split how many images there are, the digest of their bytes, and the
    fingerprint; `load_prepared` checks them.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (Looking for checksums, TFDS 4.9.10 imports importlib_resources, which
    # its dependencies do not always bring.)
    url_infos: ClassVar[dict[str, Any]] = {}
    # What a builder of TFDS takes no argument for; `prepare` sets it.
    on_bad_image: layouts.OnBadImage = "error"

    def _info(self) -> tfds.core.DatasetInfo:
        record = records.DATASETS[self.builder_config.dataset]
        number = tfds.features.Scalar(dtype=np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{record.name}: person re-identification. Terms: {record.terms}.",
            citation=record.citation,
            metadata=tfds.core.MetadataDict(),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "index": number,
                    "name": tfds.features.Text(),
                    "pid": number,
                    "camid": number,
                    "sequence": number,
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        dataset = self.read(pathlib.Path(dl_manager.manual_dir))
        return {split.name: self._generate_examples(split) for split in dataset.splits}

    def read(self, root: pathlib.Path) -> Dataset:
        """Read the data set as distributed."""
        record = records.DATASETS[self.builder_config.dataset]
        options = record.choose(self.builder_config.options)
        try:
            return records.read(record, root, self.on_bad_image, options)
        except layouts.MissingDataError as error:
            raise NotFoundError(record.missing(root, str(error))) from error

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, Any]]:
        content = ContentDigest()
        for i in range(len(split)):
            data = split.images.encoded(i)
            content.update(hash_bytes(data))
            yield (
                i,
                {
                    "image": data,
                    "index": i,
                    "name": str(split.names[i]),
                    "pid": int(split.pids[i]),
                    "camid": int(split.camids[i]),
                    "sequence": int(split.sequences[i]),
                },
            )
        self.info.metadata[split.name] = {
            "images": len(split),
            "content": content.hexdigest(),
            "fingerprint": fingerprint.combine(split, content.hexdigest()),
        }


def _configs(builder: str) -> list[ReidConfig]:
    return [
        ReidConfig(name=config, dataset=record.name, options=dict(options))
        for record in records.DATASETS.values()
        if record.builder == builder
        for config, options in record.prepared.items()
    ]


def _instructions(builder: str) -> str:
    record = next(r for r in records.DATASETS.values() if r.builder == builder)
    return f"Available from {record.source}. The manual directory must have {record.layout}."


class Market1501(_ReidBuilder):
    """Market-1501."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("market1501")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = _configs("market1501")


class Dukemtmc(_ReidBuilder):
    """DukeMTMC-reID."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("dukemtmc")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = _configs("dukemtmc")


class Msmt17(_ReidBuilder):
    """MSMT17, versions 1 and 2."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("msmt17")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = _configs("msmt17")


class Cuhk03(_ReidBuilder):
    """CUHK03: new protocol, and the 20 test sets of the classic one."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("cuhk03")
    BUILDER_CONFIGS: ClassVar[list[ReidConfig]] = _configs("cuhk03")


BUILDERS: tuple[type[_ReidBuilder], ...] = (Market1501, Dukemtmc, Msmt17, Cuhk03)


def make_builder(name: str, data_dir: str | os.PathLike[str], **options: Any) -> _ReidBuilder:
    """Make the TFDS builder for a data set and the reader's options.

    Raises:
        UserError: no such data set or option, or it cannot be prepared; or what lies at its place
            is damaged.
    """
    record = records.find_record(name)
    chosen = record.choose(options)
    for builder in BUILDERS:
        for config in builder.BUILDER_CONFIGS:
            if config.dataset == name and record.choose(config.options) == chosen:
                try:
                    return builder(
                        data_dir=os.fspath(data_dir), config=config.name, file_format="array_record"
                    )
                except Exception as error:  # TFDS raises many types on damaged descriptions
                    raise UserError(_damaged(pathlib.Path(data_dir), error)) from error
    able = [record.name for record in records.DATASETS.values() if record.builder]
    raise UserError(f"data set {name!r} cannot be prepared; these can: {', '.join(able)}")


def _damaged(path: pathlib.Path, error: Exception) -> str:
    return (
        f"prepared records in {path} cannot be read ({type(error).__name__}: {error}); remove that "
        "directory and prepare them again"
    )


def prepare(
    name: str,
    root: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    on_bad_image: layouts.OnBadImage = "error",
    **options: Any,
) -> pathlib.Path:
    """Store a data set as ArrayRecord; TFDS writes to a temporary directory and renames it.

    What is prepared already is left alone, if it holds the same.

    Args:
        name: as for `sources.load_dataset`.
        root: the directory as distributed (the "manual directory" of TFDS).
        data_dir: where TFDS keeps its data sets.
        on_bad_image: what the reader does about names that it cannot read.
        **options: the reader's own.

    Returns:
        The directory with the records.

    Raises:
        UserError: no such data set; a misnamed file; other data were prepared there before.
        NotFoundError: no data at `root`.
    """
    layouts.check_choice(on_bad_image)
    builder = make_builder(name, data_dir, **options)
    builder.on_bad_image = on_bad_image
    path = pathlib.Path(root).expanduser()
    if not path.is_dir():
        raise NotFoundError(records.find_record(name).missing(path, "no such directory"))
    stored = pathlib.Path(builder.data_path)
    if stored.is_dir():
        _check_same(builder, builder.read(path))
        return stored
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=os.fspath(path))
    )
    return stored


def _check_same(builder: _ReidBuilder, dataset: Dataset) -> None:
    for split in dataset.splits:
        claim = builder.info.metadata.get(split.name) or {}
        if claim.get("fingerprint") != fingerprint.fingerprint_split(split, progress=True):
            raise UserError(
                f"{builder.data_path} was prepared from other data: the {split.name} split differs "
                "from that of the root; remove that directory, or prepare into another"
            )


def load_prepared(name: str, data_dir: str | os.PathLike[str], **options: Any) -> Dataset:
    """Read what `prepare` stored; equal to reading the directory.

    Count, names, identities and cameras are compared with those that were stored now, the bytes of
    the images when they are read.

    Raises:
        NotFoundError: it was not prepared with these options.
        UserError: the records are damaged, or are not those that were stored.
    """
    builder = make_builder(name, data_dir, **options)
    path = pathlib.Path(builder.data_path)
    if not (path / "features.json").is_file():
        raise NotFoundError(
            f"{data_dir} has no prepared records for data set {name!r} with options {options} "
            f"(expected {path}); make them: python -m mros_jax.data.prepare "
            f"--dataset {name} --root MANUAL_DIR --out {data_dir}"
        )
    try:
        train, query, gallery = (_read_split(builder, split) for split in _SPLITS)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # ArrayRecord and TFDS raise many types on damaged files
        raise UserError(_damaged(path, error)) from error
    return Dataset(name, train, query, gallery, pid_of_label=relabel(train.pids)[1])


def _read_split(builder: _ReidBuilder, name: str) -> Split:
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    columns: dict[str, list[Any]] = {
        field: [] for field in ("index", "name", "pid", "camid", "sequence")
    }
    with console.progress(total=len(source), desc=f"indexing {name}", unit=" images") as bar:
        for start in range(0, len(source), _READ_AT_ONCE):
            rows = range(start, min(start + _READ_AT_ONCE, len(source)))
            for example in source.__getitems__(list(rows)):
                for field, column in columns.items():
                    column.append(example[field])
            bar.update(len(rows))
    order = np.argsort(columns["index"])
    record_of = order.tolist()
    pids, camids, sequences = (
        np.array(columns[field], np.int64)[order] for field in ("pid", "camid", "sequence")
    )
    claim = builder.info.metadata.get(name) or {}
    content = str(claim.get("content"))
    split = Split(
        name=name,
        names=np.array([text.decode() for text in columns["name"]])[order],
        pids=pids,
        camids=camids,
        sequences=sequences,
        labels=relabel(pids)[0] if name == "train" else None,
        images=EncodedImages(lambda row: source[record_of[row]]["image"], len(order), content),
    )
    what = f"prepared records of the {name} split in {builder.data_path}"
    if claim.get("images") != len(split):
        raise UserError(
            f"{what} are {len(split)}, {claim.get('images')} were stored; prepare them again"
        )
    if claim.get("fingerprint") != fingerprint.combine(split, content):
        raise UserError(
            f"{what} have other names, identities or cameras than those stored; prepare them again"
        )
    return split
