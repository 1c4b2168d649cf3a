"""Write a trained run's weights for PyTorch: safetensors, torchvision's names in the backbone.

    python scripts/export_torch.py --run runs/demo --out mros.safetensors

In PyTorch: `model.load_state_dict(safetensors.torch.load_file("mros.safetensors"), strict=True)`
with the module of `tests/parity/torch_mros.py`, or `torchvision.models.resnet50(...)` with the
`backbone.` tensors.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.files import check_output
from mros_jax.inference import load_model
from mros_jax.models import torch_weights
from mros_jax.training.checkpoints import NAMES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a training run")
    parser.add_argument("--checkpoint", choices=NAMES, default="last", help="of the run")
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="a .safetensors file to write"
    )
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".safetensors":
        parser.error(f"{arguments.out} must end in .safetensors")
    check_output(arguments.out)
    variables = load_model(arguments.run, arguments.checkpoint).variables
    torch_weights.save_torch_state_dict(arguments.out, variables)
    count = len(torch_weights.to_torch_state_dict(variables))
    print(f"{arguments.out}: {count} tensors, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
