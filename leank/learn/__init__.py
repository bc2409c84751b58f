"""Learn which channels to keep: so far the attention that it needs. Imports PyTorch."""

from leank.learn.ops import mixed_attention

__all__ = ["mixed_attention"]
