"""Noise schedules, guidance and solvers of the flow-matching equation; none of them knows the network."""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from samplers.flow import (
        NEGATIVE,
        PROMPT,
        Evaluation,
        Guidance,
        Guiding,
        Point,
        Solver,
        Solving,
        Step,
        Velocity,
        drawing,
        guided,
        solver,
    )
    from samplers.guidance import classifier_free_guidance, unguided
    from samplers.schedule import shift_sigma, shifted_sigmas
    from samplers.solvers import euler

__all__ = [
    "NEGATIVE",
    "PROMPT",
    "Evaluation",
    "Guidance",
    "Guiding",
    "Point",
    "Solver",
    "Solving",
    "Step",
    "Velocity",
    "classifier_free_guidance",
    "drawing",
    "euler",
    "guided",
    "shift_sigma",
    "shifted_sigmas",
    "solver",
    "unguided",
]
_FLOW = ["NEGATIVE", "PROMPT", "Evaluation", "Guidance", "Guiding", "Point", "Solver", "Solving", "Step", "Velocity"]
__getattr__ = lazy(__name__, {
    "flow": [*_FLOW, "drawing", "guided", "solver"],
    "guidance": ["classifier_free_guidance", "unguided"],
    "schedule": ["shift_sigma", "shifted_sigmas"],
    "solvers": ["euler"],
})  # fmt: skip
