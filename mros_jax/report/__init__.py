"""The last page of a run: one self-contained report.html."""

from mros_jax.report.build import write_report

__all__ = ["write_report"]
