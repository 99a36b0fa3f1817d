"""Exceptions for input that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad data or configuration. The message says what must hold, what was received and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DivergedError(InputError, FloatingPointError):
    """A model whose numbers are not finite. To who gives it, bad input; to what trained it, a run that failed."""
