"""Processes that learn one mask together: each has some samples of a batch, all the same factors.

What has to be joined are sums: of losses, of their weights and of gradients. It is started by
``torchrun`` or ``accelerate launch``; one process alone needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch

# The first process alone tests the masks while the others wait, longer than NCCL's ten minutes.
# One that dies is noticed all the same: by what started them, which ends the others.
_PATIENCE = timedelta(days=1)


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
    device : torch.device
        Where the process's model is: on the CPU (gloo) or on a GPU (nccl), of its own.

    Raises
    ------
    ModuleNotFoundError
        accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.distributed.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        # Sums are made there. NCCL refuses two processes on one GPU, whatever their numbers are.
        gloo = torch.distributed.get_backend() == "gloo"
        self.device = torch.device("cpu") if gloo else device

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
        return Processes(torch.device(device))
    return Alone()


def share(items: Sequence[Any], world: World) -> Sequence[Any]:
    """Return this process's own items: every size-th, so that no process has two more."""
    return items[world.rank :: world.size]
