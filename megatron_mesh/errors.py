"""Exceptions that end a run with one message: bad input, and memory that is full."""


class UserError(ValueError):
    """Bad input. The message names the cause and the remedy.

    Entry points print it as ``error: <message>`` and exit with code 2, without a traceback;
    every other exception is a bug and keeps its traceback.
    """


class OutOfMemory(RuntimeError):
    """The device's memory is full. The message names the remedies.

    Nothing is wrong with the input as such, so entry points exit with code 1, and without a traceback.
    """


class RanksLost(RuntimeError):
    """Other ranks of the job cannot be reached. The message says which, and where to look.

    The same command may succeed the next time, so entry points exit with code 1, and without a traceback.
    """
