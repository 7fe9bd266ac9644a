"""Errors that a user can fix, one class per kind. Each is also the standard-library type that callers would catch.

A message says where (file:line, or the key of the run file), what was found, and what to do.
Defects of this program are not here: they are `assert`s. exit_code: with which the command line ends.
"""

import reprlib
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN_CHARACTERS = 60
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 4, 80, 80, 80


def short(value: object) -> str:
    """The value as it may be shown in a sentence, in at most 60 characters, however large it is."""
    try:
        text = _SHOWN.repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def counted(count: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def command(*words: object) -> str:
    """The command line `preceptor WORDS` as a shell takes it, whatever characters a folder's name has."""
    return shlex.join(["preceptor", *map(str, words)])


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class PreceptorError(Exception):
    """Any error that the user can fix."""

    exit_code = 1


class ConfigError(PreceptorError, ValueError):
    """The run file asks for something that does not exist or cannot work."""

    exit_code = 2


class DataError(PreceptorError, ValueError):
    """A data file is missing, malformed, or holds nothing that can be trained."""

    exit_code = 3


class StreamError(DataError):
    """A stream gives no further window, for a reason that all processes of the run see alike."""


class TemplateError(PreceptorError, ValueError):
    """A chat template is missing, does not parse, or cannot represent what it is given.

    is_fatal: no example may be trained with this template.
    """

    exit_code = 4
    is_fatal = False


class ModelError(PreceptorError, ValueError):
    """A model cannot be loaded, or cannot be trained as asked."""

    exit_code = 5


class CheckpointError(PreceptorError, OSError):
    """A file or folder cannot be written, or a run's folder is not what a resumed run needs."""

    exit_code = 6


class ProcessError(PreceptorError, RuntimeError):
    """Another process of the run was killed, or cannot be reached: the same command goes on."""

    exit_code = 7


# Out of memory -------------------------------------------------------------------------------------------------------

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this is Python's, torch's or a CUDA library's error for want of memory. torch is not imported here."""
    if isinstance(error, PreceptorError):
        return False
    torch = sys.modules.get("torch")  # what is not imported has raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def explaining_out_of_memory(message: str | Callable[[], str]) -> Iterator[None]:
    """Raises ModelError where memory runs out inside. message: what did not fit, and the keys that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(message if isinstance(message, str) else message()) from error
