"""What each of two processes does in test_devices.py: patch the share that it has of a model.

``run_two("-m", "tests.tensor_parallel", folder)`` reads the models in the folder and writes what
process r got to ``<r>.pt``.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import leank
from leank.models import inspect_learnable

from .tiny_models import generate, prompts

FAMILIES = ("llama", "phi3", "gemma2")  # the plan of Phi-3 gathers K; Gemma 2 has sliding layers
LENGTHS = [45, 21]
CASES = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 17},
    "static": {"cache_implementation": "static"},
}


def answers(model):
    """Return what all cases give; prompt lookup and a second turn of "greedy", too."""
    ids, mask = prompts(LENGTHS)
    outs = {name: generate(model, ids, mask, 8, **options) for name, options in CASES.items()}
    first = outs["greedy"]
    more = torch.cat([first.sequences, prompts([6, 6], seed=2)[0]], 1)
    mask = torch.cat([mask, torch.ones(2, 14, dtype=torch.long)], 1)
    cache = first.past_key_values
    outs["again"] = generate(model, more, mask, 8, past_key_values=cache)
    outs["lookup"] = generate(
        model, ids[:1] % 11 + 3, n=20, prompt_lookup_num_tokens=5, max_matching_ngram_size=1
    )
    return {name: {"sequences": out.sequences, "logits": out.logits} for name, out in outs.items()}


def load(path):
    """Load this process's share of a model."""
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").eval()


def message(call, *args):
    """Return the error of a call that is refused."""
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{args} were not refused")


def run(folder, name):
    model, mask = load(folder / name), leank.ChannelMask.load(folder / f"{name}.safetensors")
    before = answers(model)
    with leank.patch(model, folder / f"{name}.safetensors") as handle:
        got = {"outs": answers(model), "shape": tuple(handle.mask.keep.shape)}
        cache = leank.make_cache(model)
        model(prompts([640])[0], past_key_values=cache)  # autograd looks on
        got["memory"], got["predicted"] = cache.memory(), handle.mask.predict_memory([640])
    after = answers(model)
    for case, out in before.items():
        assert all(map(torch.equal, out["logits"], after[case]["logits"])), f"unpatched: {case}"
    keep = mask.keep[:, :1]
    got["refused"] = {
        "share of a mask": message(leank.patch, model, leank.ChannelMask(keep, sink=3, recent=5)),
        "learn": message(inspect_learnable, model),
    }
    model._device_mesh = init_device_mesh("cpu", (2,))  # as older versions of transformers have it
    with leank.patch(model, mask) as handle:
        assert tuple(handle.mask.keep.shape) == got["shape"]
    return got


def main(folder):
    got = {name: run(folder, name) for name in FAMILIES}
    mask = leank.ChannelMask.dense(3, 3, 16, sink=3, recent=5)
    got["uneven"] = message(leank.patch, load(folder / "uneven"), mask)
    torch.save(got, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
