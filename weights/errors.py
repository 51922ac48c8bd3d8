"""The one error users see from this package."""

from mmdit.common.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be used: which file or key, what is wrong, what is right."""
