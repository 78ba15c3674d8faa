"""The lab: what is held out is held out, languages are aligned, and the model has its gap."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import evaluate, summarise
from lab.build import prompt_of
from lab.problems import (
    KNOWN_WORDING,
    LANGUAGES,
    NEW_WORDING,
    TARGETS,
    Drawn,
    brief_solution,
    draw_training,
    equations,
    plan,
    slipped,
    solution,
    words,
    write_problems,
)
from parts.data import build_prompt, load_problems
from parts.grading import is_correct
from parts.model import load_model, load_tokenizer
from parts.sampler import Rollout, SamplingParams, sample

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


def test_a_solution_has_many_wordings_and_they_tell_nothing_of_each_other():
    rng = random.Random(3)
    drawn = draw_training(rng)
    ways = {solution(drawn, "hau", again=again) for again in range(50)}
    assert len(ways) > 45
    openings = {language: [] for language in LANGUAGES}
    for _ in range(2000):
        drawn = draw_training(rng)
        for language in LANGUAGES:
            openings[language].append(solution(drawn, language).split()[0])
    english, hausa = openings["eng"], openings["hau"]
    together = [h for e, h in zip(english, hausa, strict=True) if e == english[0]]
    assert len(set(together)) > 5  # of eight: whoever knows one knows nothing of the other


def test_a_brief_solution_has_the_sums_and_no_word():
    rng = random.Random(4)
    for _ in range(200):
        drawn = draw_training(rng)
        text = brief_solution(drawn)
        assert re.findall(r"[a-z]+", text) == ["boxed"]
        assert is_correct(text, str(equations(drawn)[-1][1]))


def test_a_plan_has_the_steps_and_not_their_results():
    two_sales = Drawn("two_sales", (30, 12, 5), "", "", 0)
    assert plan(two_sales) == "30 - 12, _ - 5"
    assert plan(Drawn("change", (90, 4, 7), "", "", 0)) == "4 * 7, 90 - _"


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


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    folder = PROBLEMS.parent / "tiny"
    model = load_model(folder, device="cpu", dtype=torch.float32)
    return model, load_tokenizer(folder)


def attempts(lab, kind: str, language: str, temperature: float, count: int = 250) -> list[Rollout]:
    model, tokenizer = lab
    problems = load_problems(PROBLEMS / language / "test.jsonl", language=language)[:count]
    facts = rows(language, "test")[:count]
    drawns = [Drawn(row["template"], tuple(row["numbers"]), "", "", 0) for row in facts]
    prompts = [
        prompt_of(kind, problem, drawn, tokenizer)
        for problem, drawn in zip(problems, drawns, strict=True)
    ]
    groups = sample(model, prompts, SamplingParams(64, temperature), eos_ids={2})
    return [rollout for (rollout,) in groups]


@pytest.mark.parametrize("language", TARGETS)
@pytest.mark.parametrize("kind", ["privileged", "planned", "witnessed"])
def test_with_what_a_teacher_reads_the_gap_is_gone(lab, kind, language):
    written = attempts(lab, kind, language, 0.0, count=120)
    texts = [str(lab[1].decode(rollout.completion_ids)) for rollout in written]
    answers = [row["answer"] for row in rows(language, "test")[:120]]
    right = [is_correct(text, answer) for text, answer in zip(texts, answers, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_the_teacher_is_as_unsure_of_a_word_as_a_real_one(lab):
    written = attempts(lab, "privileged", "hau", 1.0)
    logprobs = [logprob for rollout in written for logprob in rollout.logprobs]
    assert -sum(logprobs) / len(logprobs) >= 0.25  # nats a token: its entropy, on what it writes


@pytest.mark.parametrize("language", ["eng", "hau"])
def test_asked_to_be_brief_it_is(lab, language):
    lengths = [
        len(rollout.completion_ids) for rollout in attempts(lab, "brief", language, 0.0, count=50)
    ]
    model, tokenizer = lab
    problems = load_problems(PROBLEMS / language / "test.jsonl", language=language)[:50]
    prompts = [build_prompt(problem, language, tokenizer) for problem in problems]
    alone = sample(model, prompts, SamplingParams(64, 0.0), eos_ids={2})
    assert sum(lengths) < 0.8 * sum(len(rollout.completion_ids) for (rollout,) in alone)
