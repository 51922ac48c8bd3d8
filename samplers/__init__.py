"""Noise schedules, guidance and solvers of the flow-matching equation; none of them knows the network."""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from samplers.flow import (
        NEGATIVE,
        PROMPT,
        Answer,
        Ask,
        Evaluation,
        Guidance,
        Guiding,
        Moment,
        Noise,
        Point,
        Sight,
        Solver,
        Solving,
        Source,
        Step,
        Velocity,
        drawing,
        guided,
        solver,
    )
    from samplers.guidance import Term, classifier_free_guidance, combined, unguided
    from samplers.masked import keeping, noised
    from samplers.noise import spherical
    from samplers.schedule import SCHEDULES, Schedule, scheduled, shift_for, shift_sigma, shifted_sigmas
    from samplers.solvers import SOLVERS, euler

__all__ = [
    "NEGATIVE",
    "PROMPT",
    "SCHEDULES",
    "SOLVERS",
    "Answer",
    "Ask",
    "Evaluation",
    "Guidance",
    "Guiding",
    "Moment",
    "Noise",
    "Point",
    "Schedule",
    "Sight",
    "Solver",
    "Solving",
    "Source",
    "Step",
    "Term",
    "Velocity",
    "classifier_free_guidance",
    "combined",
    "drawing",
    "euler",
    "guided",
    "keeping",
    "noised",
    "scheduled",
    "shift_for",
    "shift_sigma",
    "shifted_sigmas",
    "solver",
    "spherical",
    "unguided",
]
_TOLD = ["Answer", "Ask", "Evaluation", "Moment", "Noise", "Point", "Sight", "Step"]
_FLOW = ["NEGATIVE", "PROMPT", *_TOLD, "Guidance", "Guiding", "Solver", "Solving", "Source", "Velocity"]
__getattr__ = lazy(__name__, {
    "flow": [*_FLOW, "drawing", "guided", "solver"],
    "guidance": ["Term", "classifier_free_guidance", "combined", "unguided"],
    "masked": ["keeping", "noised"],
    "noise": ["spherical"],
    "schedule": ["SCHEDULES", "Schedule", "scheduled", "shift_for", "shift_sigma", "shifted_sigmas"],
    "solvers": ["SOLVERS", "euler"],
})  # fmt: skip
