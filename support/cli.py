"""How every program ends when its user made a mistake: one line and exit code 2, no traceback.

A `UserError` is the user's, and so is whatever goes wrong inside `reading(file)`. An OSError (a missing
file, a full disk) says itself what is wrong. Any other exception is a bug and keeps its traceback;
DREAM_ENGINE_TRACEBACK=1 shows the traceback of a UserError, too. Imports nothing slow.
"""

import argparse
import math
import os
import re
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what would be right."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are UserErrors."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(low, high, kind=float, exclude_low=False):
    """A type of argparse: a number from low to high, both included unless exclude_low."""

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
    """A type of argparse: a whole number from low to high."""
    return number(low, high, int)


@contextmanager
def reading(file, expected=None):
    """Around what parses a user's file or builds a module from it: any fault becomes a UserError.

    The line names the file, the cause and, if given, what was expected ("a JSON object").
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
    """End a program whose user made a mistake with one line on stderr and exit code 2."""
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
