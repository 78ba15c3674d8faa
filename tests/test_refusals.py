"""What `train` refuses: one line that names the flag or the file, and what would be valid.

test_bad_input.py holds the many inputs of all programs, whatever the words.
"""

import json
from pathlib import Path

import pytest
from test_copsd import run_cli
from test_methods import run_cli as run_small

from parts.settings import idle_settings
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
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
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
    result = run_cli(
        "train", "--data", write(tmp_path / name, text), "--out", str(tmp_path / "run")
    )
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "ophsd"], "lacks what --teacher-reads plan needs: an English solution"),
        (["--teacher-reads", "voted"], "lacks what --teacher-reads voted needs: an English"),
        (["--method", "egrsd", "--batch-size", "8"], "has no problem_en"),
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
