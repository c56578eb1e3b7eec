"""Errors that a user can correct: one line that says what, where and what to do.

The command line prints them without a traceback and exits with code 2.
"""


class PharmacistError(Exception):
    """Base of all errors that a user can correct."""


class ConfigError(PharmacistError):
    """An option, a configuration file or an output folder cannot be used."""


class OtherRunError(ConfigError):
    """The output folder holds a run with other options or inputs."""


class BusyError(ConfigError):
    """Another process works in the output folder."""


class UnknownNameError(ConfigError):
    """A method name that no registry knows."""


class DataError(PharmacistError):
    """Input data cannot be read or lack something that is needed."""


class DivergedError(DataError):
    """Loss or gradient of a training is not finite."""


class NoMatchError(PharmacistError):
    """A method found nothing to act on (no module, no row)."""


class CompatibilityError(PharmacistError):
    """Two things that cannot work together: a model and a method, a method and a launcher."""


def one_line(error: BaseException | str, length: int = 200) -> str:
    """The message of another library's error in one line of at most `length` characters; its class without one."""
    return " ".join(str(error).split())[:length] or type(error).__name__
