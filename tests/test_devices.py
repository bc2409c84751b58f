"""Models in several places: tensor parallelism over processes, and accelerate's hooks."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from . import tensor_parallel  # noqa: E402
from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import traces  # noqa: E402
from .processes import run_two  # noqa: E402
from .tiny_models import (  # noqa: E402
    assert_same,
    generate,
    logits,
    oracle,
    prompts,
    pruned,
    tiny,
    wide,
)

# ------------------------------------------------------------------------------ tensor parallelism


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Return what each of two processes got, by its number."""
    folder = tmp_path_factory.mktemp("models")
    for name in tensor_parallel.FAMILIES:
        model = FAMILIES[name].make()
        model.save_pretrained(folder / name)
        mask_for(inspect_structure(model)).save(folder / f"{name}.safetensors")
    odd = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    FAMILIES["llama"].make(**odd).save_pretrained(folder / "uneven")
    run_two("-m", "tests.tensor_parallel", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", tensor_parallel.FAMILIES)
def test_two_processes_equal_the_rule(together, name):
    """Two of the ranks' layers have nothing but an empty head."""
    model = FAMILIES[name].make()
    mask, outs = mask_for(inspect_structure(model)), []
    for one in (model, wide(model)):
        with oracle(one, mask, max(tensor_parallel.LENGTHS)):
            outs.append(tensor_parallel.answers(one))
    plain, truth = outs
    for rank in (0, 1):
        for case, out in together[rank][name]["outs"].items():
            results = (types.SimpleNamespace(**x) for x in (out, truth[case], plain[case]))
            assert_same(*results, f"rank {rank}, {case}")


def test_each_process_has_its_own_heads(together):
    for name, n_heads in {"llama": 1, "phi3": 2, "gemma2": 1}.items():
        model = FAMILIES[name].make()
        mask = mask_for(inspect_structure(model))
        with leank.patch(model, mask):
            cache = leank.make_cache(model)
            with torch.no_grad():
                model(prompts([640])[0], past_key_values=cache)
        alone = cache.memory()["total_bytes"]
        got = [together[rank][name] for rank in (0, 1)]
        assert [x["shape"] for x in got] == [(len(mask.keep), n_heads, mask.head_dim)] * 2
        used = [x["memory"]["total_bytes"] for x in got]
        assert used == [x["predicted"]["total_bytes"] for x in got]
        assert sum(used) == alone if n_heads == 1 else used == [alone, alone]


def test_refused_in_both_processes(together):
    for got in together:
        assert "model: expected one that reads two tokens" in got["uneven"]
        for name in tensor_parallel.FAMILIES:
            refused = got[name]["refused"]
            assert refused["share of a mask"].startswith("mask: expected (")
            assert ", got (" in refused["share of a mask"]
            assert "model: learning a mask expects" in refused["learn"]
        assert got["llama"]["refused"]["learn"].endswith("weights cut by tensor parallelism")


@pytest.mark.parametrize("name", ["pp", "fsdp"])
def test_other_parallelism_is_refused(name):
    model, sizes = tiny(), {"pp": 1, "fsdp": 1, "tp": 2} | {name: 2}
    model._device_mesh = types.SimpleNamespace(mesh_dim_names=[*sizes], shape=[*sizes.values()])
    message = f"model: expected tensor parallelism or none, .* got {name}=2$"
    with pytest.raises(ValueError, match=message):
        leank.patch(model, pruned())


# --------------------------------------------------------------------------------- accelerate


def dispatched(folder, disk):
    """Return the tiny model with hooks, which read the parts in `disk` in each forward."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    parts = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places |= dict.fromkeys(disk, "disk")
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize(
    "disk",
    [
        [],
        ["model.layers.1", "model.layers.2"],
        ["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"],
    ],
)
def test_hooks_and_layers_on_disk(tmp_path, disk):
    ids, mask = prompts([60, 23])
    with leank.patch(tiny(), pruned()) as handle:
        expected = generate(handle.model, ids, mask)
    model = dispatched(tmp_path, disk)
    assert ("meta" in {p.device.type for p in model.parameters()}) == bool(disk)
    before = traces(model)
    with leank.patch(model, pruned()):
        for options in ({}, {"num_beams": 2}):
            out = generate(model, ids, mask, **options)
            assert isinstance(out.past_key_values, leank.LeanKCache)
            if not options:
                np.testing.assert_array_equal(logits(out), logits(expected))
    assert traces(model) == before


def test_gpus_beside_the_cpu_are_refused():
    """Where modules compute counts, not where accelerate keeps their weights."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cuda", 1))
    message = r"model: expected all weights on the CPU, or all .*, got \['cpu', 'cuda:1'\]"
    with pytest.raises(ValueError, match=message):
        leank.patch(model, pruned())
    with pytest.raises(ValueError, match=r"model: expected all weights .*, got \['meta'\]"):
        leank.patch(tiny().to("meta"), pruned())
