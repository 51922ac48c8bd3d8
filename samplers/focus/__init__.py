"""Keeping several subjects apart by the attention that they get: what it costs that they mix, and how hard to push."""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from samplers.focus.control import Attended, Controller
    from samplers.focus.costs import COSTS, Cost, Groups
    from samplers.focus.gains import GAINS, Gain, Push

__all__ = ["COSTS", "GAINS", "Attended", "Controller", "Cost", "Gain", "Groups", "Push"]
_NAMES = {
    "control": ["Attended", "Controller"],
    "costs": ["COSTS", "Cost", "Groups"],
    "gains": ["GAINS", "Gain", "Push"],
}
__getattr__ = lazy(__name__, _NAMES)
