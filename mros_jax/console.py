"""Messages of the command-line programs, in peace with their progress bars."""

import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_messages() -> None:
    """Shows this project's messages on standard error, above any progress bar."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells every file it touches
    logger = logging.getLogger("mros_jax")
    if not logger.handlers:
        handler = _Handler()
        handler.setFormatter(
            logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
