"""What tests of patched models share: forwards, a cache with a prompt in it, traces of a patch."""

import copy

import torch
from torch._dynamo.utils import counters

import leank

from .tiny_models import VOCAB, prompts

CACHE_NAMES = {"cache", "past_key_values"}  # of the argument: since 5.24, and before


def cache_of(arguments):
    """Return the cache among a model's arguments."""
    return next(arguments[name] for name in CACHE_NAMES & set(arguments))


@torch.no_grad()
def forward(model, ids, cache, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits


def filled(model, lengths=(40, 12, 25), seed=1):
    """Return a cache with a left-padded prompt, the mask of its columns, and ids to go on with."""
    ids, mask = prompts(list(lengths), seed=seed)
    cache = leank.make_cache(model)
    forward(model, ids, cache, mask)
    more = torch.randint(3, VOCAB, (len(lengths), 6), generator=torch.Generator().manual_seed(7))
    return cache, torch.cat([mask, torch.ones_like(more)], 1), more


def enable_checkpointing(model):
    """Turn gradient checkpointing on, by the name of this transformers."""
    name = "activation_checkpointing_enable"  # since 5.23
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def traces(model):
    """What a patch could leave behind: attributes and hooks of all modules, configs, the class."""
    seen = {}
    for name, module in model.named_modules():
        seen[name] = {
            key: (id(value), list(value) if isinstance(value, dict) else None)
            for key, value in module.__dict__.items()
        }
        seen[name + " class"] = type(module)
    seen["config"] = copy.deepcopy(model.config.__dict__)
    seen["generation config"] = copy.deepcopy(model.generation_config.__dict__)
    seen["class"] = {key: id(value) for key, value in vars(type(model)).items()}
    return seen


def word_tokenizer(shift=0):
    """Tokenizer of words t3, t4, ...; `shift` gives them other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    n_words = VOCAB - 3
    ids = {f"t{i}": (i - 3 + shift) % n_words + 3 for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "<unk>": 2} | ids, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def graphs(expected):
    """Require so many graphs so far, and that nothing was left out of them: see fresh_compiler."""
    assert counters["stats"]["unique_graphs"] == expected
    assert not counters["graph_break"]
