"""Models with random weights, for benchmarks: speed does not depend on what they say."""

from __future__ import annotations

import torch
import transformers

_COMMON = {"num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": False}
SHAPES = {
    "8b": _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "small": _COMMON
    | {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "head_dim": 64,
        "vocab_size": 4096,
    },
    "tiny": _COMMON
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "vocab_size": 128256,
    },
}


def draw_model(
    shape: str, length: int, seed: int, device: torch.device, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """Draw the weights where they are used.

    Parameters
    ----------
    shape : str
        A name in SHAPES; "8b" is that of Llama 3.1 8B.
    length : int
        Tokens that it must have positions for.
    seed : int
    device, dtype
        Of the weights. On a CPU drawing those of "8b" would take minutes.
    """
    config = transformers.LlamaConfig(
        max_position_embeddings=length,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        **SHAPES[shape],
    )
    torch.manual_seed(seed)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
