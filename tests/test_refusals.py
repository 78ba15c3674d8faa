"""What `train` refuses: one line that names the flag or the file, and what would be valid.

test_bad_input.py holds the many inputs of all programs, whatever the words.
"""

import json
from pathlib import Path

import pytest
from test_copsd import run_cli
from test_methods import run_cli as run_small
from typer.testing import CliRunner

from parts import commands
from parts.settings import fill, idle_settings
from parts.setup import configure

BARE = ["--no-english-problem", "--no-english-solution"]  # a teacher's prompt of nothing else


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lang", "klingon"], "unknown language 'klingon'; valid codes"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--model", "tests"], "there is no config.json in tests"),
        (["--divergence", "kl"], "forward_kl, reverse_kl, jsd"),
        (["--clip-mode", "all"], "none, entry, token"),
        (["--clip-mode", "entry", "--clip", "0"], "--clip is 0.0; valid: above 0"),
        (["--teacher", "other"], "fixed, current, ema, copy"),
        (["--reduction", "sum"], "token, trajectory"),
        (["--thinking", "maybe"], "auto, on, off"),
        (["--thinking", "on"], "think block"),
        (["--data", "nowhere.jsonl"], "no data file nowhere.jsonl"),
        (["--data", "lab"], "lab is a folder; valid: a file, .jsonl, .json, .tsv, .csv, .parquet"),
        (["--eval-data", "lab"], "lab is a folder; valid: a file, .jsonl"),
        (["--steps", "0"], "--steps is 0; valid: 1 or more"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--temperature", "0"], "temperature"),
        (["--top-p", "0"], "--top-p is 0.0; valid: above 0, up to 1"),
        (["--lr", "-1"], "--lr is -1"),
        (["--lora-targets", "query"], "LoRA target 'query'"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
        (["--out", "tests"], "tests exists and is not a run folder"),
        (["--max-new-tokens", "512"], "no problem fits the model's context"),
        (["--method", "ppo"], "unknown method 'ppo'; valid: copsd, grpo, opsdc"),
        (["--method", "grpo", "--group-size", "1"], "--group-size is 1; valid: 2 or more"),
        (["--method", "grpo", "--batch-size", "20"], "valid: a multiple of --group-size 8"),
        (["--method", "grpo", "--loss-norm", "mean"], "token, sequence, constant"),
        (["--method", "grpo", "--scale-rewards", "batch"], "group, none"),
        (["--method", "grpo", "--inner-epochs", "0"], "--inner-epochs is 0"),
        (["--method", "grpo", "--clip-low", "2"], "--clip-low is 2.0; valid: 0 or more, up to 1"),
        (["--method", "grpo", "--kl-coef", "-1"], "--kl-coef is -1"),
        (["--token-budget", "100"], "--token-budget is 100; valid: 4096 or more"),
        (["--english-share", "2"], "--english-share is 2.0; valid: 0 or more, up to 1"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, arguments, said):
    out = tmp_path / "run"
    result = run_cli("train", "--out", str(out), *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--teacher-every", "5"],
            "--teacher-every is for --teacher copy; here --teacher is fixed",
        ),
        (["--group-size", "4"], "--group-size is for --method grpo, egrsd, ssopd; here"),
        (
            ["--method", "grpo", "--token-weight", "position"],
            "--token-weight is for --method copsd",
        ),
        (["--method", "ssopd", "--loss-prefix", "0.5"], "here --method is ssopd"),
        (["--method", "opsdc", "--witness-tokens", "9"], "--witness-tokens is for --method ssopd"),
        (["--method", "ophsd", "--brief", "uniform"], "--brief is for --teacher-reads brief; here"),
        (["--method", "opsdc", "--note-tokens", "9"], "--note-tokens is for --teacher-reads plan"),
        (["--method", "ssopd", "--credit-mix", "0.5"], "--credit-mix is for --method egrsd; here"),
        (["--gate-floor", "0.5"], "--gate-floor is for --token-weight confidence; here"),
        (["--method", "egrsd", "--gate-scale", "1e-50"], "--gate-scale is 1e-50; valid: 1e-06 or"),
        (["--loss-top-k", "5"], "--loss-top-k is for --loss-over top_k; here"),
        (["--vote-samples", "5"], "--vote-samples is for --teacher-reads voted; here"),
        (["--method", "opsdc", "--teacher-every", "0"], "--teacher-every is 0; valid: 1 or more"),
        (["--method", "ophsd", "--note-tokens", "0"], "--note-tokens is 0; valid: 1 or more"),
        (["--method", "ophsd", "--note-tokens", "999"], "no problem fits the model's context"),
        (
            ["--method", "egrsd", "--credit-clip", "1"],
            "--credit-clip is 1.0; valid: 0 or more, below",
        ),
        (["--method", "egrsd", "--batch-size", "20"], "valid: a multiple of --group-size 8"),
        (["--loss-prefix", "0"], "--loss-prefix is 0.0; valid: above 0, up to 1"),
        (["--teacher-reads", "hints"], "solution, brief, plan, explained, voted"),
        (["--token-weight", "x"], "uniform, confidence, position"),
        (["--completion", "reference", "--loss-prefix", "0.3"], "has no teacher; --token-weight"),
        (["--completion", "garbage", "--loss-over", "sampled"], "has no teacher; --token-weight"),
        (
            ["--completion", "teacher", "--teacher-reads", "plan"],
            "valid with --completion teacher: solution, brief",
        ),
    ],
)
def test_bad_input_of_a_member_is_one_line_exit_code_2_and_nothing_written(
    tmp_path, arguments, said
):
    out = tmp_path / "run"
    result = run_small("--out", str(out), *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--clip", "0.2"], "--clip is for --clip-mode entry, token; here --clip-mode is none"),
        (["--method", "opsdc", "--clip", "0.1"], "--clip is for --clip-mode entry, token"),
        (["--method", "grpo", "--clip-mode", "entry"], "--clip-mode is for --method copsd, opsdc"),
        (["--loss-over", "sampled", "--clip-mode", "entry"], "is for --loss-over vocabulary, top"),
        (["--completion", "reference", "--clip-mode", "entry"], "is for --completion student, tea"),
        (["--beta", "0.3"], "--beta is for --divergence jsd; here --divergence is forward_kl"),
        (["--ema-decay", "0.9"], "--ema-decay is for --teacher ema; here --teacher is fixed"),
        (["--method", "grpo", "--reduction", "token"], "--reduction is for --method copsd, opsdc"),
        (["--method", "grpo", "--loss-over", "top_k"], "--loss-over is for --method copsd, opsdc"),
        (["--method", "grpo", "--cosine-every", "5"], "--cosine-every is for --method copsd"),
        (["--cosine-every", "5"], "--cosine-every is for --clip-mode entry, token"),
        (["--method", "grpo", "--swap-solutions"], "--swap-solutions is for --method copsd"),
        (["--method", "grpo", "--answer-only"], "--answer-only is for --method copsd"),
        (["--method", "grpo", "--completion", "student"], "--completion is for --method copsd;"),
        (["--method", "opsdc", "--no-english-problem"], "--english-problem is for --teacher-reads"),
        (["--method", "opsdc", "--swap-solutions"], "--swap-solutions is for --teacher-reads solu"),
        (["--method", "opsdc", "--answer-only"], "--answer-only is for --teacher-reads solution"),
        (["--method", "ophsd", "--no-english-solution"], "--english-solution is for --teacher-re"),
        (["--teacher-reads", "voted", "--swap-solutions"], "--swap-solutions is for --teacher-rea"),
        (["--no-english-solution", "--swap-solutions"], "is for --english-solution True; here"),
        (["--method", "ssopd", "--reduction", "token"], "--reduction is for --method copsd"),
        (["--method", "ssopd", "--cosine-every", "5"], "--cosine-every is for --clip-mode entry"),
        (["--method", "ssopd", "--no-english-solution"], "--english-solution is for --method cops"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused_with_what_it_needs(tmp_path, arguments, needed):
    """They were accepted, and the run was the one without them."""
    out = tmp_path / "run"
    result = run_small("--out", str(out), *arguments)
    assert result.exit_code == 2 and needed in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"method": "grpo", "divergence": "jsd", "beta": 0.3}, []),  # of the KL in the tables
        ({"method": "grpo", "english_problem": False, "english_solution": False}, []),
        ({"method": "grpo", "teacher": "ema", "ema_decay": 0.9}, []),
        ({"method": "ssopd", "clip_mode": "entry", "clip": 0.2, "cosine_every": 5}, []),
        ({"method": "egrsd", "swap_solutions": True, "english_problem": False}, []),
        ({"method": "ophsd", "answer_only": True}, []),
        ({"completion": "garbage", "swap_solutions": True, "reduction": "trajectory"}, []),
        ({"loss_over": "top_k", "loss_top_k": 5, "clip_mode": "token", "clip": 0.1}, []),
        ({"loss_over": "top_k", "clip_mode": "token", "cosine_every": 5}, ["cosine_every"]),
    ],
)
def test_what_a_run_or_its_tables_read_is_not_refused(given, idle):
    config, _ = configure(given)
    assert list(idle_settings(given, config)) == idle


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        # No KL stands in tables that there are none of.
        ({"method": "grpo", "divergence": "jsd", "beta": 0.3}, ["divergence", "beta"]),
        ({"method": "egrsd", "divergence": "jsd", "beta": 0.3}, ["divergence", "beta"]),
        ({"method": "ssopd", "divergence": "jsd", "beta": 0.3}, []),
        ({"divergence": "jsd", "beta": 0.3, "loss_over": "sampled"}, []),  # of the KL in the log
        ({"method": "grpo", "teacher": "ema", "ema_decay": 0.9}, ["teacher", "ema_decay"]),
        ({"method": "grpo", "teacher": "copy", "teacher_every": 9}, ["teacher", "teacher_every"]),
        ({"method": "egrsd", "teacher": "ema", "ema_decay": 0.9}, []),
        ({"method": "ssopd", "teacher": "ema", "ema_decay": 0.9}, []),
        ({"method": "grpo", "compile": True}, ["compile"]),
        ({"method": "opsdc", "compile": True, "teacher_every": 9}, []),
        ({"completion": "reference", "top_k": 5, "top_p": 0.9}, ["top_p", "top_k"]),
        ({"completion": "garbage", "divergence": "jsd"}, ["divergence"]),
        ({"completion": "garbage", "teacher": "ema", "compile": False}, ["teacher", "compile"]),
        ({"completion": "teacher", "teacher": "ema", "top_k": 5, "top_p": 0.9}, []),
        # The teacher's prompt decides which problems fit the context, whoever reads it.
        ({"method": "grpo", "english_problem": False, "english_solution": False}, []),
        ({"completion": "reference", "english_problem": False}, []),
        # Looks on the way are greedy.
        (
            {"eval_every": 1, "eval_samples": 4, "eval_temperature": 0.5, "eval_top_p": 0.5},
            ["eval_samples", "eval_temperature", "eval_top_p"],
        ),
        ({"eval_every": 1, "dev_problems": 5, "eval_data": "lab/problems/hau/test.jsonl"}, []),
    ],
)
def test_what_only_an_evaluation_would_show_is_idle_without_one(given, idle):
    """Such flags were accepted with --eval-problems 0, and the run was the one without them."""
    given = {"eval_problems": 0, **given}
    config, _ = configure(given)
    assert list(idle_settings(given, config)) == idle
    measured = {**given, "eval_problems": 1}
    assert not idle_settings(measured, configure(measured)[0])


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"eval_samples": 1, "eval_temperature": 0.0, "eval_top_p": 0.5}, ["eval_top_p"]),
        ({"eval_samples": 1, "eval_temperature": 0.0}, []),
        ({"top_k": 1, "top_p": 0.5}, ["top_p"]),
        ({"top_k": 0, "top_p": 0.5}, []),
        ({"lr": 0.0, "weight_decay": 0.1, "max_grad_norm": 9.0}, ["weight_decay", "max_grad_norm"]),
        ({"lr": 1e-9, "weight_decay": 0.1, "max_grad_norm": 9.0}, []),
        ({"micro_batch": 1, "micro_tokens": 99}, ["micro_tokens"]),
        ({"micro_batch": 2, "micro_tokens": 99}, []),
    ],
)
def test_what_another_setting_leaves_nothing_to_do_is_idle(given, idle):
    config, _ = configure(given)
    assert list(idle_settings(given, config)) == idle


def test_what_only_an_evaluation_would_show_is_refused_in_a_line_that_says_so(tmp_path):
    flags = ["--eval-problems", "0", "--method", "grpo", "--teacher", "ema"]
    result = run_cli("train", *flags, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2 and result.stderr == (
        "error: --teacher is for --method copsd, opsdc, ophsd, egrsd, ssopd; here --method is "
        "grpo, and --eval-problems 0 leaves out the KL that it would change\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_gives_is_never_refused_as_idle(tmp_path):
    entries = {"eval_problems": 0, "teacher": "ema", "eval_samples": 4, "weight_decay": 0.1}
    recipe = {name: {"value": value} for name, value in entries.items()}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    given = {"method": "grpo", "lr": 0.0}
    assert not idle_settings(given, fill(given, tmp_path))
    typed = {**given, **entries}
    assert [*idle_settings(typed, fill(typed, tmp_path))] == [
        *("teacher", "weight_decay", "eval_samples")
    ]


def test_a_walk_shows_the_divergence_of_a_model_whose_recipe_has_no_evaluation(tmp_path):
    for file in Path("lab/tiny").iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "recipe.json").unlink()
    (tmp_path / "recipe.json").write_text('{"eval_problems": {"value": 0}}', encoding="utf-8")
    flags = ["--method", "grpo", "--divergence", "jsd", "--max-new-tokens", "8"]
    data = ["--data", "lab/problems/hau/train.jsonl"]
    result = run_cli("show", "--model", str(tmp_path), *data, *flags)
    assert result.exit_code == 0, result.output


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"problem": "one", "answer": "1"}\n{"problem": \n', "line 2"),
        ("b.jsonl", '{"answer": "1"}\n', "problem"),
        ("c.jsonl", '{"problem": " ", "answer": "1"}\n', "empty"),
        (
            "d.jsonl",
            '{"problem": "p", "answer": "1", "problem_translated": "q", "language": "swa"}\n',
            "swa",
        ),
        ("e.jsonl", "", "no problems"),
        ("f.jsonl", '{"problem": "one", "answer": "1"}\n', "1 distinct problems"),
    ],
)
def test_a_bad_data_file_is_one_line_that_names_it(tmp_path, name, text, said):
    # Without a file to evaluate on, so that problems are held out of this one.
    flags = ["--data", write(tmp_path / name, text), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(commands.copsd, ["train", *flags])
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "ophsd"], "lacks what --teacher-reads plan needs: an English solution"),
        (["--teacher-reads", "voted"], "lacks what --teacher-reads voted needs: an English"),
        (
            ["--method", "egrsd", "--batch-size", "8"],
            "has no English problem and no English solution, which the teacher's prompt shows; a "
            "data file has it in these columns, beside problem_translated: problem, solution\n",
        ),
        (["--no-english-problem"], "in these columns, beside problem_translated: solution\n"),
        (["--teacher-reads", "explained", BARE[0]], "what --teacher-reads explained needs: an Eng"),
        (["--completion", "reference", *BARE], "what --completion reference needs: an English sol"),
        (["--completion", "garbage", *BARE], "what --completion garbage needs: an English solut"),
        (["--completion", "reference", "--teacher-reads", "brief"], "--completion reference needs"),
    ],
)
def test_data_that_lacks_what_the_teacher_reads_is_one_line(tmp_path, flags, said):
    data = tmp_path / "data.jsonl"
    rows = [{"problem": f"p{i}", "answer": "18", "language": "hau"} for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run_small("--data", str(data), "--out", str(tmp_path / "run"), *flags)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
