"""MGN by seathiefwang/MGN-pytorch, GNAYUOHZ/ReID-MGN and levyfan/reid-mgn, told apart by names.

All take the mean of image and mirror image; the first two resize bicubically. The authors published
no code. seathiefwang's published weights have average pooling in place of the maximum. GNAYUOHZ's
reduces all vectors by one layer, which is taken for each of ours.
"""

import re

from mros_jax.models.torch_weights import StateDict
from mros_jax.peers.plan import Names, Peer, Plan, count, find_resnet


def _plan(state: StateDict) -> Plan:
    # Of the repositories one alone writes "backone".
    start = "backone." if "backone.0.weight" in state else "backbone."
    one = "reduction.0.weight" in state
    reduced = state["reduction.0.weight" if one else "reduction_0.0.weight"].shape[0]
    after_reduction = state["fc_id_2048_0.weight"].shape[1] == reduced
    changes = {
        "network.trunk": name_cut_resnet(state, start),
        "network.pooling": "mean" if start == "backone." else "max",
        "network.reduced": reduced,
        "network.head_bias": True,
    }
    names = (
        *name_shared(start),
        *name_tails({"tail_global": "p1", "tail_part2": "p2", "tail_part3": "p3"}),
        *_name_reductions("global", 0, one),
        *_name_reductions("part2", 3, one),
        *_name_reductions("part3", 5, one),
        (r"classifier_global\.(\d)\.", r"fc_id_2048_\1."),
        (r"classifier_part2\.(\d)\.", r"fc_id_256_1_\1."),
        (r"classifier_part3\.(\d)\.", r"fc_id_256_2_\1."),
    )
    config = "configs/mgn.py:public" if after_reduction else "configs/mgn.py"
    return Plan(config, changes, names, state, state["fc_id_2048_0.weight"].shape[0])


def _name_reductions(kind: str, first: int, one: bool) -> Names:
    """The reductions of one kind, the first of which has the number `first` there."""

    def name(layer: str, leaf: str, place: str) -> str:
        number = "" if one else f"_{int(place) + first}"
        return f"reduction{number}.{layer}.{leaf}"

    return (
        (rf"reduction_{kind}\.bn\.(\d)\.(.*)", lambda m: name("1", m[2], m[1])),
        (rf"reduction_{kind}\.(\d)\.(.*)", lambda m: name("0", m[2], m[1])),
    )


def name_cut_resnet(state: StateDict, start: str) -> str:
    """The key of `TRUNKS` of a ResNet cut after the first block of its third stage.

    `start` are the layers before the cut, counted; "p1" is a branch after it.
    """
    before = re.escape(start)
    sizes = (
        count(state, rf"{before}4\.(\d+)\."),
        count(state, rf"{before}5\.(\d+)\."),
        1 + count(state, r"p1\.0\.(\d+)\."),
        count(state, r"p1\.1\.(\d+)\."),
    )
    bottleneck = f"{start}4.0.conv3.weight" in state
    return find_resnet(state, sizes, f"{start}0.weight", bottleneck=bottleneck)


def name_shared(start: str) -> Names:
    """The layers before the cut, counted from the first convolution, as 0, to the block, as 6."""
    return (
        (r"trunk\.conv1\.", f"{start}0."),
        (r"trunk\.bn1\.", f"{start}1."),
        (r"trunk\.layer1\.", f"{start}4."),
        (r"trunk\.layer2\.", f"{start}5."),
        (r"trunk\.layer3\.0\.", f"{start}6."),
    )


def name_tails(branches: dict[str, str]) -> Names:
    """The branches after the cut: 0, the rest of the third stage, and 1, the fourth."""

    def rest(theirs: str, block: str) -> str:
        return f"{theirs}.0.{int(block) - 1}."

    return [
        pair
        for ours, theirs in branches.items()
        for pair in (
            (rf"{ours}\.layer3\.(\d+)\.", lambda m, theirs=theirs: rest(theirs, m[1])),
            (rf"{ours}\.layer4\.", f"{theirs}.1."),
        )
    ]


PEER = Peer(
    "seathiefwang/MGN-pytorch, GNAYUOHZ/ReID-MGN or levyfan/reid-mgn",
    (r"back(b)?one\.0\.weight", r"reduction(_0)?\.0\.weight", r"fc_id_2048_0\.weight"),
    _plan,
)
