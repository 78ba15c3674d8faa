"""What the documents claim about the code, and what the design holds the code to."""

import ast
import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import copsd
import eval as evaluation

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CEILINGS = {
    "copsd.py": 800,
    "eval.py": 450,
    "kernels.py": 320,
    "parts/sampler.py": 330,
    "parts/model.py": 280,
    "parts/data.py": 320,
    "parts/grading.py": 320,
    "parts/runs.py": 280,
    "parts/report.py": 350,
    # not in the first plan; LOG.md says why they are there
    "parts/benchmarks.py": 120,
    "parts/flags.py": 80,
    "parts/machine.py": 80,
    "parts/mathcheck.py": 100,
    "parts/metrics.py": 250,
}
SOURCES = [ROOT / name for name in CEILINGS]
FUNCTION_CEILING, LOOP_CEILING = 60, 90


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def ours(path: Path) -> set[str]:
    return {
        name
        for name in imports(path)
        if name.split(".")[0] in ("copsd", "eval", "kernels", "parts", "lab")
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_stay_within_their_ceilings(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= CEILINGS[path.relative_to(ROOT).as_posix()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            ceiling = (
                LOOP_CEILING if node.name in ("train_copsd", "train_grpo") else FUNCTION_CEILING
            )
            assert (node.end_lineno or 0) - node.lineno < ceiling, node.name
            assert node.name.startswith("_") or ast.get_docstring(node), (
                f"{node.name} has no docstring"
            )


def test_imports_point_one_way():
    parts = [*(ROOT / "parts").glob("*.py"), ROOT / "kernels.py"]
    assert all(not ours(path) for path in parts)
    assert {name.split(".")[0] for name in ours(ROOT / "eval.py")} == {"parts"}
    assert {name.split(".")[0] for name in ours(ROOT / "copsd.py")} == {"eval", "kernels", "parts"}


def test_copsd_does_not_know_the_lab():
    text = (ROOT / "copsd.py").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if "lab/" in line] == [
        line for line in text.splitlines() if line.strip().startswith("model: str = setting(")
    ]


def test_nothing_is_unpickled_and_no_remote_code_runs():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert (
            "torch.load" not in text
            and "pickle.load" not in text
            and "trust_remote_code=True" not in text
        )


def test_each_equation_of_the_readme_is_marked_where_it_is_computed():
    mapped = set(re.findall(r"Eq\. \((\d+)\)", README))
    computed = {
        number
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        for number in re.findall(r"# Eq\. \((\d+)\)", line)
    }
    assert mapped == computed != set()


@pytest.mark.parametrize(
    "name",
    ["kernels", "eval", "copsd"]
    + [
        f"parts.{name}"
        for name in (
            "sampler",
            "model",
            "data",
            "grading",
            "mathcheck",
            "metrics",
            "benchmarks",
            "tokens",
        )
    ],
)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def readme_commands(program: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"python {program}")]


@pytest.mark.parametrize("command", readme_commands("copsd.py"))
def test_copsd_commands_of_the_readme_run(command, tmp_path):
    arguments = shlex.split(command)[2:]
    if "Qwen2.5-1.5B" in arguments:
        pytest.skip("needs the hub; test_hub.py runs it against a local cache")
    if arguments[0] == "compare":
        arguments += [
            "--seeds",
            "1",
            "--sweep",
            "1",
            "--token-budget",
            "600",
            "--batch-size",
            "8",
            "--max-new-tokens",
            "30",
        ]
        arguments += [
            "--eval-problems",
            "4",
            "--eval-samples",
            "2",
            "--dev-problems",
            "4",
            "--out",
            str(tmp_path / "out"),
        ]
    if arguments[0] == "train":
        arguments += [
            "--steps",
            "1",
            "--batch-size",
            "8",
            "--eval-problems",
            "4",
            "--out",
            str(tmp_path / "run"),
        ]
    result = CliRunner().invoke(copsd.app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", readme_commands("eval.py"))
def test_eval_commands_of_the_readme_run(command, tmp_path):
    arguments = [
        argument.replace("evaluations/", f"{tmp_path}/") for argument in shlex.split(command)[2:]
    ]
    if "--adapter" in arguments:
        flags = [
            "--steps",
            "1",
            "--batch-size",
            "4",
            "--eval-problems",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
        assert CliRunner().invoke(copsd.app, ["train", *flags]).exit_code == 0
        arguments[arguments.index("--adapter") + 1] = str(tmp_path / "run")
    if arguments[0] == "report":
        for seed, folder in enumerate(arguments[1:]):
            made = ["--pass-at-k", "2", "--limit", "4", "--seed", str(seed), "--out", folder]
            assert CliRunner().invoke(evaluation.app, made).exit_code == 0
        arguments += ["--out", str(tmp_path / "report")]
    else:
        arguments += ["--limit", "4"]
    result = CliRunner().invoke(evaluation.app, arguments)
    assert result.exit_code == 0, result.output


def test_the_lab_recipe_gives_a_reason_for_each_difference():
    recipe = json.loads((ROOT / "lab" / "tiny" / "recipe.json").read_text(encoding="utf-8"))
    assert all(
        entry["why"] and entry.keys() - {"grpo"} == {"value", "why"} for entry in recipe.values()
    )
