"""What the programs share: how they end when their user made a mistake. Imports nothing slow."""

import argparse
import sys
from contextlib import contextmanager


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


@contextmanager
def one_line_errors():
    """End a program whose user made a mistake with one line and exit code 2, not a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        message = "interrupted; files already written are whole"
    except (ValueError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        message = "the GPU has too little memory; try a smaller --size, --num or --batch"
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
