"""Tiny random models, masks for them, and a dense oracle of the rule."""

import contextlib
import copy

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import eager_mask

from leank import ChannelMask

from .compare import assert_within_budget

torch.set_num_threads(1)  # models this small only wait for their threads

FAMILIES = ("llama", "qwen2")
N, HKV, D = 3, 2, 16
VOCAB = 97
SINK, RECENT = 3, 5


def tiny(family="llama", dtype=torch.float32, seed=0, **options):
    """Make a model of 3 layers; Llama has R = 4, Qwen2 has R = 3 and biases."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "intermediate_size": 96,
        "num_hidden_layers": N,
        "num_key_value_heads": HKV,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "llama":
        config = LlamaConfig(
            hidden_size=128, num_attention_heads=8, **{"head_dim": D} | sizes | options
        )
        model = LlamaForCausalLM(config)
    else:
        config = Qwen2Config(hidden_size=96, num_attention_heads=6, **sizes | options)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, attention is nearly uniform and hides mistakes.
            if name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight")):
                parameter.mul_(6)
            if name.endswith("proj.bias"):
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


def all_keeping():
    return ChannelMask(np.ones((N, HKV, D), bool), sink=SINK, recent=RECENT)


def pruned():
    """Widths 0, 8 and D; layer 1 has nothing but an empty and a half head."""
    keep = np.zeros((N, HKV, D), bool)
    keep[0, 0, ::2] = True
    keep[0, 1] = True
    keep[1, 1, 8:] = True
    keep[2, 0, [0, 1, 2, 3, 12, 13, 14, 15]] = True
    return ChannelMask(keep, sink=SINK, recent=RECENT)


def prompts(lengths, n_columns=None, seed=1):
    """Return left-padded ids and their mask for rows of the given lengths."""
    n_columns = max(lengths) if n_columns is None else n_columns
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), n_columns), generator=generator)
    mask = (torch.arange(n_columns) >= n_columns - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def generate(model, ids, mask=None, n=12, **options):
    """Generate n tokens, greedily unless told otherwise; returns the output with raw logits."""
    torch.manual_seed(0)
    settings = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )


def logits(out):
    """Logits of all steps as an array [n, B, vocabulary]."""
    return torch.stack(out.logits).numpy()


def assert_same(out, truth, plain, label=""):
    """Require the same tokens, and logits as near to the float64 truth as those of a plain run."""
    for other in (truth, plain):
        assert torch.equal(out.sequences, other.sequences), f"{label}: other tokens"
    assert_within_budget(logits(out), logits(truth), logits(plain), "float32", label)


def wide(model):
    """Copy a model to float64."""
    return copy.deepcopy(model).double()


# ---------------------------------------------------------------------------------- the oracle

_rule = {}


@contextlib.contextmanager
def oracle(model, mask, prompt_columns=None, n0=None):
    """
    Let the model attend by the rule of csrc/leank.h over dense K and V of an ordinary cache.

    The prompt is the tokens of a row in the first `prompt_columns` columns, or n0[b] tokens. It
    shares nothing with the package: positions come from the mask, the window from comparing them.
    """
    AttentionInterface.register("test_oracle", _oracle_attention)
    AttentionMaskInterface.register("test_oracle", eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "test_oracle"
    _rule.update(mask=mask, prompt_columns=prompt_columns, n0=n0)
    try:
        yield model
    finally:
        model.config._attn_implementation = before
        _rule.clear()


def _oracle_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    allowed = attention_mask[:, 0] == 0
    if sliding_window is None:
        out = attend(module.layer_idx, query, key, value, allowed, scaling, **kwargs)
    else:  # not ours: the mask hides what is outside of the window
        out = _softmax(_scores(query, key, scaling), allowed, value, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def attend(layer, query, key, value, allowed, scaling, **terms):
    """Attend by the rule in one layer; allowed [B, T, L] is causality and padding."""
    rule = _rule["mask"]
    keep = torch.from_numpy(np.array(rule.keep[layer]))
    real = allowed[:, -1]
    position = real.cumsum(-1) - 1
    at = position[:, -query.shape[2] :]
    if _rule["n0"] is not None:
        n0 = torch.tensor(_rule["n0"])
    else:
        n0 = real[:, : _rule["prompt_columns"]].sum(-1)
    distance = at[:, :, None] - position[:, None]
    in_prompt = (at < n0[:, None])[:, :, None]
    window = (position[:, None] < rule.sink) | (distance < rule.recent) | in_prompt
    # A query of an empty head sees the window alone.
    n_groups = query.shape[1] // key.shape[1]
    is_live = keep.any(-1).repeat_interleave(n_groups)
    kept = _scores(query, key * keep[:, None], scaling)
    scores = torch.where(window[:, None], _scores(query, key, scaling), kept)
    allowed = allowed[:, None] & (window[:, None] | is_live[:, None, None])
    return _softmax(scores, allowed, value, **terms)


def _scores(query, key, scaling):
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling


def _softmax(scores, allowed, value, softcap=None, s_aux=None, **kwargs):
    """Softmax over what is allowed, and over a sink of each head, times V: [B, Hq, T, Dv]."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed.ndim == 3:
        allowed = allowed[:, None]
    scores = scores.masked_fill(~allowed, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.detach()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0)[..., : value.shape[2]]
    return weights @ value.repeat_interleave(scores.shape[1] // value.shape[1], 1)
