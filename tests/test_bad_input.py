"""Bad inputs, sixty and more for each program: one line, exit code 2, and nothing made.

Last the files of a run or an evaluation, each damaged: the line says what to do.
"""

import functools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, few_flags, few_problems
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parts import commands

LAB = ROOT / "lab" / "tiny"
PROBLEMS = ROOT / "lab" / "problems" / "hau"
HUGE = str(10**30)
DEEP = "[" * 100_000 + "]" * 100_000
Maker = Callable[[Path], list[str]]  # makes what is broken in a folder; returns the arguments
APPS = {
    "train": (commands.copsd, ["train"]),
    "eval": (commands.evaluation, []),
    "compare": (commands.comparison, []),
    "show": (commands.copsd, ["show"]),
    "plan": (commands.copsd, ["plan"]),
    "export-data": (commands.copsd, ["export-data"]),
    "report": (commands.evaluation, ["report"]),
}
OUTLESS = {"show", "plan"}  # they have no --out
DATALESS = {"eval", "plan", "report"}  # they have no --data
# Held out of a few problems: to read all of them takes longer than all else.
FEW_HELD_OUT = {
    "train": ["--eval-problems", "4"],
    "compare": ["--eval-problems", "4", "--dev-problems", "4"],
}
PASS_AT_KS = ("0", "x", "", "1_0", str(10**12), "8,16x")
SEEDS = ("0", "", "-1", "x", "1_0", str(10**9))
SWEEPS = ("", "0", "x", "1_0", "inf", "1,1")


def typed(*arguments: str) -> Maker:
    return lambda folder: list(arguments)


def model_with(change: Callable[[Path], Any]) -> Maker:
    """Return a maker of a copy of the lab's model in which `change` breaks something."""

    def make(folder: Path) -> list[str]:
        model = folder / "model"
        shutil.copytree(LAB, model)
        change(model)
        return ["--model", str(model)]

    return make


def text_in(name: str, text: str) -> Maker:
    return model_with(lambda model: (model / name).write_text(text, encoding="utf-8"))


def json_with(name: str, **changes: Any) -> Maker:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return model_with(change)


def recipe_with(name: str, value: Any) -> Maker:
    return json_with("recipe.json", **{name: {"value": value, "why": "broken"}})


def token_beyond_the_head(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9999, "content": "<x>"})
    (model / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def recipe_folder(model: Path) -> None:
    (model / "recipe.json").unlink()
    (model / "recipe.json").mkdir()


def nan_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def half_the_weights(model: Path) -> None:
    held = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(held[: len(held) // 2])


def data_of(text: str | bytes, name: str = "data.jsonl", flag: str = "--data") -> Maker:
    def make(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [flag, str(path)]

    return make


def adapter_with(tensors: bytes | None = None, text: str | None = None, **changes: Any) -> Maker:
    """Return a maker of an adapter for the lab's model that is broken."""

    def make(folder: Path) -> list[str]:
        adapter = folder / "adapter"
        adapter.mkdir()
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
        (adapter / "adapter_config.json").write_text(text or json.dumps(config))
        held = {}
        for layer in range(4):
            path = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            held[f"{path}A.weight"] = torch.full((4, 128), torch.nan)
            held[f"{path}B.weight"] = torch.zeros(128, 4)
        save_file(held, adapter / "adapter_model.safetensors")
        if tensors is not None:
            (adapter / "adapter_model.safetensors").write_bytes(tensors)
        return ["--adapter", str(adapter)]

    return make


def a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("mine")
    return ["--out", str(folder / "file")]


def below_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("mine")
    return ["--out", str(folder / "file" / "run")]


def a_pipe(flag: str) -> Maker:
    """Return a maker of what is neither file nor folder. A device would be lost if it was taken."""

    def make(folder: Path) -> list[str]:
        os.mkfifo(folder / "pipe")
        return [flag, str(folder / "pipe")]

    return make


def a_link(flag: str, name: str) -> Maker:
    """Return a maker of a link to a file, which a file of ours would replace."""

    def make(folder: Path) -> list[str]:
        (folder / "own.html").touch()
        (folder / name).symlink_to(folder / "own.html")
        return [flag, str(folder / name)]

    return make


ROW = {"id": "1", "problem": "One and 1?", "solution": "2", "answer": "2", "language": "hau"}
ROW["problem_translated"] = "Daya da 1?"
MODELS = {
    "a model that is nowhere": typed("--model", "nowhere"),
    "an empty model": typed("--model", ""),
    "a folder that is no model": typed("--model", str(PROBLEMS)),
    "weights with NaN": model_with(nan_weights),
    "half of the weights": model_with(half_the_weights),
    "no weights": model_with(lambda model: (model / "model.safetensors").unlink()),
    "empty weights": model_with(lambda model: (model / "model.safetensors").write_bytes(b"")),
    "a hidden size of other weights": json_with("config.json", hidden_size=64),
    "fewer layers than weights": json_with(
        "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3
    ),
    "layers below 0": json_with("config.json", num_hidden_layers=-1),
    "heads as text": json_with("config.json", num_attention_heads="four"),
    "a rope base of true": json_with("config.json", rope_parameters={"rope_theta": True}),
    "an infinite rope base": json_with("config.json", rope_parameters={"rope_theta": math.inf}),
    "a rope factor of true": json_with(
        "config.json", rope_scaling={"rope_type": "linear", "factor": True}
    ),
    "an unknown family": json_with("config.json", model_type="abacus"),
    "a vocabulary of null": json_with("config.json", vocab_size=None),
    "a config that is broken": text_in("config.json", "{"),
    "a config that is a list": text_in("config.json", "[]"),
    "a config that is nested deeply": text_in("config.json", DEEP),
    "no config": model_with(lambda model: (model / "config.json").unlink()),
    "a context below 0": json_with("config.json", max_position_embeddings=-1),
    "tidying as text": json_with("tokenizer_config.json", clean_up_tokenization_spaces="abacus"),
    "a length limit below 1": json_with("tokenizer_config.json", model_max_length=0),
    "a tokenizer that is broken": text_in("tokenizer.json", "{"),
    "a tokenizer that is empty": text_in("tokenizer.json", "{}"),
    "a tokenizer of an unknown kind": json_with("tokenizer.json", model={"type": "abacus"}),
    "tokenizer settings that are broken": text_in("tokenizer_config.json", "{"),
    "no chat template": model_with(lambda model: (model / "chat_template.jinja").unlink()),
    "generation settings that are broken": text_in("generation_config.json", "{"),
    "an end outside the vocabulary": json_with("generation_config.json", eos_token_id=9999),
    "an end that is text": json_with("generation_config.json", eos_token_id=[2, "end"]),
    "an end that is a list of lists": json_with("generation_config.json", eos_token_id=[[2]]),
    "an end below 0": json_with("generation_config.json", eos_token_id=-1),
    "a tokenizer with a token beyond the head": model_with(token_beyond_the_head),
    "a recipe that is broken": text_in("recipe.json", "{"),
    "a recipe that is a list": text_in("recipe.json", "[1]"),
    "a recipe that is nested deeply": text_in("recipe.json", DEEP),
    "a recipe that is a folder": model_with(recipe_folder),
    "a recipe of a method": recipe_with("method", "grpo"),
    "a recipe's entry with an unknown key": json_with(
        "recipe.json", lr={"value": 0.001, "grop": 0.5}
    ),
    "a recipe's entry without value": json_with("recipe.json", lr={"why": "none"}),
    "a recipe's entry that is a number": json_with("recipe.json", lr=1),
    "a recipe's text for a number": recipe_with("max_new_tokens", "64"),
    "a recipe's null for a number": recipe_with("max_new_tokens", None),
    "a recipe's list for a number": recipe_with("max_new_tokens", [64]),
    "a recipe's fraction for a count": recipe_with("max_new_tokens", 1.5),
    "a recipe's true for a count": recipe_with("max_new_tokens", True),
    "a recipe's count below 1": recipe_with("max_new_tokens", 0),
    "a recipe's count of many digits": recipe_with("max_new_tokens", 10**400),
    "a recipe's number for a file": recipe_with("eval_data", 5),
    "a recipe's empty file": recipe_with("eval_data", ""),
    "a recipe's text for true or false": recipe_with("english_problem", "false"),
    "a recipe's number for true or false": recipe_with("english_problem", 1),
    "a recipe's infinity": recipe_with("lr", float("inf")),
    "a recipe's NaN": recipe_with("lr", float("nan")),
    "an unknown device": typed("--device", "abacus"),
    "an unknown dtype": typed("--dtype", "int3"),
    "an unknown language": typed("--lang", "xyz"),
    "an empty language": typed("--lang", ""),
    "no folder's name": typed("--out", ""),
    "a blank folder's name": typed("--out", "  "),
    "a file as folder": a_file,
    "a folder below a file": below_a_file,
    "a device as folder": typed("--out", "/dev/full"),
    "a seed of 30 digits": typed("--seed", HUGE),
    "top-p of 0": typed("--top-p", "0"),
    "top-p above 1": typed("--top-p", "1.5"),
    "top-p of NaN": typed("--top-p", "nan"),
    "top-k below 0": typed("--top-k", "-1"),
    "a temperature below 0": typed("--temperature", "-1"),
    "an infinite temperature": typed("--temperature", "inf"),
    "thinking perhaps": typed("--thinking", "maybe"),
    "no new tokens": typed("--max-new-tokens", "0"),
    "more tokens than fit": typed("--max-new-tokens", "9999"),
    "a flag that is none": typed("--lerning-rate", "1"),
}
RUNS = {
    f"{flag} {value}": typed(flag, value)
    for flag, values in {
        "--steps": ("0", "-1", "1.5"),
        "--token-budget": ("0", "1"),
        "--batch-size": ("0", str(10**12)),
        "--micro-batch": ("0",),
        "--chunk-tokens": ("0", str(10**12)),
        "--sample-rows": ("0",),
        "--lora-rank": ("0", str(10**9)),
        "--lora-alpha": ("0", "nan"),
        "--lora-targets": ("nose", "", "q_proj,q_proj", "q_proj,"),
        "--lr": ("-1", "nan", "inf", "1e38", "fast"),
        "--kl-coef": ("inf", "-1"),
        "--beta": ("0", "1"),
        "--clip": ("0",),
        "--clip-low": ("2",),
        "--english-share": ("2",),
        "--ema-decay": ("2",),
        "--max-grad-norm": ("0", "nan"),
        "--weight-decay": ("-1",),
        "--eval-samples": ("0", str(10**12)),
        "--eval-temperature": ("-1", "0"),
        "--eval-top-p": ("0",),
        "--divergence": ("l2",),
        "--clip-mode": ("half",),
        "--teacher": ("none",),
        "--reduction": ("sum",),
        "--data": ("", "nowhere.jsonl", "README.md"),
        "--eval-data": ("", "nowhere.jsonl"),
    }.items()
    for value in values
}
DATA = {
    "data that is empty": data_of(""),
    "data that is broken": data_of("{\n"),
    "data that is nested deeply": data_of(DEEP + "\n"),
    "data that is no UTF-8": data_of(b'{"problem": "\xff"}\n'),
    "data of a list": data_of("[1]\n"),
    "data without a problem": data_of('{"answer": "2"}\n'),
    "data with half a letter": data_of(json.dumps({**ROW, "problem": "a \ud800 b"}) + "\n"),
    "data with a control character": data_of(json.dumps({**ROW, "problem": "a \b b"}) + "\n"),
    "data with an answer that is none": data_of(json.dumps({**ROW, "answer": "NaN"}) + "\n"),
    "data with a problem twice": data_of(2 * (json.dumps(ROW) + "\n")),
    "data of another language": data_of(json.dumps({**ROW, "language": "swa"}) + "\n"),
}
TRAIN = {
    **MODELS,
    **RUNS,
    **DATA,
    "nothing kept": typed("--keep", "0"),
    "no saves": typed("--save-every", "0"),
    "an unknown method": typed("--method", "ppo"),
    "groups of one": typed("--method", "grpo", "--group-size", "1"),
    "groups that do not fit": typed("--method", "grpo", "--batch-size", "12"),
    "problems below 0": typed("--eval-problems", "-1"),
    "a temperature that overflows": typed("--temperature", "1e-38"),
    "an evaluation's temperature that overflows": typed("--eval-temperature", "1e-38"),
    "samples of no evaluation": typed("--eval-problems", "0", "--eval-samples", "5"),
    "problems set aside for no look": typed("--dev-problems", "5"),
    "two ends": typed("--steps", "5", "--token-budget", "100000"),
    "an answer with a control token": data_of(json.dumps({**ROW, "answer": "16<|im_end|>"}) + "\n"),
}
EVAL = {
    **MODELS,
    **{f"--pass-at-k {k}": typed("--pass-at-k", k) for k in PASS_AT_KS},
    "k above samples": typed("--pass-at-k", "8", "--samples", "4"),
    "no samples": typed("--samples", "0"),
    "samples without end": typed("--samples", str(10**12)),
    "greedy samples": typed("--greedy", "--samples", "3"),
    "a greedy cut": typed("--greedy", "--top-k", "5"),
    "a cut of one token": typed("--pass-at-k", "1", "--top-k", "1", "--top-p", "0.5"),
    "a cut at temperature 0": typed("--temperature", "0", "--top-p", "0.5"),
    "a revision of a file": typed("--benchmark", "lab/problems/hau/test.jsonl", "--revision", "v1"),
    "a temperature that overflows": typed("--temperature", "1e-38"),
    "flags before report": typed("--lang", "hau", "report", "nowhere"),
    "no problems": typed("--limit", "0"),
    "no rows": typed("--batch-rows", "0"),
    "a benchmark that is nowhere": typed("--benchmark", "nowhere"),
    "an empty benchmark": typed("--benchmark", ""),
    "an empty revision": typed("--revision", ""),
    "an empty adapter": typed("--adapter", ""),
    "an adapter that is nowhere": typed("--adapter", "nowhere"),
    "an adapter of NaN": adapter_with(),
    "an adapter of no bytes": adapter_with(tensors=b""),
    "an adapter of rank 0": adapter_with(r=0),
    "an adapter of rank -1": adapter_with(r=-1),
    "an adapter of rank text": adapter_with(r="4"),
    "an adapter of rank true": adapter_with(r=True),
    "an adapter of rank null": adapter_with(r=None),
    "an adapter of alpha text": adapter_with(lora_alpha="8"),
    "an adapter of alpha NaN": adapter_with(lora_alpha=float("nan")),
    "an adapter of layers as text": adapter_with(layers_to_transform="all"),
    "an adapter of no targets": adapter_with(target_modules=[]),
    "an adapter of targets as a number": adapter_with(target_modules=5),
    "an adapter of targets as an object": adapter_with(target_modules={"q_proj": 1}),
    "an adapter that leaves out true": adapter_with(exclude_modules=True),
    "an adapter with 0 for false": adapter_with(use_dora=0),
    "an adapter's settings broken": adapter_with(text="{"),
    "an adapter's settings a list": adapter_with(text="[]"),
    "an adapter's settings nested deeply": adapter_with(text=DEEP),
}
COMPARE = {
    **{name: maker for name, maker in MODELS.items() if "a seed" not in name},
    **RUNS,
    **DATA,
    **{f"--seeds {seeds}": typed("--seeds", seeds) for seeds in SEEDS},
    "a seed of 30 digits": typed("--seeds", f"0,{HUGE}"),
    "a seed twice": typed("--seeds", "1,1"),
    "the sweep's seed": typed("--seeds", "1000,2"),
    **{f"--sweep {rates}": typed("--sweep", rates) for rates in SWEEPS},
    "no problems to choose by": typed("--dev-problems", "0"),
    "no problems to compare on": typed("--eval-problems", "0"),
    "results in a folder that is nowhere": typed("--results", "nowhere/RESULTS.md"),
    "empty results": typed("--results", ""),
    "a method": typed("--method", "grpo"),
    "a seed that is not for it": typed("--seed", "1"),
}


@functools.cache
def finished_evaluation() -> Path:
    """Return the folder of an evaluation of two problems, and of nothing that vouches for them."""
    folder = Path(tempfile.mkdtemp()) / "done"
    flags = ["--lang", "hau", "--greedy", "--limit", "2", "--max-new-tokens", "8"]
    result = CliRunner().invoke(commands.evaluation, [*flags, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    (folder / "digests.json").unlink()
    return folder


def evaluation_with(name: str, change: Callable[[str], str | None]) -> Maker:
    """Return a maker of a finished evaluation in which a file's text is changed; None: removed."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(finished_evaluation(), folder / "done")
        file = folder / "done" / name
        text = change(file.read_text(encoding="utf-8"))
        file.unlink()
        if text is not None:
            file.write_text(text, encoding="utf-8")
        return [str(folder / "done")]

    return make


def report_of(*arguments: str) -> Maker:
    """Return a maker of a finished evaluation to report on, and of further arguments."""
    make = evaluation_with("summary.json", lambda text: text)
    return lambda folder: [*make(folder), *arguments]


def without_metric(name: str) -> Callable[[str], str]:
    return lambda text: json.dumps({n: x for n, x in json.loads(text).items() if n != name})


def record_with(part: str | None, name: str, value: Any) -> Maker:
    """Return a maker of a finished evaluation whose record, without a seal, has another value."""

    def change(text: str) -> str:
        record = json.loads(text)
        del record["sha256"]
        (record[part] if part else record)[name] = value
        return json.dumps(record)

    return evaluation_with("settings.json", change)


def some_of(makers: dict[str, Maker], *names: str) -> dict[str, Maker]:
    return {name: makers[name] for name in names}


# Of the models that are broken, some that each program reads.
CONFIGS = some_of(
    MODELS,
    "a model that is nowhere",
    "an empty model",
    "a folder that is no model",
    "a config that is broken",
    "a config that is a list",
    "no config",
    "a recipe that is broken",
    "a recipe that is a list",
    "a recipe's count below 1",
    "a recipe's NaN",
    "a flag that is none",
)
LANGUAGES = some_of(
    MODELS,
    "an unknown language",
    "an empty language",
    "a seed of 30 digits",
    "a tokenizer that is broken",
    "more tokens than fit",
    "thinking perhaps",
)
SHOW = {
    **CONFIGS,
    **LANGUAGES,
    **some_of(MODELS, "half of the weights", "an unknown device", "an unknown dtype"),
    **some_of(MODELS, "top-p of 0", "an infinite temperature"),
    **some_of(DATA, "data that is empty", "data that is broken", "data of another language"),
    **some_of(EVAL, "an empty adapter", "an adapter that is nowhere", "an adapter of rank 0"),
    "an empty page": typed("--html", ""),
    "a blank page": typed("--html", "  "),
    "a folder as page": lambda folder: ["--html", str(folder)],
    "a pipe as page": a_pipe("--html"),
    "a page that is no page by its name": typed("--html", "walk.jsonl"),
    "a page among a model's files": typed("--html", "lab/tiny/walk.html"),
    "a link as page": a_link("--html", "walk.html"),
    "a page in a folder that is nowhere": typed("--html", "nowhere/walk.html"),
    "a method's flag without the method": typed("--credit-mix", "0.5"),
}
PLAN = {
    **CONFIGS,
    **{f"a card of {size!r}": typed("--gpu", size) for size in ("0", "-5", "nan", "inf", "x", "")},
    **{f"{n!r} prompt tokens": typed("--prompt-tokens", n) for n in ("0", "-1", "x", "9" * 400)},
    **{f"{n!r} teacher tokens": typed("--teacher-tokens", n) for n in ("0", "9" * 400)},
    "an unknown device": typed("--device", "abacus"),
    "more prompt tokens than any model reads": typed("--prompt-tokens", str(10**9)),
    "more new tokens than any model writes": typed("--max-new-tokens", "9" * 18),
    "targets that match no layer": typed("--lora-targets", "zz"),
    "a device without a number": typed("--device", "cuda:"),
    "an unknown dtype": typed("--dtype", "int3"),
    "no rows": typed("--micro-batch", "0"),
    "no rank": typed("--lora-rank", "0"),
    "groups that do not fit": typed("--method", "grpo", "--batch-size", "12"),
    "a method's flag without the method": typed("--kl-coef", "1"),
    "samples of no evaluation": typed("--eval-problems", "0", "--eval-samples", "4"),
}
EXPORT = {
    **CONFIGS,
    **LANGUAGES,
    **some_of(MODELS, "no folder's name", "a blank folder's name"),
    **some_of(DATA, "data that is empty", "data that is broken", "data of another language"),
    "an unknown format": typed("--format", "verl"),
    "an empty format": typed("--format", ""),
    "an empty file's name": typed("--file", ""),
    "a blank file's name": typed("--file", "  "),
    "a folder as file": lambda folder: ["--file", str(folder)],
    "a pipe as file": a_pipe("--file"),
    "a file below a file": lambda folder: ["--file", str(folder / "README.md" / "x.jsonl")],
    "problems below 0": typed("--eval-problems", "-1"),
    "a file and a folder": lambda folder: ["--file", "a.jsonl", "--out", "b"],
    "an answer with a control token": data_of(json.dumps({**ROW, "answer": "16<|im_end|>"}) + "\n"),
}


def a_link_beside(folder: Path) -> list[str]:
    """Return an evaluation and a link to it, which is the same under another name."""
    arguments = report_of()(folder)
    (folder / "other").symlink_to(Path(arguments[0]).absolute())
    return [*arguments, str(folder / "other")]


REPORT = {
    "nothing to report on": typed(),
    "an empty name": typed(""),
    "a folder that is nowhere": typed("nowhere"),
    "a folder without an evaluation": typed("."),
    "a file": typed("README.md"),
    "one twice": lambda folder: 2 * report_of()(folder),
    "one by a link, too": a_link_beside,
    "an empty --out": report_of("--out", ""),
    "a blank --out": report_of("--out", "  "),
    "a file as --out": lambda folder: [*report_of()(folder), *a_file(folder)],
    "a folder below a file": lambda folder: [*report_of()(folder), *below_a_file(folder)],
    "a device as --out": report_of("--out", "/dev/full"),
    "a flag that is none": report_of("--pass-at-k", "2"),
    "no record": evaluation_with("settings.json", lambda text: None),
    "half of the record": evaluation_with("settings.json", lambda text: text[: len(text) // 2]),
    "a record that is a list": evaluation_with("settings.json", lambda text: "[]"),
    "a date that is a number": record_with("identity", "template_date", 5),
    "ks as text": record_with("settings", "ks", "x"),
    "a model that is a list": record_with("settings", "model", [1]),
    "a temperature as text": record_with("settings", "temperature", "x"),
    "versions in a list": record_with(None, "versions", [1]),
    "a version that is a number": record_with("versions", "torch", 2),
    "samples below 1": record_with("settings", "samples", 0),
    "an unknown setting without end": record_with("settings", "more", float("inf")),
    "no summary": evaluation_with("summary.json", lambda text: None),
    "a summary without a metric": evaluation_with("summary.json", without_metric("format rate")),
    "a summary that is broken": evaluation_with("summary.json", lambda text: "{"),
    "no problems": evaluation_with("problems.jsonl", lambda text: None),
    "one problem of two": evaluation_with(
        "problems.jsonl", lambda text: text.split("\n")[0] + "\n"
    ),
    "a problem twice": evaluation_with("problems.jsonl", lambda text: 2 * text),
    "tokens below 0": evaluation_with(
        "problems.jsonl", lambda text: re.sub(r'"tokens": \d+', '"tokens": -1', text)
    ),
    "tokens as text": evaluation_with(
        "problems.jsonl", lambda text: re.sub(r'"tokens": (\d+)', r'"tokens": "\1"', text)
    ),
}
PROGRAMS = {
    "train": TRAIN,
    "eval": EVAL,
    "compare": COMPARE,
    "show": SHOW,
    "plan": PLAN,
    "export-data": EXPORT,
    "report": REPORT,
}
TABLE = [
    pytest.param(program, maker, id=f"{program}: {name}")
    for program, makers in PROGRAMS.items()
    for name, maker in makers.items()
]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_there_are_sixty_for_each_program():
    assert min(len(TRAIN), len(EVAL), len(COMPARE)) >= 60
    assert min(len(SHOW), len(PLAN), len(EXPORT), len(REPORT)) >= 20


@pytest.mark.parametrize(("program", "maker"), TABLE)
def test_bad_input_is_one_line_and_makes_nothing(tmp_path, monkeypatch, program, maker):
    if program == "report":
        finished_evaluation()  # made where the lab is
    monkeypatch.chdir(tmp_path)
    arguments = maker(tmp_path)
    app, command = APPS[program]
    if "--data" not in arguments and "--model" in arguments and program not in DATALESS:
        # A copy of the lab's model has no problems beside it.
        few = ["--data", few_problems()["data"], *FEW_HELD_OUT.get(program, [])]
        arguments = [*few, *arguments]
    if program == "eval" and not {"--benchmark", "--lang"} & {*arguments}:
        arguments += ["--benchmark", "lab"]
    # export-data's --file takes the place of --out.
    if not {"--out", "--file"} & {*arguments} and program not in OUTLESS:
        arguments += ["--out", str(tmp_path / "out")]
    (tmp_path / "README.md").write_text("words")
    before = tree(tmp_path)
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    assert tree(tmp_path) == before


# Files of ours that are damaged

RUN = ["train", "--steps", "2", "--save-every", "2", "--batch-size", "2", "--max-new-tokens", "8"]
RUN += ["--eval-problems", "1", "--eval-samples", "1", *few_flags()]
EVALUATION = ["--lang", "hau", "--greedy", "--limit", "2", "--max-new-tokens", "8"]
HARMS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda held: held[: len(held) // 2],
    "emptied": lambda held: b"",
    "a brace": lambda held: b"{\n",
}
FILES = {
    "train": ["config.json", "digests.json", "metrics.jsonl", "completions.jsonl"],
    "eval": ["settings.json", "digests.json"],
    "report": ["settings.json", "digests.json", "summary.json", "problems.jsonl"],
}
FILES["train"] += ["before.json", "after.json", "resume/step_00002.json"]
FILES["train"] += ["resume/step_00002.safetensors"]
FILES["train"] += ["adapters/step_00002/adapter_config.json"]
DAMAGED = [
    (program, name, harm, is_vouched_for)
    for program, names in FILES.items()
    for name in names
    for harm in HARMS
    for is_vouched_for in (True, False)
    if is_vouched_for or (name != "digests.json" and "adapter" not in name)
]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run and a finished evaluation."""
    folder = tmp_path_factory.mktemp("damaged")
    for app, flags, name in (
        (commands.copsd, RUN, "train"),
        (commands.evaluation, EVALUATION, "eval"),
    ):
        result = CliRunner().invoke(app, [*flags, "--out", str(folder / name)])
        assert result.exit_code == 0, result.output
    shutil.copytree(folder / "eval", folder / "report")
    return folder


def unlocked(files: dict[str, bytes | None]) -> dict[str, bytes | None]:
    return {name: held for name, held in files.items() if not name.endswith("owner.lock")}


@pytest.mark.parametrize(("program", "name", "harm", "is_vouched_for"), DAMAGED)
def test_a_damaged_file_is_one_line_that_says_what_to_do(
    done, tmp_path, program, name, harm, is_vouched_for
):
    folder = tmp_path / "done"
    shutil.copytree(done / program, folder)
    file = folder / name
    file.write_bytes(HARMS[harm](file.read_bytes()))
    if not is_vouched_for:
        (folder / "digests.json").unlink()
    given = {
        "train": [*RUN, "--out", str(folder)],
        "eval": [*EVALUATION, "--out", str(folder)],
        "report": ["report", str(folder), "--out", str(tmp_path / "report")],
    }
    before = tree(tmp_path)
    result = CliRunner().invoke(APPS[program][0], given[program])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert file.name in result.stderr
    assert re.search("remove|choose another|start anew", result.stderr), result.stderr
    assert unlocked(tree(tmp_path)) == unlocked(before)


@pytest.mark.parametrize("name", ["problems.jsonl", "before.json", "after.json", "digests.json"])
def test_what_is_to_be_removed_is_made_again(done, tmp_path, name):
    program = "eval" if name == "problems.jsonl" else "train"
    folder = tmp_path / "done"
    shutil.copytree(done / program, folder)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    app, _ = APPS[program]
    flags = EVALUATION if program == "eval" else RUN
    result = CliRunner().invoke(app, [*flags, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert name == "digests.json" or (folder / name).read_bytes() == whole
