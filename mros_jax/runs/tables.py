"""Results as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.runs.results import RANKS, get_rank

_WIDTHS = (7, 8, 8, 8, 9)


def format_percent(value: float | None, digits: int = 2) -> str:
    """A fraction of 1 in percent; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def format_results(results: Mapping[str, Any]) -> str:
    """The content of results.json as a table, with intervals and verification where present."""
    protocol = results["results"][0]["protocol"]
    lines = [
        f"{protocol['dataset'] or 'descriptors'}: {protocol['num_query']} queries "
        f"({protocol['num_valid_queries']} with a match), gallery {protocol['num_gallery']} "
        f"({protocol['num_distractors']} distractors), {protocol['num_junk']} junk left out",
        f"{protocol['metric']} distance, "
        f"{'normalised' if protocol['normalize'] else 'unnormalised'}, AP {protocol['ap']}, "
        f"flip test {protocol['flip_test']}, crops {protocol.get('crops')}, "
        f"{_name_exit(protocol)}commit {protocol['commit']}",
        "",
        _format_line("", ("mAP", "mINP", *(f"Rank-{k}" for k in RANKS))),
    ]
    for entry in results["results"]:
        values = (entry["mAP"], entry["mINP"], *(get_rank(entry, k) for k in RANKS))
        lines.append(_format_line(entry["name"], tuple(map(format_percent, values))))
        if "intervals" in entry:
            ranges = {k: v for k, v in entry["intervals"].items() if isinstance(v, tuple)}
            text = "  ".join(f"{k} {100 * a:.2f}-{100 * b:.2f}" for k, (a, b) in ranges.items())
            lines.append(f"  95 % by {entry['intervals']['by']}: {text}")
    if exits := results.get("exits"):
        lines += ["", "Each descriptor by itself, and the multiply-adds of one pass up to it"]
        names = ("mAP", "mINP", *(f"Rank-{k}" for k in RANKS))
        rows = [("", "numbers", "multiply-adds", *names)]
        for entry in exits:
            values = (entry["mAP"], entry["mINP"], *(get_rank(entry, k) for k in RANKS))
            cost = f"{entry['multiply_adds'] / 1e6:,.1f} M"
            rows.append((entry["name"], str(entry["size"]), cost, *map(format_percent, values)))
        lines += format_grid(rows).splitlines()
    if verified := results.get("verification"):
        lines += ["", f"EER {100 * verified['eer']:.2f} at {verified['eer_threshold']:.4f}"]
        for field, true, false in (("tpr_at_fpr", "TPR", "FPR"), ("dir_at_far", "DIR", "FAR")):
            for point in verified[field]:
                at = "none" if point["threshold"] is None else f"{point['threshold']:.4f}"
                lines.append(
                    f"{true} at {false} {point['target']:<6g} {100 * point['true_rate']:6.2f}  "
                    f"threshold {at}"
                )
    return "\n".join(lines)


def _name_exit(protocol: Mapping[str, Any]) -> str:
    """Which of a network's descriptors was evaluated, where it is not the main one."""
    name = protocol.get("descriptor", "descriptor")
    return "" if name == "descriptor" else f"descriptor {name}, "


def format_grid(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows of cells, the head first, in aligned columns or as a Markdown table."""
    if markdown:
        head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _format_line(name: str, cells: tuple[str, ...]) -> str:
    return f"{name:14}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, _WIDTHS, strict=True))
