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
