"""A file in each format: made, compared with the run, and only then published."""

import logging
import os
import pathlib
from typing import Any

import numpy as np

from mros_jax import config as configs
from mros_jax import extras
from mros_jax.data.splits import Dataset
from mros_jax.errors import NotFoundError, UserError, check_choice
from mros_jax.export import checks, stablehlo
from mros_jax.export.model import Model, flatten, load
from mros_jax.files import check_output, write_atomically
from mros_jax.models import torch_weights

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "float16", "int8")
SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo.zip", "torch": ".safetensors"}
FORMATS = tuple(SUFFIXES)
_CALIBRATION = 128  # training images that ranges of activations are taken from


def export(
    run: str | os.PathLike[str],
    form: str,
    out: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str = "last",
    precision: str = "float32",
    flip_test: bool | None = None,
    crops: str | None = None,
    root: str | None = None,
    sample: int = 100,
) -> pathlib.Path:
    """Write a run's network as one file.

    Args:
        run: the run's directory.
        form: "onnx", "stablehlo" or "torch".
        out: the file; None: `model` with the format's suffix in the run, `model-int8.onnx` and
            `model-float16.onnx` for other precisions.
        checkpoint: "last" or "best".
        precision: "float32"; of ONNX files also "float16" or "int8".
        flip_test: mean over image and mirror image; None: as the run.
        crops: "ten": mean over ten crops, or "none"; None: as the run.
        root: where the run's data set is now; None: where it was.
        sample: images that the file is compared with the run on.

    Returns:
        The file.

    Raises:
        NotFoundError: no run, or no checkpoint.
        UserError: what the format needs is not installed, an option that it does not have, a file
            that does not agree with the run (nothing is written), a path that cannot be written.
    """
    check_choice("format", form, FORMATS)
    check_choice("precision", precision, PRECISIONS)
    if precision != "float32" and form != "onnx":
        raise UserError(f"precision {precision} is for ONNX files; {form} files have float32")
    if sample < 2:
        raise UserError(f"sample is {sample}; a query and a gallery image are 2 at least")
    if form == "onnx":
        extras.require("export", "an ONNX file")
    if form == "stablehlo":
        extras.require("stablehlo", "a StableHLO file")
    model = load(run, checkpoint, flip_test=flip_test, crops=crops)
    if out is None:
        words = "model" if precision == "float32" else f"model-{precision}"
        out = model.run.path / f"{words}{SUFFIXES[form]}"
    path = pathlib.Path(out)
    if not path.name.endswith(SUFFIXES[form]):
        raise UserError(f"{path} must end in {SUFFIXES[form]}")
    check_output(path)
    if form == "torch":
        torch_weights.save_torch_state_dict(
            path, model.embedder.variables, flatten(model.explain())
        )
        return path
    dataset = _find_dataset(model, root)
    chosen = checks.invent(sample) if dataset is None else checks.draw(dataset, sample)
    if form == "onnx":
        data = _make_onnx(model, chosen, dataset, precision)
    else:
        data = _make_stablehlo(model, chosen)
    with write_atomically(path, "wb") as file:
        file.write(data)
    return path


def _find_dataset(model: Model, root: str | None) -> Dataset | None:
    config = model.config
    if root is not None:
        config.dataset.root = root
    try:
        return configs.load_dataset(config)
    except NotFoundError as error:
        if root is not None:
            raise
        log.warning("The run's data set is not there; the file is checked on noise (%s)", error)
        return None


def _make_stablehlo(model: Model, sample: checks.Sample) -> bytes:
    program = stablehlo.convert(model)
    sample = sample.resize(*model.size, model.interpolation)
    agreement = _check(model, stablehlo.Session(program), sample)
    return stablehlo.pack(program, {**model.explain(), **_explain_check(agreement, sample)})


def _make_onnx(
    model: Model, sample: checks.Sample, dataset: Dataset | None, precision: str
) -> bytes:
    from mros_jax.export import onnx_file  # slow to import

    network = onnx_file.convert(model)
    whole = onnx_file.assemble(model, network)
    agreement = _check(model, onnx_file.Session(whole.SerializeToString()), sample)
    explained = {**model.explain(), "precision": precision}
    if precision == "float32":
        explained |= _explain_check(agreement, sample)
    else:
        if precision == "int8":
            if dataset is None:
                raise UserError(
                    "precision int8 takes the ranges of activations from training images, and the "
                    "run's data set is not there; say where it is now with --root"
                )
            images = checks.read(dataset.train, _CALIBRATION)
            network = onnx_file.quantize(model, network, images)
        else:
            network = onnx_file.halve(network)
        whole = onnx_file.assemble(model, network)
        session = onnx_file.Session(whole.SerializeToString())
        explained |= _measure_loss(model, session, sample, precision)
    onnx_file.explain(whole, flatten(explained))
    return bytes(whole.SerializeToString())


def _check(model: Model, session: checks.Session, sample: checks.Sample) -> checks.Agreement:
    """Refuse a file that does not make the run's descriptors."""
    ours, theirs = model.embed(sample.images), checks.run(session, sample.images)
    agreement = _compare(model, ours, theirs, sample)
    if not agreement.holds:
        raise UserError(
            f"nothing is written: on {sample} the file does not agree with the run: {agreement}; "
            f"expected at most {checks.TOLERANCE:g} and none"
        )
    log.info("On %s: %s", sample, agreement)
    return agreement


def _compare(
    model: Model, ours: np.ndarray, theirs: np.ndarray, sample: checks.Sample
) -> checks.Agreement:
    return checks.compare(ours, theirs, len(sample.query), model.config.eval.metric)


def _explain_check(agreement: checks.Agreement, sample: checks.Sample) -> dict[str, Any]:
    return {"check": {"on": str(sample), "difference": agreement.difference}}


def _measure_loss(
    model: Model, session: checks.Session, sample: checks.Sample, precision: str
) -> dict[str, Any]:
    """What a smaller precision costs, on the sample."""
    ours, theirs = model.embed(sample.images), checks.run(session, sample.images)
    agreement = _compare(model, ours, theirs, sample)
    explained = _explain_check(agreement, sample)
    if not np.isfinite(agreement.difference):
        raise UserError(f"nothing is written: in {precision} descriptors are not finite")
    log.info("In %s descriptors differ by up to %.1e", precision, agreement.difference)
    own, other = (checks.score(made, sample, model.config.eval) for made in (ours, theirs))
    if own is not None and other is not None:
        loss = round(100 * (own.mAP - other.mAP), 2) + 0.0  # no -0.00
        log.info(
            "mAP of float32 %.2f, of %s %.2f: it loses %.2f",
            100 * own.mAP,
            precision,
            100 * other.mAP,
            loss,
        )
        explained["check"] |= {"mAP": {"float32": own.mAP, precision: other.mAP}}
    return explained
