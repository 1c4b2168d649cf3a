"""Results as text for people."""

from collections.abc import Mapping
from typing import Any

from mros_jax.retrieval import Result


def format_results(results: Mapping[str, Any]) -> str:
    """The content of results.json as a table, with intervals and verification where present."""
    protocol = results["results"][0]["protocol"]
    lines = [
        f"{protocol['dataset'] or 'descriptors'}: {protocol['num_query']} queries "
        f"({protocol['num_valid_queries']} with a match), gallery {protocol['num_gallery']} "
        f"({protocol['num_distractors']} distractors), {protocol['num_junk']} junk left out",
        f"{protocol['metric']} distance, "
        f"{'normalised' if protocol['normalize'] else 'unnormalised'}, AP {protocol['ap']}, "
        f"flip test {protocol['flip_test']}, commit {protocol['commit']}",
        "",
        f"{'':14}{'mAP':>7}{'mINP':>8}{'Rank-1':>8}{'Rank-5':>8}{'Rank-10':>9}",
    ]
    for entry in results["results"]:
        result = Result.from_dict(entry)
        values = (result.mAP, result.mINP, result.rank(1), result.rank(5), result.rank(10))
        shown = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        numbers = "".join(f"{v:>{w}}" for v, w in zip(shown, (7, 8, 8, 8, 9), strict=True))
        lines.append(f"{entry['name']:14}{numbers}")
        if "intervals" in entry:
            ranges = {k: v for k, v in entry["intervals"].items() if isinstance(v, tuple)}
            text = "  ".join(f"{k} {100 * a:.2f}-{100 * b:.2f}" for k, (a, b) in ranges.items())
            lines.append(f"  95 % by {entry['intervals']['by']}: {text}")
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
