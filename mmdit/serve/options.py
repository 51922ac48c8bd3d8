"""What a user may say of the server."""

import ipaddress
from dataclasses import dataclass, fields

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, check_options, from_one_to, option, same, whole, wrong
from mmdit.control.options import ControlOptions
from mmdit.driver.options import ModelOptions
from mmdit.driver.settings import Settings
from mmdit.memory.options import MemoryOptions
from mmdit.options import ComputeOptions
from text_encoders.options import TextOptions
from vae.options import TinyOptions


def _port(name: str, value: object) -> None:
    if not whole(value) or not 0 <= value < 2**16:
        raise wrong(name, value, "a port from 1 to 65535, or 0 for one that is free")


def _origin(name: str, value: object) -> None:
    if not str(value).startswith(("http://", "https://", "chrome-extension://")) or str(value).endswith("/"):
        raise wrong(name, value, "an origin without a path, as in https://example.org")


def loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class LimitOptions:
    """Limits"""

    queue: int = option(
        64, "pictures that may wait or be drawn; more are answered 429", metavar="N", check=from_one_to(100_000)
    )
    most_pictures: int = option(10, "pictures of one request", metavar="N", check=from_one_to(100_000))
    most_steps: int = option(150, "steps of a picture", metavar="N", check=from_one_to(100_000))
    most_side: int = option(2048, "pixels of a picture's side", metavar="N", check=from_one_to(2**16))
    most_megabytes: int = option(64, "size of a request", metavar="N", check=from_one_to(2**14))
    timeout: int = option(
        600, "seconds after which a request is answered 504 and its pictures are let go", metavar="N",
        check=from_one_to(10**6),
    )  # fmt: skip
    grace: int = option(
        30, "seconds that pictures have to be done after SIGTERM", metavar="N", check=from_one_to(10**6)
    )  # fmt: skip

    def check_together(self) -> None:
        if self.most_pictures > self.queue:
            raise wrong("most_pictures", self.most_pictures, f"at most those of the queue, {self.queue}")


@dataclass(frozen=True)
class AddressOptions:
    """Where, and for whom"""

    host: str = option("127.0.0.1", "the address to listen at; one beyond this machine needs keys", metavar="ADDRESS")
    port: int = option(7860, "the port; 0: one that is free", metavar="N", check=_port)
    api_key_file: str | None = option(
        None, "a line for each key that is let in: KEY [NAME [most pictures at a time]]", metavar="FILE"
    )
    origin: str | None = option(
        None, "let pages of this origin in, as https://example.org", metavar="ORIGIN", check=_origin
    )

    def check_together(self) -> None:
        if not loopback(self.host) and self.api_key_file is None:
            raise SettingsError(
                f"host is {self.host}, which others reach: expected --api-key-file FILE with it, or 127.0.0.1"
            )


@dataclass(frozen=True)
class LoadingOptions:
    """How it is read and controlled"""

    attention: str = same(ComputeOptions, "attention")
    device: str = same(ComputeOptions, "device")
    dtype: str = same(ComputeOptions, "dtype")
    quantise: str = same(ComputeOptions, "quantise")
    compile: bool = same(ComputeOptions, "compile")
    t5: str = same(TextOptions, "t5")
    embedding: tuple[str, ...] = same(TextOptions, "embedding")
    control: tuple[str, ...] = same(ControlOptions, "control")


# A dataclass has the fields of its last base first: read from below, this is the order of --help.
@dataclass(frozen=True)
class ServeOptions(MemoryOptions, TinyOptions, LoadingOptions, ModelOptions, LimitOptions, AddressOptions):
    """What `python -m mmdit.serve` is told."""

    def check(self) -> None:
        """Raise SettingsError for what cannot be."""
        check_options(self)

    @property
    def settings(self) -> Settings:
        """What of it is settings of every picture: how the model is loaded."""
        own = {f.name for f in fields(Settings) if Mark.FOUND not in f.metadata["marks"]}
        return Settings(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in own})
