"""Run a function on two processes joined by gloo, with a time limit, and bring back what it returns or raises."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


class RankError(Exception):
    """A rank raised, ended without an answer, or took too long."""


def on_ranks(function: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """What `function(rank, *args)` returns on each rank.

    Args:
        function: top-level, so that a fresh process finds it.
        args: plain data.
        seconds: time for all.

    Raises:
        RankError: with the rank's traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
        ranks = [
            context.Process(target=_rank, args=(rank, meeting, pipes[rank][1], function, args), daemon=True)
            for rank in range(RANKS)
        ]
        try:
            for process, (_, send) in zip(ranks, pipes, strict=True):
                process.start()
                send.close()
            return _collect([receive for receive, _ in pipes], time.monotonic() + seconds)
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], until: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        open_ = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(open_, timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(set(range(len(pipes))) - set(found))} gave no answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} ended without an answer") from None
            if not good:
                raise RankError(f"rank {rank}:\n{value}")
            found[rank] = value
    return [found[rank] for rank in range(len(pipes))]


def _rank(rank: int, meeting: str, send: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
        send.send((True, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        send.send((False, traceback.format_exc()))
        raise
