"""The one error users see from this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line: which file or key, what is wrong, what is right.

    Names from inside a file end up in messages, so characters that could break or forge a terminal line
    are escaped.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line)
