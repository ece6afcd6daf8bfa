"""The errors of Graft, each with an exit code and, where there is one, a remedy.

GraftError
├── UsageError       2    bad recipe, data, model or call
│   ├── RecipeError       a key or value of a recipe
│   ├── DataError         a row, file or column
│   ├── ModelError        a base model that is missing, incomplete or unknown
│   ├── RouteError        rows that cannot go where they were sent
│   └── NotMergeable      a method that cannot be written into its base
├── ResourceError    3    no memory, disk or network
├── GuardError       4    a guard stopped the run
├── DamagedError     5    a file that is cut off, altered or made for something else
└── Interrupted    130    Ctrl-C or SIGTERM
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

NO_FILE = (errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""What the system says of a path that can be no file: bad input, where other errors of it are a lack of something."""


class GraftError(Exception):
    """Base of all errors raised on purpose.

    `message` says what was given and what is allowed; `remedy` says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class UsageError(GraftError):
    """Bad input: a recipe, data, a model or a call."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe's key or value."""


class DataError(UsageError):
    """A data file, row or column."""


class ModelError(UsageError):
    """A base model that is missing, incomplete or of an unknown architecture."""


class RouteError(UsageError):
    """Rows of a batch that cannot go where they were sent."""


class NotMergeable(UsageError):
    """A method that cannot be written into its base's weights."""


class ResourceError(GraftError):
    """No memory, disk or network."""

    exit_code = 3


class GuardError(GraftError):
    """A guard stopped the run."""

    exit_code = 4


class DamagedError(GraftError):
    """An artefact that is cut off, altered or made for another base."""

    exit_code = 5


def nearest(name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> str:
    """A half sentence that helps with a misspelled name: the nearest known one (or alias), or all known ones."""
    names = sorted(known)
    long = [alias for alias in aliases if len(alias) > 2]  # "lr" is near every "r"
    close = [known for known in names if known.lower() == name.lower()]
    close = close or get_close_matches(name, [*names, *long], n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}"
