"""The loss of a mask as it will be used, on batches that are never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from leank.learning.parallel import Alone, World
from leank.learning.sample import Batch
from leank.learning.span import Dense, SpanModel, loss_of


class Validation:
    """Batches, and their dense runs as far as there is memory for them.

    Parameters
    ----------
    model : SpanModel
    batches : sequence of Batch
        Of this process; at least one in all processes together.
    world : World, optional
        The processes that validate together; default: this one alone.
    cache_bytes : int
        Dense runs are kept where they are up to so many bytes; the others are run again each
        time, with the same result.
    """

    def __init__(
        self,
        model: SpanModel,
        batches: Sequence[Batch],
        *,
        world: World | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.model, self.world = model, world or Alone()
        if not self.world.sum(torch.tensor(float(len(batches)))):
            raise ValueError("validation: expected at least one batch, got none")
        self.batches = [batch.to(model.device) for batch in batches]
        self._cache: dict[int, Dense] = {}
        self._room = cache_bytes

    @torch.no_grad()
    def loss(self, keep: np.ndarray) -> float:
        """Return the mean over batches of a mask's loss: empty heads see no middle key.

        Parameters
        ----------
        keep : bool array [N, Hkv, D]
        """
        mask = torch.tensor(keep, device=self.model.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for i, batch in enumerate(self.batches):
            dense = self._dense(i)
            out = self.model.mixed(batch, dense, mask.float(), ~mask.any(-1))
            total[0] += loss_of(out, dense, batch)
            total[1] += 1
        loss, n_batches = self.world.sum(total).tolist()
        return loss / n_batches

    def _dense(self, i: int) -> Dense:
        if i in self._cache:
            return self._cache[i]
        dense = self.model.dense(self.batches[i])
        if dense.n_bytes <= self._room:
            self._room -= dense.n_bytes
            self._cache[i] = dense
        return dense
