"""Between PyTorch tensors and the arrays that ``leank._C`` takes: bfloat16 is uint16 there."""

from __future__ import annotations

import numpy as np
import torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """View as an array, bfloat16 as uint16; copies only if the last axis has a stride."""
    tensor = tensor.detach()
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """View as a tensor, uint16 as bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
