"""The errors that users see, and the one way to make a text safe to show."""

_LONGEST = 4000  # characters of a message: names inside a file may be longer


def one_line(text: str) -> str:
    """The text with all characters escaped that could break, forge or colour a line of a terminal.

    Prompts, paths, and names from inside a file end up in what is printed.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """Something of the user's cannot be used; the message is one line: where, what is wrong, what would be right."""

    def __init__(self, message: str) -> None:
        text = one_line(message[:_LONGEST])
        super().__init__(text if len(text) <= _LONGEST and len(message) <= _LONGEST else f"{text[:_LONGEST]}...")


class SettingsError(UserError):
    """A setting that cannot be used: which, why, and what would be right."""
