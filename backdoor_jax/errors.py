"""The errors a user can mend.

Every message says what was wrong, what was expected and how to mend it; the command line prints it in one line and
leaves with exit code 2.
"""


class UserError(ValueError):
    """Something the user gave cannot be used; the message names the mend."""


class NonFiniteError(UserError):
    """A model's weights or logits are not finite.

    It is an error and never a rate, since the argmax of NaN is class 0, which would read as an attack success of 1.
    """


class FailedRepairs(UserError):
    """Some repairs of an experiment could not be made; the others were, and have their rows."""


def first_line(error: Exception) -> str:
    """What an error says in one line, or its kind where it says nothing.

    Example:
        >>> first_line(OSError("no room\\nat all")), first_line(EOFError())
        ('no room', 'EOFError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
