"""The model families that the tests run, as tiny random models, and those that are refused.

The README's table of families is written from here: ``python -m tests.families``.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from leank import ChannelMask
from leank.models import Layout

from .tiny_models import RECENT, SINK, VOCAB

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: python -m tests.families -->\n", "<!-- end of families -->\n"

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = ["sliding_attention", "full_attention"] * 2
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
# Of these scaled weights attention is far from uniform; as initialised, it hides mistakes.
_SCALED = {
    r"(q_proj|k_proj|qkv_proj|query_key_value|lm_head|embed_out)\.weight$": 6.0,
    r"(embed_tokens|word_embeddings|embed_in|wte)\.weight$": 4.0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table; the tests run `config` with `options`."""

    title: str
    config: str
    options: dict[str, Any]
    note: str = ""
    learn: bool = True  # whether `leank.learn` takes it too

    def make(self, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
        """Make a tiny random model, whose attention is not uniform."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**_SIZES | self.options | options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for pattern, factor in _SCALED.items():
                    if re.search(pattern, name):
                        parameter.mul_(factor)
                if re.search(r"[qk]_norm", name):
                    parameter.add_(torch.rand_like(parameter) + 1)
                elif name.endswith("bias") or "sinks" in name:
                    parameter.normal_(0, 0.5)
        for module in model.modules():
            # Attention that Zamba's layers share is told its layer at each call, the oracle is not.
            if getattr(module, "layer_idx", 0) in (None, -1):
                module.layer_idx = config.layer_types.index("hybrid")
        return model.to(dtype).eval()


FAMILIES = {
    "llama": Family("Llama 2, 3", "LlamaConfig", {}),
    "smollm3": Family(
        "SmolLM3", "SmolLM3Config", {"no_rope_layer_interval": 2}, "layers without rotary embedding"
    ),
    "mistral": Family("Mistral", "MistralConfig", {"sliding_window": None}, "without a window"),
    "mixtral": Family(
        "Mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen2Config", {}),
    "qwen2 sliding": Family(
        "Qwen2 with sliding layers",
        "Qwen2Config",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
        "only the layers with full attention",
        learn=False,
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE", "Qwen2MoeConfig", _EXPERTS | {"shared_expert_intermediate_size": 32}
    ),
    "qwen3": Family("Qwen3", "Qwen3Config", {"head_dim": 32}, "q and k normed"),
    "qwen3_moe": Family("Qwen3-MoE", "Qwen3MoeConfig", _EXPERTS | {"head_dim": 16}),
    "phi3": Family("Phi-3, Phi-4", "Phi3Config", {}, "fused projections"),
    "gemma": Family("Gemma", "GemmaConfig", {"head_dim": 256, "num_key_value_heads": 1}),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2Config",
        {
            "num_hidden_layers": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 64,
            "sliding_window": 8,
            "layer_types": _MIXED,
            "attn_logit_softcapping": 5.0,
        },
        "soft-capped; only the layers with full attention",
        learn=False,
    ),
    "gemma3": Family(
        "Gemma 3 (text)",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 64,
            "sliding_window": 8,
            "layer_types": _MIXED,
        },
        "only the layers with full attention",
        learn=False,
    ),
    "olmo2": Family("OLMo 2", "Olmo2Config", {}),
    "granite": Family(
        "Granite",
        "GraniteConfig",
        {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5},
        "scaled logits",
        learn=False,
    ),
    "gpt_oss": Family(
        "GPT-OSS",
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": _MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.04,
        },
        "attention sinks; only the layers with full attention",
        learn=False,
    ),
    "falcon": Family(
        "Falcon",
        "FalconConfig",
        {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
        "sdpa only",
        learn=False,
    ),
    "falcon new": Family(
        "Falcon, new decoder",
        "FalconConfig",
        {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
        "sdpa only; stores K and V of each query head, as transformers does",
        learn=False,
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia", "GPTNeoXConfig", {}, "part of the channels rotates", learn=False
    ),
    "starcoder2": Family(
        "StarCoder2", "Starcoder2Config", {"sliding_window": None, "initializer_range": 0.05}
    ),
    "cohere": Family("Cohere", "CohereConfig", {"logit_scale": 0.5}, "scaled logits", learn=False),
    "gpt2": Family(
        "GPT-2",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024},
        "positions are embedded",
        learn=False,
    ),
    "lfm2": Family(
        "LFM2",
        "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        "beside convolutions",
        learn=False,
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32},
        "beside linear attention",
        learn=False,
    ),
    "qwen3_5": Family(
        "Qwen3.5 (text)", "Qwen3_5TextConfig", _LINEAR, "beside linear attention", learn=False
    ),
    "olmo_hybrid": Family(
        "OLMo Hybrid",
        "OlmoHybridConfig",
        {"num_hidden_layers": 4, "layer_types": _LINEAR["layer_types"]},
        "beside linear attention",
        learn=False,
    ),
    "jamba": Family(
        "Jamba",
        "JambaConfig",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4},
        "beside Mamba",
        learn=False,
    ),
    "bamba": Family(
        "Bamba", "BambaConfig", _MAMBA2 | {"attn_layer_indices": [1]}, "beside Mamba", learn=False
    ),
    "granite hybrid": Family(
        "Granite 4 hybrid",
        "GraniteMoeHybridConfig",
        _MAMBA2
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "attention_multiplier": 0.2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
        "beside Mamba",
        learn=False,
    ),
    "nemotron_h": Family(
        "Nemotron-H",
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "head_dim": 16,
        },
        "beside Mamba and layers without a cache",
        learn=False,
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        "FalconH1Config",
        _MAMBA2 | {"mamba_d_ssm": 128},
        "beside Mamba in each layer",
        learn=False,
    ),
    "zamba": Family(
        "Zamba",
        "ZambaConfig",
        {
            "num_hidden_layers": 4,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "initializer_range": 0.06,
        },
        "beside Mamba",
        learn=False,
    ),
    "zamba2": Family(
        "Zamba2",
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "mamba", "hybrid"],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_mem_blocks": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
            "initializer_range": 0.06,
        },
        "beside Mamba",
        learn=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Refused:
    """A family that `leank.patch` refuses; its message must match `message`."""

    title: str
    config: str
    options: dict[str, Any]
    why: str
    message: str
    auto: str = "AutoModelForCausalLM"

    def make(self) -> torch.nn.Module:
        """Make a tiny model."""
        config = getattr(transformers, self.config)(**_SIZES | self.options)
        return getattr(transformers, self.auto).from_config(config)


_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
REFUSED = {
    "deepseek_v2": Refused(
        "DeepSeek-V2", "DeepseekV2Config", _LATENT, "MLA", "DeepseekV2ForCausalLM with .*MLA"
    ),
    "deepseek_v3": Refused(
        "DeepSeek-V3", "DeepseekV3Config", _LATENT, "MLA", "DeepseekV3ForCausalLM with .*MLA"
    ),
    "mamba": Refused(
        "Mamba", "MambaConfig", {}, "recurrent", "MambaForCausalLM with .* a state in every layer"
    ),
    "recurrent_gemma": Refused(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        {"head_dim": 16},
        "recurrent",
        "RecurrentGemmaForCausalLM with .* a state in every layer",
    ),
    "t5": Refused(
        "T5", "T5Config", {"d_model": 64}, "cross", "cross-attention", "AutoModelForSeq2SeqLM"
    ),
    "bart": Refused(
        "BART",
        "BartConfig",
        {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1},
        "cross",
        "cross-attention",
        "AutoModelForSeq2SeqLM",
    ),
    "bloom": Refused("BLOOM", "BloomConfig", {}, "alibi", "BloomForCausalLM with alibi"),
    "falcon alibi": Refused(
        "Falcon with alibi",
        "FalconConfig",
        {"alibi": True},
        "alibi",
        "FalconForCausalLM with alibi",
    ),
    "gpt_neo": Refused(
        "GPT-Neo",
        "GPTNeoConfig",
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
        "own",
        r"attention interface or torch's .*, got GPTNeoForCausalLM computing with K \(\w+\)",
    ),
    "gemma4": Refused(
        "Gemma 4",
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _MIXED,
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        "shared",
        "Gemma4ForCausalLM, whose layers share them",
    ),
    "windows": Refused(
        "Mistral with a window",
        "MistralConfig",
        {"sliding_window": 8},
        "window",
        "MistralForCausalLM with a sliding window, .* in every layer",
    ),
}
_WHY = {
    "MLA": "multi-head latent attention stores a latent vector instead of K",
    "recurrent": "their layers keep a state or a sliding window, nothing that grows",
    "cross": "cross-attention does not decode from a growing cache",
    "alibi": "it adds a bias to each logit",
    "own": "its attention does not go through transformers' attention interface",
    "shared": "layers that read K and V of other layers store none",
    "window": "a sliding window in every layer leaves nothing to prune",
}


def mask_for(layout: Layout) -> ChannelMask:
    """Return a mask with halves of heads and empty heads; layers with windows keep everything."""
    n_layers, n_heads, head_dim = layout.mask_shape
    keep = np.zeros(layout.mask_shape, bool)
    for i, (layer, head) in enumerate(np.ndindex(n_layers, n_heads)):
        if i % 3 == 0:
            keep[layer, head, ::2] = True
        elif i % 3 == 1:
            keep[layer, head, head_dim // 2 :] = True
    keep[list(layout.outside)] = True
    return ChannelMask(keep, sink=SINK, recent=RECENT)


def table() -> str:
    """Return what the README says about families."""
    lines = ["| tested | class | `leank learn` | |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        cls = transformers.AutoModelForCausalLM._model_mapping[
            getattr(transformers, family.config)
        ].__name__
        learn = "yes" if family.learn else "no"
        lines.append(f"| {family.title} | {cls} | {learn} | {family.note} |".replace("|  |", "| |"))
    reasons = []
    for why, text in _WHY.items():
        titles = [refused.title for refused in REFUSED.values() if refused.why == why]
        reasons.append(f"{', '.join(titles)} ({text})")
    refused = textwrap.fill("Refused: " + "; ".join(reasons) + ".", 118)
    return "\n".join(lines) + f"\n\n{refused}\n"


def readme(text: str) -> str:
    """Return the README with the table in its place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(readme(README.read_text()))
    sys.exit(0)
