"""A tiny model with a tokenizer of characters, a little text, and options of a run of seconds."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import leank

from .tiny_models import VOCAB, tiny

WORDS = "the cat sat on a mat and saw how the moon went over hills while rain fell in town".split()
OPTIONS = {
    "sink": 4,
    "recent": 60,
    "stage1_steps": 6,
    "stage2_steps": 6,
    "validate_every": 2,
    "batch_size": 2,
    "n_validation": 4,
    "n_test": 3,
    "lr": 0.1,
    "stage2_lr": 0.05,
    "lengths": (260, 300),
    "kinds": ("single", "continuation"),
    "seed": 3,
}


def character_tokenizer(extra=0):
    """Make a tokenizer of VOCAB single characters, and `extra` tokens more."""
    letters = ["<unk>", "\n", *map(chr, range(32, 127))][:VOCAB]
    letters += [f"<{i}>" for i in range(extra)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def write_text(path, seed=0):
    """Write 45 kB of sentences, none of which is like another."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(500):
        lines.append(" ".join(rng.choice(WORDS, 15)) + f" {rng.integers(10**9)} times.")
        lines += [""] * (i % 5 == 4)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_model(folder, **options):
    """Save the tiny model with its tokenizer; return the folder."""
    tiny(**options).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def learn(text, ratio=0.5, align=8, model=None, **options):
    """Learn a mask for the tiny model from a text file."""
    options = OPTIONS | {"text": (text,)} | options
    return leank.learn(model or tiny(), character_tokenizer(), ratio, align, **options)
