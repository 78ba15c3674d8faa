"""Bad inputs, sixty and more for each program: one line, exit code 2, and nothing made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
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
}


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
    "an unknown family": json_with("config.json", model_type="abacus"),
    "a vocabulary of null": json_with("config.json", vocab_size=None),
    "a config that is broken": text_in("config.json", "{"),
    "a config that is a list": text_in("config.json", "[]"),
    "a config that is nested deeply": text_in("config.json", DEEP),
    "no config": model_with(lambda model: (model / "config.json").unlink()),
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
}
EVAL = {
    **MODELS,
    **{f"--pass-at-k {k}": typed("--pass-at-k", k) for k in ("0", "x", "", str(10**12), "8,16x")},
    "k above samples": typed("--pass-at-k", "8", "--samples", "4"),
    "no samples": typed("--samples", "0"),
    "samples without end": typed("--samples", str(10**12)),
    "greedy samples": typed("--greedy", "--samples", "3"),
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
    "an adapter's settings broken": adapter_with(text="{"),
    "an adapter's settings a list": adapter_with(text="[]"),
    "an adapter's settings nested deeply": adapter_with(text=DEEP),
}
COMPARE = {
    **{name: maker for name, maker in MODELS.items() if "a seed" not in name},
    **RUNS,
    **DATA,
    **{f"--seeds {seeds}": typed("--seeds", seeds) for seeds in ("0", "", "-1", "x", str(10**9))},
    "a seed of 30 digits": typed("--seeds", f"0,{HUGE}"),
    "a seed twice": typed("--seeds", "1,1"),
    "the sweep's seed": typed("--seeds", "1000,2"),
    **{f"--sweep {rates}": typed("--sweep", rates) for rates in ("", "0", "x", "inf", "1,1")},
    "no problems to choose by": typed("--dev-problems", "0"),
    "no problems to compare on": typed("--eval-problems", "0"),
    "results in a folder that is nowhere": typed("--results", "nowhere/RESULTS.md"),
    "empty results": typed("--results", ""),
    "a method": typed("--method", "grpo"),
    "a seed that is not for it": typed("--seed", "1"),
}
TABLE = [
    pytest.param(program, maker, id=f"{program}: {name}")
    for program, makers in (("train", TRAIN), ("eval", EVAL), ("compare", COMPARE))
    for name, maker in makers.items()
]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_there_are_sixty_for_each_program():
    assert min(len(TRAIN), len(EVAL), len(COMPARE)) >= 60


@pytest.mark.parametrize(("program", "maker"), TABLE)
def test_bad_input_is_one_line_and_makes_nothing(tmp_path, monkeypatch, program, maker):
    monkeypatch.chdir(tmp_path)
    arguments = maker(tmp_path)
    app, command = APPS[program]
    if "--data" not in arguments and "--model" in arguments and program != "eval":
        # A copy of the lab's model has no problems beside it.
        arguments += ["--data", str(PROBLEMS / "train.jsonl")]
    if program == "eval" and not {"--benchmark", "--lang"} & {*arguments}:
        arguments += ["--benchmark", "lab"]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    (tmp_path / "README.md").write_text("words")
    before = tree(tmp_path)
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    assert tree(tmp_path) == before
