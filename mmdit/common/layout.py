"""What of a network may be treated apart for the memory's sake: its class says so in an attribute `layout`."""

from typing import NamedTuple


class Layout(NamedTuple):
    """A network's parts by their names, as plans, streams and quantisation need to know them.

    What is left out here is on the device as a whole while the network is used: right, and larger than it need be.
    """

    tables: tuple[str, ...] = ()  # tensors of which a run uses few rows; they stay on the host
    before: str | None = None  # pattern of the modules that are used before the loop, for all its steps at once
    blocks: str | None = None  # list of modules that run one after another
    loop: bool = False  # whether the blocks run more than once
    entries: tuple[str, ...] = ()  # modules that are called without the whole
    channels_last: bool = False  # whether its convolutions are faster so, in 16 bits
