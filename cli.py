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
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = str(error).strip().splitlines()[0]
            message = f"torch.compile does not work here, leave --compile out ({reason[:200]})"
        elif "out of memory" in str(error):
            smaller = "try a smaller --size, --num or --batch, and to draw --low-memory"
            message = f"the GPU has too little memory; {smaller}"
        else:
            raise
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
