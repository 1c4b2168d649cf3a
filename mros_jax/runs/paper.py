"""Results beside the tables of a paper, and what keeps the two from being compared."""

import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import Any

from mros_jax.errors import NotFoundError, UserError
from mros_jax.runs.run import Run

# Column of the report: key in the tables.
METRICS = {"mAP": "mAP", "Rank-1": "rank1", "Rank-5": "rank5", "Rank-10": "rank10", "mINP": "mINP"}


def load_tables(path: str | None = None) -> dict[str, Any]:
    """Read a paper's tables.

    Args:
        path: a file like `mros_jax/runs/paper_results.toml`, which is what None stands for.

    Raises:
        NotFoundError: there is no such file.
        UserError: it is no TOML, or holds something else.
    """
    if path is None:
        return tomllib.loads((importlib.resources.files("mros_jax.runs") / _TABLES).read_text())
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path} does not exist; --paper names a file like {_TABLES} of mros_jax/runs"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    missing = [name for name in ("protocol", "config", "table") if name not in tables]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; expected what {_TABLES} has")
    return tables


_TABLES = "paper_results.toml"


def find_mismatches(
    protocol: Mapping[str, Any],
    paper: Mapping[str, Any],
    table: Mapping[str, Any],
    row: Mapping[str, Any],
) -> list[str]:
    """What makes a number another measurement than that of a row: "what: here, not there"."""
    got = dict(protocol)
    # Whether junk is dropped first or later, the plain scores are the same: the sum must agree.
    got["num_gallery_and_junk"] = protocol["num_gallery"] + protocol["num_junk"]
    found = [
        f"{name}: {got.get(name)}, not {wanted}"
        for name, wanted in (paper["protocol"] | row.get("protocol", {})).items()
        if got.get(name) != wanted
    ]
    if protocol["rerank"] != table.get("rerank"):
        found.append(f"rerank: {protocol['rerank']}, not {table.get('rerank')}")
    elif table.get("rerank"):
        options = protocol["rerank_options"]
        found += [
            f"{name}: {options.get(name)}, not {wanted}"
            for name, wanted in table["rerank_options"].items()
            if options.get(name) != wanted
        ]
    return found


def find_config_mismatches(config: Mapping[str, Any] | None, paper: Mapping[str, Any]) -> list[str]:
    """Where a run's config is another than that of the paper's row of its system."""
    if config is None:
        return []
    wanted = paper["config"].get(config.get("name"), {})
    found = {name: _look_up(config, name) for name in wanted}
    return [f"{k}: {found[k]}, not {wanted[k]}" for k in wanted if found[k] != wanted[k]]


def _look_up(tree: Any, name: str) -> Any:
    """The value of a dotted name, None where there is none."""
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def find_rows(
    system: str, paper: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """All rows that tables have of a system, each after its table.

    Args:
        system: a config's `name`.
        paper: as `load_tables` returns it.
    """
    return [
        (table, row)
        for table in paper["table"]
        for row in table["row"]
        if row.get("system") == system
    ]


def find_row(
    system: str, rerank: str | None, paper: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The row to show of a system, after its table: of several that with most columns.

    Args:
        system: a config's `name`.
        rerank: the method of the table; None: without re-ranking.
        paper: as `load_tables` returns it.
    """
    found = [pair for pair in find_rows(system, paper) if pair[0].get("rerank") == rerank]
    return max(found, key=lambda pair: sum(x in pair[1] for x in METRICS.values()), default=None)


def find_paper_rows(run: Run) -> tuple[list[dict[str, float]], list[str], list[str]]:
    """What was published of each ranking of a run.

    Returns:
        For each ranking column -> fraction of 1, empty where there is nothing; what was measured
        otherwise than that, as "what: here, not there"; and the names of the rows.
    """
    paper = load_tables()
    rows: list[dict[str, float]] = []
    mismatches, names = [], []
    for result in run.rankings:
        found = find_row(run.system, result["rerank"], paper)
        if found is None:
            rows.append({})
            continue
        table, row = found
        mismatches += find_mismatches(result["protocol"], paper, table, row)
        names.append(f"{row['name']} (table {table['number']})")
        rows.append({name: row[key] / 100 for name, key in METRICS.items() if key in row})
    mismatches += find_config_mismatches(run.config, paper)
    return rows, list(dict.fromkeys(mismatches)), names
