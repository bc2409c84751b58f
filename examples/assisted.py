"""Prompt lookup with a pruned K cache, token for token as greedy: python examples/assisted.py."""

import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import leank
from leank.smollm2 import model_path

path = model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)

lines = [f"On day {i} the boat came back at {i % 12 + 1} with fish." for i in range(1, 120)]
text = "\n".join([*lines, *lines[:10], "On day 11"])  # what follows stands further up
inputs = tokenizer(text, return_tensors="pt")
settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}


def run(name, **drafts):
    """Generate and print the speed; returns the new text."""
    start = time.perf_counter()
    model.generate(**inputs, **settings | {"max_new_tokens": 1, "min_new_tokens": 1})
    prompt_s = time.perf_counter() - start  # not what drafts make faster
    start = time.perf_counter()
    out = model.generate(**inputs, **settings, **drafts)
    n_tokens = out.shape[1] - inputs.input_ids.shape[1]
    decode_s = time.perf_counter() - start - prompt_s
    print(f"{name}: {(n_tokens - 1) / decode_s:.1f} tokens per second after the prompt")
    return tokenizer.decode(out[0, -n_tokens:])


with leank.patch(model, "smollm2-135m-instruct-70"):
    greedy = run("greedy       ")
    assisted = run("prompt lookup", prompt_lookup_num_tokens=16)
print(assisted)
print("the same text" if assisted == greedy else f"but greedy says: {greedy}")
