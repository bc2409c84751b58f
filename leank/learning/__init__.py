"""Learning a mask: its attention, data, and two stages. Imports PyTorch.

So far the parts; what joins them to one function and command is to come.
"""

from leank.learning.ops import mixed_attention

__all__ = ["mixed_attention"]
