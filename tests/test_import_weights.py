"""Checkpoints as other codes save them become runs, whose descriptors are those of that code."""

import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from mros_jax import compare, evaluate, extract, import_weights, index
from mros_jax import train as training
from mros_jax.errors import NotFoundError, UserError
from mros_jax.export import __main__ as export
from mros_jax.import_weights import import_run
from mros_jax.inference import load_model
from mros_jax.models.resnet import TrunkSpec
from mros_jax.models.trunks import TRUNKS
from mros_jax.peers import PEERS
from mros_jax.report import write_report
from mros_jax.runs.run import Run
from tests.recorded import look_up, seeded


class Case(NamedTuple):
    """A checkpoint, and what becomes of it.

    `network` makes the other code's network, or computes TriNet. `system` and `fields` are what the
    run's config says. `levels` are what grey levels 0..255 are divided by, after `mean` is
    subtracted. `wrap` is how its code names and keeps tensors.
    """

    peer: str
    network: Callable[[Any], Any]
    system: str
    fields: Mapping[str, Any] = MappingProxyType({})
    size: tuple[int, int] = (96, 48)
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    levels: tuple[float, float, float] = (58.395, 57.12, 57.375)
    bgr: bool = False
    classes: int = 7
    prefix: str = ""
    arrays: bool = False


_BICUBIC = {"input.interpolation": "bicubic"}
_PLAIN = {"network.neck": False, "network.head_bias": True, "eval.normalize": False}
_TRINET: dict[str, Any] = {"levels": (1.0, 1.0, 1.0), "classes": 0, "arrays": True}

CASES = {
    "strong-baseline": Case(
        "strong-baseline",
        lambda peers: peers.StrongBaseline(),
        "strong-authors",
        {"network.stem_relu": False, "network.neck": True, "network.last_stride": 1},
    ),
    "strong-baseline without neck": Case(
        "strong-baseline",
        lambda peers: peers.StrongBaseline(neck=False),
        "strong-authors",
        {"network.neck": False, "network.head_bias": True},
        prefix="module.",
    ),
    "fast-reid": Case(
        "fast-reid",
        lambda peers: peers.FastReID(),
        "strong",
        _BICUBIC | {"network.stem_relu": True, "network.stem_pool": "end"},
        prefix="module.",
    ),
    "fast-reid GeM": Case(
        "fast-reid",
        lambda peers: peers.FastReID(gem=True, non_local=(2, 3)),
        "fast-reid-gem",
        {"network.pooling": "gem", "network.non_local": ["layer2_0", "layer3_0"]},
    ),
    "fast-reid AGW": Case(
        "fast-reid",
        lambda peers: peers.FastReID(non_local=(3,)),
        "fast-reid-gem",
        {"network.pooling": "gem", "network.non_local": ["layer3_0"]},
    ),
    "fast-reid of its first releases": Case(
        "fast-reid",
        lambda peers: peers.FastReID(old=True),
        "strong",
        {
            "input.mean": [0.5, 0.5, 0.5],
            "input.std": [0.2, 0.2, 0.2],
            "network.stem_pool": "centered",
        },
        mean=(127.5, 127.5, 127.5),
        levels=(51.0, 51.0, 51.0),
    ),
    "torchreid resnet": Case(
        "torchreid",
        lambda peers: peers.TorchreidResNet(),
        "torchreid-tiny",
        _PLAIN | {"network.last_stride": 2, "eval.metric": "euclidean"},
    ),
    "torchreid resnet fc": Case(
        "torchreid",
        lambda peers: peers.TorchreidResNet(features=32),
        "torchreid-tiny_fc32",
        {"network.reduced": 32, "network.descriptor": "h", "network.last_stride": 1},
        prefix="module.",
    ),
    "torchreid densenet": Case(
        "torchreid",
        lambda peers: peers.TorchreidDenseNet(),
        "torchreid-tiny_densenet",
        _PLAIN | {"network.last_stride": 2},
    ),
    "torchreid densenet fc": Case(
        "torchreid",
        lambda peers: peers.TorchreidDenseNet(features=32),
        "torchreid-tiny_densenet_fc32",
        {"network.reduced": 32, "network.last_stride": 2},
    ),
    "torchreid pcb": Case(
        "torchreid",
        lambda peers: peers.TorchreidPCB(parts=3),
        "pcb",
        {"network.num_stripes": 3, "network.descriptor": "g"},
    ),
    "torchreid hacnn": Case(
        "torchreid",
        lambda peers: peers.TorchreidHACNN(),
        "hacnn",
        {"network.stem": 16, "network.widths": [16, 32, 48], "network.embedded": 32},
        size=(160, 64),
    ),
    "mfbn": Case("mfbn", lambda peers: peers.MFBN(), "mfbn", _BICUBIC | {"eval.flip_test": True}),
    "mgn of seathiefwang": Case(
        "mgn",
        lambda peers: peers.MGN(),
        "mgn-public",
        _BICUBIC | {"network.pooling": "mean", "eval.flip_test": True},
    ),
    "mgn of GNAYUOHZ": Case(
        "mgn",
        lambda peers: peers.MGN("max", shared=True),
        "mgn-public",
        _BICUBIC | {"network.pooling": "max", "network.global_heads": "f"},
    ),
    "mgn of levyfan": Case(
        "mgn",
        lambda peers: peers.MGN("max", before=True),
        "mgn",
        {"input.interpolation": "bilinear", "network.global_heads": "z"},
    ),
    "pcb": Case("pcb-rpp", lambda peers: peers.PCBByAuthors(), "pcb", {"network.num_stripes": 6}),
    "pcb_rpp": Case(
        "pcb-rpp",
        lambda peers: peers.PCBByAuthors(refined=True),
        "pcb_rpp-authors",
        {"network.pooling": "refined", "network.part_classifier": "authors"},
    ),
    "dare": Case("dare", lambda peers: peers.DaRe(), "dare", {"eval.crops": "ten"}, classes=0),
    "dare densenet": Case(
        "dare",
        lambda peers: peers.DenseDaRe(),
        "dare-densenet201",
        {"network.trunk": "tiny_densenet"},
        classes=0,
    ),
    "trinet of Lasagne": Case(
        "triplet-reid",
        lambda peers: peers.lasagne_trinet,
        "trinet",
        {"input.channels": "bgr", "network.strides": "1x1", "network.stem_pool": "end"},
        mean=(103.0626238, 115.90288257, 123.15163084),
        bgr=True,
        **_TRINET,
    ),
    "trinet of TensorFlow": Case(
        "triplet-reid",
        lambda peers: peers.slim_trinet,
        "trinet",
        {"input.channels": "rgb", "network.strides": "last", "eval.crops": "ten"},
        mean=(123.68, 116.78, 103.94),
        **_TRINET,
    ),
}


def draw(name, kind, shape):
    """A tensor of a trained network's size, by its name."""
    ranges = {
        **{"scale": (0.5, 1.5), "bias": (-0.3, 0.3), "mean": (-0.3, 0.3), "var": (0.5, 2)},
        **{"inverse": (0.7, 1.4), "p": (2.5, 3.5)},
    }
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind in ranges:
        return seeded(name).uniform(*ranges[kind], shape).astype(np.float32)
    inputs = np.prod(shape[:-1] if kind == "weight_in_out" else shape[1:])
    values = seeded(name).standard_normal(shape) * (2 / inputs) ** 0.5
    return values.astype(np.float32)


def make_pictures(size):
    """Three pictures of smooth colours: uint8 (3, H, W, 3)."""
    coarse = seeded("pictures").integers(0, 256, (3, 6, 3, 3), np.uint8)
    sized = [
        PIL.Image.fromarray(x).resize(size[::-1], PIL.Image.Resampling.BICUBIC) for x in coarse
    ]
    return np.stack([np.asarray(x) for x in sized])


def look_inside(case):
    """From PyTorch: (kind and shape of each tensor by name, descriptors (3, D))."""
    import torch

    from tests.parity import torch_peers

    pictures = make_pictures(case.size)[..., :: -1 if case.bgr else 1]
    inputs = (pictures - np.float32(case.mean)) / np.float32(case.levels)
    x = torch.from_numpy(inputs.transpose(0, 3, 1, 2).astype(np.float32).copy())
    network = case.network(torch_peers)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    with torch.no_grad():
        if case.arrays:

            def take(kind, shape, name=None):
                name = name or f"arr_{len(specs)}"
                specs[name] = kind, tuple(shape)
                return torch.from_numpy(draw(name, kind, shape))

            return specs, network(take, x).numpy()
        for name, value in network.state_dict().items():
            specs[name] = _find_kind(name, value), tuple(value.shape)
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                specs[name] = "zero", tuple(parameter.shape)
        fixed = {k: v for k, v in network.state_dict().items() if k.startswith("pixel_")}
        drawn = {k: torch.from_numpy(draw(k, *spec)) for k, spec in specs.items()} | fixed
        network.load_state_dict(drawn)
        return specs, network.eval()(x).numpy()


def _find_kind(name, value):
    ends = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "zero", "p": "p"}
    last = name.rpartition(".")[2]
    return ends.get(last) or (
        "bias" if last == "bias" else "scale" if value.ndim == 1 else "weight"
    )


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """`checkpoint(name)`: a file as its code saves it, and the descriptors of the pictures."""
    monkeypatch.setitem(TRUNKS, "small", TrunkSpec((2, 1, 2, 1), 16, "bottleneck"))

    def make(name):
        case = CASES[name]

        def compute():
            specs, descriptors = look_inside(case)
            text = json.dumps(specs).encode()
            return {"specs": np.frombuffer(text, np.uint8), "descriptors": descriptors}

        # One file for all tests of a case.
        test = test_a_checkpoint_becomes_a_run_of_its_system.__name__
        kept = look_up(f"tests/test_import_weights.py::{test}[{name}]", compute)
        specs = json.loads(kept["specs"].tobytes())
        state = {name: draw(name, *spec) for name, spec in specs.items()}
        for name, level in (("mean", case.mean[0]), ("std", case.levels[0])):
            if f"pixel_{name}" in state:
                state[f"pixel_{name}"] = np.full((1, 3, 1, 1), level, np.float32)
        path = tmp_path / f"checkpoint{'.npz' if case.arrays else '.safetensors'}"
        if case.arrays:
            np.savez(path, **state)
        else:
            save_file({case.prefix + name: value for name, value in state.items()}, path)
        return path, kept["descriptors"]

    return make


def small(case):
    height, width = case.size
    return (
        f"--config.input.height={height}",
        f"--config.input.width={width}",
        "--config.eval.resize=()",
    )


QUICK = ("strong-baseline", "fast-reid of its first releases", "mgn of GNAYUOHZ")


@pytest.mark.pytorch
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_checkpoint_becomes_a_run_of_its_system(name, checkpoint, tmp_path):
    case = CASES[name]
    path, _ = checkpoint(name)
    run = import_run(path, peer=case.peer, out=tmp_path / "run", overrides=small(case))
    assert run.system == case.system
    assert run.num_classes == case.classes
    config = ConfigDict(run.config)
    for field, value in case.fields.items():
        section, _, last = field.rpartition(".")
        assert config[section][last] == value, field
    assert config.weights == "none"
    assert run.record["imported"]["from"] == case.peer
    assert run.record["imported"]["file"] == path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "run"]


def check_descriptors(name, checkpoint, out):
    case = CASES[name]
    path, theirs = checkpoint(name)
    run = import_run(path, peer=case.peer, out=out, overrides=small(case))
    ours = load_model(run.path).embed(make_pictures(case.size))
    assert np.linalg.norm(theirs[0] - theirs[1]) > 1e-2 * np.linalg.norm(theirs[0])
    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert error.max() <= 1e-5


@pytest.mark.pytorch
def test_descriptors_are_those_of_the_other_code(checkpoint, tmp_path):
    check_descriptors("strong-baseline", checkpoint, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.pytorch
@pytest.mark.parametrize("name", [name for name in CASES if name != "strong-baseline"])
def test_descriptors_of_every_peer(name, checkpoint, tmp_path):
    check_descriptors(name, checkpoint, tmp_path / "run")


def write_market(root):
    """JPEGs of six people from two cameras, in Market-1501's layout."""
    rng = np.random.default_rng(0)
    parts = {"bounding_box_train": (7, 1, 2), "query": (1, 1), "bounding_box_test": (1, 2)}
    for part, (first, *cameras) in parts.items():
        (root / part).mkdir(parents=True)
        for pid in range(first, first + 6):
            for camera in cameras:
                pixels = np.full((128, 64, 3), 40 * (pid % 6), np.uint8)
                pixels[20:60, 10:50] = rng.integers(0, 256, 3)
                name = f"{pid:04d}_c{camera}s1_{pid:06d}_00.jpg"
                PIL.Image.fromarray(pixels).save(root / part / name)
    return root


@pytest.mark.slow
@pytest.mark.pytorch
def test_an_imported_run_is_a_run_everywhere(checkpoint, tmp_path, capsys, monkeypatch):
    """From the command line: evaluated, extracted, indexed, exported, compared and reported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, _ = checkpoint("fast-reid of its first releases")
    out, root = tmp_path / "runs" / "bot", write_market(tmp_path / "market")
    words = [*small(CASES["fast-reid"]), f"--config.dataset.root={root}"]
    words += ["--config.input.channels=bgr"]
    assert import_weights.main(["--from=fast-reid", str(path), f"--out={out}", *words]) == 0
    assert capsys.readouterr().out == f"{out}: strong on market1501, 7 identities, from {path}\n"

    results = str(out / "results.json")
    assert evaluate.main([f"--run={out}", f"--out={results}", "--no_progress"]) == 0
    assert Run(out).features is not None  # kept as the run's own
    protocol = Run(out).rankings[0]["protocol"]
    assert (protocol["dataset"], protocol["num_query"]) == ("market1501", 6)
    assert Run(out).results["run"]["system"] == "strong"

    described = tmp_path / "gallery.npz"
    words = [f"--run={out}", f"--images={root / 'bounding_box_test'}", f"--out={described}"]
    assert extract.main(words) == 0
    words = ["build", str(tmp_path / "index"), f"--features={described}"]
    assert index.main(words) == 0

    assert export.main([str(out), "--format=stablehlo", "--sample=4"]) == 0
    with zipfile.ZipFile(out / "model.stablehlo.zip") as archive:
        explained = json.loads(archive.read("metadata.json"))["input"]
    assert explained["mean"] == [0.5, 0.5, 0.5]
    assert (explained["channels"], explained["interpolation"]) == ("bgr", "bicubic")

    assert compare.main([str(out)]) == 0
    assert "strong" in capsys.readouterr().out
    assert "strong on market1501" in write_report(out).read_text()

    with pytest.raises(UserError, match=r"imported from checkpoint.safetensors .*config.init.run="):
        training.train(ConfigDict(Run(out).config), out)


@pytest.fixture
def strong(checkpoint):
    return checkpoint("strong-baseline")[0]


def edited(path, change):
    """A checkpoint of the tensors that are left of another's."""
    state = {name: value.copy() for name, value in load_file(path).items()}
    change(state)
    save_file(state, path)
    return path


def refuse(path, out, match, peer="strong-baseline", overrides=()):
    """It is refused, and nothing is left or lost."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=match):
        import_run(path, peer=peer, out=out, overrides=overrides)
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.pytorch
def test_what_does_not_fit_is_listed_by_its_names_there(strong, tmp_path):
    def change(state):
        del state["base.layer2.0.conv1.weight"]
        state["bottleneck.weight"] = state["bottleneck.weight"][:5]
        state["bottleneck.bias"][3] = 0.25
        state |= {f"extra{i}.weight": np.zeros(2, np.float32) for i in range(9)}

    path = edited(strong, change)
    with pytest.raises(UserError) as caught:
        import_run(
            path, peer="strong-baseline", out=tmp_path / "run", overrides=small(CASES["pcb"])
        )
    lines = str(caught.value).splitlines()
    assert "as a checkpoint of strong-baseline" in lines[0]
    assert "    base.layer2.0.conv1.weight (32, 16, 3, 3)" in lines
    assert "    extra5.weight (2,)" in lines
    assert "    and 3 more" in lines
    assert "    bottleneck.weight (5,), expected (128,)" in lines
    assert "    bottleneck.bias is not 0, and is fixed at 0 in this network" in lines
    assert not (tmp_path / "run").exists()


@pytest.mark.pytorch
def test_the_wrong_peer_is_named_and_the_right_one_too(checkpoint, tmp_path):
    path, _ = checkpoint("torchreid resnet")
    refuse(path, tmp_path / "run", r"no checkpoint of mgn .*fc_id_2048_0.*--from torchreid", "mgn")
    with pytest.raises(UserError, match="peer is 'bot'; expected one of strong-baseline, "):
        import_run(path, peer="bot", out=tmp_path / "run")


@pytest.mark.pytorch
def test_only_an_empty_directory_becomes_a_run(strong, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refuse(strong, out, r"not empty \(it holds notes.txt\)")
    refuse(strong, out / "notes.txt", "is a file")
    (out / "notes.txt").unlink()
    run = import_run(strong, peer="strong-baseline", out=out)
    assert run.exists()
    refuse(strong, out, "not empty")


@pytest.mark.pytorch
def test_fields_are_checked(strong, tmp_path):
    out = tmp_path / "run"
    refuse(strong, out, "no field 'hight'", overrides=["--config.input.hight=3"])
    refuse(strong, out, "channels is 'grb'", overrides=["--config.input.channels=grb"])
    refuse(strong, out, "std above 0", overrides=["--config.input.std=(0.0, 1.0, 1.0)"])
    refuse(strong, out, "descriptor is 'f_x'", overrides=["--config.network.descriptor=f_x"])


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("base.layer1.0.bn1.IN.weight", "instance normalization"),
        ("base.layer1.0.se.fc.0.weight", "squeeze-and-excitation"),
        ("base.layer1.1.conv1.weight", "2, 1, 1, 1 basic blocks of width 16; the ResNets here are"),
    ],
)
def test_networks_that_are_not_here_are_named(strong, tmp_path, extra, what):
    path = edited(strong, lambda state: state.update({extra: np.zeros(3, np.float32)}))
    refuse(path, tmp_path / "run", what)


def test_damaged_files_are_said_to_be(tmp_path):
    out = tmp_path / "run"
    for name in ("w.safetensors", "w.npz"):
        path = tmp_path / name
        path.write_bytes(b"PK\x03\x04 no weights")
        refuse(path, out, "is not a whole")
    for count, what in (
        (5, "it holds 5 arrays; TriNet on ResNet-50 has 273"),
        (273, "no deviations"),
    ):
        arrays: Any = {f"arr_{i}": np.zeros(3, np.float32) for i in range(count)}
        np.savez(tmp_path / "w.npz", **arrays)
        refuse(tmp_path / "w.npz", out, what, "triplet-reid")
    np.savez(tmp_path / "o.npz", a=np.array([object()]))
    refuse(tmp_path / "o.npz", out, "is not a whole .npz file of arrays")
    with pytest.raises(NotFoundError):
        import_run(tmp_path / "none.pth", peer="mgn", out=out)


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "net"])
def test_pytorch_files_are_taken_out_of_their_wrappers(torch, strong, tmp_path, wrapper):
    state = {f"module.{k}": torch.from_numpy(v) for k, v in load_file(strong).items()}
    scores = {"epoch": 3, "rank1": np.float64(0.9), "optimizer": {"lr": 1e-3}}
    path = tmp_path / "w.pth.tar"
    torch.save({wrapper: state, **scores} if wrapper else state, path)
    run = import_run(path, peer="strong-baseline", out=tmp_path / "run")
    assert run.num_classes == 7


class Payload:
    """What a file could do to who unpickles it."""

    def __reduce__(self):
        return os.makedirs, ("executed",)


def test_nothing_in_a_file_is_executed(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "w.pth")
    refuse(tmp_path / "w.pth", tmp_path / "run", r"holds Python objects, .*model.state_dict\(\)")
    assert not pathlib.Path("executed").exists()


def test_every_peer_has_a_case():
    assert {case.peer for case in CASES.values()} == set(PEERS)
