"""The names of the costs and gains; what they stand for loads PyTorch: `samplers.focus.COSTS`, `samplers.focus.GAINS`."""

LOSSES = ("focus", "conform", "attend-and-excite", "divide-and-bind", "jedi")
GAINS = ("code", "memoryless", "unit", "step", "relative")
