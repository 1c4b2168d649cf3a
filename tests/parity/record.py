"""Write what PyTorch computes for `tests/test_recorded.py`: `python -m tests.parity.record`.

With names of cases, only those.
"""

import sys

import jax
import torch

from mros_jax.models import torch_weights
from tests.parity import test_mgn, test_systems
from tests.parity.common import LABELS, make_ours
from tests.parity.harness import to_numpy
from tests.parity.test_systems import Case, make_pair, to_torch, train_theirs
from tests.parity.torch_mros import TorchMROS, stack_centers, total_loss
from tests.recorded import digest, draw, save_system
from tests.test_recorded import make_batches, split_tensors


class _MROS(TorchMROS):
    """With outputs named as those of the other systems."""

    def forward(self, x):
        out = super().forward(x)
        embeddings = {f"{kind}_{k}": out[kind][k] for kind in "gh" for k in self.levels}
        return {
            "descriptor": out["descriptor"],
            "embeddings": embeddings,
            "logits": out["logits"],
            "raw": out,
        }


def _mros(setting):
    beta = 0.0005

    def loss(out, labels, own):
        (centers,) = own.values()
        return total_loss(out["raw"], labels, list(stack_centers(centers)), setting, beta)

    def undo_weight(own):
        (centers,) = own.values()
        centers.grad /= beta

    def make_optimizers(model, own):
        weights = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(weights, lr=0.001, weight_decay=5e-4)
        return [(adam, True), (torch.optim.SGD(own.values(), lr=0.5), False)]

    return Case(
        "mros",
        setting,
        lambda fields, n: _MROS(n, setting, fields.trunk),
        loss,
        make_optimizers,
        lambda epoch: 0.01 * (1 - epoch / 10) + epoch / 10,  # the first ten epochs
        finish=undo_weight,
    )


CASES = {
    **{f"mros-{setting}": _mros(setting) for setting in ("I", "II", "III", "IV")},
    **test_mgn.CASES,
    **test_systems.CASES,
}


def describe(case, config):
    """What `tests.test_recorded.read_case` reads."""
    original = case.read().network
    changes = {k: v for k, v in config.network.items() if v != original[k]}
    case = {"file": case.file, "variant": case.variant, "stage": case.stage, "idle": case.idle}
    return case | {"changes": changes}


def compute(case):
    """(what the case is, digests of all that is recorded)."""
    with jax.enable_x64(True):
        pair = make_pair(case).to_float64()
        ours = make_ours(pair.config, draw)
    pair = pair._replace(variables=ours.variables, own=ours.own)
    batches, labels = make_batches(), torch.from_numpy(LABELS).long()
    start = torch_weights.to_torch_state_dict(pair.variables)
    state = {name: torch.from_numpy(value) for name, value in start.items()}
    model = pair.theirs
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        out = model.eval()(to_torch(batches[0]))
    table = {"evaluation/descriptor": out["descriptor"]}
    for kind in ("embeddings", "logits"):
        for name, vectors in out[kind].items():
            table[f"evaluation/{kind}/{name}"] = torch.stack(tuple(vectors), dim=1)

    own = pair.torch_own(torch.float64)
    total, terms = case.loss(model.train()(to_torch(batches[0])), labels, own)
    total.backward()
    case.finish(own)
    table["loss/total"] = total
    table |= {f"loss/terms/{name}": term for name, term in terms.items()}
    tensors = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        fixed = parameter.grad is None
        tensors[name] = torch.zeros_like(parameter) if fixed else parameter.grad
    table |= split_tensors(tensors, "gradients")
    table |= {f"gradients/{name}": tensor.grad for name, tensor in own.items()}
    table = {name: to_numpy(value).copy() for name, value in table.items()}

    model.zero_grad()
    model.load_state_dict(state, strict=True)
    own = train_theirs(pair, batches, labels)
    flat = pair.torch_own(torch.float64)
    table |= {f"steps/{name}": own[name] - to_numpy(flat[name]) for name in own}
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked") and name not in case.idle:
            table[f"steps/{name}"] = to_numpy(value) - start[name]
    digests = {name: digest(name, value) for name, value in table.items()}
    return describe(case, pair.config), digests


def main(names):
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    for name in names or CASES:
        save_system(name, *compute(CASES[name]))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
