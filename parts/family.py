"""Which families of models are honoured: what a model's configuration says about it.

Sampling and scoring read a model in one way: causal attention over all earlier tokens, a cache of
keys and values and nothing else, a position for every token, and a head that is one matrix. A
family that means more than that is refused by name here, since it would run and give other numbers
than its own. What no configuration tells, parts/selfcheck.py finds out on the model itself.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from parts.typed import typed

# What some families do to logits after the head, with the value that does nothing. Scoring
# multiplies hidden states by the head's matrix and no more, and so does sampling: with any other
# value neither would see the distribution that the model was trained to give.
PLAIN_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
# Of rotary positions. transformers checks the types of all numbers but these, and true is 1.
ROPE_NUMBERS = {
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def check_family(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError, in one line, for a configuration that is not honoured; see the file's top.

    name  what the message calls the model
    """
    called = f"{name} ({config.model_type})"
    settings = config.get_text_config().to_dict()
    for field, plain in PLAIN_HEAD.items():
        value = settings.get(field)
        if value not in (plain, None):
            raise ValueError(
                f"{called} has {field}={value}: a plain linear head is supported, {field}={plain}"
            )
    for rope in _ropes(settings.get("rope_parameters")):
        for field in sorted(rope.keys() & ROPE_NUMBERS):
            typed(rope[field], float | None, f"{called}: {field}")
    if config.is_encoder_decoder or config.model_type in _encoder_decoders():
        raise ValueError(f"{called} is of an encoder-decoder family: valid are decoders only")
    # Quantised layers are not nn.Linear, and their products are not those of a weight.
    for held in (config.to_dict().get("quantization_config"), settings.get("quantization_config")):
        if held:
            method = held.get("quant_method", "unnamed") if isinstance(held, dict) else held
            valid = "weights in float32, bfloat16 or float16"
            raise ValueError(f"{called} is quantised ({method}): valid are {valid}")
    kinds = _cache_kinds(config)
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{called} has layers of {', '.join(sorted(kinds))}; valid: full_attention only"
        )


def _encoder_decoders() -> set[str]:
    """Return the model types that transformers builds from an encoder and a decoder.

    Their decoders can be loaded alone, and then say nothing of it in their configuration.
    """
    return set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def _cache_kinds(config: PretrainedConfig) -> set[str]:
    """Return what the layers keep of the tokens so far, as transformers' own cache does for them.

    A window that is as wide as the context is full attention.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, LookupError, TypeError, ValueError):
        return {"an unknown kind"}
    kinds = set()
    for layer in layers:
        if type(layer) is DynamicLayer:
            kinds.add("full_attention")
        elif type(layer) is DynamicSlidingWindowLayer:
            wide = layer.sliding_window >= context_length(config)
            window = f"sliding_attention (a window of {layer.sliding_window} tokens)"
            kinds.add("full_attention" if wide else window)
        else:
            kinds.add(type(layer).__name__)
    return kinds


def context_length(config: PretrainedConfig) -> int:
    """Return how many tokens a row may have, prompt and completion together.

    Beyond their original context the rope types "longrope" and "dynamic" turn all positions
    otherwise, by the longest row of the batch, so that a row's numbers would depend on the rows
    beside it. For them the original context is the limit. A family without one has sys.maxsize.
    """
    text = config.get_text_config()
    # An attribute, not the dictionary's key: families such as GPT-2 have another name for it.
    declared: int | None = getattr(text, "max_position_embeddings", None)
    limits = [declared if declared and declared > 0 else sys.maxsize]
    for rope in _ropes(text.to_dict().get("rope_parameters")):
        kind = str(rope.get("rope_type"))
        if kind == "longrope" or "dynamic" in kind:
            limits.append(rope.get("original_max_position_embeddings") or limits[0])
    return min(limits)


def _ropes(parameters: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the settings of rotary positions: one for all layers, or one for each kind of layer."""
    if not parameters:
        return
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield value


def check_modules(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError for a model whose head or decoder cannot be used as ours are.

    The head is to be a linear layer; load_model refuses its bias. The decoder is to take a position
    for every token, without which rows of two lengths cannot be decoded beside each other.
    """
    called = f"{name} ({model.config.model_type})"
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{called} has no linear head: scoring supports a plain linear head only")
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        raise ValueError(
            f"{called} takes no position ids: rows of two lengths would be sampled wrongly"
        )


def switch_off_dropout(config: PretrainedConfig) -> None:
    """Set every rate of dropout in the configuration to 0, in place, before a model is built.

    Dropout acts in training mode only, so that the student would differ from the teacher, and from
    what was sampled, by noise.
    """
    for part in (config, config.get_text_config()):
        for field, rate in part.to_dict().items():
            if "drop" in field and type(rate) in (int, float) and rate:
                setattr(part, field, type(rate)(0))


def train_without_noise(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """Be a model's own train(): set training mode only where gradient checkpointing needs it.

    Some routers of experts draw at random in training mode, whatever the configuration says, so
    that they stay in eval mode. Of what a layer's training mode does, dropout is 0 already.
    """
    for module in model.modules():
        recomputed = (
            isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        )
        module.training = mode and recomputed
    return model
