"""Errors that a user can fix. Each message says in one line what is wrong, with names and values, and what to do.

All of them are `ValueError`s. Any other exception is a defect, or comes from a library.
"""


class UserError(ValueError):
    """The base class of these errors."""


class InputError(UserError):
    """An invalid argument, prompt or number."""


class ConfigError(InputError):
    """An invalid config field, or fields that do not fit each other, the model or the devices."""


class DataError(UserError):
    """An invalid text, or invalid rows made from it."""


class WeightsError(UserError):
    """Gemma's weights or tokenizer: missing, damaged, or another model's."""


class FormatError(UserError):
    """A file that is damaged or not of the expected kind, or SAEs of an unsupported format or kind."""


class NotFoundError(UserError):
    """Nothing is at a path or an address, or it cannot be reached."""


class RunError(UserError):
    """A run directory: it has no run, the run cannot be resumed like this, or no checkpoint is whole."""


class OutputError(UserError):
    """An output path that cannot be written to: taken, in use, or not the user's."""


class NonFiniteError(UserError, FloatingPointError):
    """An activation, a loss or a number that is not finite."""
