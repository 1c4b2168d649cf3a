"""A run beside the paper's tables, and what keeps the two from being compared."""

import tomllib
from typing import Any

from mros_jax import compare
from mros_jax.runs.run import Run

# Column of the report: key in the paper's tables.
METRICS = {"mAP": "mAP", "Rank-1": "rank1", "Rank-5": "rank5", "Rank-10": "rank10", "mINP": "mINP"}


def find_paper_rows(run: Run) -> tuple[list[dict[str, float]], list[str]]:
    """What the paper has for each ranking of a run.

    Returns:
        For each ranking column -> fraction of 1, empty where the paper has none; and what was
        measured otherwise than in the paper, as "what: here, not there".
    """
    if not compare.PAPER.exists():  # installed without the repository
        return [{} for _ in run.rankings], [f"{compare.PAPER} is not there"]
    paper = tomllib.loads(compare.PAPER.read_text())
    rows, mismatches = [], []
    for result in run.rankings:
        found: dict[str, Any] = {}
        for table in paper["table"]:
            if table.get("rerank") != result["rerank"]:
                continue
            own = [row for row in table["row"] if row.get("system") == run.system]
            if own and len(own[0]) > len(found):  # the table with more columns
                found = own[0]
                mismatches += compare.find_mismatches(result["protocol"], paper, table)
        rows.append({name: found[key] / 100 for name, key in METRICS.items() if key in found})
    mismatches += [
        f"{name}: {run.config['network'].get(name)}, not {wanted}"
        for name, wanted in paper["model"].items()
        if run.config["network"].get(name) != wanted
    ]
    return rows, list(dict.fromkeys(mismatches))
