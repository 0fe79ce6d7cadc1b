"""The one exception a user can cause."""


class InputError(ValueError):
    """Bad input: the message is one sentence that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """
