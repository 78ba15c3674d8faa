"""Find a model, on disk or on the hub, load it, and check that it is what we think."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parts.chat import turn_end_ids
from parts.family import (
    check_family,
    check_modules,
    context_length,
    switch_off_dropout,
    train_without_noise,
)
from parts.files import read_object
from parts.lora import attach_lora as attach_lora  # for those who look for it here
from parts.machine import is_out_of_memory, state_precision
from parts.typed import typed

# Small files that transformers and tokenizers read, and what they raise where one is broken.
LIBRARY_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
PROBES = ("ab cd", "2 + 3 = 5\n\tƙ አ 🙂 </think>")  # every tokenizer has to read any text
PROJECT = Path(__file__).resolve().parent.parent
# Prefixes of bare model names, and who publishes the family on the hub.
FAMILIES = {
    "Qwen": "Qwen",
    "Llama-": "meta-llama",
    "SmolLM2-": "HuggingFaceTB",
    "gemma-": "google",
}
TEXTS = ["*.json", "*.txt", "*.jinja", "*.model"]  # a model's files beside its weights
# Subfolders, and Mistral's "consolidated", hold the same weights in other formats; an adapter is
# another model.
IGNORED = ["*/*", "consolidated*", "adapter_*"]


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """Return a model's folder: a local one, or else the hub's snapshot, downloaded or cached.

    name     a folder, also one beside the program, as "lab/tiny" is; "org/name"; or a bare name of
             a known family, such as "Qwen2.5-1.5B"
    weights  False: its configuration and tokenizer will do, and no more is then fetched

    Never takes pickles or code. Raises ValueError for an unknown bare name, FileNotFoundError for
    what is not there.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = PROJECT / name
    if not folder.is_dir():
        folder = _snapshot(name, [*TEXTS, "*.safetensors"] if weights else TEXTS)
    for pattern in ("config.json", "*.safetensors") if weights else ("config.json",):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"model {name}: there is no {pattern} in {folder}")
    return folder


def published_name(folder: Path) -> tuple[str, str | None]:
    """Return the name and revision under which other programs load the model in `folder`.

    folder  what resolve_model returned: of a snapshot of the hub's, "org/name" and its commit; of
            another folder, its absolute path and None
    """
    store = folder.parent.parent.name
    if folder.parent.name == "snapshots" and store.startswith("models--"):
        return store.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder.resolve()), None


def _snapshot(name: str, patterns: list[str]) -> Path:
    """Return the folder of the hub's snapshot."""
    owners = [owner for prefix, owner in FAMILIES.items() if name.startswith(prefix)]
    if "/" not in name and not owners:
        prefixes = ", ".join(f"{prefix}*" for prefix in FAMILIES)
        raise ValueError(
            f"unknown model {name!r}: valid are a local folder, org/name, and {prefixes}"
        )
    try:
        folder = snapshot_download(
            name if "/" in name else f"{owners[0]}/{name}",
            allow_patterns=patterns,
            ignore_patterns=IGNORED,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"model {name}: no such folder, and none from the hub: {reason}"
        ) from error
    return Path(folder)


def load_config(folder: Path) -> PretrainedConfig:
    """Return the configuration in folder; ValueError where it is broken or is not honoured."""
    name = f"model {folder}"
    with loading(folder, name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_family(config, name)
    return config


def load_model(
    folder: Path, *, device: str, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """Return the causal language model in folder, frozen and in eval mode.

    gradient_checkpointing  recompute each layer in backward instead of keeping what it computed:
                            less memory, more time; acts in training mode only

    The model has no noise of its own in any mode: dropout is off, and its train() leaves random
    routers as they are. From safetensors only, never with remote code. Raises ValueError for a
    family that is not honoured (parts/family.py), for weights that are not those of its
    configuration, and for an adapter in the same folder.
    """
    name = f"model {folder}"
    if (folder / "adapter_config.json").is_file():
        # Where peft is installed, transformers puts it on unasked, and "the base" is no longer it.
        raise ValueError(
            f"{name} holds an adapter beside the model, adapter_config.json: move it out and name "
            "it with --adapter"
        )
    config = load_config(folder)
    state_precision()
    switch_off_dropout(config)
    # It may also be of a family without this kind of attention.
    with loading(folder, f"{name} ({config.model_type})"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, in one line
            output_loading_info=True,
        )
    model, info = loaded
    _refuse_other_weights(info, name)
    refuse_not_finite(dict(model.named_parameters()), name)
    check_modules(model, name)
    if model.get_output_embeddings().bias is not None:
        raise ValueError(f"{name} has a bias in its head: valid is a plain linear head only")
    model.train = MethodType(train_without_noise, model)  # copied with the model, unlike a closure
    if gradient_checkpointing:
        # transformers 5.17 warns about this name and has no other.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # The reentrant kind drops the gradient of a layer whose input needs none, as behind
            # frozen embeddings.
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    return model.requires_grad_(False).to(device).eval()


@contextmanager
def loading(folder: Path, name: str) -> Iterator[None]:
    """Raise ValueError, in one line, for whatever a broken file makes the libraries raise.

    Their code trusts the files, so that a text in place of a number, or another size than that of
    the weights, can fail in it in any way. An error of the machine, such as a lack of memory, stays
    what it is.
    """
    for file in folder.glob("*.json"):
        if file.name in LIBRARY_FILES:
            _check_settings(file)
    try:
        with _quiet():
            yield
    except BaseException as error:
        if is_out_of_memory(error) or not _is_of_a_library(error):
            raise
        raise ValueError(f"{name} cannot be loaded: {_reason(error)}") from error


def _is_of_a_library(error: BaseException) -> bool:
    """Say whether a broken file makes the libraries raise such an error.

    tokenizers, which is written in Rust, raises no kind of its own, and where it fails unforeseen,
    pyo3's PanicException, which has no name in Python and is no Exception.
    """
    is_rust = type(error) is Exception or type(error).__name__ == "PanicException"
    return is_rust or isinstance(error, LIBRARY_ERRORS)


def _check_settings(file: Path) -> None:
    """Raise ValueError for a setting that the libraries take as it is, and fail with later.

    That is a size below 1; a length limit that is no number, or tidying of texts that is neither on
    nor off, fails only when a text is read.
    """
    held = read_object(file)
    text = held.get("text_config")
    parts = [held, text] if isinstance(text, dict) else [held]
    for part in parts if file.name == "config.json" else ():
        for size in SIZES:
            if type(part.get(size)) is int and part[size] < 1:
                raise ValueError(f"{file} has {size} {part[size]}; valid: 1 or more")
    if file.name == "tokenizer_config.json":
        limit = held.get("model_max_length")  # often 10**30, for none
        if limit is not None and not (type(limit) in (int, float) and limit >= 1):
            raise ValueError(f"{file} has model_max_length {limit!r}; valid: a number, 1 or more")
        name = "clean_up_tokenization_spaces"
        typed(held.get(name), bool | None, f"{file}: {name}")
    if file.name == "tokenizer.json" and isinstance(held.get("model"), dict):
        _refuse_merges_without_prefix(held["model"], file)


def _refuse_merges_without_prefix(model: dict[str, Any], file: Path) -> None:
    """Raise ValueError where the second half of a merge lacks the prefix that it must begin with.

    tokenizers cuts as many bytes off it unseen, and ends the process where that splits a letter.
    """
    prefix = model.get("continuing_subword_prefix")
    merges = model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        second = halves[-1] if isinstance(halves, list) and halves else None
        if isinstance(second, str) and not second.startswith(prefix):
            raise ValueError(
                f"{file} has the continuing_subword_prefix {prefix!r}, with which the "
                f"merge {merge!r} does not go on"
            )


def _reason(error: BaseException) -> str:
    """Return what an error of the libraries says, in one line; a KeyError says a name at most."""
    if isinstance(error, KeyError) and error.args:
        (key, *_) = error.args
        if " " not in str(key):
            return f"its files name {key!r}, which transformers does not know"
        return " ".join(str(key).split())
    return " ".join(str(error).split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says while it reads files off the terminal: what matters is raised.

    Its table of weights that do not fit has many lines, and so has a complaint about a setting.
    """
    kept = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(kept)


@contextmanager
def _unheard() -> Iterator[None]:
    """Lose what a library written in Rust says, past Python, of a failure that it also raises."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _refuse_other_weights(info: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where the files hold other weights than the configuration describes.

    info  what transformers says of its loading; it leaves out what a family ignores on purpose
    transformers fills what is missing, or of another size, with random numbers, drops what has no
    place, and goes on.
    """
    if info["mismatched_keys"]:
        part, stored, described = min(info["mismatched_keys"])
        raise ValueError(
            f"{name} has {part} of the sizes {tuple(stored)}, and its config.json describes "
            f"{tuple(described)}"
        )
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(info['missing_keys'])}")
    if info["unexpected_keys"]:
        raise ValueError(
            f"{name} has weights that its config.json has no place for, such as "
            f"{min(info['unexpected_keys'])}"
        )


def refuse_not_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError for weights with NaN or an infinity: whatever they compute is no number."""
    for part, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            remedy = ""
            if tensor.dtype == torch.float16:  # the files may hold more than it can
                remedy = "; if they leave float16's range: --dtype float32 or bfloat16"
            raise ValueError(
                f"{name} has weights that are not finite, such as those of {part}{remedy}"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in folder.

    Raises ValueError if it has no chat template, with which prompts are built.
    """
    with loading(folder, f"the tokenizer in {folder}"), _unheard():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for text in PROBES:  # some of it fails in use only
            tokenizer.decode(tokenizer.encode(text))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template: valid are chat or instruct models"
        )
    return tokenizer


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return all ids that end a completion: those of the tokenizer, the model, the chat template.

    Qwen's models list several. The template's id closes an assistant's turn: a base model names it
    nowhere else, and would go on to write the user's next turn.
    """
    return turn_end_ids(tokenizer) | set(_named_ends(model, tokenizer))


def _named_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return what the files name as ids that end a completion, whether they are ids or not."""
    named = []
    for source in (tokenizer, model.config, model.generation_config):
        eos: Any = source.eos_token_id  # an id, a list of ids, or None
        named += eos if isinstance(eos, list) else [eos]
    return [end for end in named if end is not None]


def valid_ids(tokenizer: PreTrainedTokenizerBase) -> int | set[int]:
    """Return the ids that may be sampled, those of the vocabulary.

    A count n stands for 0 to n - 1; a set is returned where added tokens leave a gap below their
    ids. Qwen's heads have more rows than its tokenizer has tokens.
    """
    ids = set(tokenizer.get_vocab().values())
    return len(ids) if max(ids) == len(ids) - 1 else ids


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError where the tokenizer's tokens, or the ids that end a completion, do not fit.

    name  what the message calls the model

    Each token needs a row in the head, to be sampled, and one in the embedding, to be read. Each
    end must be a token, or no completion would ever end with it.
    """
    rows = min(len(head_weight(model)), token_count(model))
    tokens = tokenizer.get_vocab()
    last = max(tokens, key=lambda token: tokens[token])
    if tokens[last] >= rows:
        raise ValueError(
            f"{name} has ids 0 to {rows - 1}, and its tokenizer goes up to id {tokens[last]}, "
            f"{last!r}: they do not belong together"
        )
    ids = set(tokens.values())
    for end in _named_ends(model, tokenizer):
        if type(end) is not int or end not in ids:
            raise ValueError(
                f"{name} has the eos_token_id {end!r}, which is no id of its tokenizer; see "
                "config.json and generation_config.json"
            )


def final_hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return hidden_BTD, the states after the last norm, with gradient to the adapter.

    ids_BT      token ids; pads, if any, come AFTER a row's tokens. Attention is causal, so a token
                never sees the pads on its right, and its position is the same as without them: no
                mask and no position ids are needed.
    hidden_BTD  in the model's dtype; the state at t predicts token t + 1

    Raises ValueError for rows beyond the model's context.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
    >>> model = LlamaForCausalLM(config).eval()
    >>> alone, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0]])
    >>> torch.allclose(final_hidden(model, alone), final_hidden(model, padded)[:, :2], atol=1e-6)
    True
    """
    context = context_length(model.config)
    if ids_BT.shape[1] > context:
        raise ValueError(
            f"a row of {ids_BT.shape[1]} tokens exceeds the model's context of {context}"
        )
    return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state


def token_count(model: PreTrainedModel) -> int:
    """Return the rows of the embedding: valid ids are 0 to one less."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def head_weight(model: PreTrainedModel) -> Tensor:
    """Return head_VD, frozen, in the model's dtype: logits_NV = hidden_ND @ head_VD.T."""
    return cast(nn.Linear, model.get_output_embeddings()).weight
