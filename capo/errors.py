"""Errors that the command line turns into exit codes."""


class UsageError(Exception):
    """The user's input is at fault: printed without a traceback, exit code 2."""


class VerifierError(RuntimeError):
    """The verifier cannot work: its process does not start, or known answers come out wrong."""
