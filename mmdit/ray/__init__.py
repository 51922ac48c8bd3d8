"""Many machines by Ray: a list by Ray Data, the server by Ray Serve (`serve run mmdit.ray:app`)."""

from mmdit.common.lazy import lazy

__getattr__ = lazy(__name__, {"server": ["app"]})
