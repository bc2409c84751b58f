"""Processes that learn one mask together: each has some samples of a batch, all the same factors.

What has to be joined are sums: of losses, of their weights and of gradients. It is started by
``torchrun`` or ``accelerate launch``; one process alone needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class World(Protocol):
    """The processes, and how to add over them."""

    rank: int
    size: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, the same bits in each."""

    def wait(self) -> None:
        """Return when all processes have called it."""

    def leave(self) -> None:
        """End the work with the others."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x

    def wait(self) -> None:
        """Return at once."""

    def leave(self) -> None:
        """Do nothing."""


class Processes:
    """The processes of torch.distributed, which accelerate starts if nobody has.

    Parameters
    ----------
    cpu : bool
        Whether the model is on the CPU (gloo) or on a GPU (nccl).

    Raises
    ------
    ModuleNotFoundError
        accelerate is not installed.
    """

    def __init__(self, cpu: bool) -> None:
        if not torch.distributed.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=cpu)
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self.device = torch.device("cpu") if cpu else torch.device("cuda", local_rank())

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes.

        They are gathered and added in the order of their ranks, so that each process gets the same
        bits and masks cannot differ between them; the tensors are small.
        """
        x = x.contiguous()
        parts = [torch.empty_like(x, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.to(self.device))
        return torch.stack(parts).sum(0).to(x.device)

    def wait(self) -> None:
        """Return when all processes have called it."""
        self.sum(torch.zeros(1))

    def leave(self) -> None:
        """End torch.distributed, which warns of processes that do not."""
        torch.distributed.destroy_process_group()


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Return how many processes learn together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def find_world(device: torch.device | str) -> World:
    """Return the processes that torchrun or accelerate started, or this one alone."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if started or (joined and torch.distributed.get_world_size() > 1):
        return Processes(cpu=torch.device(device).type == "cpu")
    return Alone()


def share(items: Sequence[Any], world: World) -> Sequence[Any]:
    """Return this process's own items: every size-th, so that no process has two more."""
    return items[world.rank :: world.size]
