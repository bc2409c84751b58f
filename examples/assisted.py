"""Prompt lookup with a pruned K cache gives greedy's text: python examples/assisted.py."""

import time

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import leank
from leank.smollm2 import model_path


class Clock(BaseStreamer):
    """Notes when tokens come, and how many: the prompt, then those of each forward."""

    def __init__(self):
        self.ticks = []

    def put(self, tokens):
        self.ticks.append((time.perf_counter(), tokens.numel()))

    def end(self):
        pass

    def report(self):
        (start, _), *ticks = self.ticks[1:]  # from the first new token on: not the prompt
        n_tokens = sum(n for _, n in ticks)
        speed = n_tokens / (ticks[-1][0] - start)
        return f"{speed:.1f} tokens per second, {n_tokens / len(ticks):.1f} per forward"


path = model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)

lines = [f"On day {i} the boat came back at {i % 12 + 1} with fish." for i in range(1, 120)]
text = "\n".join([*lines, *lines[:10], "On day 11"])  # what follows stands further up
inputs = tokenizer(text, return_tensors="pt")
lookup = {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 6}


def answer(**options):
    """Return the new text and the clock."""
    clock = Clock()
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False, streamer=clock, **options)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :]), clock


with leank.patch(model, "smollm2-135m-instruct-70"):
    greedy, clock = answer()
    print("greedy:       ", clock.report())
    text, clock = answer(**lookup)
    print("prompt lookup:", clock.report())
print("the same text:" if text == greedy else "other texts:", repr(text))
