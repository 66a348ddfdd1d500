"""Mistakes that the person at the keyboard can fix, and how they are told."""

import operator
from contextlib import contextmanager

CONDITIONS = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
    "a multiple of": lambda value, of: value % of == 0,
}


class InputError(Exception):
    """A mistake that the person at the keyboard can fix: printed as one line, exit status 2."""


def check(holds, message):
    """Raises InputError(message) unless `holds`."""
    if not holds:
        raise InputError(message)


def check_range(name, value, conditions):
    """Raises InputError unless a number meets all conditions, such as `at least 1, a multiple of 64`."""
    for condition in conditions.split(", "):
        kind, _, bound = condition.rpartition(" ")
        check(CONDITIONS[kind](value, float(bound)), f"{name}={value}: must be {conditions}")


@contextmanager
def reported_as(problem):
    """Turns any exception that a library raises inside, as at a damaged file, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise InputError(f"{problem}: {why}") from None


def explain(error):
    """One line for the person at the keyboard about an exception, or None if only a programmer can help."""
    text = str(error)
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError):  # a full disk, a folder without permission
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or text}{where}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file that was given is not text in UTF-8: {text}"
    if isinstance(error, RuntimeError) and "C++ compiler" in text:
        return "--compile needs a C++ compiler: install one, or leave it out"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory: lower --batch_size or the sizes"
    return None
