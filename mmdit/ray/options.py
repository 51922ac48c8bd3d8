"""What a user may say of a server on many machines: the server's own options, and how many replicas of it there are."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import from_one_to, kind, of_each, option, wrong
from mmdit.serve.options import ServeOptions

_NOT_HERE = {"port"}  # Ray's proxies listen
_WORDS = {"true": True, "false": False}


def _from_none(name: str, value: object) -> None:
    if not isinstance(value, int) or not 0 <= value <= 64:
        raise wrong(name, value, "a whole number from 0 to 64")


@dataclass(frozen=True)
class ReplicaOptions:
    """Replicas"""

    min_replicas: int = option(1, "replicas that are always there", metavar="N", check=from_one_to(10_000))
    max_replicas: int = option(1, "and at most, as requests come", metavar="N", check=from_one_to(10_000))
    target: int = option(
        8, "requests of each replica beyond which there are more replicas", metavar="N", check=from_one_to(10_000)
    )
    ongoing: int = option(16, "requests that one replica is given at a time", metavar="N", check=from_one_to(10_000))
    waiting: int = option(
        64, "requests that wait at each proxy; beyond it 429", metavar="N", check=from_one_to(100_000)
    )
    cores: int = option(1, "processor cores of each replica", metavar="N", check=from_one_to(1024))
    gpus: int | None = option(
        None, "GPUs of each (default: one where the cluster has any)", metavar="N", check=_from_none
    )  # fmt: skip

    def check_together(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise wrong("min_replicas", self.min_replicas, f"at most max_replicas, {self.max_replicas}")


@dataclass(frozen=True)
class ClusterOptions(ReplicaOptions, ServeOptions):
    """What `serve run mmdit.ray:app` is told."""


def options_of(given: Mapping[str, Any]) -> ClusterOptions:
    """The options that `name=value` words, or the args of a config file, give; SettingsError."""
    names = [f.name for f in fields(ClusterOptions) if f.name not in _NOT_HERE]
    for name in given:
        if name not in names:
            raise SettingsError(f"no option {name!r:.60}: there are {', '.join(names)}")
    options = ClusterOptions(**{name: _as_option(name, value) for name, value in given.items()})
    options.check()
    return options


def _as_option(name: str, value: Any) -> Any:
    """Words are texts; lists of them come from files alone."""
    if kind(ClusterOptions, name) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    of = of_each(ClusterOptions, name)
    if of is int and isinstance(value, str) and value.isdecimal() and len(value) < 20:
        return int(value)
    if of is bool and isinstance(value, str):
        return _WORDS.get(value.lower(), value)
    return value
