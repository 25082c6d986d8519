"""Report a user's mistake in one line, with exit code 2 and without a traceback.

Such a mistake is a `UserError`, whatever fails inside `reading(file)`, or an OSError (a missing file, a
full disk), or a text that no path may hold. Any other exception is a bug and shows its traceback;
DREAM_ENGINE_TRACEBACK=1 shows that of a mistake, too. This module imports nothing slow.
"""

import argparse
import gc
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress

INTERRUPTED = "interrupted; files already written are whole"


class UserError(ValueError):
    """A mistake of the user; the message says what is wrong and what would be right."""


def check_finite(engine, made, *tensors):
    """Raise UserError if a tensor holds NaN or infinity; made: what the tensors are, and of whom.

    Waits for the device, so no step of a sampler calls this.
    """
    if not all(x.isfinite().all() for x in tensors):
        weights = *engine.named_parameters(), *engine.named_buffers()
        bad = [name for name, x in weights if not x.isfinite().all()]
        cause = f"so does {bad[0]}: look at its file and config.json" if bad else "no weight does"
        raise UserError(f"{made} holds NaN or infinity; {cause}; or try --dtype float32")


def check_list(values, kinds, expected, count=None):
    """Raise UserError unless values is a list of these kinds: of so many, or of at least one."""
    is_list = isinstance(values, list | tuple) and all(isinstance(x, kinds) for x in values)
    if not is_list or not values or len(values) != (count or len(values)):
        raise UserError(f"expected {expected}, got {values!r:.80}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose options cannot be abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:  # which argparse would turn into a list
            if re.fullmatch("--[^=]+=--", str(argument)):
                self.error(f"argument {argument[:-3]}: expected a value")
        return super().parse_known_args(args, namespace)


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


def printable(text):
    """A text as one line, with ? for each character that a terminal would not show."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


@contextmanager
def reading(file, expected=None):
    """Run code that parses a user's file or builds a module from it; any fault becomes a UserError.

    Its message names the file, the cause and, if given, what was expected ("a JSON object").
    A fifo or a device, also one in a folder, is refused unopened: reading it might never end.
    """
    name = str(file)
    for path in (name, *(os.scandir(name) if os.path.isdir(name) else ())):
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise UserError(f"{os.fspath(path)}: is not a regular file")
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        cause = message_of(error)[:200]
        cause = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        what = f"expected {expected}" if expected else "damaged, or not what it should be"
        raise UserError(f"{file}: {what} ({cause})") from error


def message_of(error):
    """The message of an exception as one line; that of an OSError names its file, without a number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror[0].lower() + error.strerror[1:]
        file = error.filename2 or error.filename
        text = f"{file}: {text}" if file else text
    return " ".join(text.split())


def _end(*_):  # an ordinary exit takes up to seconds to delete all objects
    with suppress(OSError, RuntimeError):  # a closed pipe; print was interrupted
        sys.stdout.flush()
    os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(2)


@contextmanager
def one_line_errors():
    """Run a program; after a user's mistake, print one line on stderr and exit with code 2."""
    try:
        gc.enable()
        is_program = signal.getsignal(signal.SIGINT) is _end
        if is_program:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(sys.stdout, "reconfigure"):  # names of files are not always UTF-8
            sys.stdout.reconfigure(errors="backslashreplace")
        yield
    except KeyboardInterrupt:
        if is_program:
            _end()
        message = INTERRUPTED
    except (ValueError, OSError) as error:
        message = message_of(error)
        no_path = re.search("embedded null|surrogates not allowed", message)  # in a text or path
        mistake = isinstance(error, UserError | OSError) or no_path
        if os.environ.get("DREAM_ENGINE_TRACEBACK") or not mistake:
            raise
    except (RuntimeError, MemoryError) as error:
        scarce = re.search("out of memory|can't allocate memory", str(error))
        if not scarce and not isinstance(error, MemoryError):
            raise
        smaller = "try a smaller --size, --num or --batch, and to draw --low-memory"
        message = f"too little memory; {smaller}"
    else:
        return
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


# While one of this project's programs imports and loads, Ctrl-C ends it at once with one line: in an
# import, an exception could get lost. No garbage is collected then, which would take a tenth of the time.
_project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_program = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", os.sep)))
if _project in (_program, os.path.dirname(_program)):
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _end)
