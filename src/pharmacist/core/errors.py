"""Errors that a user can correct: one line that says what is wrong, where, and how to fix it.

The command line prints them without a traceback and exits with code 2.
"""


class PharmacistError(Exception):
    """Base class of all errors that a user can correct."""


class ConfigError(PharmacistError):
    """An option, a configuration file or an output folder cannot be used."""


class OtherRunError(ConfigError):
    """The output folder contains a run with other options or inputs."""


class BusyError(ConfigError):
    """Another process is working in the output folder."""


class UnknownNameError(ConfigError):
    """A method name is not registered."""


class DataError(PharmacistError):
    """Input data cannot be read, or something is missing from them."""


class DivergedError(DataError):
    """The loss or gradient of a training is not finite."""


class NoMatchError(PharmacistError):
    """A method has found nothing to act on (no module, no row)."""


class CompatibilityError(PharmacistError):
    """Two things cannot work together, such as a model and a method, or a method and a launcher."""


def one_line(error: BaseException | str, length: int = 200) -> str:
    """The message of another library's error in one line of at most `length` characters; its class without one."""
    return " ".join(str(error).split())[:length] or type(error).__name__
