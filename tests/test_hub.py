"""The command on a real model's name, against a local folder in the layout of the hub's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from parts.data import load_problems

ROOT = Path(__file__).resolve().parent.parent


def fill_cache(cache: Path, lab_folder: Path) -> None:
    """Lay out the lab's model as Qwen/Qwen2.5-1.5B and its problems as COPSD's training set.

    Both look as a download leaves them in the hub's cache.
    """
    model = cache / "models--Qwen--Qwen2.5-1.5B"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    ignored = shutil.ignore_patterns("recipe.json")  # a recipe is for local folders
    shutil.copytree(lab_folder, model / "snapshots" / "abc123", ignore=ignored)
    data = cache / "datasets--yihongLiu--COPSD-AfriMGSM-TrainDataset"
    (data / "refs").mkdir(parents=True)
    (data / "refs" / "main").write_text("def456")
    (data / "snapshots" / "def456" / "data").mkdir(parents=True)
    problems = load_problems(ROOT / "lab" / "problems" / "hau" / "train.jsonl", language="hau")[:60]
    columns = {
        "source": ["lab"] * len(problems),
        "problem": [p.problem_en for p in problems],
        "solution": [p.solution_en for p in problems],
        "Answer": [p.answer for p in problems],
        "problem_translated": [p.problem for p in problems],
        "language": ["Hausa"] * len(problems),
        "language_short": ["ha"] * len(problems),
    }
    pq.write_table(
        pa.table(columns), data / "snapshots" / "def456" / "data" / "hausa-00000-of-00001.parquet"
    )


def run_offline(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the project with nothing but a hub's cache to load from."""
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **offline},
    )


def test_the_readme_command_on_a_hub_model_runs_from_the_hub_cache(tmp_path, lab_folder):
    fill_cache(tmp_path / "cache", lab_folder)
    command = "copsd.py train --model Qwen2.5-1.5B --lang hau"  # as in the README
    small = "--steps 1 --batch-size 4 --eval-problems 4 --eval-samples 2 --max-new-tokens 24"
    arguments = [*command.split(), *small.split(), "--out", str(tmp_path / "run")]
    result = run_offline(arguments, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert "COPSD on Qwen2.5-1.5B, Hausa: 56 problems to train on, 4 held out" in result.stdout
    assert (tmp_path / "run" / "adapters" / "step_00001" / "adapter_model.safetensors").is_file()


def test_a_benchmark_from_the_hub_cache_is_evaluated_and_its_commit_recorded(tmp_path):
    repo = tmp_path / "cache" / "datasets--masakhane--afrimgsm"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("def456")
    for code, problem in {"hau": "Nawa ne 2 + {}?", "swa": "Ni ngapi 2 + {}?"}.items():
        folder = repo / "snapshots" / "def456" / "data" / code
        folder.mkdir(parents=True)
        header = "question\tanswer\tanswer_number\tequation_solution\n"
        rows = "".join(f"{problem.format(number)}\t\t{number + 2}\t\n" for number in range(250))
        (folder / "test.tsv").write_text(header + rows, encoding="utf-8")
    command = "eval.py --benchmark afrimgsm --lang hau,swa --greedy --limit 2"
    arguments = [*command.split(), "--out", str(tmp_path / "out")]
    result = run_offline(arguments, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    for code in ("hau", "swa"):
        record = json.loads((tmp_path / "out" / code / "settings.json").read_text(encoding="utf-8"))
        assert record["identity"]["data_revision"] == "def456"
        assert record["settings"]["benchmark"] == "afrimgsm"


def test_without_network_or_cache_the_hub_command_is_one_line(tmp_path):
    arguments = ["copsd.py", "train", "--model", "Qwen2.5-1.5B", "--out"]
    result = run_offline([*arguments, str(tmp_path / "run")], tmp_path / "empty")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model Qwen2.5-1.5B")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
