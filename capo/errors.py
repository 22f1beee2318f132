"""Errors that the command line turns into exit codes."""


class UsageError(Exception):
    """The user's input is at fault: printed without a traceback, exit code 2."""
