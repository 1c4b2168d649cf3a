"""Write the embedded data set as files: `python -m mros_jax.data.synthetic --out DIR`."""

import sys

from mros_jax import console
from mros_jax.data.synthetic.dataset import main

if __name__ == "__main__":
    sys.exit(console.run(main))
