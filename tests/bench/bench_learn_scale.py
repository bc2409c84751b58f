"""Learn a mask for an 8B-shaped model with random weights at 32k tokens: step time and memory.

python -m tests.bench.bench_learn_scale TOKENIZER
torchrun --standalone --nproc-per-node 2 -m tests.bench.bench_learn_scale TOKENIZER
python -m tests.bench.bench_learn_scale TOKENIZER --split

TOKENIZER is a folder with a tokenizer of at most 128,256 tokens. Each process reads `--rows`
samples in a step: the speed-up of two GPUs is the time per sample of one over that of two. With
--split one process has the layers spread over all GPUs. A step's time runs from its end to that of
the one before; the first step of each stage and those with a validation do not count.
--shape tiny tries the script on a CPU.
"""

import argparse
import statistics
import time

import torch
import transformers

import leank
from leank.bench import machine
from leank.bench.random_models import SHAPES, draw_model
from leank.learning.parallel import find_world, local_rank
from leank.learning.run import Event


def make_model(args: argparse.Namespace, device: torch.device) -> transformers.PreTrainedModel:
    """Draw the weights, and spread the layers if they are to be."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = draw_model(args.shape, args.length, args.seed, device, dtype)
    return split(model) if args.split else model


def split(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Spread the layers evenly over all GPUs, as device_map="auto" would."""
    from accelerate import dispatch_model

    n_layers, n_gpus = model.config.num_hidden_layers, torch.cuda.device_count()
    places = {f"model.layers.{i}": i * n_gpus // n_layers for i in range(n_layers)}
    ends = {"model.norm": n_gpus - 1, "lm_head": n_gpus - 1}
    first = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    model = dispatch_model(model, first | places | ends, skip_keys="past_key_values")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(0)  # the whole model was there
    return model


class Clock:
    """Times of steps by stage, of the process that is told of them."""

    def __init__(self) -> None:
        self.begun = self.before = time.perf_counter()
        self.times: dict[int, list[float]] = {1: [], 2: []}

    def lap(self, what: str) -> None:
        """Print what took the time since the last lap."""
        now = time.perf_counter()
        if local_rank() == 0:
            print(f"{what}: {now - self.before:.1f} s", flush=True)
        self.before = now

    def __call__(self, event: Event) -> None:
        """Note the time of a step; its loss was read, so the GPU is done."""
        step, now = event.step, time.perf_counter()
        if event.n_done == 1:
            self.lap("data, and the first step")
        elif step.step > 0 and step.validation is None:
            self.times[step.stage].append(now - self.before)
        self.before = now


def describe(times: list[float], n_samples: int) -> str:
    """Return median and range of times, and the time per sample."""
    median = statistics.median(times)
    return (
        f"{median:.3f} s a step ({min(times):.3f} to {max(times):.3f}, n = {len(times)}), "
        f"{median / n_samples:.3f} s a sample"
    )


def main() -> None:
    """Draw, learn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=1, help="samples of a process in a step")
    parser.add_argument("--steps", type=int, default=10, help="of each stage, at least 3")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps: expected at least 3: the first and the last do not count")
    clock = Clock()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    world = find_world(device)
    if world.rank == 0:
        facts = machine.facts(device.type, args.seed)
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        print(f"{vars(args)}, {world.size} processes", flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    model = make_model(args, device)
    clock.lap("drawing the weights")
    n_samples = args.rows * world.size
    leank.learn(
        model,
        tokenizer,
        sink=64,
        recent=512,
        lengths=args.length,
        batch_size=n_samples,
        stage1_steps=args.steps,
        stage2_steps=args.steps,
        validate_every=args.steps,
        n_validation=1,
        n_test=0,
        chunk=args.chunk,
        progress=clock,
    )
    if world.rank == 0:
        for stage, times in clock.times.items():
            print(f"stage {stage}: {describe(times, n_samples)}")
        print(f"both: {describe(sum(clock.times.values(), []), n_samples)}")
        print(f"all: {time.perf_counter() - clock.begun:.1f} s")
    if device.type == "cuda":
        for gpu in range(torch.cuda.device_count()) if args.split else [device.index]:
            peak = torch.cuda.max_memory_allocated(gpu)
            print(f"process {world.rank}, GPU {gpu}: peak memory {peak / 2**30:.1f} GiB")
    world.leave()


if __name__ == "__main__":
    main()
