"""Run a task file of lm_eval on a patched model: python examples/lm_eval_harness.py task.yaml.

Needs lm_eval (pip install lm_eval). Without a file it makes a small task itself. What generates
prunes; log-likelihoods are of forwards without a cache, so they are those of the dense model.
"""

import json
import sys
import tempfile
from pathlib import Path

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    sys.exit(f"{error}: pip install lm_eval")
from transformers import AutoModelForCausalLM, AutoTokenizer

import leank
from leank.smollm2 import model_path

TASK = """task: boat_house
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}} On day"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def make_task(folder):
    """Write a task in which a regular text goes on, longer than the window; return its file."""
    folder = Path(folder)
    lines = [f"On day {i} the boat came back at {i % 12 + 1} with fish." for i in range(1, 200)]
    docs = [
        {
            "text": " ".join(lines[: n - 1]),
            "answer": f" {n} the boat came back at {n % 12 + 1} with fish",
        }
        for n in (60, 70)
    ]
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    path = folder / "boat_house.yaml"
    path.write_text(TASK.format(data=data))
    return path


def evaluate(model, tokenizer, path):
    """Return the results of a task file."""
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    lm = HFLM(model, tokenizer=tokenizer, batch_size=1)
    out = simple_evaluate(lm, tasks=[path.stem], task_manager=manager, bootstrap_iters=0)
    found = out["results"][path.stem]
    return {k: float(v) for k, v in found.items() if "," in k and "stderr" not in k}


folder = model_path()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
with tempfile.TemporaryDirectory() as made:
    path = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else make_task(made)
    with leank.patch(model, "smollm2-135m-instruct-70"):
        print("pruned:", evaluate(model, tokenizer, path))
    print("dense: ", evaluate(model, tokenizer, path))
