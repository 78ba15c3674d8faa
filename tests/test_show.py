"""show.py: one problem carried through, on the lab model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, few_flags, write_file
from rich.console import Console
from test_selfcheck import Scaled
from typer.testing import CliRunner

from kernels import divergence
from parts import commands
from parts.commands import SHOWN
from parts.data import load_problems
from parts.files import read_json
from parts.recipe import METHODS, Config
from parts.sampler import Rollout
from parts.setup import configure
from show import Lesson, _mean_is, as_in_run, prepare, walk

QUIET = Console(quiet=True)
TRAIN = ["--steps", "1", "--batch-size", "4", "--eval-problems", "0", "--lr", "0.01"]
TRAIN += few_flags()


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.copsd, list(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("show") / "run"
    result = run_cli("train", *TRAIN, "--out", str(out))
    assert result.exit_code == 0, result.output
    return out


def test_both_prompts_are_printed_with_the_boundary():
    result = run_cli("show", "--lang", "SW")
    assert result.exit_code == 0, result.output
    student, teacher = result.stdout.split("===== the teacher reads")
    assert "===== the student reads" in student
    assert "Swali kwa Kiingereza" in teacher and "Swali kwa Kiingereza" not in student
    assert result.stdout.count("<<< the completion begins here >>>") == 2
    assert "template hash" in teacher
    without = run_cli("show", "--lang", "swa", "--no-english-problem")
    assert "Swali kwa Kiingereza" not in without.stdout


def test_the_controls_of_what_the_teacher_reads_are_shown():
    """Both flags were none of show's, though they decide what the teacher reads."""
    plain, answer, swapped = (
        run_cli("show", *flag).stdout.partition("the teacher reads")[2]
        for flag in ([], ["--answer-only"], ["--swap-solutions"])
    )
    problems = load_problems(Path("lab/problems/hau/train.jsonl"))[:2]
    own, other = (str(problem.solution_en) for problem in problems)
    assert own in plain and own not in answer and own not in swapped
    assert f"\\boxed{{{problems[0].answer}}}" in answer and other in swapped


def test_the_mean_below_the_table_is_the_loss_of_that_rollout():
    from copsd import copsd_loss

    setup = prepare(*configure({"lang": "hau"}), None, QUIET)
    found = walk(setup, trained=False)
    problem = setup.train[0]
    loss_N, _ = copsd_loss(setup, [setup.teacher_prompt(problem)], [found.rollout])
    losses = [row.loss for row in found.rows]
    assert losses == pytest.approx(loss_N.tolist(), abs=1e-5)
    output = run_cli("show", "--lang", "hau").stdout
    assert f"{sum(losses) / len(losses):.3f}" in output
    assert re.search(r"GRPO hears of this rollout: [01] \(", output)


@pytest.mark.parametrize("flags", [{}, {"clip_mode": "entry", "clip": 0.2}])
def test_the_note_on_the_clip_is_the_cosine_of_autograds_gradients(flags):
    setup = prepare(*configure({"lang": "hau", **flags}), None, QUIET)
    found = walk(setup, trained=False)
    clip = flags.get("clip", 0.05)  # the paper's, where the recipe clips nothing
    said = next(note for note in found.notes if note.startswith("cosine"))
    assert f"the entry clip of {clip} nats" in said and ("not set here" in said) is (not flags)
    ids = found.rollout.completion_ids
    logits_NV = [
        setup.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].detach().double()
        for prompt in (found.rollout.prompt_ids, setup.teacher_prompt(setup.train[0]))
    ]
    student_NV = logits_NV[0].requires_grad_()
    gradients = []
    for mode in ("none", "entry"):
        loss_N = divergence(
            student_NV, logits_NV[1], kind="forward_kl", temperature=1.1, clip_mode=mode, clip=clip
        )
        gradients.append(torch.autograd.grad(loss_N.sum(), student_NV)[0].flatten())
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    assert float(said.partition("nats: ")[2].split()[0]) == pytest.approx(cosine, abs=0.002)


def test_the_trained_student_stands_beside_the_untrained_one(trained):
    setup = prepare(*configure({"lang": "hau"}), trained, QUIET)
    found = walk(setup, trained=True)
    assert found.after is not None
    assert [row.text for row in found.after] == [row.text for row in found.rows]
    assert [row.teacher for row in found.after] == pytest.approx(
        [row.teacher for row in found.rows]
    )
    assert [row.student for row in found.after] != pytest.approx(
        [row.student for row in found.rows]
    )
    untrained = walk(prepare(*configure({"lang": "hau"}), None, QUIET), trained=False)
    assert [row.kl for row in found.rows] == pytest.approx([row.kl for row in untrained.rows])


def train(out: Path, *flags: str) -> str:
    result = run_cli("train", *TRAIN, *flags, "--out", str(out))
    assert result.exit_code == 0, result.output
    return str(out)


def test_a_runs_settings_are_the_defaults_of_its_walk(tmp_path):
    """A run of OPHSD in Swahili was shown as one of COPSD in Hausa."""
    run = train(tmp_path / "run", "--method", "ophsd", "--lang", "swa", "--note-tokens", "40")
    shown = run_cli("show", "--adapter", run)
    assert shown.exit_code == 0, shown.output
    assert f"settings as in {run}: method ophsd, lang swa, note_tokens 40\n" in shown.stdout
    assert "Mpango:" in shown.stdout.partition("teacher reads")[2], "a plan, in Swahili"
    # What is typed goes first. Another method has another recipe, and another language other data.
    typed = {"method": "copsd", "lang": "hau", "seed": 3}
    settings, said = as_in_run(typed, Path(run), SHOWN)
    assert said == f"settings as in {run}"
    plain = {"model": "lab/tiny", "thinking": "auto", "dtype": "auto"}
    assert settings == {**plain, **typed}
    settings, said = as_in_run({"note_tokens": 30}, Path(run), SHOWN)
    assert settings["note_tokens"] == 30 and "note_tokens" not in said
    assert "steps" not in settings and "device" not in settings
    # An adapter's folder has no settings.
    for folder in (Path(run, "adapters", "step_00001"), tmp_path):
        assert as_in_run(typed, folder, SHOWN) == (typed, "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--completion", "reference"], "--completion reference: trained on other completions"),
        (["--loss-over", "sampled"], "--loss-over sampled: the loss is not over the whole"),
    ],
)
def test_a_run_with_another_loss_than_is_shown_is_told_so(tmp_path, flags, said):
    shown = run_cli("show", "--adapter", train(tmp_path / "run", *flags)).stdout
    assert said in shown and "= loss" not in shown and "cosine" not in shown


@pytest.mark.parametrize("over", [["sampled"], ["top_k", "--loss-top-k", "5"]])
def test_a_loss_over_less_than_the_vocabulary_can_be_asked_for(over):
    """It was a setting of a run's record only."""
    shown = run_cli("show", "--loss-over", *over)
    assert shown.exit_code == 0, shown.output
    assert f"--loss-over {over[0]}: the loss is not over the whole" in shown.stdout
    assert "= loss" not in shown.stdout and "the teacher reads" in shown.stdout


def test_the_reward_of_a_wrong_completion_of_which_a_start_is_shown_is_that_of_the_whole():
    """Of three tokens it was said that they hold no box."""
    reasons = [
        re.findall("GRPO hears of this rollout: .*", run_cli("show", *flags).stdout)
        for flags in (["--method", "ssopd"], ["--method", "ssopd", "--witness-tokens", "3"])
    ]
    assert reasons[0] == reasons[1] and "0 (wrong; the answer is" in reasons[0][0]


@pytest.mark.parametrize("flags", [["--method", "egrsd"], ["--token-weight", "confidence"]])
def test_of_the_gate_it_is_said_whose_formula_it_is(flags):
    assert "(the formula of confidence is ours)" in run_cli("show", *flags).stdout
    off = run_cli("show", *flags[:2], "--token-weight", "position").stdout
    assert "is ours" not in off and "weight" in off


def test_a_group_is_as_large_as_the_runs(tmp_path):
    run = train(tmp_path / "run", "--method", "grpo", "--group-size", "2")
    shown = run_cli("show", "--adapter", run)
    assert shown.exit_code == 0, shown.output
    assert "shown: of 2 completions" in shown.stdout


def test_data_of_a_run_that_are_gone_are_one_line(tmp_path):
    data = data_of(tmp_path, **ENGLISH)
    run = train(tmp_path / "run", "--data", data, "--batch-size", "1")
    Path(data).rename(tmp_path / "moved.jsonl")
    result = run_cli("show", "--adapter", run)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"{run} was trained on {data}, which is not there; name" in result.stderr
    moved = run_cli("show", "--adapter", run, "--data", str(tmp_path / "moved.jsonl"))
    assert moved.exit_code == 0, moved.output


@pytest.mark.parametrize(
    ("config", "said"), [(None, "it has no config"), ({"method": "copsd", "clip": "no"}, "clip is")]
)
def test_a_record_that_is_damaged_is_one_line(tmp_path, trained, config, said):
    run = shutil.copytree(trained, tmp_path / "run")
    write_file(run, "config.json", json.dumps({"config": config}))
    result = run_cli("show", "--adapter", str(run))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and f"{run}/config.json" in result.stderr


def test_the_page_holds_the_same_walk(tmp_path, trained):
    page = tmp_path / "walk.html"
    result = run_cli("show", "--adapter", str(trained), "--html", str(page))
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "GRPO hears of this rollout" in text and "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("divergence", "name"), [("jsd", "JSD"), ("reverse_kl", "KL"), ("forward_kl", "KL")]
)
def test_a_divergence_is_called_what_it_is(tmp_path, trained, divergence, name):
    """JSD was called KL."""
    page = tmp_path / "walk.html"
    flags = ["--divergence", divergence, "--adapter", str(trained), "--html", str(page)]
    result = run_cli("show", *flags)
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert words.count(f"{name},") == 1 and words.count(name) == 1  # the column, and after training
    assert f'"name": "{name}"' in page.read_text(encoding="utf-8")


def data_of(folder: Path, **changes) -> str:
    """Write data of one problem without an English side; return its name."""
    row = {"problem": "Nawa ne 2 + 3?", "answer": "5", "language": "hau", **changes}
    return str(write_file(folder, "data.jsonl", json.dumps(row) + "\n"))


ENGLISH = {
    "problem": "What is 2 + 3?",
    "solution": "2 + 3 = 5",
    "problem_translated": "Nawa ne 2 + 3?",
}
LONG = "so " * 200


@pytest.mark.parametrize("method", ["grpo", "ssopd"])
def test_methods_that_train_without_an_english_side_are_shown_without_one(tmp_path, method):
    """Both were refused: the first has no teacher, and that of the second reads a completion."""
    page = tmp_path / "walk.html"
    arguments = ["--method", method, "--data", data_of(tmp_path), "--html", str(page)]
    result = run_cli("show", *arguments)
    assert result.exit_code == 0, result.output
    # Both called the mean a loss: of GRPO's there is none, and SSOPD's stands beside GRPO's.
    called = {"grpo": "", "ssopd": "SSOPD's term"}[method]
    assert f'"mean_is": "{called}"' in page.read_text(encoding="utf-8")
    assert "= loss" not in result.stdout and ("= SSOPD's" in result.stdout) is bool(called)
    assert "GRPO hears of this rollout: " in result.stdout
    assert ("the problem has no English side" in result.stdout) is (method == "grpo")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], ["the teacher reads", "every token weighs 1"]),
        (
            ["--token-weight", "position", "--loss-prefix", "0.5"],
            ["tokens weigh 1 on average, by --token-weight position and --loss-prefix 0.5"],
        ),
        (
            ["--method", "grpo"],
            [
                "COPSD's teacher would read; GRPO has no teacher",
                "the one that COPSD's teacher disagrees with most",
                ", and all count alike",
            ],
        ),
        (["--method", "opsdc"], ["OPSDC's teacher reads", "every token weighs 1"]),
        (["--method", "egrsd"], ["EGRSD's teacher reads", " times its weight"]),
        (
            ["--method", "ssopd", "--temperature", "0.01"],
            ["SSOPD's teacher reads nothing", "the longest completion", "skips this group: 0 of 8"],
        ),
        (
            ["--method", "grpo", "--temperature", "0.01"],
            ["is 0.000, and all count alike: all completions are right or all are wrong"],
        ),
    ],
)
def test_a_walk_says_whose_teacher_reads_and_how_tokens_weigh(tmp_path, flags, said):
    """COPSD's said nothing of weights, and GRPO's had a teacher like any other."""
    page = tmp_path / "walk.html"
    result = run_cli("show", *flags, "--html", str(page))
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert all(words in result.stdout and words in text for words in said), result.stdout
    teachers = re.findall("===== (.*teacher.*), [0-9]+ tokens =====", result.stdout)
    assert len(teachers) == 1 and f"What {teachers[0]} (" in text


def test_the_mean_of_tokens_that_nothing_is_learned_from_is_called_nothing():
    lesson = Lesson(Rollout([1], [2], [0.0], "stop"), [1])
    found = {method: _mean_is(Config(method=method), lesson) for method in METHODS}
    assert found == {
        **dict.fromkeys(("copsd", "opsdc", "ophsd"), "loss"),
        **dict.fromkeys(("grpo", "egrsd"), ""),
        "ssopd": "SSOPD's term",
    }
    assert _mean_is(Config(method="ssopd"), replace(lesson, weight=0.0)) == ""
    # What is shown is the divergence over the vocabulary, and SSOPD's term is not.
    assert _mean_is(Config(method="ssopd", loss_over="sampled"), lesson) == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [(LONG, "the problem's answer cannot be graded"), ("", "the problem has no answer")],
)
def test_an_answer_that_cannot_be_graded_is_said_or_refused(tmp_path, answer, said):
    """The first ended in a traceback; a missing one was graded against the text "None"."""
    data = ["--data", data_of(tmp_path, **ENGLISH, answer=answer)]
    result = run_cli("show", *data)
    assert result.exit_code == 0, result.output
    assert f"GRPO hears of this rollout: nothing, for {said}" in result.stdout
    for method in ("grpo", "egrsd", "ssopd"):
        refused = run_cli("show", "--method", method, *data)
        assert refused.exit_code == 2 and "cannot be graded" in refused.stderr, refused.output
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_a_tokenizer_that_does_not_fit_the_model_is_one_line(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "lab" / "tiny", model)
    settings = read_json(model / "generation_config.json")
    write_file(model, "generation_config.json", json.dumps({**settings, "eos_token_id": 9999}))
    result = run_cli("show", "--model", str(model), "--data", data_of(tmp_path, **ENGLISH))
    assert result.exit_code == 2, result.output
    assert "eos_token_id 9999" in result.stderr and result.stderr.count("\n") == 1


def test_a_model_that_is_read_wrongly_is_refused(monkeypatch, tiny_model):
    """It was walked through, and its losses were those of other logits than its own."""
    tiny_model.__class__ = Scaled
    monkeypatch.setattr("show.load_model", lambda folder, **options: tiny_model)
    result = run_cli("show")
    assert result.exit_code == 2, result.output
    assert "cannot be used: hidden states times the head" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lang", "klingon"], "unknown language"),
        (["--adapter", "tests"], "neither an adapter folder nor a run folder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--html", "nowhere/walk.html"], "nowhere"),
        (["--max-new-tokens", "512"], "no problem fits the model's context"),
        (["--teacher", "ema"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said):
    result = run_cli("show", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
