"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """Bad input. The message names the cause and the remedy.

    Entry points print it as ``error: <message>`` and exit with code 2, without a traceback;
    every other exception is a bug and keeps its traceback.
    """
