"""What goes wrong in ways that a user can mend: every message says in one line what, with names and values, and how.

All are `ValueError`s. Any other exception is a defect, or a library's own.
"""


class UserError(ValueError):
    """The base of all."""


class InputError(UserError):
    """An argument, a prompt or a number that does not fit."""


class ConfigError(InputError):
    """A field of a config, or fields that do not fit each other, the model or the devices."""


class DataError(UserError):
    """A text, or the rows made of it."""


class WeightsError(UserError):
    """Gemma's weights or tokenizer: not there, damaged, or another model's."""


class FormatError(UserError):
    """A file that is damaged or not what it should be; of SAEs, of a format or kind that is not read or written."""


class NotFoundError(UserError):
    """Nothing lies where a path or an address points, or it cannot be reached."""


class RunError(UserError):
    """A run directory: no run, none that can go on so, or without a whole checkpoint."""


class OutputError(UserError):
    """A place that cannot be written to: taken, in use, or not the user's."""


class NonFiniteError(UserError, FloatingPointError):
    """An activation, a loss or a number that is not finite."""
