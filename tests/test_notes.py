"""Notes: what is sampled in a step for the teacher to read, as a plan, an explanation or a vote.

test_methods.py holds the members that read them; test_readings.py holds the wordings.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, write_file
from test_grpo import jsonl, nudge
from test_methods import make_setup, train
from typer.testing import CliRunner

import methods
from methods import read_notes, usable_text
from parts import commands, ranks
from parts.model import eos_ids
from parts.prompts import languages
from parts.readings import longest_readings, note_request
from parts.sampler import Rollout
from parts.setup import Setup
from parts.view import NO_NOTE


def test_a_plan_is_the_current_students_and_does_not_touch_the_rollouts(tmp_path):
    flags = {"divergence": "reverse_kl", "clip_mode": "none", "lr": 0.0}
    plain = train(tmp_path / "plain", **flags)
    planned = train(tmp_path / "plan", method="ophsd", note_tokens=16, lr=0.0)
    texts = [
        [row["completion"] for row in jsonl(each / "completions.jsonl")]
        for each in (plain, planned)
    ]
    assert texts[0] == texts[1], "plans have a random stream of their own"
    setup, _ = make_setup(tmp_path / "s", method="ophsd", note_tokens=16, top_k=1)
    problems = setup.train[:4]
    first = read_notes(setup, problems, 1)
    assert read_notes(setup, problems, 1).prompts == first.prompts
    nudge(setup, 0.3)
    assert read_notes(setup, problems, 1).prompts != first.prompts, "the student has changed"
    text = str(setup.tokenizer.decode(first.prompts[0]))
    assert "Tsari:" in text and f"kawai:\n{problems[0].answer}" in text
    assert str(problems[0].solution_en) not in text
    assert first.sampled_tokens > 0 and first.metrics["note/plain_frac"] == 0


def test_each_rank_asks_for_its_share_of_the_texts(tmp_path, monkeypatch):
    """Every rank wrote all of them, as slowly as one process does."""
    setup, _ = make_setup(tmp_path)
    prompts = [setup.student_prompt(problem) for problem in setup.train[:3]]
    whole = methods.write_apart(setup, prompts, step=1, limit=8, samples=2)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda items: items)
    shares = []
    for number in range(2):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        shares.append(methods.write_apart(setup, prompts, step=1, limit=8, samples=2))
    assert [len(share) for share in shares] == [1, 2]
    texts = [
        [rollout.completion_ids for group in groups for rollout in group]
        for groups in (whole, [*shares[0], *shares[1]])
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("note", ["", "  \n", "so <|im_end|> it"])
def test_a_plan_that_cannot_be_read_leaves_the_plain_prompt_and_is_counted(
    tmp_path, monkeypatch, note
):
    setup, _ = make_setup(tmp_path, method="ophsd")
    problems = setup.train[:2]
    good = setup.tokenizer.encode("Add both.", add_special_tokens=False)
    spelled = setup.tokenizer.encode(note, add_special_tokens=False)
    written = [
        [Rollout([5], ids or sorted(eos_ids(setup.model, setup.tokenizer))[:1], [0.0], "stop")]
        for ids in (good, spelled)
    ]
    monkeypatch.setattr(methods, "write_apart", lambda *a, **k: written)
    monkeypatch.setattr(
        Setup,
        "text_of",
        lambda _, rollout: note if rollout.completion_ids != good else "Add both.",
    )
    found = read_notes(setup, problems, 1)
    assert found.prompts[0] == setup.teacher_prompt(problems[0], "Add both.")
    assert found.prompts[1] == setup.student_prompt(problems[1])
    assert found.metrics["note/plain_frac"] == 0.5


def test_a_plan_that_would_not_fit_leaves_the_plain_prompt(tmp_path, monkeypatch):
    setup, _ = make_setup(tmp_path, method="ophsd")
    monkeypatch.setattr(methods, "usable_text", lambda *_: "a b c " * 300)
    found = read_notes(setup, setup.train[:2], 1)
    assert found.prompts == [setup.student_prompt(problem) for problem in setup.train[:2]]
    assert found.metrics["note/plain_frac"] == 1


def test_problems_whose_plan_might_not_fit_are_left_out_before_the_run(tmp_path):
    setup, _ = make_setup(tmp_path, method="ophsd", note_tokens=40)
    problem = setup.train[0]
    with_plan, request = longest_readings(setup.config, problem, setup.tokenizer)
    assert with_plan == len(setup.teacher_prompt(problem, ".")) + 40
    asked = note_request(setup.config, problem, setup.tokenizer)
    room = setup.config.max_new_tokens
    assert asked is not None and request + room == len(asked) + 40
    for tokens in (440, 10**12):  # of the latter a list would fill the memory
        with pytest.raises(ValueError, match=r"no problem fits .*--note-tokens"):
            make_setup(tmp_path / "long", method="ophsd", note_tokens=tokens)


def test_thoughts_are_no_part_of_a_note(tmp_path, monkeypatch):
    setup, _ = make_setup(tmp_path)
    monkeypatch.setattr(Setup, "opens_think", True)
    rollout = Rollout([5], [6], [0.0], "stop")
    for said, left in (("a</think> b", "b"), ("never closed", "")):
        monkeypatch.setattr(Setup, "text_of", lambda *_, said=said: said)
        assert usable_text(setup, rollout) == left
    # A thought that the model opened by itself was shown to the teacher whole.
    monkeypatch.setattr(Setup, "opens_think", False)
    for said, left in (("<think>a</think> b", "b"), ("<think>never closed", ""), ("b", "b")):
        monkeypatch.setattr(Setup, "text_of", lambda *_, said=said: said)
        assert usable_text(setup, rollout) == left


def thinking_model(folder: Path) -> str:
    """Write the lab's model with a template that opens a think block, which it never closes."""
    shutil.copytree(ROOT / "lab" / "tiny", folder)
    template = folder / "chat_template.jinja"
    opens = "{% if not (enable_thinking is defined and not enable_thinking) %}<think>\n{% endif %}"
    ends = template.read_text(encoding="utf-8").rpartition("{% endif %}")
    write_file(folder, template.name, f"{ends[0]}{opens}{ends[1]}")
    return str(folder)


@pytest.mark.parametrize("reads", ["plan", "explained"])
def test_a_thought_that_fills_every_note_is_said_once(tmp_path, reads):
    """The teacher read what the student read, the loss was 0, and nothing was said."""
    flags = ["--model", thinking_model(tmp_path / "model"), "--teacher-reads", reads]
    flags += ["--data", str(ROOT / "lab/problems/hau/train.jsonl"), "--note-tokens", "16"]
    flags += ["--clip-mode", "entry"]
    short = ["--steps", "2", "--batch-size", "4", "--eval-problems", "0", "--cosine-every", "1"]
    out = ["--out", str(tmp_path / "run")]
    trained = CliRunner().invoke(commands.copsd, ["train", *flags, *short, *out])
    assert trained.exit_code == 0, trained.output
    assert trained.stdout.count(f"step 1: {NO_NOTE}") == trained.stdout.count(NO_NOTE) == 1
    assert all(words in NO_NOTE for words in ("--note-tokens", "--thinking off"))
    rows = jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["loss/objective_nats_per_token"] for row in rows] == [0.0, 0.0]
    shown = CliRunner().invoke(commands.copsd, ["show", *flags])
    assert shown.exit_code == 0 and NO_NOTE in shown.stdout, shown.output
    assert "clip of 0.05 nats: none, for one of them is 0" in shown.stdout
    # The remedy that it names.
    off = CliRunner().invoke(commands.copsd, ["show", *flags, "--thinking", "off"])
    assert off.exit_code == 0 and NO_NOTE not in off.stdout, off.output


def test_an_explanation_is_the_teachers_and_stands_beside_the_solution(tmp_path):
    setup, _ = make_setup(tmp_path, teacher_reads="explained", note_tokens=16, top_k=1)
    problem = setup.train[0]
    first = read_notes(setup, [problem], 1)
    text = str(setup.tokenizer.decode(first.prompts[0]))
    assert str(problem.solution_en) in text and "Why it is right:" in text
    nudge(setup, 0.3)
    assert read_notes(setup, [problem], 1).prompts == first.prompts, "the teacher is fixed"


def test_an_explanation_is_asked_for_without_the_english_problem_where_that_is_not_shown(tmp_path):
    """The one who explains read it all the same, or a problem that was called "None"."""
    asked = {}
    for shown in (True, False):
        given = {"teacher_reads": "explained", "english_problem": shown}
        setup, _ = make_setup(tmp_path / str(shown), **given)
        problem = setup.train[0]
        request = note_request(setup.config, problem, setup.tokenizer)
        asked[shown] = str(setup.tokenizer.decode(request or []))
        assert problem.problem in asked[shown] and str(problem.solution_en) in asked[shown]
    label = languages()["hau"].english_problem_label
    block = f"{label}\n{problem.problem_en}\n\n"
    assert block in asked[True] and asked[False] == asked[True].replace(block, "")


def test_the_answer_that_most_attempts_agree_on_takes_the_solutions_place(tmp_path, monkeypatch):
    setup, _ = make_setup(tmp_path, teacher_reads="voted", vote_samples=3)
    first, second = setup.train[:2]
    said = [[r"\boxed{7}", r"\boxed{41}", r"so \boxed{41.0}"], ["none", "none", "none"]]
    written = [[Rollout([5], [index], [0.0], "stop") for index in (0, 1, 2)] for _ in said]
    texts = iter(text for row in said for text in row)
    monkeypatch.setattr(methods, "write_apart", lambda *a, **k: written)
    monkeypatch.setattr(methods, "usable_text", lambda *_: next(texts))
    found = methods.read_votes(setup, [replace(first, answer="41"), second], 1)
    text = str(setup.tokenizer.decode(found.prompts[0]))
    assert "Most attempts give the answer 41." in text and str(first.solution_en) not in text
    assert found.prompts[1] == setup.student_prompt(second)
    assert found.sampled_tokens == 6 and found.metrics["vote/right_frac"] == 0.5
    assert found.metrics["note/plain_frac"] == 0.5


def test_answers_that_votes_are_graded_by_are_tried_before_the_run(tmp_path, monkeypatch):
    """Or a missing math-verify would be found out in the middle of it."""
    checked = []
    monkeypatch.setattr("parts.setup.check_answers", checked.extend)
    setup, _ = make_setup(tmp_path, teacher_reads="voted")
    assert {*setup.train} <= {*checked}


LONG = " ".join(["abc"] * 99)  # an answer that does not fit


@pytest.mark.parametrize(
    ("said", "gold", "reads", "right"),
    [
        (r"\boxed{1, 2}", "1, 2", "give the answer 1, 2.", 1),
        (r"\boxed{x = \sqrt{12}}", r"2\sqrt{3}", None, 1),
        (r"\boxed{4}", "9" * 500, "give the answer 4.", None),
        (r"\boxed{＜|im_end|＞}", "4", "", 0),
        (rf"\boxed{{{LONG}}}", "4", "", 0),
    ],
    ids=["several", "equal", "ungradable", "control", "long"],
)
def test_a_vote_is_graded_and_shown_only_where_it_can_be_read(
    tmp_path, monkeypatch, said, gold, reads, right
):
    """A control token that the normal form spelled ended the run; "1, 2" was never right."""
    setup, _ = make_setup(tmp_path, teacher_reads="voted")
    monkeypatch.setattr(
        methods, "write_apart", lambda *a, **k: [[Rollout([5], [6], [0.0], "stop")]]
    )
    monkeypatch.setattr(methods, "usable_text", lambda *_: said)
    long = setup.teacher_prompt(setup.train[0], LONG)
    monkeypatch.setattr(
        methods, "context_length", lambda _: len(long) - 1 + setup.config.max_new_tokens
    )
    problem = replace(setup.train[0], answer=gold)
    found = methods.read_votes(setup, [problem], 1)
    assert found.metrics["vote/right_frac"] == right
    assert found.metrics["note/plain_frac"] == (reads == "")
    if reads == "":
        assert found.prompts == [setup.student_prompt(problem)]
    else:
        assert (reads or "Most attempts") in str(setup.tokenizer.decode(found.prompts[0]))
