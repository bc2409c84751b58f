"""What tests of patched models on a GPU share: the place, models, runs that are compared.

Without CUDA in the build the place is the CPU, over operators that do what the kernels do
(`cuda_emulated`): that tests the host's part. With it, it is an NVIDIA GPU.
"""

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import CompileConfig, LogitsProcessor

import leank
from leank import ChannelMask

from .compare import assert_within_budget
from .cuda_emulated import emulated
from .tiny_models import HKV, VOCAB, N, generate, oracle, prompts, tiny, wide

D = 64
WINDOW = {"sink": 3, "recent": 5, "slack": 4}
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def place_of(name):
    """Yield where models are, for "emulated" or "cuda"."""
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        pytest.importorskip("leank.cuda", reason="leank was built without CUDA")
        yield "cuda"
        return
    if find_spec("leank._cuda") is not None:
        pytest.skip("leank was built with CUDA: a GPU runs these cases")
    patches = pytest.MonkeyPatch()
    with emulated(patches):
        yield "cpu"


def pruned(n_layers=N, n_heads=HKV):
    """Widths 0, 16, 32 and D; layer 1 has an empty and a half head."""
    keep = np.zeros((n_layers, n_heads, D), bool)
    keep[0, 0, ::2] = True
    keep[0, 1:] = True
    keep[1, -1, D // 2 :] = True
    keep[2:, 0, [*range(8), *range(D - 8, D)]] = True
    return ChannelMask(keep, sink=WINDOW["sink"], recent=WINDOW["recent"])


class Models:
    """A model where it is tested, and what it is compared with."""

    def __init__(self, model, place, mask=None):
        self.plain, self.double = copy.deepcopy(model), wide(model)
        self.model, self.place = model.to(place), place
        self.mask = pruned() if mask is None else mask
        self.dtype = NAMES[model.dtype]

    def patch(self, **options):
        return leank.patch(self.model, self.mask, **WINDOW | options)

    def assert_rule(self, got, ids, real, n_prompt, label=""):
        """Require the logits [B, T, vocabulary] of the last T columns of ids to follow the rule."""
        position = (real.cumsum(1) - 1).clamp(min=0)
        outs = []
        for model in (self.double, self.plain):
            with torch.no_grad(), oracle(model, self.mask, n_prompt):
                call = {"attention_mask": real, "position_ids": position, "use_cache": False}
                out = model(ids, **call).logits[:, -got.shape[1] :]
            outs.append(out[real[:, -got.shape[1] :] == 1].double().numpy())
        got = got.cpu()[real[:, -got.shape[1] :] == 1].double().numpy()
        assert_within_budget(got, *outs, self.dtype, label)


def small(place, dtype=torch.bfloat16):
    """Return a tiny Llama."""
    return Models(tiny(head_dim=D, dtype=dtype), place)


class Forced(LogitsProcessor):
    """Choose given tokens, so that runs of little precision stay comparable."""

    def __init__(self, tokens, n_prompt):
        self.tokens, self.n_prompt = tokens, n_prompt

    def __call__(self, input_ids, scores):
        wanted = self.tokens[:, input_ids.shape[1] - self.n_prompt]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None].to(scores.device), 0)


def draw(n_rows, n_columns, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (n_rows, n_columns), generator=generator)


def eager(models):
    return {"disable_compile": True}


def compiled(models):
    """Decode in one graph: on a GPU with CUDA graphs, as generate() does by itself."""
    on_gpu = models.place == "cuda"
    config = CompileConfig(
        fullgraph=True,
        backend="inductor" if on_gpu else "eager",
        mode="reduce-overhead" if on_gpu else None,
    )
    config._compile_all_devices = True
    return {"compile_config": config}


def run(models, lengths, n=12, **options):
    """Generate given tokens, and compare all logits with the rule; returns the output."""
    ids, mask = prompts(lengths)
    tokens = draw(len(ids), n)
    out = generate(
        models.model,
        ids.to(models.place),
        mask.to(models.place) if len(set(lengths)) > 1 else None,
        n,
        logits_processor=[Forced(tokens, ids.shape[1])],
        **options,
    )
    assert torch.equal(out.sequences.cpu(), torch.cat([ids, tokens], 1))
    assert isinstance(out.past_key_values, leank.LeanKCache)
    got = torch.stack(out.logits, 1)
    real = torch.cat([mask, torch.ones_like(tokens)], 1)[:, :-1]
    models.assert_rule(got, out.sequences.cpu()[:, :-1], real, ids.shape[1], str(lengths))
    return out


@torch.no_grad()
def forward(models, ids, cache, real=None):
    """Return the logits of a call; `real` covers all columns."""
    call = {}
    if real is not None:
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        call = {"attention_mask": real, "position_ids": position}
    call = {name: x.to(models.place) for name, x in call.items()}
    return models.model(ids.to(models.place), past_key_values=cache, **call).logits


def filled(models, lengths=(80, 12, 25), max_cache_len=100):
    """Return a cache with a left-padded prompt, its ids and its mask."""
    ids, real = prompts(list(lengths))
    cache = leank.make_cache(models.model, max_cache_len=max_cache_len)
    forward(models, ids, cache, real)
    return cache, ids, real


def steps(models, cache, ids, real, new, n_prompt=80):
    """Go on column by column, where new [B, T] is 0 for padding, and compare with the rule."""
    n = ids.shape[1]
    ids, real = torch.cat([ids, new], 1), torch.cat([real, (new > 0).long()], 1)
    got = [
        forward(models, ids[:, i : i + 1], cache, real[:, : i + 1]) for i in range(n, ids.shape[1])
    ]
    models.assert_rule(torch.cat(got, 1), ids, real, n_prompt)
    cache.check()
    return ids, real
