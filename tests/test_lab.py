"""The lab: what is held out is held out, languages are aligned, and the model has its gap."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from eval import evaluate, summarise
from lab.problems import (
    KNOWN_WORDING,
    LANGUAGES,
    NEW_WORDING,
    TARGETS,
    Drawn,
    draw_training,
    equations,
    slipped,
    solution,
    words,
    write_problems,
)
from parts.data import build_prompt, load_problems
from parts.grading import is_correct
from parts.model import load_model, load_tokenizer
from parts.sampler import SamplingParams, sample

PROBLEMS = Path(__file__).resolve().parent.parent / "lab" / "problems"


def rows(language: str, name: str) -> list[dict]:
    text = (PROBLEMS / language / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def pairs(name: str) -> set[tuple[str, tuple[int, ...]]]:
    return {(row["template"], tuple(row["numbers"])) for row in rows("eng", name)}


def test_test_problems_share_no_template_and_numbers_with_anything_trained_on():
    assert len(pairs("test")) == 250
    assert len(pairs("train")) == 500
    assert not pairs("test") & pairs("train")
    rng = random.Random(0)  # of the stream that the base model was trained on
    stream = [draw_training(rng) for _ in range(20_000)]
    assert not pairs("test") & {(drawn.template, drawn.numbers) for drawn in stream}
    assert all(Drawn(template, numbers, "", "", 0).held_out for template, numbers in pairs("test"))


def test_nothing_trains_on_the_new_wordings():
    assert len(NEW_WORDING) == 2
    assert len(KNOWN_WORDING) >= 12
    assert {template for template, _ in pairs("new_wording")} == set(NEW_WORDING)
    assert {template for template, _ in pairs("train") | pairs("test")} == set(KNOWN_WORDING)
    rng = random.Random(0)
    assert {draw_training(rng).template for _ in range(2_000)} == set(KNOWN_WORDING)


@pytest.mark.parametrize("name", ["train", "test", "new_wording"])
def test_languages_are_aligned_row_by_row(name):
    english = rows("eng", name)
    for language in TARGETS:
        for row, other in zip(rows(language, name), english, strict=True):
            for field in ("id", "problem", "solution", "answer", "template", "numbers"):
                assert row[field] == other[field]
            shown = re.findall(r"\d+", row["problem_translated"])
            assert sorted(shown) == sorted(map(str, row["numbers"]))
            assert row["problem_translated"] != other["problem_translated"]


def test_a_slip_goes_on_consistently_and_its_wrong_sum_is_not_learned():
    rng = random.Random(2)
    for _ in range(500):
        drawn = draw_training(rng)
        pieces = slipped(drawn, "eng", rng)
        text = "".join(piece for piece, _ in pieces)
        sums = re.findall(r"(\d+ [-+*] \d+) = (\d+)", text)
        assert all(eval(left) == int(right) for left, right in sums)
        assert text.endswith(f"\\boxed{{{sums[-1][1]}}}.")
        first_text, first_is_learned = pieces[0]
        assert first_text.endswith(sums[0][0])
        assert not first_is_learned
        _, last_is_learned = pieces[-1]
        assert last_is_learned


def test_solutions_are_right():
    rng = random.Random(1)
    for _ in range(500):
        drawn = draw_training(rng)
        for text, value in equations(drawn):
            left, right = text.split(" = ")
            assert eval(left) == int(right) == value >= 1  # digits and operators of our own making
        for language in LANGUAGES:
            assert f"\\boxed{{{equations(drawn)[-1][1]}}}" in solution(drawn, language)
            assert drawn.name in words(drawn, language) or "{name}" not in drawn.template


def test_the_files_are_what_the_seed_makes(tmp_path):
    write_problems(tmp_path, seed=0)
    for path in tmp_path.rglob("*.jsonl"):
        assert path.read_bytes() == (PROBLEMS / path.relative_to(tmp_path)).read_bytes()


def test_the_lab_is_small(lab_folder):
    size = sum(path.stat().st_size for path in lab_folder.parent.rglob("*") if path.is_file())
    assert size <= 8 * 2**20
    model = load_model(lab_folder, device="cpu", dtype=torch.float32)
    assert model.num_parameters() <= 2_000_000
    assert model.config.model_type in ("qwen2", "qwen3")


def test_the_gap_is_there(lab_folder):
    model = load_model(lab_folder, device="cpu", dtype=torch.float32)
    tokenizer = load_tokenizer(lab_folder)
    accuracy = {}
    for language in LANGUAGES:
        problems = load_problems(PROBLEMS / language / "test.jsonl", language=language)
        results = evaluate(model, tokenizer, problems, SamplingParams(64, temperature=0.0))
        accuracy[language] = summarise(results, [1])["pass@1"].value
    assert accuracy["eng"] >= 0.8
    assert all(accuracy[language] <= 0.4 for language in TARGETS)


@pytest.mark.parametrize("language", TARGETS)
def test_with_the_teachers_prompt_the_gap_is_gone(lab_folder, language):
    model = load_model(lab_folder, device="cpu", dtype=torch.float32)
    tokenizer = load_tokenizer(lab_folder)
    problems = load_problems(PROBLEMS / language / "test.jsonl", language=language)
    prompts = [build_prompt(problem, language, tokenizer, role="teacher") for problem in problems]
    groups = sample(model, prompts, SamplingParams(64, temperature=0.0), eos_ids={2})
    texts = [str(tokenizer.decode(rollouts[0].completion_ids)) for rollouts in groups]
    right = [
        is_correct(text, str(problem.answer)) for text, problem in zip(texts, problems, strict=True)
    ]
    assert sum(right) >= 0.95 * len(right)
