"""Generate with a pruned K cache and with a dense one: python examples/generate.py."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import leank
from leank.smollm2 import model_path

path = model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)

lines = [f"On day {i} the boat came back at {i % 12 + 1} with fish." for i in range(1, 120)]
lines[40] = "The key of the boat house hangs behind the green door."
question = "Where does the key of the boat house hang?"
chat = [{"role": "user", "content": "\n".join([*lines, question])}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}


def answer():
    """Return the new text and the cache."""
    out = model.generate(**inputs, **settings)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), out.past_key_values


with leank.patch(model, "smollm2-135m-instruct-70"):
    text, cache = answer()
print("pruned:", text, f"({cache.memory()['total_bytes']:,} bytes)")
text, cache = answer()
dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
print("dense: ", text, f"({dense_bytes:,} bytes)")
