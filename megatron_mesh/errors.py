"""Exceptions that end a run with one message and no traceback."""


class UserError(ValueError):
    """Bad input. The message names the cause and the remedy.

    Entry points print ``error: <message>`` without a traceback and exit with code 2. Exceptions of other
    types than those in this module are bugs, and keep their traceback.
    """


class OutOfMemory(RuntimeError):
    """The device ran out of memory. The message names the remedies.

    The input itself may be right, so entry points exit with code 1, without a traceback.
    """


class RanksLost(RuntimeError):
    """Other ranks of the job can't be reached. The message names them and where to look.

    The same command may succeed next time, so entry points exit with code 1, without a traceback.
    """
