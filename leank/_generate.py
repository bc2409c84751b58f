"""The methods that ``generate`` meets on a patched model, in place of those of its class.

They give it a LeanKCache, announce the prompt, refuse what does not work with it, and say so when
an answer is dense. Each calls the class's method for the rest.
"""

from __future__ import annotations

import contextvars
import inspect
import warnings

import transformers
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from .cache import LeanKCache, patch_of
from .models import tensor_ranks

# What generate() calls the cache among a model's arguments: the one since 5.24, or the other.
_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"
# Without a GPU's memory to save, "offloaded" asks for what is done anyway.
_CACHES = (None, "dynamic", "offloaded", "static")
# Ways to draft that run some of the model's own layers, or need what they computed.
_DRAFTS = ("assistant_early_exit", "use_mtp", "speculation_type")
# How the class's versions of the methods in REPLACED must begin.
HOOKS = {
    "generate": ["self"],
    "_prepare_cache_for_generation": [
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ],
    "_prefill": ["self", "input_ids", "generation_config", "model_kwargs"],
    "_get_candidate_generator": [
        "self",
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
    ],
}


class _Call:
    """What is known about the generate() call that runs."""

    def __init__(self, model=None) -> None:
        self.model = model
        self.prepared = False
        self.dense = ""  # why the answer is dense
        self.cache: LeanKCache | None = None
        self.is_assistant = False
        self.gpus: list[int] = []
        self.n_columns = 0  # in the cache before the call


_current: contextvars.ContextVar[_Call | None] = contextvars.ContextVar(
    "leank_generate", default=None
)


def _generate(self, *args, **kwargs):
    """As the class's ``generate``, and certain that the pruned cache was used."""
    call, outer = _Call(self), _current.get()
    token = _current.set(call)
    try:
        result = type(self).generate(self, *args, **kwargs)
    finally:
        _current.reset(token)
    # By any layer: one that attends by itself would be dense, and no other would show it.
    unused = call.cache is not None and call.n_columns in call.cache.counts()
    if not call.prepared or unused:
        missed = "use the model's cache" if call.prepared else "ask the model for its cache"
        raise RuntimeError(
            f"generate: transformers {transformers.__version__} did not {missed}, so the answer "
            "would be a dense one; leank.unpatch(model) to get it"
        )
    if outer is not None and outer.model is self:
        outer.prepared = True  # by this call, which is the whole work of a custom_generate recipe
    if call.cache is not None:
        call.cache.check()
        if not call.is_assistant:
            call.cache.stop_past_recording()  # nothing in transformers does
    if call.dense:
        # From here, so that the line that is named is the user's.
        warnings.warn(
            f"generate() on a model patched by LeanK ran dense, without pruning: {call.dense}",
            UserWarning,
            stacklevel=2,
        )
    return result


def _prepare_cache(
    self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
):
    """Put a LeanKCache where the class would put a DynamicCache."""
    call = _current.get() or _Call()
    call.prepared = True
    handle = patch_of(self)
    given = model_kwargs.get(_CACHE)
    if given is not None and not isinstance(given, LeanKCache):
        call.dense = f"past_key_values is a {type(given).__name__}, not a LeanKCache"
    elif given is None and generation_config.use_cache is False:
        call.dense = "use_cache is False"
    else:
        _refuse(generation_config)
        gpus = call.gpus = handle.gpus()
        if gpus:
            _refuse_on_gpu(generation_config)
        # Graphs end where layers change their GPU; with tensor parallelism they are untried.
        if len(gpus) > 1 or (gpus and tensor_ranks(self)[1] > 1):
            generation_config.disable_compile = True
        call.is_assistant = generation_config.is_assistant
        if given is None:
            if gpus or generation_config.cache_implementation == "static":
                n_columns = max(max_cache_length, generation_config.max_cache_len or 0)
                if not (gpus and generation_config.disable_compile):  # else no graph is reused
                    n_columns = max(n_columns, handle.max_cache_len or 0)
                    handle.max_cache_len = n_columns
                call.cache = handle.make_cache(n_columns)
            else:
                call.cache = handle.make_cache()
            model_kwargs[_CACHE] = call.cache
            if call.is_assistant:
                call.cache.activate_past_recording()
            return None
        if generation_config.use_cache is False:
            raise ValueError("use_cache: expected True with a LeanKCache, got False")
        handle.check_cache(given, gpus)
        if not call.is_assistant:
            given.stop_past_recording()
        call.cache, call.n_columns = given, given.n_columns
    return type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )


def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
    """Announce the prompt, which is known here before it is cut into chunks."""
    handle = patch_of(self)
    _announce(input_ids, model_kwargs, cut=handle.prefill == "pruned")
    before = generation_config.disable_compile
    call = _current.get()
    if handle.gpus() if call is None else call.gpus:
        generation_config.disable_compile = True  # its chunks: a graph there takes one token
    try:
        return type(self)._prefill(
            self, input_ids, generation_config, model_kwargs, *args, **kwargs
        )
    finally:
        generation_config.disable_compile = before


def _candidate_generator(
    self,
    generation_config,
    input_ids,
    inputs_tensor,
    logits_processor,
    model_kwargs,
    *args,
    **kwargs,
):
    """Announce the prompt of assisted generation, whose first forward brings drafts with it."""
    _announce(input_ids, model_kwargs)
    cache, mask = (model_kwargs.get(name) for name in (_CACHE, "attention_mask"))
    n_mask = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if isinstance(cache, LeanKCache) and cache.get_seq_length() and n_mask == input_ids.shape[1]:
        raise ValueError(
            f"input_ids: expected only those after the {cache.get_seq_length()} columns of "
            "past_key_values, with an attention_mask over all of them, since assisted generation "
            f"feeds again what a cache holds; got {input_ids.shape[1]} and a mask over as many"
        )
    return type(self)._get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        *args,
        **kwargs,
    )


def _announce(input_ids, model_kwargs, cut: bool = False) -> None:
    """Announce the prompt to an empty LeanKCache, unless its first chunk alone is to be dense."""
    cache = model_kwargs.get(_CACHE)
    if not isinstance(cache, LeanKCache) or cache.get_seq_length():
        return
    prompt = model_kwargs.get("inputs_embeds")
    n_columns = (input_ids if prompt is None else prompt).shape[1]
    if n_columns == 0:
        raise ValueError("generate: expected a prompt of at least one token, got none")
    if cut:
        return
    announced = cache.packed[0].prompt_columns
    if announced not in (None, n_columns):
        raise ValueError(
            f"generate: expected a prompt of {announced} columns, as announced by "
            f"cache.expect_prompt, got {n_columns}; cache.reset() forgets the announcement"
        )
    cache.expect_prompt(n_columns)


def _create_masks(self, **kwargs):
    """Make the masks of a step on a GPU with one copy, where transformers takes many operations."""
    cache, mask = kwargs.get(_CACHE), kwargs.get("attention_mask")
    wide = None
    if isinstance(cache, LeanKCache):
        wide = cache.step_mask(kwargs["inputs_embeds"].shape[1], mask)
    if wide is None:
        return create_masks_for_generate(**kwargs)
    kinds = getattr(kwargs["config"].get_text_config(), "layer_types", None)
    return wide if kinds is None else dict.fromkeys(kinds, wide)


def _init_continuous_batching(self, *args, **kwargs):
    raise NotImplementedError(
        "continuous batching: not supported on a patched model; call leank.unpatch(model) first"
    )


REPLACED = {
    "generate": _generate,
    "_prepare_cache_for_generation": _prepare_cache,
    "_prefill": _prefill,
    "_get_candidate_generator": _candidate_generator,
    "init_continuous_batching": _init_continuous_batching,
}

# What generate() has a function for, unless the model has its own.
ADDED = {"create_masks_for_generate": _create_masks}


def _refuse(generation_config) -> None:
    """Raise for what generate() can do, but not with a LeanKCache."""
    for name in _DRAFTS:
        value = getattr(generation_config, name, None)
        if value not in (None, False):
            raise NotImplementedError(
                f"{name}: expected None on a patched model, which drafts by "
                f"prompt_lookup_num_tokens or with an assistant_model, got {value!r}"
            )
    kind = generation_config.cache_implementation
    if kind not in _CACHES:
        raise NotImplementedError(
            f"cache_implementation: expected one of {', '.join(map(repr, _CACHES))} on a patched "
            f"model, got {kind!r}"
        )
    if generation_config.guidance_scale not in (None, 1):
        raise NotImplementedError(
            "guidance_scale: expected None or 1 on a patched model, whose second, unconditional "
            f"cache would not be pruned, got {generation_config.guidance_scale}"
        )
    if generation_config.output_attentions:
        raise NotImplementedError(
            "output_attentions: expected False on a patched model, which never forms the weights"
        )


def _refuse_on_gpu(generation_config) -> None:
    """Raise for what needs a cache that grows, or one that moves."""
    what = (
        ("is_assistant", generation_config.is_assistant),
        ("cache_implementation", generation_config.cache_implementation == "offloaded"),
    )
    for name, got in what:
        if got:
            raise NotImplementedError(
                f"{name}: expected none on a GPU, where a cache has a fixed length and stays; the "
                "CPU does it"
            )
