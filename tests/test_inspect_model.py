"""What models tell of their heads: pairs that turn together, and attention to the middle."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
import transformers  # noqa: E402

from leank import ChannelMask, model_inspection  # noqa: E402
from leank.inspection import Inspection  # noqa: E402
from leank.model_inspection import inspect_mask, middle_mass, rotary_of  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES  # noqa: E402
from .hf_tools import traces, word_tokenizer  # noqa: E402
from .test_inspect import leank_cli  # noqa: E402
from .tiny_models import RECENT, SINK, VOCAB, D, pruned, tiny, wide  # noqa: E402

WINDOW = {"sink": SINK, "recent": RECENT}
# Pairs of all families but these are (c, c + D / 2).
NO_ROTARY = {"gpt2", "jamba", "granite hybrid", "nemotron_h", "zamba", "zamba2"}
PARTIAL = {"gpt_neox": 4, "qwen3_next": 4, "qwen3_5": 4, "bamba": 8}
REFUSED = {"falcon", "falcon new"}


def ids(n_tokens=40, n_rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (n_rows, n_tokens), generator=generator)


def turned_by(model):
    """Pairs of channels that a turn of the model's own K mixes, found by differences in layer 0.

    Two equal tokens have equal K before the turn. After it, what a pair's first channel loses in
    squares, the second one gains.
    """
    seen = {}

    def record(module, query, key, value, mask, **kwargs):
        seen.setdefault(module.layer_idx, key.detach().double())
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("test_record", record)
    before = model.config._attn_implementation
    model.config._attn_implementation = "test_record"
    try:
        with torch.no_grad():
            model(torch.full((1, 2), 5), position_ids=torch.tensor([[0, 3]]), use_cache=False)
    finally:
        model.config._attn_implementation = before
    k = seen[0][0, 0]
    change = (k[1] ** 2 - k[0] ** 2).numpy()
    pairs = set()
    for c in np.flatnonzero(np.abs(change) > 1e-9 * float((k**2).max())):
        partner = int(np.abs(change + change[c]).argmin())
        assert abs(change[partner] + change[c]) < 1e-6 * abs(k**2).max()
        pairs.add((min(c, partner), max(c, partner)))
    return sorted((int(a), int(b)) for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "cohere"])
def test_pairs_are_those_that_the_model_turns(name):
    model = FAMILIES[name].make()
    found = rotary_of(model).pairs
    assert sorted(map(tuple, found.tolist())) == turned_by(wide(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = FAMILIES[name].make()
    layout = inspect_structure(model)
    found = rotary_of(model)
    n = 0 if name in NO_ROTARY else PARTIAL.get(name, layout.head_dim)
    pairs = np.arange(n).reshape(-1, 2) if name == "cohere" else np.arange(n).reshape(2, n // 2).T
    assert found.pairs.tolist() == pairs.tolist()
    assert found.without == ((1,) if name == "smollm3" else ())
    if name in REFUSED:
        with pytest.raises(ValueError, match="attention interface in one process, got Falcon"):
            middle_mass(model, ids(), **WINDOW)
        return
    mass = middle_mass(model, ids(), **WINDOW)
    assert mass.shape == (layout.n_layers - len(layout.outside), 4)
    assert (mass > 0).all() and (mass < 1).all()


def test_layers_with_full_attention_that_do_not_turn():
    sizes = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB)
    config = transformers.Cohere2Config(
        **sizes,
        intermediate_size=32,
        num_hidden_layers=3,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    model = transformers.Cohere2ForCausalLM(config).eval()
    assert rotary_of(model).without == (2,)
    keep = np.ones((3, 1, 16), bool)
    found = inspect_mask(ChannelMask(keep), model)
    assert found.layers == [2] and not found.turned.any() and found.low_half is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen2 sliding", "granite"])
def test_mass_is_that_of_the_weights(name, monkeypatch):
    model = FAMILIES[name].make()
    tokens = ids(30)
    eager = wide(model)
    eager.set_attn_implementation("eager")
    if getattr(eager.config, "_experts_implementation", None) is not None:
        eager.set_experts_implementation("eager")  # the default knows no float64
    with torch.no_grad():
        weights = eager(tokens, output_attentions=True, use_cache=False).attentions
    outside = inspect_structure(model).outside
    truth = []
    for layer, w in enumerate(weights):
        if layer in outside:
            continue
        total = torch.zeros(w.shape[1], dtype=torch.float64)
        for p in range(SINK + RECENT, 30):
            total += w[:, :, p, SINK : p - RECENT + 1].sum((0, 2))
        truth.append((total / (2 * (30 - SINK - RECENT))).numpy())
    np.testing.assert_allclose(middle_mass(model, tokens, **WINDOW), truth, rtol=0, atol=2e-6)
    # Queries come one by one where memory allows no more.
    monkeypatch.setattr(model_inspection, "_SCORES", 1)
    np.testing.assert_allclose(middle_mass(model, tokens, **WINDOW), truth, rtol=0, atol=2e-6)


def test_no_array_grows_with_the_square(monkeypatch):
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, d: sizes.append(x.numel()) or softmax(x, d))
    monkeypatch.setattr(model_inspection, "_SCORES", 8 * 200 * 4)
    middle_mass(tiny(), ids(200, 1), **WINDOW)
    assert max(sizes) <= 8 * 200 * 4 and len(sizes) == 3 * 48


def test_a_streaming_head_shows():
    """A head whose queries are zero attends evenly; one that adds a sharp last key does not."""
    model = tiny()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight[: 4 * D] = 0
    mass = middle_mass(model, ids(60), **WINDOW)
    p = np.arange(SINK + RECENT, 60)
    even = ((p - RECENT + 1 - SINK) / (p + 1)).mean()
    np.testing.assert_allclose(mass[:, :4], even, rtol=1e-5)
    assert (np.abs(mass[:, 4:] - even) > 1e-3).all()


def test_the_model_stays_as_it_was():
    model = tiny()
    model.train()
    before = traces(model)
    middle_mass(model, ids(), **WINDOW)
    assert traces(model) == before and model.training
    model.model.layers[1].self_attn.forward = None
    before = traces(model)
    with pytest.raises(ValueError):
        middle_mass(model, ids(), **WINDOW)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink": -1}, "sink: expected at least 0, got -1"),
        ({"recent": 0}, "recent: expected at least 1, got 0"),
        ({"recent": 37}, r"ids: expected \(B, L\) of more tokens than the window of 3 \+ 37"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        middle_mass(tiny(), ids(), **WINDOW | options)


def test_what_is_no_number_is_refused():
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="expected finite attention, got NaN in LlamaForCausalLM"):
        middle_mass(model, ids(), **WINDOW)


def test_another_threads_model_is_refused():
    model = tiny()
    middle_mass(model, ids(), **WINDOW)  # registers
    model.config._attn_implementation = "leank_mass_sdpa"
    with pytest.raises(RuntimeError, match="another thread measures a model"):
        model(ids())


def test_a_mask_and_its_model():
    model, tokens = tiny(), ids()
    found = inspect_mask(pruned(), model, tokens)
    np.testing.assert_array_equal(found.mass, middle_mass(model, tokens, **WINDOW))
    plain = Inspection(pruned()).as_json()
    assert found.as_json() | {"mass": None, "heads": None} == plain | {"heads": None}
    with pytest.raises(ValueError, match=r"mask: expected \(3, 2, 16\) \[layers, kv_heads"):
        inspect_mask(ChannelMask.dense(3, 2, 8), model)
    with pytest.raises(ValueError, match="mask: expected a known window beside ids"):
        inspect_mask(ChannelMask.dense(3, 2, 16), model, tokens)


# -------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer, a mask for it, and a text."""
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    pruned().save(folder / "mask.safetensors")
    words = np.random.default_rng(0).integers(3, VOCAB, 300)
    (folder / "text.txt").write_text(" ".join(f"t{i}" for i in words), encoding="utf-8")
    return folder


def test_inspect_with_a_model_and_text(folder):
    words = [folder / "mask.safetensors", "--model", folder, "--text", folder / "text.txt"]
    result = leank_cli("inspect", *words, "--tokens", 100, "--json")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    tokens = word_tokenizer()((folder / "text.txt").read_text(), return_tensors="pt").input_ids
    mass = middle_mass(tiny(), tokens[:, :100], **WINDOW)
    got = np.array([head["mass"] for head in line["heads"]]).reshape(mass.shape)
    np.testing.assert_allclose(got, mass, rtol=1e-6)
    assert line["n_queries"] == 100 - SINK - RECENT
    result = leank_cli("inspect", *words)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    words = " ".join(result.stdout.split())
    assert "mean over 292 queries" in words and "Rank correlation of middle" in words


def test_inspect_with_a_model_needs_no_weights(folder, tmp_path):
    for name in ("config.json", "mask.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    result = leank_cli("inspect", tmp_path / "mask.safetensors", "--model", tmp_path)
    assert result.exit_code == 0, result.output


def test_mistakes_are_one_line(folder, tmp_path):
    mask, model, text = folder / "mask.safetensors", folder, folder / "text.txt"
    pruned_at = tmp_path / "short.txt"
    pruned_at.write_text("t3 t4")
    ChannelMask.dense(3, 2, 8, **WINDOW).save(tmp_path / "other.safetensors")
    ChannelMask.dense(3, 2, 16).save(tmp_path / "unknown.safetensors")
    for words, message in (
        ([mask, "--model", tmp_path / "no"], "model: "),
        ([tmp_path / "other.safetensors", "--model", model], "mask: expected (3, 2, 16)"),
        (
            [tmp_path / "unknown.safetensors", "--model", model, "--text", text],
            "mask: the file does not say its window; give --sink and --recent",
        ),
        ([mask, "--model", model, "--text", tmp_path / "no"], "text: expected a UTF-8 text file"),
        ([mask, "--model", model, "--text", pruned_at], "text: expected more tokens than the"),
        (
            [mask, "--model", model, "--text", text, "--tokens", 1025],
            "tokens: expected at most the model's context of 1024, got 1025",
        ),
    ):
        result = leank_cli("inspect", *words)
        assert result.exit_code == 2, message
        assert result.stderr.startswith(f"leank inspect: {message}"), result.stderr
        assert result.stderr.count("\n") == 1
