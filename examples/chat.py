"""Chat about a text on one pruned cache, words as they come: python examples/chat.py."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import leank
from leank.smollm2 import model_path

path = model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

lines = [f"On day {i} the boat came back at {i % 12 + 1} with fish." for i in range(1, 120)]
lines[40] = "The key of the boat house hangs behind the green door."
chat = [{"role": "system", "content": "Answer from this log.\n" + "\n".join(lines)}]
seen = torch.empty(0, dtype=torch.long)  # the tokens that the cache holds

with leank.patch(model, "smollm2-135m-instruct-70"):
    cache = leank.make_cache(model)
    print("Ask about the log of a boat, such as where a key hangs; an empty line ends.")
    while text := sys.stdin.readline().strip():
        chat.append({"role": "user", "content": text})
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        # The template may write an answer in other tokens than it came in: keep what is the same.
        new, n = inputs["input_ids"][0], min(len(seen), inputs["input_ids"].shape[1])
        n_same = int((seen[:n] == new[:n]).cumprod(0).sum())
        cache.crop(n_same - len(seen))
        ids = model.generate(
            **inputs, past_key_values=cache, streamer=streamer, max_new_tokens=48, do_sample=False
        )[0]
        seen = ids[: cache.get_seq_length()]
        answer = tokenizer.decode(ids[len(new) :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": answer})

total = leank.memory_report(cache).total
print(f"{len(seen)} tokens: {total.total_bytes:,} bytes, dense {total.dense_bytes:,}")
