"""Several processes that train one model together; one alone, where none were started by torchrun.

On CPUs a process of one thread per core is faster than one process of many threads, and loses less where other programs
take turns on the cores: threads wait for each other in every operation, processes once in a step.
"""

import os
import signal

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        if self.size > 1:
            dist.init_process_group("gloo")

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def average(self, source: nn.Module, target: nn.Module, share: float, loss: float) -> tuple[float, float, bool]:
        """Put the mean of all processes' gradients of `source` into `target`, a module of the same parameters.

        Returns the first process's share of its time spent, the mean loss, and whether any was told to stop: all
        processes then do the same.
        """
        pairs = list(zip(source.parameters(), target.parameters()))
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p, _ in pairs]
        notes = [share if self.rank == 0 else 0.0, loss / self.size, float(self.stopped)]
        flat = torch.cat(
            [g.flatten().float() / self.size for g in gradients] + [gradients[0].new_tensor(notes).float()]
        )
        if self.size > 1:
            dist.all_reduce(flat)
        *parts, notes = flat.split([g.numel() for g in gradients] + [3])
        for (_, p), part in zip(pairs, parts):
            p.grad = part.view_as(p)
        source.zero_grad(set_to_none=True)
        share, loss, stop = notes.tolist()
        return share, loss, stop > 0

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, for all."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor
