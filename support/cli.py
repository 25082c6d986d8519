"""Report a user's mistake in one line, with exit code 2 and without a traceback.

A mistake is a `UserError`, an OSError (a missing file, a full disk), or any failure inside
`reading(file)`. Any other exception is a bug and shows its traceback. DREAM_ENGINE_TRACEBACK=1
shows the traceback of a mistake, too. This module imports nothing slow.
"""

import argparse
import math
import os
import re
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user; the message says what is wrong and what would be right."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose options cannot be abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(low, high, kind=float, exclude_low=False):
    """A type for argparse: a number from low to high, both included unless exclude_low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and not (exclude_low and value == low):
            return value
        what = "a whole number" if kind is int else "a number"
        limits = f"above {low:g} and at most" if exclude_low else f"from {low:g} to"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {what} {limits} {high:g}")

    return parse


def whole_number(low, high=10**9):
    """A type for argparse: a whole number from low to high."""
    return number(low, high, int)


@contextmanager
def reading(file, expected=None):
    """Run code that parses a user's file or builds a module from it; any fault becomes a UserError.

    Its message names the file, the cause and, if given, what was expected ("a JSON object").
    """
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        cause = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        what = f"expected {expected}" if expected else "damaged, or not what it should be"
        raise UserError(f"{file}: {what} ({cause})") from error


@contextmanager
def one_line_errors():
    """Run a program; after a user's mistake, print one line on stderr and exit with code 2."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # names of files are not always UTF-8
            sys.stdout.reconfigure(errors="backslashreplace")
        yield
    except KeyboardInterrupt:
        message = "interrupted; files already written are whole"
    except (UserError, OSError) as error:
        if os.environ.get("DREAM_ENGINE_TRACEBACK"):
            raise
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        scarce = re.search("out of memory|can't allocate memory", str(error))
        if not scarce and not isinstance(error, MemoryError):
            raise
        smaller = "try a smaller --size, --num or --batch, and to draw --low-memory"
        message = f"too little memory; {smaller}"
    else:
        return
    message = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
