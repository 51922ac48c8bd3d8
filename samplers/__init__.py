"""Noise schedules, guidance and solvers of the flow-matching equation; none of them knows the network."""

from samplers.euler import Step, euler
from samplers.guidance import classifier_free_guidance
from samplers.schedule import shift_sigma, shifted_sigmas

__all__ = ["Step", "classifier_free_guidance", "euler", "shift_sigma", "shifted_sigmas"]
