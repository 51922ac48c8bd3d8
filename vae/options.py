"""What a user may say of a small autoencoder beside the model's own."""

from dataclasses import dataclass

from mmdit.common.options import Mark, option, wrong


@dataclass(frozen=True)
class TinyOptions:
    """A small autoencoder"""

    taesd: str | None = option(
        None,
        "TAESD3, for previews with more detail, or for --taesd-decode",
        Mark.LOADED,
        Mark.PATH,
        Mark.NOT_SEEN,  # where it decodes, `weights` tells
        metavar="FILE|FOLDER",
    )
    taesd_decode: bool = option(
        False, "decode by it, and encode init where it can: faster, in less memory, with fewer details", Mark.LOADED
    )

    def check_together(self) -> None:
        if self.taesd_decode and self.taesd is None:
            raise wrong("taesd_decode", True, "with it --taesd FILE")
