"""Write a trained run's weights for PyTorch: safetensors, torchvision's names in the trunk.

    python -m scripts.export_torch --run runs/demo --out mros.safetensors

In PyTorch: `model.load_state_dict(safetensors.torch.load_file("mros.safetensors"), strict=True)`
with the system's module in `tests/parity`, or `torchvision.models.resnet50(...)` with the tensors
of the trunk.
"""

import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.inference import load_model
from mros_jax.models import torch_weights
from scripts import common


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="directory of the run")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="of the run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help=".safetensors to write")
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out} must end in .safetensors")
    variables = load_model(args.run, args.checkpoint).variables
    torch_weights.save_torch_state_dict(args.out, variables)
    count = len(torch_weights.to_torch_state_dict(variables))
    print(f"{args.out}: {count} tensors, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
