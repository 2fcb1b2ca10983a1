"""Errors that users can fix.

Every message says what was wrong, what was expected and how to fix it. The command line prints it in one line and
exits with code 2.
"""

LONGEST = 500
"""Characters of a message: names that come from a file may be as long as the file."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says how to fix it.

    It is one line of at most 500 printable characters, whatever was put into it.

    Example:
        >>> str(UserError("a name with \\x1b[31m and\\na line end"))
        'a name with \\\\x1b[31m and\\\\na line end'
        >>> len(str(UserError("a" * 10_000)))
        500
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), LONGEST))


class NonFiniteError(UserError):
    """A model's weights or logits are not finite.

    It is an error and never a rate: the argmax of NaN is class 0, which would read as an attack success rate of 1.
    """


class NoLinearHead(UserError):
    """A network does not end in the linear layer that a method needs.

    Attributes:
        problem: what was wrong, without the fix.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{problem}; choose a defense that needs none, such as super_finetune, or a detector, such as loss_ascent"
        )


class FailedRepairs(UserError):
    """Some repairs of an experiment failed; the others succeeded and have their rows."""


def printable(text: str, longest: int) -> str:
    """Text with escapes for what cannot be printed, and with the middle left out where it is too long.

    Example:
        >>> printable("a\\tb", 10), printable("abcdefghijklmnop", 10)
        ('a\\\\tb', 'abcd...nop')
    """
    # The ends are enough: an escape is never shorter than what it stands for.
    shortened = text if len(text) <= 2 * longest else text[:longest] + text[-longest:]
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in shortened
    )
    if len(escaped) <= longest and shortened is text:
        return escaped
    tail = (longest - 3) // 2
    return f"{escaped[: longest - 3 - tail]}...{escaped[len(escaped) - tail :]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or its type where the message is empty.

    Example:
        >>> first_line(OSError("no room\\nat all")), first_line(EOFError())
        ('no room', 'EOFError')
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0], 200) if lines else type(error).__name__
