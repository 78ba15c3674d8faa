"""parts/controls.py and the settings behind each control: a step trains on what its name says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import few_problems
from rich.console import Console
from typer.testing import CliRunner

import copsd
from copsd import SOURCES, completion_hidden, copsd_loss
from parts import commands, controls
from parts.experiments import ATTRIBUTION, COMPARISON, FAMILY
from parts.grading import is_correct
from parts.lora import teacher_view
from parts.model import head_weight
from parts.recipe import COMPLETIONS, METHODS
from parts.runs import Run
from parts.setup import Setup, configure, prepare
from parts.steps import draw_problems, rollout_seed
from parts.view import StepView

QUIET = Console(quiet=True)
SMALL = {"steps": 1, "batch_size": 6, "micro_batch": 4, "eval_problems": 0, "max_new_tokens": 48}


def make_setup(tmp_path: Path, **given) -> tuple[Setup, Run]:
    config, folder = configure({**SMALL, **few_problems(), "out": str(tmp_path / "run"), **given})
    return prepare(config, folder, QUIET)


def arm(name: str) -> dict:
    return next(v.settings for v in ATTRIBUTION.variants if v.name == name)


def text_of(setup: Setup, ids: list[int]) -> str:
    return str(setup.tokenizer.decode(ids))


def test_the_reference_is_the_solution_and_the_end_of_the_turn_behind_the_students_prompt(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("reference"))
    problems = setup.train[:5]
    write, _ = SOURCES["reference"]
    for problem, rollout in zip(problems, write(setup, problems, seed=1), strict=True):
        assert text_of(setup, rollout.completion_ids) == f"{problem.solution_en}<|im_end|>"
        assert rollout.prompt_ids == setup.student_prompt(problem)
        assert rollout.finish_reason == "stop" and math.isnan(rollout.logprobs[0])
        assert len(rollout.logprobs) == len(rollout.completion_ids)


def test_a_label_is_not_made_of_a_solution_that_is_not_there(tmp_path):
    """It was "None", and so was a word of the garbage."""
    setup, _ = make_setup(tmp_path)
    bare = replace(setup.train[0], solution_en=None)
    for write in (controls.reference_label, controls.garbage_label):
        with pytest.raises(ValueError, match="has no English solution to be learned as a label"):
            write(setup, [bare], seed=0)


def test_a_label_is_cut_where_a_completion_of_the_student_is(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("reference"), max_new_tokens=7)
    (rollout,) = controls.reference_label(setup, setup.train[:1], seed=0)
    assert len(rollout.completion_ids) == 7 and rollout.finish_reason == "length"


def test_garbage_is_another_solutions_words_in_disorder_and_the_right_box(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("format"))
    plain, _ = make_setup(tmp_path / "plain")
    own = {problem.id: problem for problem in plain.train}
    write, _ = SOURCES["garbage"]
    problems = setup.train[:5]
    for problem, rollout in zip(problems, write(setup, problems, seed=1), strict=True):
        text = text_of(setup, rollout.completion_ids).removesuffix("<|im_end|>")
        *words, box = text.split(" ")
        assert box == f"\\boxed{{{problem.answer}}}" and is_correct(text, str(problem.answer))
        whole = [word for word in str(problem.solution_en).split() if "boxed" not in word]
        assert sorted(words) == sorted(whole) and words != whole
        assert problem.solution_en != own[problem.id].solution_en
        assert problem.answer == own[problem.id].answer
    again = write(setup, problems, seed=1)
    other = write(setup, problems, seed=2)
    first = [r.completion_ids for r in write(setup, problems, seed=1)]
    assert first == [r.completion_ids for r in again] != [r.completion_ids for r in other]


def test_garbage_that_is_too_long_keeps_its_box_and_its_end(tmp_path):
    """The box stands last, and was what the length limit cut off: no format was left to learn."""
    setup, _ = make_setup(tmp_path, **arm("format"))
    problems = setup.train[:5]
    whole = controls.garbage_label(setup, problems, seed=1)
    for limit in (12, 16, 20):
        few = replace(setup, config=replace(setup.config, max_new_tokens=limit))
        for problem, long, rollout in zip(
            problems, whole, controls.garbage_label(few, problems, seed=1), strict=True
        ):
            ids = rollout.completion_ids
            text = text_of(setup, ids)
            assert len(ids) == limit < len(long.completion_ids) and rollout.finish_reason == "stop"
            assert text.endswith(f" \\boxed{{{problem.answer}}}<|im_end|>")
            assert ids[: limit - 9] == long.completion_ids[: limit - 9]


def test_hard_labels_lose_minus_the_log_probability_of_each_token(tmp_path):
    setup, _ = make_setup(tmp_path, completion="reference")
    rollouts = controls.reference_label(setup, setup.train[:3], seed=0)
    _, loss_of = SOURCES["reference"]
    loss_N, stats = loss_of(setup, [[0]] * 3, rollouts)  # no teacher's prompt is read
    expected = []
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.completion_ids
        logits_TV = setup.model(torch.tensor([ids])).logits[0].double()
        log_q_TV = (logits_TV / setup.config.temperature).log_softmax(-1)
        first = len(rollout.prompt_ids)
        expected += [-log_q_TV[place - 1, ids[place]] for place in range(first, len(ids))]
    torch.testing.assert_close(loss_N.double(), torch.stack(expected), atol=1e-4, rtol=0)
    assert torch.equal(stats["kl_N"], loss_N.detach())


def test_off_policy_completions_are_the_teachers_and_the_student_learns_its_distribution(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("off-policy"))
    with torch.no_grad():
        for tensor in setup.lora.parameters():
            tensor.add_(
                0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            )
    write, loss_of = SOURCES["teacher"]
    assert loss_of is copsd_loss
    problems = setup.train[:4]
    rollouts = write(setup, problems, seed=3)
    # The log-probs of the sampler are those of the fixed teacher behind its own prompt.
    completions = [rollout.completion_ids for rollout in rollouts]
    with teacher_view(setup.lora, "fixed"):
        hidden_ND = completion_hidden(
            setup.model, [setup.teacher_prompt(problem) for problem in problems], completions
        )
    ids_N = torch.tensor([token for ids in completions for token in ids])
    logits_NV = (hidden_ND @ head_weight(setup.model).T) / setup.config.temperature
    logprob_N = logits_NV.log_softmax(-1).gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)
    sampled_N = torch.tensor([logprob for r in rollouts for logprob in r.logprobs])
    torch.testing.assert_close(logprob_N.detach(), sampled_N, atol=1e-4, rtol=0)
    for problem, rollout in zip(problems, rollouts, strict=True):
        assert rollout.prompt_ids == setup.student_prompt(problem)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_step_trains_on_the_completions_that_it_logs(tmp_path, monkeypatch, completion):
    setup, run = make_setup(tmp_path, completion=completion)
    seen = []
    write, loss_of = SOURCES[completion]

    def spy(setup, prompts, rollouts, **options):
        seen.extend(rollouts)
        return loss_of(setup, prompts, rollouts, **options)

    monkeypatch.setitem(SOURCES, completion, (write, spy))
    copsd.train_copsd(setup, run, StepView(QUIET, 1))
    (row,) = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    problems = draw_problems(setup, 6, step=1)
    expected = write(setup, problems, seed=rollout_seed(setup.config, 1))
    if completion in ("reference", "garbage"):  # what the trained model would sample is another
        assert sorted(r.completion_ids for r in seen) == sorted(r.completion_ids for r in expected)
        assert row["score/tokens"] == row["update/tokens"]  # no teacher reads a label
    assert row["sampled_tokens"] == sum(len(r.completion_ids) for r in seen)
    assert row["update/grad_norm"] > 0


def test_the_teacher_of_the_answer_arm_reads_the_problem_and_the_answer_and_nothing_else(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("answer"))
    plain, _ = make_setup(tmp_path / "plain")
    for problem, whole in zip(setup.train[:5], plain.train[:5], strict=True):
        prompt = text_of(setup, setup.teacher_prompt(problem))
        assert whole.problem in prompt and f"\n\\boxed{{{whole.answer}}}\n" in prompt
        assert str(whole.problem_en) not in prompt and str(whole.solution_en) not in prompt


def test_the_other_teachers_read_what_their_arms_say(tmp_path):
    plain, _ = make_setup(tmp_path / "plain")
    english, _ = make_setup(tmp_path / "english", **arm("english-problem"))
    other, _ = make_setup(tmp_path / "other", **arm("other-solution"))
    for index, whole in enumerate(plain.train[:5]):
        prompt = text_of(english, english.teacher_prompt(english.train[index]))
        assert str(whole.problem_en) in prompt and str(whole.solution_en) not in prompt
        prompt = text_of(other, other.teacher_prompt(other.train[index]))
        following = plain.train[index + 1]
        assert str(whole.problem_en) in prompt and str(following.solution_en) in prompt
        assert whole.solution_en == following.solution_en or str(whole.solution_en) not in prompt


def test_the_english_arm_asks_in_english_only(tmp_path):
    setup, _ = make_setup(tmp_path, **arm("english"))
    drawn = draw_problems(setup, 6, step=1)
    assert all(p.language == "eng" and p.problem == p.problem_en for p in drawn)


def test_arms_have_names_of_their_own_and_the_family_a_line_a_method():
    for design in (COMPARISON, FAMILY, ATTRIBUTION):
        names = [variant.name for variant in design.variants]
        assert len(set(names)) == len(names) and "base" not in names
        assert {name for pair in design.pairs for name in pair} <= {"base", *names}
        assert not any(" - " in name for name in names)
    assert {variant.settings["method"] for variant in FAMILY.variants} == set(METHODS)
    assert len({v.settings.get("method", "copsd") for v in ATTRIBUTION.variants}) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "grpo", "--completion", "teacher"], "is a control of COPSD; valid: student"),
        (["--completion", "mine"], "unknown completion 'mine'; valid: student, teacher, reference"),
        (["--answer-only", "--swap-solutions"], "both replace the solution; leave one"),
        (["--answer-only", "--no-english-solution"], "shows the answer where"),
        (["--cosine-every", "-1"], "--cosine-every is -1; valid: 0 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(tmp_path, flags, said):
    out = tmp_path / "run"
    result = CliRunner().invoke(commands.copsd, ["train", *flags, "--out", str(out)])
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not out.exists()


def test_a_label_inside_a_thought_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("parts.setup.prompt_opens_think", lambda tokenizer, thinking: True)
    with pytest.raises(ValueError, match="valid with it: --thinking off"):
        make_setup(tmp_path, completion="reference")


def test_the_cosine_is_logged_at_the_steps_asked_for_and_changes_no_byte(tmp_path):
    adapters = []
    for every in (0, 2):
        setup, run = make_setup(
            tmp_path / str(every), clip_mode="entry", cosine_every=every, steps=3, lr=0.01
        )
        copsd.train_copsd(setup, run, StepView(QUIET, 3))
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line)["loss/clip_gradient_cosine"] for line in lines]
        if every:
            assert found[1] is None and all(-1 <= found[step] < 0.9 for step in (0, 2))
        else:
            assert found == [None, None, None]
        path = run.folder / "adapters" / "step_00003" / "adapter_model.safetensors"
        adapters.append(path.read_bytes())
    assert adapters[0] == adapters[1]
