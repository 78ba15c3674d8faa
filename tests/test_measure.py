"""parts/measure.py: the one way from problems to graded attempts, and the tables at both ends."""

import doctest
import io
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from rich.console import Console

from parts import grading, measure
from parts.data import load_problems
from parts.files import read_json, write_json
from parts.grading import grade
from parts.measure import Ruler, check_answers, evaluate, measure_languages, text_language
from parts.metrics import Estimate, Graded, summarise
from parts.model import load_model, load_tokenizer
from parts.prompts import Problem, build_prompt, pose_in_english
from parts.recipe import Config
from parts.sampler import SamplingParams
from parts.setup import configure

RULER = Ruler(
    max_new_tokens=40,
    temperature=1.0,
    top_p=0.95,
    samples=2,
    seed=0,
    thinking="auto",
    max_rows=256,
)


@pytest.fixture(scope="module")
def lab():
    """The lab model, its tokenizer, and four of its problems."""
    folder = ROOT / "lab" / "tiny"
    model = load_model(folder, device="cpu", dtype=torch.float32)
    problems = load_problems(ROOT / "lab" / "problems" / "hau" / "test.jsonl", language="hau")
    return model, load_tokenizer(folder), problems[:4]


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_doctests():
    result = doctest.testmod(measure)
    assert result.failed == 0 and result.attempted >= 1


@pytest.mark.parametrize("answer", [None, "", " ", "1" * 5000])
def test_a_gold_that_cannot_be_graded_is_an_error_naming_the_problem(answer):
    with pytest.raises(ValueError, match=r"'p7'.*cannot be graded"):
        check_answers([Problem("p7", "?", None, None, answer, "hau")])


@pytest.mark.parametrize("broken", ["raise ImportError", "parse = verify = print"])
def test_math_verify_is_tried_before_work_begins_where_an_answer_needs_it(
    tmp_path, monkeypatch, broken
):
    """It was missed in the middle of a run, with a traceback."""
    monkeypatch.setattr(grading, "_idle_workers", [])
    text = Problem("p7", "?", None, None, r"2\sqrt{3}", "hau")
    check_answers([text])
    (worker,) = grading._idle_workers
    worker.kill()
    worker.communicate()
    monkeypatch.setattr(grading, "_idle_workers", [])
    (tmp_path / "math_verify.py").write_text(f"LatexExtractionConfig = dict\n{broken}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_answers([replace(text, answer="18")])
    with pytest.raises(OSError, match=r"math-verify does not .*pip install"):
        check_answers([text])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Mun sami 19 + 13 = 32. Amsar ita ce \\boxed{32}.", "hau"),
        ("Tunapata 19 + 13 = 32. Jibu ni \\boxed{32}.", "swa"),
        ("A rí 19 + 13 = 32. Ìdáhùn ni \\boxed{32}.", "yor"),
        ("First 19 + 13 = 32. The answer is \\boxed{32}.", "eng"),
        ("በመጀመሪያ 19 እና 13 እንደምራለን፤ ከዚያ ውጤቱን በሁለት እናካፍላለን፤ ስለዚህ መልሱ አስራ ስድስት ነው።", "amh"),
        (
            "我们先把两个数加起来，然后从总数里减去卖掉的鸡蛋，所以一共还剩下十八个鸡蛋，答案是十八。",
            "zho",
        ),
        ("x = 5, y = 3, 5 \\times 3 = 15 \\Rightarrow \\boxed{15}", "unknown"),
        ("Ɛyɛ sɛ yɛbɛhwɛ sɛnea nkosua no dodow te ansa na yɛakan.", "twi"),
        ("Hena awu legbe ɖeka la, wohiã ka blɔ babla 2 ƒe afã", "ewe"),
        ("ꕉꕜꕮ ꔔꘋ ꖸ ꔰ ꗋꘋ 18", "vai"),
        ("Nous avons donc dix-huit oeufs, et la réponse est la somme des deux.", "fra"),
        ("\\frac{1}{2} + \\frac{1}{3} = \\boxed{\\frac{5}{6}}", "unknown"),
        ("", "unknown"),
        ("\0\x1b[0m\ud800\ufffe", "unknown"),
    ],
)
def test_the_language_of_a_text_is_told_or_said_to_be_unknown(text, language):
    assert text_language(text) == language


def test_no_text_can_break_the_language_identifier():
    stream = random.Random(3)
    for length in range(300):
        text_language("".join(chr(stream.randrange(0x110000)) for _ in range(length)))


def test_an_attempt_holds_what_the_grader_and_the_sampler_said(lab):
    model, tokenizer, problems = lab
    params = SamplingParams(40, 1.0, 0.95, seed=7)
    results = evaluate(model, tokenizer, problems, params, samples=2, first_index=5)
    assert [result.id for result in results] == [problem.id for problem in problems]
    for place, (problem, result) in enumerate(zip(problems, results, strict=True), start=5):
        assert (result.language, result.problem) == ("hau", problem.problem)
        assert (result.gold, result.level) == (problem.answer, None)
        assert [attempt.seed for attempt in result.attempts] == [f"7/{place}/0", f"7/{place}/1"]
        for attempt in result.attempts:
            verdict = asdict(grade(attempt.completion, result.gold))
            assert {name: getattr(attempt, name) for name in verdict} == verdict
            assert attempt.language == text_language(attempt.completion)
            assert 1 <= attempt.tokens <= 40
            # No control token is left in the text that is graded.
            assert not any(token in attempt.completion for token in tokenizer.all_special_tokens)
    assert len({result.prompt_hash for result in results}) == len(problems)


def test_a_problems_attempts_depend_on_its_place_and_not_on_its_company(lab):
    model, tokenizer, problems = lab
    params = SamplingParams(40, 1.0, 0.95, seed=7)
    together = evaluate(model, tokenizer, problems, params, samples=2, max_rows=3)
    alone = evaluate(model, tokenizer, problems[2:3], params, samples=2, first_index=2)
    assert alone == together[2:3]
    elsewhere = evaluate(model, tokenizer, problems[2:3], params, samples=2, first_index=3)
    assert elsewhere[0].attempts != alone[0].attempts


def test_polymaths_levels_are_read_from_its_ids(lab):
    model, tokenizer, problems = lab
    names = ["low-en-1", "top-en-0", "topmost-1", "3"]
    rows = [replace(row, id=name) for row, name in zip(problems, names, strict=True)]
    results = evaluate(model, tokenizer, rows, SamplingParams(1, 0.0, 0.95))
    assert [result.level for result in results] == ["low", "top", None, None]


def test_the_question_is_the_students_prompt(lab, monkeypatch):
    model, tokenizer, problems = lab
    asked = []
    plain = measure.sample

    def listening(model, prompts, *rest, **options):
        asked.extend(prompts)
        return plain(model, prompts, *rest, **options)

    monkeypatch.setattr(measure, "sample", listening)
    evaluate(model, tokenizer, problems, SamplingParams(1, 0.0, 0.95))
    assert asked == [build_prompt(problem, "hau", tokenizer) for problem in problems]


def test_a_ruler_is_what_the_settings_say_and_greedy_is_one_attempt(lab):
    model, tokenizer, problems = lab
    config = Config(max_new_tokens=40, eval_samples=2, sample_rows=256, seed=9)
    assert Ruler.of(config, seed=0) == RULER
    config = replace(config, eval_temperature=0.7, eval_top_p=0.5, thinking="off", sample_rows=3)
    assert Ruler.of(config, seed=4) == Ruler(40, 0.7, 0.5, 2, 4, "off", 3)
    greedy = RULER.measure(model, tokenizer, problems, greedy=True)
    sampled = RULER.measure(model, tokenizer, problems, greedy=False)
    assert [len(result.attempts) for result in (*greedy, *sampled)] == [1] * 4 + [2] * 4
    other = replace(RULER, temperature=0.3, top_p=0.5, samples=8)
    assert other.measure(model, tokenizer, problems, greedy=True) == greedy
    assert sampled == evaluate(
        model, tokenizer, problems, SamplingParams(40, 1.0, 0.95, seed=0), samples=2
    )


def test_both_ends_of_training_show_the_summary_of_the_very_attempts(lab):
    model, tokenizer, problems = lab
    columns = measure_languages(model, tokenizer, problems, RULER, quiet(), "before training")
    greedy = summarise(RULER.measure(model, tokenizer, problems, greedy=True), [1])
    sampled = summarise(RULER.measure(model, tokenizer, problems, greedy=False), [1, 2])
    posed = pose_in_english(problems, 1.0)
    english = summarise(RULER.measure(model, tokenizer, posed, greedy=True), [1])
    assert columns["hau"] == {measure.GREEDY_NAME: greedy["pass@1"], **sampled}
    # In English nothing is sampled: every metric is of the greedy attempts, and is called so.
    shown = {name: english[name] for name in measure.ENGLISH_METRICS}
    named = {measure.GREEDY_NAME: english["pass@1"], **shown}
    assert columns["eng"] == named
    assert next(iter(columns["eng"])) == measure.GREEDY_NAME


def test_english_is_measured_beside_another_language_where_the_data_has_it(lab, monkeypatch):
    model, tokenizer, problems = lab
    asked: list[tuple[str, bool, int]] = []

    def answered(self, model, tokenizer, posed, *, greedy, on_progress=None) -> list[Graded]:
        asked.append((posed[0].language, greedy, len(posed)))
        return [_right(problem, 1 if greedy else 2) for problem in posed]

    monkeypatch.setattr(Ruler, "measure", answered)

    def languages_of(posed: list[Problem]) -> list[str]:
        return list(measure_languages(model, tokenizer, posed, RULER, quiet(), "before"))

    bare = [replace(problem, problem_en=None) for problem in problems]
    assert languages_of(problems) == ["hau", "eng"]
    assert asked == [("hau", True, 4), ("hau", False, 4), ("eng", True, 4)]
    assert languages_of([*bare[:3], problems[3]]) == ["hau", "eng"]
    assert asked[-1] == ("eng", True, 1)  # only those that have an English side
    assert languages_of(bare) == ["hau"]
    assert languages_of(pose_in_english(problems, 1.0)) == ["eng"]


def _right(problem: Problem, attempts: int) -> Graded:
    """Return a problem whose attempts all are right, without asking any model."""
    text = f"Amsar ita ce \\boxed{{{problem.answer}}}."
    verdict = asdict(grade(text, str(problem.answer)))
    attempt = measure.Attempt(
        completion=text, **verdict, tokens=3, finish_reason="stop", language="hau", seed="0/0/0"
    )
    return Graded(
        problem.id, problem.language, problem.problem, "1", "abc", None, [attempt] * attempts
    )


def test_an_evaluation_comes_back_from_the_run_folder_as_it_was():
    estimate = Estimate(0.1 + 0.2, 1 / 3, 2 / 3)
    columns = {"hau": {"pass@1": estimate, "mean tokens": Estimate(4.0, 3.0, 5.0)}, "eng": {}}
    stored = json.loads(json.dumps(measure.plain_columns(columns)))
    assert measure.read_columns(stored) == columns


def test_before_and_after_stand_side_by_side_in_a_table_a_language():
    before = {
        "hau": {"greedy accuracy": Estimate(0.25, 0.2, 0.3), "old": Estimate(1.0, 1.0, 1.0)},
        "eng": {"greedy accuracy": Estimate(0.5, 0.4, 0.6)},
    }
    after = {
        "hau": {"greedy accuracy": Estimate(0.75, 0.7, 0.8)},
        "eng": {"greedy accuracy": Estimate(0.45, 0.4, 0.5)},
    }
    before["hau"][measure.KL_NAME] = after["hau"][measure.KL_NAME] = Estimate(0.1, 0.0, 0.2)
    stream = io.StringIO()
    config = Config(divergence="jsd")
    measure.print_change(before, after, Console(file=stream, width=100), config)
    said = stream.getvalue()
    assert "JSD to the teacher, nats/token" in said and measure.KL_NAME not in said
    assert measure.KL_NAME in before["hau"], "results keep their names"
    assert said.index("Hausa") < said.index("English")
    row = next(line for line in said.splitlines() if "greedy accuracy" in line)
    assert row.index("0.250 [0.200, 0.300]") < row.index("0.750 [0.700, 0.800]")
    assert said.splitlines()[-2:] == [
        "Hausa: greedy accuracy 0.250 before, 0.750 after",
        "English: greedy accuracy 0.500 before, 0.450 after",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "forward KL to the teacher"),
        ({"method": "grpo"}, "forward KL to the teacher"),
        ({"method": "opsdc"}, "reverse KL to the teacher"),
        ({"method": "ophsd"}, "reverse KL to the teacher with the solution"),
        ({"method": "ssopd"}, "forward KL to the teacher with the solution"),
        ({"teacher_reads": "voted"}, "forward KL to the teacher with the solution"),
        ({"swap_solutions": True}, "forward KL to the teacher with the solution"),
        ({"answer_only": True}, "forward KL to the teacher with the solution"),
        ({"english_solution": False}, "forward KL to the teacher"),
    ],
)
def test_the_title_says_which_divergence_it_is_and_what_another_teacher_reads(given, said):
    """All were called the KL to the teacher."""
    config, _ = configure({**given, "out": "runs/x"})
    assert measure.kl_title(config) == f"{said}, nats/token"


def test_without_the_detector_the_language_is_unknown_and_its_metrics_have_no_value(monkeypatch):
    monkeypatch.setattr(measure, "language_detector", lambda: None)
    assert measure.text_language("Jibu ni mayai kumi na nane.") == "unknown"
    problem = Problem("0", "?", None, None, "1", "swa")
    found = _right(problem, 2)
    unknown = replace(found, attempts=[replace(a, language="unknown") for a in found.attempts])
    known = replace(found, attempts=[replace(a, language="swa") for a in found.attempts])
    for results, value in (([known], 1.0), ([unknown], math.nan), ([known, unknown], 0.5)):
        summary = summarise(results, [1])
        assert summary["in the problem's language"].value == pytest.approx(value, nan_ok=True)
        english = math.nan if math.isnan(value) else 0.0
        assert summary["in English"].value == pytest.approx(english, nan_ok=True)


@pytest.mark.parametrize(
    "stored",
    [{"hau": 3}, {"hau": {}}, {"hau": {measure.GREEDY_NAME: {"value": 1.0}}}, {"hau": {"x": None}}],
)
def test_a_damaged_table_is_refused_with_its_file(stored):
    with pytest.raises(ValueError, match=r"before.json is damaged"):
        measure.check_columns(stored, Path("before.json"))


def test_a_table_with_a_value_that_is_nan_comes_back_from_its_file(tmp_path):
    columns = {"hau": {measure.GREEDY_NAME: Estimate(0.5, math.nan, math.nan)}}
    write_json(tmp_path / "before.json", measure.plain_columns(columns))
    stored = read_json(tmp_path / "before.json")
    measure.check_columns(stored, tmp_path / "before.json")
    found = measure.read_columns(stored)["hau"][measure.GREEDY_NAME]
    assert found.value == 0.5 and math.isnan(found.low) and math.isnan(found.high)
