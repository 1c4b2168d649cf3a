"""Packages that only one purpose needs: the extras of pyproject.toml."""

import importlib.util

from mros_jax.errors import UserError

# What an extra is looked for by.
_MODULES = {
    "report": ("jinja2", "matplotlib"),
    "tensorboard": ("tensorboardX",),
    "tfds": ("array_record", "tensorflow_datasets"),
    "cuhk03": ("h5py",),
    "faiss": ("faiss",),
    "video": ("av",),
    "jpeg": ("simplejpeg",),
    "stablehlo": ("flatbuffers",),
    "export": ("jax2onnx", "onnx", "onnxruntime"),
    "explore": ("gradio", "jinja2"),
}


def find_missing(extra: str, purpose: str) -> str | None:
    """What to tell a user who lacks packages of an extra; None where all are there.

    Args:
        extra: its name.
        purpose: what needs them, as the subject of a sentence.
    """
    missing = [name for name in _MODULES[extra] if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"{purpose} needs {' and '.join(missing)}, which {verb} not installed: "
        f"pip install 'mros_jax[{extra}]'"
    )


def require(extra: str, purpose: str) -> None:
    """Check that an extra is installed, before its packages are imported.

    Raises:
        UserError: it is not; says how to install it.
    """
    if (message := find_missing(extra, purpose)) is not None:
        raise UserError(message)
