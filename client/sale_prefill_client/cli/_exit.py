"""Exit codes, the same for every command."""

from __future__ import annotations

from ..errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    SalePrefillError,
    SessionNotFoundError,
    UnavailableError,
)

OK = 0
ERROR = 1
USAGE = 2
UNAVAILABLE = 3
INVALID_REQUEST = 4
NOT_FOUND = 5
INTERRUPTED = 130
OUTPUT_CLOSED = 141

DESCRIPTION = """\
exit codes:
  0    done
  1    the server reported an error, or another failure
  2    wrong usage, or an input file that cannot be read
  3    the server cannot be reached, is not ready, is full, or took too long: try again later
  4    the request is invalid: change it
  5    no such session
  130  interrupted (Ctrl-C); the request is cancelled
  141  the output was closed early, as by `| head`"""


class UsageError(Exception):
    """The command line makes no sense; the message says what would."""


def code_of(error: SalePrefillError) -> int:
    """Exit code of a failed call."""
    if isinstance(error, InvalidRequestError):
        return INVALID_REQUEST
    if isinstance(error, SessionNotFoundError):
        return NOT_FOUND
    if isinstance(error, (UnavailableError, OverloadedError, DeadlineExceededError)):
        return UNAVAILABLE
    return ERROR
