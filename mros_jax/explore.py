"""Look into a run's results by hand, on a local page.

    python -m mros_jax.explore runs/market
    python -m mros_jax.explore runs/market --against runs/pcb --port 8000

The page is served to this machine alone, and fetches nothing from elsewhere.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from mros_jax import console, extras, parallel


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.explore", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run (its --workdir)")
    parser.add_argument(
        "--against", metavar="RUN", help="another run on the same data set, shown side by side"
    )
    parser.add_argument(
        "--port", type=console.count, help="of 127.0.0.1 (default: the first free one from 7860)"
    )
    args = parser.parse_args(argv)
    extras.require("explore", "the explorer")
    parallel.use_compilation_cache()
    from mros_jax.explorer import page  # what it is made with may not be installed
    from mros_jax.explorer.exploration import Exploration

    runs = [Exploration(path, progress=True) for path in (args.run, args.against) if path]
    for other in runs[1:]:
        runs[0].check_same_images(other)
    # Ended by another program it cleans up as after Ctrl-C: there may be uploads.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with page.serve(runs, args.port) as address:
        print(f"Explorer of {args.run}: {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
