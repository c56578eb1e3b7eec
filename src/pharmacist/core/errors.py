"""Errors that a user can mend: one line that says what, where and what to do.

The command line prints them without a traceback and exits with code 2.
"""


class PharmacistError(Exception):
    """Base of every error that is the caller's to mend."""


class ConfigError(PharmacistError):
    """An option, a configuration file or an output folder cannot be used as given."""


class OtherRunError(ConfigError):
    """The output folder holds a run with other options or inputs."""


class BusyError(ConfigError):
    """Another process works in the output folder."""


class UnknownNameError(ConfigError):
    """A method name that no registry knows."""


class DataError(PharmacistError):
    """Input data cannot be read or does not hold what is needed."""


class DivergedError(DataError):
    """Loss or gradient of a training is not finite."""


class NoMatchError(PharmacistError):
    """A method found nothing to act on (no module, no row); a silent no-op is never an option."""


class CompatibilityError(PharmacistError):
    """Two things that cannot work together: a model and a method, a method and a launcher."""


def one_line(error: BaseException | str, length: int = 200) -> str:
    """The message of another library's error in one line of at most `length` characters; its class without one."""
    return " ".join(str(error).split())[:length] or type(error).__name__
