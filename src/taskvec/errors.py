"""The errors that this library raises on purpose.

TaskvecError
├── MismatchError    ValueError      names, shapes or bases differ
├── MissingError     KeyError        a name that is not there, a pattern that matches nothing
├── OptionError      TypeError       an option that does not exist or cannot vary here; an argument of the wrong kind
├── RangeError       ValueError      an option outside its range
├── DtypeError       TypeError       a dtype this library does not do arithmetic on
├── NonFiniteError   ValueError      NaN or inf where a statistic is taken
├── AliasError       ValueError      two models that share storage
├── DegenerateError  ValueError      an operation that has no answer: a zero vector, nothing to merge
├── RuleError        ValueError      a rule that returned something else than one tensor of the right shape
├── FormatError      ValueError      a file that is damaged, dangerous or not a checkpoint
├── LocationError    FileNotFoundError
└── ExistsError      FileExistsError
"""

__all__ = [
    "AliasError",
    "DegenerateError",
    "DtypeError",
    "ExistsError",
    "FormatError",
    "LocationError",
    "MismatchError",
    "MissingError",
    "NonFiniteError",
    "OptionError",
    "RangeError",
    "RuleError",
    "TaskvecError",
]


class TaskvecError(Exception):
    """The root of every error this library raises on purpose."""


class MismatchError(TaskvecError, ValueError):
    """Names, shapes or bases differ between the inputs."""


class MissingError(TaskvecError, KeyError):
    """A name that is not there, or a pattern that matches nothing."""

    def __str__(self) -> str:  # KeyError's own would print the message in quotes
        return str(self.args[0]) if self.args else ""


class OptionError(TaskvecError, TypeError):
    """An option that does not exist or cannot take such a value, or an argument of the wrong kind."""


class RangeError(TaskvecError, ValueError):
    """An option outside its range."""


class DtypeError(TaskvecError, TypeError):
    """A dtype (or kind of tensor) this library does not do arithmetic on."""


class NonFiniteError(TaskvecError, ValueError):
    """NaN or inf where a statistic is taken."""


class AliasError(TaskvecError, ValueError):
    """Two models that share storage, so that their difference would always be zero."""


class DegenerateError(TaskvecError, ValueError):
    """An operation that has no answer: a zero vector, nothing to merge."""


class RuleError(TaskvecError, ValueError):
    """A rule that did not return one tensor of the right shape."""


class FormatError(TaskvecError, ValueError):
    """A file that is damaged, dangerous or not a checkpoint."""


class LocationError(TaskvecError, FileNotFoundError):
    """A path at which there is nothing."""


class ExistsError(TaskvecError, FileExistsError):
    """Something is already there, and `overwrite` is not set."""
