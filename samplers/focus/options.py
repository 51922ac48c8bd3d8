"""The names of the costs and gains. What they stand for loads PyTorch: `COSTS` and `GAINS` of `samplers.focus`."""

LOSSES = ("focus", "conform", "attend-and-excite", "divide-and-bind", "jedi")
GAINS = ("code", "memoryless", "unit", "step", "relative")
