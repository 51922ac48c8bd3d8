"""Noise schedules, guidance and solvers of the flow-matching equation; none of them knows the network."""

from typing import TYPE_CHECKING

from common.lazy import lazy

if TYPE_CHECKING:
    from samplers.guidance import classifier_free_guidance
    from samplers.schedule import shift_sigma, shifted_sigmas
    from samplers.solvers import Step, euler

__all__ = ["Step", "classifier_free_guidance", "euler", "shift_sigma", "shifted_sigmas"]
__getattr__ = lazy(__name__, {
    "guidance": ["classifier_free_guidance"], "schedule": ["shift_sigma", "shifted_sigmas"],
    "solvers": ["Step", "euler"],
})  # fmt: skip
