"""Errors that users can fix.

Every message says what was wrong, what was expected and how to fix it. The command line prints it in one line and
exits with code 2.
"""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says how to fix it."""


class NonFiniteError(UserError):
    """A model's weights or logits are not finite.

    It is an error and never a rate: the argmax of NaN is class 0, which would read as an attack success rate of 1.
    """


class FailedRepairs(UserError):
    """Some repairs of an experiment failed; the others succeeded and have their rows."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where the message is empty.

    Example:
        >>> first_line(OSError("no room\\nat all")), first_line(EOFError())
        ('no room', 'EOFError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
