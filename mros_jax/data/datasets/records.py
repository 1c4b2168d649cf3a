"""All data sets, one record each: how it is read, its options, where it comes from, its numbers.

Readers, the doctor, configs and prepared records ask here; what is known of a data set stands
nowhere else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mros_jax.data.datasets import cuhk03, folder, layouts, msmt17
from mros_jax.data.datasets.layouts import OnBadImage
from mros_jax.data.splits import Dataset
from mros_jax.data.synthetic import dataset as synthetic
from mros_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Option:
    """What a user may choose about a data set.

    Attributes:
        default: the value where nothing is chosen; its type is the option's.
        help: one line.
        values: all that is allowed; None for anything of the type.
        ignored_elsewhere: whether data sets without this option pass over it. Others refuse a value
            that is not the default: nobody shall believe that it had an effect.
    """

    default: bool | int | str
    help: str
    values: tuple[str, ...] | range | None = None
    ignored_elsewhere: bool = False

    def check(self, name: str, value: object) -> None:
        """Check a value.

        Raises:
            UserError: another type, or none of the values.
        """
        if type(value) is not type(self.default):
            raise UserError(
                f"option {name} is {value!r}; expected a {type(self.default).__name__} "
                f"such as {self.default!r}"
            )
        if self.values is not None and value not in self.values:
            expected = (
                f"{self.values[0]} to {self.values[-1]}"
                if isinstance(self.values, range)
                else f"one of {', '.join(self.values)}"
            )
            raise UserError(f"option {name} is {value!r}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the authors of a data set publish about a split.

    Attributes:
        images: None where it depends on options.
        identities: without junk and distractors.
        cameras: in all.
    """

    images: int | None
    identities: int
    cameras: int


@dataclasses.dataclass(frozen=True)
class Record:
    """A data set.

    Attributes:
        name: what it is called in configs and on command lines.
        read: `read(root, on_bad_image=..., **options)`; None for the one that is rendered.
        source: where it can be asked for, with the archive's name.
        layout: what is expected below its root.
        terms: licence, as far as it is known.
        citation: the paper to cite.
        options: by name.
        published: counts of each split, for the options' defaults.
        published_with: (option, value) -> counts of splits that it changes.
        builder: name of its TFDS builder; empty if it cannot be prepared.
        prepared: TFDS config name -> the options that differ from their defaults.
    """

    name: str
    read: Callable[..., Dataset]
    source: str
    layout: str
    terms: str = ""
    citation: str = ""
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Counts] = dataclasses.field(default_factory=dict)
    published_with: Mapping[tuple[str, Any], Mapping[str, Counts]] = dataclasses.field(
        default_factory=dict
    )
    builder: str = ""
    prepared: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def is_rendered(self) -> bool:
        """Whether it needs no root."""
        return not self.layout

    def counts(self, options: Mapping[str, Any]) -> dict[str, Counts]:
        """Return the published counts of each split with these options."""
        counts = dict(self.published)
        for option in options.items():
            counts |= self.published_with.get(option, {})
        return counts

    def choose(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Complete options by their defaults.

        Options that only other data sets have may be given at their defaults, as a config that
        lists all of them does.

        Raises:
            UserError: an option that this data set does not have, or a value that it cannot have.
        """
        chosen = {name: option.default for name, option in self.options.items()}
        for name, value in options.items():
            if name in self.options:
                self.options[name].check(name, value)
                chosen[name] = value
            elif not any(
                other.ignored_elsewhere or other.default == value
                for other in (record.options.get(name) for record in DATASETS.values())
                if other is not None
            ):
                raise UserError(
                    f"data set {self.name!r} has no option {name} (given: {value!r}); "
                    f"it has {', '.join(self.options) or 'none'}"
                )
        return chosen

    def missing(self, root: pathlib.Path | None, what: str = "") -> str:
        """Return the message for data that are not there: what is expected, and where to ask."""
        seen = "no root was given" if root is None else f"nothing usable at {root}"
        return (
            f"data set {self.name!r}: {seen}{what and ' (' + what + ')'}\n"
            f"  expected there: {self.layout}\n"
            f"  available from: {self.source}\n"
            "  without files: the data set 'synthetic' is rendered and needs none"
        )


def _counts(cameras: int, **splits: tuple[int | None, int]) -> dict[str, Counts]:
    return {split: Counts(*counts, cameras) for split, counts in splits.items()}


def _read_synthetic(root: None, *, preset: str, seed: int) -> Dataset:
    return synthetic.make_dataset(**synthetic.PRESETS[preset], seed=seed)


_MARKET_LAYOUT = "bounding_box_train/, query/ and bounding_box_test/ with files like "
_MSMT17_LISTS = "list_train.txt, list_val.txt, list_query.txt, list_gallery.txt"
_INCLUDE_VAL = {"include_val": Option(True, "train on MSMT17's validation list too, as published")}


def _msmt17(version: int, layout: str) -> Record:
    return Record(
        name="msmt17" if version == 1 else "msmt17_v2",
        read=functools.partial(msmt17.read_msmt17, version=version),
        source="https://www.pkuvmc.com/dataset.html, on request "
        + ("(MSMT17_V1.tar.gz)" if version == 1 else "(MSMT17_V2)"),
        layout=f"{layout} and {_MSMT17_LISTS}",
        terms="release agreement to be signed; research only",
        citation="Wei et al., Person transfer GAN to bridge domain gap for person "
        "re-identification, CVPR 2018",
        options=_INCLUDE_VAL,
        published=_counts(15, train=(32_621, 1041), query=(11_659, 3060), gallery=(82_161, 3060)),
        published_with={("include_val", False): _counts(15, train=(30_248, 1041))},
        builder="msmt17",
        prepared={f"v{version}": {}, f"v{version}_without_val": {"include_val": False}},
    )


_CUHK03_SITE = (
    "http://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html (cuhk03_release.zip, md5 "
    "728939e58ad9f0ff53e521857dd8fb43)"
)
_CUHK03_TERMS = "for academic research, on request"
_CUHK03_PAPER = (
    "Li et al., DeepReID: deep filter pairing neural network for person re-identification, "
    "CVPR 2014"
)


def _cuhk03(kind: str, published: Mapping[str, Counts]) -> Record:
    return Record(
        name=f"cuhk03_{kind}",
        read=functools.partial(cuhk03.read_new_protocol, kind=kind),
        source=f"{_CUHK03_SITE}, https://github.com/zhunzhong07/person-re-ranking "
        "(cuhk03_new_protocol_config_*.mat, CUHK03-NP.zip)",
        layout=f"{kind}/bounding_box_train/, {kind}/query/, {kind}/bounding_box_test/ (CUHK03-NP); "
        f"or cuhk03_new_protocol_config_{kind}.mat beside cuhk-03.mat or images_{kind}/",
        terms=_CUHK03_TERMS,
        citation=f"{_CUHK03_PAPER}; Zhong et al., Re-ranking person re-identification with "
        "k-reciprocal encoding, CVPR 2017",
        published=published,
        builder="cuhk03",
        prepared={kind: {}},
    )


def _cuhk03_classic(kind: str) -> Record:
    sets = range(20)
    return Record(
        name=f"cuhk03_{kind}_classic",
        read=functools.partial(cuhk03.read_classic, kind=kind),
        source=_CUHK03_SITE,
        layout="cuhk-03.mat",
        terms=_CUHK03_TERMS,
        citation=_CUHK03_PAPER,
        options={"test_set": Option(0, "which of classic CUHK03's 20 test sets", sets)},
        published=_counts(2, train=(None, 1367), query=(None, 100), gallery=(None, 100)),
        builder="cuhk03",
        prepared={
            f"{kind}_classic_{number:02d}": {"test_set": number} if number else {}
            for number in sets
        },
    )


_RECORDS = (
    Record(
        name="market1501",
        read=layouts.read_market1501,
        source="https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html "
        "(Market-1501-v15.09.15.zip, md5 65005ab7d12ec1c44de4eeafe813e68a; distractors_500k.zip)",
        layout=_MARKET_LAYOUT + "0002_c1s1_000451_03.jpg",
        terms="no licence in the archive; made available for academic research",
        citation="Zheng et al., Scalable person re-identification: a benchmark, ICCV 2015",
        options={
            "distractors_500k": Option(False, "with Market-1501's 500,000 further distractors")
        },
        # The gallery: 13,120 boxes of people, 2,793 distractors and 3,819 junk boxes.
        published=_counts(6, train=(12_936, 751), query=(3368, 750), gallery=(19_732, 750)),
        builder="market1501",
        prepared={"plain": {}, "distractors_500k": {"distractors_500k": True}},
    ),
    Record(
        name="dukemtmc",
        read=layouts.read_dukemtmc,
        source="nowhere officially: its authors withdrew it in 2019; for those who have a copy "
        "(DukeMTMC-reID.zip)",
        layout=_MARKET_LAYOUT + "0001_c2_f0046182.jpg",
        terms="was CC BY-NC-SA 4.0; withdrawn: consider whether to use it at all",
        citation="Zheng, Zheng, Yang, Unlabeled samples generated by GAN improve the person "
        "re-identification baseline in vitro, ICCV 2017; Ristani et al., ECCV 2016 workshops",
        published=_counts(8, train=(16_522, 702), query=(2228, 702), gallery=(17_661, 1110)),
        builder="dukemtmc",
        prepared={"plain": {}},
    ),
    _msmt17(1, "train/, test/"),
    _msmt17(2, "mask_train_v2/, mask_test_v2/"),
    _cuhk03("labeled", _counts(2, train=(7368, 767), query=(1400, 700), gallery=(5328, 700))),
    _cuhk03("detected", _counts(2, train=(7365, 767), query=(1400, 700), gallery=(5332, 700))),
    _cuhk03_classic("labeled"),
    _cuhk03_classic("detected"),
    Record(
        name="folder",
        read=folder.read_folder,
        source="you: it is your own directory",
        layout="images.csv with the columns path,pid,camid,split; or "
        f"{_MARKET_LAYOUT}0002_c1s1_000451_03.jpg; or train/, query/ and gallery/ with a directory "
        "for each person and files like c1_0001.jpg",
    ),
    Record(
        name="synthetic",
        read=_read_synthetic,
        source="this library, which renders it",
        layout="",
        options={
            "preset": Option(
                "demo",
                "size of the synthetic data set",
                tuple(synthetic.PRESETS),
                ignored_elsewhere=True,  # configs of every size choose one
            ),
            "seed": Option(0, "of the synthetic data set: other seed, other people", range(2**31)),
        },
    ),
)

# The one list of data sets: name -> record.
DATASETS: dict[str, Record] = {record.name: record for record in _RECORDS}


def find_record(name: str) -> Record:
    """Return the record of a data set.

    Raises:
        UserError: there is none of this name.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; there are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def options_of(name: str) -> dict[str, Option]:
    """Return the options of a data set by name.

    Raises:
        UserError: there is no such data set.
    """
    return dict(find_record(name).options)


def read(
    record: Record, root: pathlib.Path | None, on_bad_image: OnBadImage, options: Mapping[str, Any]
) -> Dataset:
    """Read a data set from its directory, with complete options."""
    if "on_bad_image" in inspect.signature(record.read).parameters:
        options = {**options, "on_bad_image": on_bad_image}  # classic CUHK03 has no file names
    return record.read(root, **options)


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Offer the options of these data sets as arguments, `--NAME=VALUE`.

    What was given is read back by `pick_options`.
    """
    group = parser.add_argument_group("options of data sets")
    options = {key: option for name in names for key, option in options_of(name).items()}
    for key, option in options.items():
        group.add_argument(
            f"--{key}",
            type=_parse_bool if isinstance(option.default, bool) else type(option.default),
            nargs="?" if isinstance(option.default, bool) else None,
            const=True if isinstance(option.default, bool) else None,
            metavar="VALUE",
            help=f"{option.help} (default: {option.default})",
        )


def pick_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values that are options of some data set, and were given (not None).

    Args:
        values: by name, such as a config's `dataset` section or `vars` of parsed arguments.
    """
    known = {key for record in DATASETS.values() for key in record.options}
    return {key: value for key, value in values.items() if key in known and value is not None}


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"
