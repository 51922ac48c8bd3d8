"""Who is let in: the keys of `--api-key-file`."""

import hashlib
import hmac
import re
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path

from mmdit.common.errors import SettingsError
from mmdit.common.paths import user_path

_MOST_BYTES = 1_000_000
_SHORTEST = 16  # characters of a key


@dataclass(frozen=True)
class Client:
    """Somebody with a key, or, where none are needed, anybody."""

    name: str = "anyone"
    most: int | None = None  # pictures that may wait or be drawn at a time


ANYONE = Client()


class Keys:
    """The clients by their keys; without a file everybody is let in."""

    def __init__(self, path: str | None = None) -> None:
        """Raises SettingsError for a file that cannot be read, has no key, or a line that is none."""
        self._clients: list[tuple[bytes, Client]] = []
        if path is None:
            return
        for number, line in enumerate(_lines(path), 1):
            words = line.split("#")[0].split()
            if words:
                self._clients.append(_client(f"api_key_file: {path}: line {number}", words))
        if not self._clients:
            raise SettingsError(f"api_key_file: {path}: has no key: expected lines KEY [NAME [PICTURES]]")

    @property
    def needed(self) -> bool:
        return bool(self._clients)

    def client(self, authorization: str) -> Client | None:
        """Whose key a header has: `Bearer KEY`, or `Basic` with the key as password; None for nobody's."""
        if not self.needed:
            return ANYONE
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:
                return None
        elif scheme.lower() != "bearer":
            return None
        asked, found = _digest(value.strip()), None
        for digest, client in self._clients:  # all of them, each in a time that tells nothing
            if hmac.compare_digest(digest, asked):
                found = client
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _lines(path: str) -> list[str]:
    file: Path = user_path("api_key_file", path)
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"api_key_file: {path}: {error.strerror or error}") from None
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"api_key_file: {path}: more than {_MOST_BYTES} bytes, which are no keys")
    return data.decode(errors="replace").splitlines()


def _client(where: str, words: list[str]) -> tuple[bytes, Client]:
    """A line of the file; the message does not show the key."""
    key, name, most, *more = [*words, *[""] * max(0, 3 - len(words))]
    if more or not re.fullmatch(rf"[!-~]{{{_SHORTEST},}}", key):
        raise SettingsError(f"{where}: expected KEY [NAME [PICTURES]], the key of {_SHORTEST} characters or more")
    if most and not re.fullmatch("[1-9][0-9]{0,5}", most):
        raise SettingsError(f"{where}: {most!r:.40}: expected a number of pictures from 1")
    return _digest(key), Client(name or "client", int(most) if most else None)
