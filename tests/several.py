"""Work done by several processes at once, with a process group between them or none."""

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from toys import Ran

from mmdit.model import MMDiT
from mmdit.parallel.ranks import Layout, Ranks
from mmdit.parallel.tokens import exchanges_of, split

LIMIT = 120  # seconds
_PROCESSES = multiprocessing.get_context("forkserver")  # one imports PyTorch, all others begin as its copies
_PROCESSES.set_forkserver_preload(["mmdit.run", "mmdit.driver.pipeline", "mmdit.parallel.command"])


def several(size: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What `work(ranks, *given)` gives in each of so many processes; what it raises is given too.

    work: a function of a module. None for a process that was killed.
    """
    return _begun(size, _met, work, *given)


def commands(size: int, options: list[str], before: Callable[[int], object] | None = None) -> list[Any]:
    """The command line in so many processes, in the environment that torchrun makes.

    before: a function of a module, called in each process with its number before the command. None for a process that
    was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return _begun(size, _command, port, options, before)


def alone(size: int, options: list[str], before: Callable[[int], object] | None = None) -> list[Any]:
    """The same in so many processes that know nothing of each other."""
    return _begun(size, _by_itself, options, before)


def _begun(size: int, begin: Callable[..., Any], *given: Any) -> list[Any]:
    with TemporaryDirectory() as name:
        every = [
            _PROCESSES.Process(target=_one, args=(rank, size, Path(name), begin, given), daemon=True)
            for rank in range(size)
        ]
        for process in every:
            process.start()
        for process in every:
            process.join(LIMIT)
        late = [rank for rank, process in enumerate(every) if process.is_alive()]
        for rank in late:
            every[rank].kill()
        assert not late, f"processes {late} of {size} are still waiting"
        files = [Path(name, f"{rank}.pt") for rank in range(size)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _one(rank: int, size: int, folder: Path, begin: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        result = begin(rank, size, folder, *given)
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{rank}.unfinished")
    os.replace(folder / f"{rank}.unfinished", folder / f"{rank}.pt")


def _met(rank: int, size: int, folder: Path, work: Callable[..., Any], *given: Any) -> Any:
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    with torch.no_grad():
        return work(Ranks(rank, size), *given)


def _command(
    rank: int, size: int, _: Path, port: int, options: list[str], before: Callable[[int], object] | None
) -> Ran:
    import mmdit.run

    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mmdit.run._TO_SPEAK = 0
    if before is not None:
        before(rank)
    return _main(options)


def _by_itself(rank: int, *given: Any) -> Ran:
    *_, options, before = given
    if before is not None:
        before(rank)
    return _main(options)


def _main(options: list[str]) -> Ran:
    import mmdit.run

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = mmdit.run.main(options)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ran(code, out.getvalue().splitlines(), err.getvalue().splitlines())


def velocities(ranks: Ranks, model: MMDiT, cases: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of latent, sigma, context and pooled each, the tokens split between all. Here, as tests import references."""
    _, line = ranks.lines(Layout(tokens=ranks.size))
    found = []
    for latent, sigma, context, pooled in cases:
        with split(model, exchanges_of(model, line, latent, context.shape[1])):
            found.append(model(latent, sigma, context, pooled))
    return found
