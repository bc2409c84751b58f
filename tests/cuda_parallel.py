"""What each of two processes does in test_cuda_generate.py: decode with its share on its own GPU.

``run_two("-m", "tests.cuda_parallel", folder)`` reads the model and the mask in the folder and
writes what process r got to ``<r>.pt``.
"""

import faulthandler
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import leank

from .cuda_model_tools import WINDOW, Forced, draw
from .tiny_models import generate, prompts

LENGTHS, N_NEW = [80, 12], 12
WAYS = {"greedy": {}, "lookup": {"prompt_lookup_num_tokens": 3}}


def main(folder):
    faulthandler.dump_traceback_later(100, exit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", tp_plan="auto", dtype=torch.bfloat16
    ).eval()
    rank, got = torch.distributed.get_rank(), {}
    with leank.patch(model, folder / "mask.safetensors", **WINDOW) as handle:
        for name, options in WAYS.items():
            n_rows = 1 if name == "lookup" else 2  # transformers drafts for one row
            ids, mask = (x[:n_rows] for x in prompts(LENGTHS))
            tokens = draw(n_rows, N_NEW)
            out = generate(
                model,
                ids.to(model.device),
                mask.to(model.device),
                N_NEW,
                logits_processor=[Forced(tokens, ids.shape[1])],
                **options,
            )
            stores = [layer.store for layer in out.past_key_values.packed]
            got[name] = {
                "logits": torch.stack(out.logits, 1).cpu(),
                "sequences": out.sequences.cpu(),
                "heads": {store.n_heads for store in stores},
                "device": {str(store.device) for store in stores},
            }
    assert len(handle.gpus()) == 1
    torch.save(got, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
