"""Write a trained run's weights for PyTorch: safetensors, torchvision's names in the backbone.

    python scripts/export_torch.py runs/demo mros.safetensors

In PyTorch: `model.load_state_dict(safetensors.torch.load_file("mros.safetensors"), strict=True)`
with the module of `tests/parity/torch_mros.py`, or `torchvision.models.resnet50(...)` with the
`backbone.` tensors.
"""

import argparse
import pathlib
import sys

from mros_jax.inference import load_model
from mros_jax.models import torch_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.add_argument("out", type=pathlib.Path, help="a .safetensors file to write")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best"))
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".safetensors":
        parser.error(f"{arguments.out} must end in .safetensors")
    try:
        variables = load_model(arguments.run, arguments.checkpoint).variables
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch_weights.save_torch_state_dict(arguments.out, variables)
    count = len(torch_weights.to_torch_state_dict(variables))
    print(f"{arguments.out}: {count} tensors, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
