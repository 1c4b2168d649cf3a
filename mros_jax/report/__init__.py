"""The last page of a run: one self-contained report.html."""

import os
import pathlib
from typing import Any

from mros_jax import extras


def write_report(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, **options: Any
) -> pathlib.Path:
    """Write a run's report; see `mros_jax.report.build.write_report`.

    Raises:
        UserError: what it is drawn with is not installed.
    """
    extras.require("report", "a report")
    from mros_jax.report import build  # matplotlib is slow to import

    return build.write_report(workdir, out, **options)
