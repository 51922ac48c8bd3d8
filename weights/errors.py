"""The one error users see from this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line: which file or key, what is wrong, what is right."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """The message with characters escaped that could break or forge a terminal line.

    Names from inside a file end up in messages.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
