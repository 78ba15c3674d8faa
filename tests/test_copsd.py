"""The method end to end on the lab model: what is scored, the loss, what the loop leaves behind."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import assert_alike_but_for_rounding, die_at, few_problems
from rich.console import Console
from typer.testing import CliRunner

import copsd
from copsd import completion_hidden, copsd_loss, roll_out
from kernels import chunked_logprob, divergence, reduce_loss
from parts import commands, steplog
from parts.files import read_json
from parts.lora import teacher_view
from parts.microbatch import Limit, micro_batches
from parts.model import head_weight
from parts.prompts import pose_in_english
from parts.recipe import Config
from parts.setup import configure, prepare
from parts.view import StepView

SMALL = {"steps": 2, "batch_size": 6, "micro_batch": 4, "eval_problems": 0, "max_new_tokens": 24}
QUIET = Console(quiet=True)


def make_setup(tmp_path: Path, **given):
    config, folder = configure({**SMALL, "out": str(tmp_path / "run"), **given})
    return prepare(config, folder, QUIET)


def train(tmp_path: Path, **given) -> Path:
    setup, run = make_setup(tmp_path, **given)
    copsd.train_copsd(setup, run, StepView(QUIET, setup.config.steps))
    return run.folder


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def timeless(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if "time_s" not in key and "memory" not in key}
        for row in rows
    ]


def nudge(setup, scale: float = 0.05) -> None:
    """Move the adapter off its start, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in setup.lora.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def read_by_teacher(setup, problems: list) -> list[list[int]]:
    return [setup.teacher_prompt(problem) for problem in problems]


# What is scored


def test_training_scores_the_tokens_with_the_log_probs_they_were_sampled_with(tmp_path):
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    rollouts = roll_out(setup, setup.train[:8], seed=3)
    prompts, completions = [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]
    assert len({len(p) for p in prompts}) > 1, "rows of unlike length are the point"
    hidden_ND = completion_hidden(setup.model, prompts, completions)
    ids_N = torch.tensor([token for completion in completions for token in completion])
    logprob_N, _ = chunked_logprob(
        hidden_ND, head_weight(setup.model), ids_N, temperature=setup.config.temperature
    )
    sampled_N = torch.tensor([logprob for r in rollouts for logprob in r.logprobs])
    torch.testing.assert_close(logprob_N.detach(), sampled_N, atol=1e-4, rtol=0)


def test_rows_scored_together_are_rows_scored_alone(tmp_path):
    setup, _ = make_setup(tmp_path)
    rollouts = roll_out(setup, setup.train[:5], seed=3)
    together = completion_hidden(
        setup.model, [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]
    )
    alone = torch.cat(
        [completion_hidden(setup.model, [r.prompt_ids], [r.completion_ids]) for r in rollouts]
    )
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_a_prompt_without_a_completion_is_an_error_and_not_left_out(tmp_path):
    setup, _ = make_setup(tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        completion_hidden(setup.model, [[1, 2], [3]], [[4]])


def test_every_completion_token_is_scored_once_and_eos_is_among_them(tmp_path):
    setup, _ = make_setup(tmp_path, max_new_tokens=64)
    rollouts = roll_out(setup, setup.train[:8], seed=0)
    assert any(
        r.finish_reason == "stop" and r.completion_ids[-1] == setup.tokenizer.eos_token_id
        for r in rollouts
    )
    loss_N, stats = copsd_loss(setup, read_by_teacher(setup, setup.train[:8]), rollouts)
    tokens = sum(len(r.completion_ids) for r in rollouts)
    assert len(loss_N) == len(stats["kl_N"]) == tokens
    cut = [
        r.__class__(r.prompt_ids, r.completion_ids[:-1], r.logprobs[:-1], "length")
        for r in rollouts
    ]
    assert len(copsd_loss(setup, read_by_teacher(setup, setup.train[:8]), cut)[0]) == tokens - len(
        rollouts
    )


def test_student_and_teacher_prompts_end_in_the_same_tokens(tmp_path):
    setup, _ = make_setup(tmp_path)
    start = setup.tokenizer.encode("<|im_start|>", add_special_tokens=False)[0]
    for problem in setup.train[:5]:
        student = setup.student_prompt(problem)
        teacher = setup.teacher_prompt(problem)
        assistant = student[len(student) - 1 - student[::-1].index(start) :]
        assert len(assistant) > 5 and teacher[-len(assistant) :] == assistant


# What the loss is


# The current teacher makes the student's own forward pass. The fixed one goes on behind a prompt
# that is kept, which is rounded otherwise.
@pytest.mark.parametrize(("teacher", "rounding"), [("current", 0), ("fixed", 1e-5)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_that_reads_the_students_prompt_gives_no_loss_and_no_gradient(
    tmp_path, kind, teacher, rounding
):
    setup, _ = make_setup(tmp_path, divergence=kind, clip_mode="none", teacher=teacher)
    rollouts = roll_out(setup, setup.train[:4], seed=0)
    # B = 0: the adapter changes nothing yet.
    loss_N, stats = copsd_loss(setup, [rollout.prompt_ids for rollout in rollouts], rollouts)
    loss_N.mean().backward()
    assert loss_N.abs().max() <= rounding and stats["kl_N"].abs().max() <= rounding
    assert all(
        tensor.grad is None or tensor.grad.abs().max() <= rounding
        for tensor in setup.lora.parameters()
    )
    assert bool(setup.kept_prompts.kept) == (teacher == "fixed")


def test_the_loss_is_the_divergence_between_two_plain_forwards(tmp_path):
    setup, _ = make_setup(tmp_path, clip_mode="entry")
    nudge(setup)
    problem = setup.train[0]
    rollout = roll_out(setup, [problem], seed=0)[0]
    loss_N, _ = copsd_loss(setup, read_by_teacher(setup, [problem]), [rollout])

    def logits(prompt: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + rollout.completion_ids])
        return setup.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

    student = logits(rollout.prompt_ids)
    with teacher_view(setup.lora, "fixed"):
        teacher = logits(setup.teacher_prompt(problem))
    plain_N = divergence(
        student, teacher, kind="forward_kl", temperature=1.1, clip_mode="entry", clip=0.05
    )
    torch.testing.assert_close(loss_N, plain_N, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["token", "trajectory"])
def test_the_gradient_of_a_step_does_not_depend_on_the_micro_batches(tmp_path, reduction):
    setup, _ = make_setup(tmp_path, clip_mode="none")
    nudge(setup)
    problems = setup.train[:7]
    rollouts = roll_out(setup, problems, seed=0)
    step_tokens = sum(len(r.completion_ids) for r in rollouts)
    gradients = []
    for size in (1, 3, 7):
        for tensor in setup.lora.parameters():
            tensor.grad = None
        for rows in micro_batches(rollouts, Limit(size)):
            teacher_prompts = read_by_teacher(setup, [problems[row] for row in rows])
            loss_N, _ = copsd_loss(setup, teacher_prompts, [rollouts[row] for row in rows])
            lengths = [len(rollouts[row].completion_ids) for row in rows]
            reduce_loss(
                loss_N, lengths, reduction=reduction, step_tokens=step_tokens, step_rows=7
            ).backward()
        gradients.append(
            torch.cat([t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None])
        )
    scale = gradients[0].abs().max().item()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5 * scale, rtol=0)


def test_swapped_solutions_are_of_other_problems_and_the_held_out_ones_stay(
    tmp_path,
):
    plain, _ = make_setup(tmp_path / "plain", eval_problems=4)
    swapped, _ = make_setup(tmp_path / "swapped", eval_problems=4, swap_solutions=True)
    assert [p.solution_en for p in swapped.train[:-1]] == [p.solution_en for p in plain.train[1:]]
    assert [p.problem_en for p in swapped.train] == [p.problem_en for p in plain.train]
    assert swapped.heldout == plain.heldout


def test_a_share_of_the_problems_is_posed_in_english_to_both_roles(tmp_path):
    setup, _ = make_setup(tmp_path)
    problems = setup.train[:4]
    posed = pose_in_english(problems, 0.5)
    assert [p.language for p in posed] == ["eng", "eng", "hau", "hau"] and posed[2:] == problems[2:]
    assert [p.problem for p in posed[:2]] == [p.problem_en for p in problems[:2]]
    for role_prompt in (setup.student_prompt, setup.teacher_prompt):
        assert "step by step" in setup.tokenizer.decode(role_prompt(posed[0]))
    assert pose_in_english(problems, 0.0) == problems


def test_micro_batches_hold_every_row_once(tmp_path):
    setup, _ = make_setup(tmp_path)
    rollouts = roll_out(setup, setup.train[:7], seed=0)
    batches = micro_batches(rollouts, Limit(3))
    assert sorted(row for rows in batches for row in rows) == list(range(7))
    assert [len(rows) for rows in batches] == [3, 3, 1]


# What the loop does


def test_training_brings_the_student_closer_and_leaves_base_and_teacher_alone(tmp_path):
    setup, run = make_setup(tmp_path, steps=6, batch_size=16, lr=1e-3, max_new_tokens=48)
    base = {
        name: tensor.clone()
        for name, tensor in setup.model.named_parameters()
        if "lora" not in name
    }
    copsd.train_copsd(setup, run, StepView(QUIET, 6))
    kl = [row["loss/kl_nats_per_token"] for row in jsonl(run.folder / "metrics.jsonl")]
    assert kl[-1] < kl[0]
    assert all(
        torch.equal(tensor, base[name])
        for name, tensor in setup.model.named_parameters()
        if name in base
    )


def test_a_step_logs_what_it_did(tmp_path):
    folder = train(tmp_path, batch_size=16)
    rows = jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0].keys() >= {
        "loss/objective_nats_per_token",
        "loss/kl_nats_per_token",
        "loss/clipped_token_frac",
        "loss/teacher_entropy_nats_per_token",
        "loss/student_entropy_nats_per_token",
        "update/grad_norm",
        "update/lr",
        "rollout/completion_tokens_mean",
        "rollout/cut_frac",
        "rollout/tokens",
        "score/tokens",
        "update/tokens",
        "rollout/time_s",
        "score/time_s",
        "update/time_s",
        "memory/peak_gib",
    }
    assert rows[0]["update/lr"] == pytest.approx(1e-3) and rows[1]["update/lr"] == pytest.approx(
        5e-4
    )  # linear to 0
    completions = jsonl(folder / "completions.jsonl")
    assert [row["step"] for row in completions] == [1] * steplog.LOGGED_ROLLOUTS + [
        2
    ] * steplog.LOGGED_ROLLOUTS
    assert all(row["completion"] and row["prompt"] for row in completions)
    languages = {"Hausa" in row["prompt"] for row in completions}
    assert languages == {True, False}, (
        "with half the problems in English, both languages are to be read"
    )
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (
        stored["config"]["clip"] == 0.05
        and stored["identity"]["base_weights"]
        and stored["versions"]["torch"]
    )
    assert (folder / "adapters" / "step_00002" / "adapter_model.safetensors").is_file()


def test_same_seed_same_run_whatever_the_global_random_state(tmp_path):
    torch.manual_seed(1)
    first = train(tmp_path / "a")
    torch.manual_seed(2)
    second = train(tmp_path / "b")
    other = train(tmp_path / "c", seed=1)
    adapter = Path("adapters/step_00002/adapter_model.safetensors")
    assert (
        (first / adapter).read_bytes()
        == (second / adapter).read_bytes()
        != (other / adapter).read_bytes()
    )
    assert (first / "completions.jsonl").read_bytes() == (second / "completions.jsonl").read_bytes()


@pytest.mark.parametrize("teacher", ["fixed", "ema"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch, teacher):
    flags = {"steps": 5, "save_every": 2, "batch_size": 4, "teacher": teacher, "ema_decay": 0.5}
    straight = train(tmp_path / "straight", **flags)
    setup, run = make_setup(tmp_path / "killed", **flags)
    view = StepView(QUIET, 5)
    die_at(4, view, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        copsd.train_copsd(setup, run, view)
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 5, "loss')  # a torn line
    resumed = train(tmp_path / "killed", **flags)
    for name in (
        "adapters/step_00005/adapter_model.safetensors",
        "resume/step_00005.safetensors",
        "completions.jsonl",
    ):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    assert timeless(jsonl(straight / "metrics.jsonl")) == timeless(jsonl(resumed / "metrics.jsonl"))


def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, monkeypatch):
    import signal

    setup, run = make_setup(tmp_path, steps=5)
    view = StepView(QUIET, 5)
    monkeypatch.setattr(
        view, "show", lambda metrics: metrics["step"] == 2 and signal.raise_signal(signal.SIGTERM)
    )
    assert copsd.train_copsd(setup, run, view) is False
    assert run.load_state()[0] == 2 and len(jsonl(run.folder / "metrics.jsonl")) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_gradients_that_are_not_finite_are_dropped_and_end_the_run_when_they_repeat(
    tmp_path, monkeypatch
):
    setup, run = make_setup(tmp_path, steps=5)
    start = [tensor.clone() for tensor in setup.lora.parameters()]
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(float("nan"))
    )
    with pytest.raises(FloatingPointError, match="no finite gradient in 3 updates"):
        copsd.train_copsd(setup, run, StepView(QUIET, 5))
    assert all(
        torch.equal(tensor, before)
        for tensor, before in zip(setup.lora.parameters(), start, strict=True)
    )


CHANGES = {
    "lang": "swa",
    "data": "lab/problems/hau/test.jsonl",
    "seed": 1,
    "divergence": "reverse_kl",
    "clip_mode": "none",
    "clip": 0.01,
    "reduction": "trajectory",
    "teacher": "current",
    "english_problem": False,
    "english_solution": False,
    "batch_size": 5,
    "temperature": 0.8,
    "max_new_tokens": 12,
    "lr": 2e-3,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_targets": "q_proj",
    "steps": 3,
    "dtype": "bfloat16",
    "save_every": 1,
    "english_share": 0.0,
    "swap_solutions": True,
    "answer_only": True,
    "completion": "reference",
    "token_budget": 150,
    "loss_over": "sampled",
    "teacher_reads": "brief",
    "token_weight": "position",
    "loss_prefix": 0.3,
}
# These change memory, speed, place or the evaluation, and must not change what is learned, or are
# tested elsewhere.
ELSEWHERE = {
    "model",
    "top_p",
    "top_k",
    "eval_data",
    "out",
    "beta",
    "ema_decay",
    "thinking",
    "micro_batch",
    "micro_tokens",
    "chunk_tokens",
    "sample_rows",
    "gradient_checkpointing",
    "compile",
    "device",
    "eval_problems",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "keep",
    # In test_controls.py
    "cosine_every",
    # In test_watch.py
    "eval_every",
    "dev_problems",
    # GRPO's, in test_grpo.py
    "method",
    "group_size",
    "scale_rewards",
    "inner_epochs",
    "clip_low",
    "clip_high",
    "kl_coef",
    "loss_norm",
    "mask_truncated",
    "resample_dead_groups",
    # the family's, in test_methods.py
    "warm_start",
    "teacher_every",
    "loss_top_k",
    "brief",
    "brief_language",
    "note_tokens",
    "vote_samples",
    "gate_scale",
    "gate_floor",
    "gate_lookahead",
    "credit_mix",
    "credit_clip",
    "witness_weight",
    "witness_tokens",
}


def fingerprint(folder: Path) -> list:
    adapters = sorted(folder.glob("adapters/*/adapter_model.safetensors"))
    return [
        [path.parent.name for path in adapters],
        adapters[-1].read_bytes(),
        (folder / "completions.jsonl").read_bytes(),
    ]


def test_every_flag_has_a_tested_effect(tmp_path):
    assert CHANGES.keys() | ELSEWHERE == {f.name for f in fields(Config)}
    few = few_problems(tmp_path)
    paper = {"clip_mode": "entry", **few}  # without a clip, its size has nothing to change
    plain = fingerprint(train(tmp_path / "plain", **paper))
    for name, value in CHANGES.items():
        assert fingerprint(train(tmp_path / name, **{**paper, name: value})) != plain, name
    hot = {"temperature": 3.0, **few}  # at 1.1 too few tokens are there for a truncation to show
    assert fingerprint(train(tmp_path / "h1", **hot)) != fingerprint(
        train(tmp_path / "h2", top_k=1, **hot)
    )
    assert fingerprint(train(tmp_path / "h3", **hot)) != fingerprint(
        train(tmp_path / "h4", top_p=0.1, **hot)
    )
    jsd = {"divergence": "jsd", "clip_mode": "none", **few}
    assert fingerprint(train(tmp_path / "j1", **jsd)) != fingerprint(
        train(tmp_path / "j2", beta=0.1, **jsd)
    )
    ema = {"teacher": "ema", **few}
    assert fingerprint(train(tmp_path / "e1", **ema)) != fingerprint(
        train(tmp_path / "e2", ema_decay=0.1, **ema)
    )


def test_memory_flags_do_not_change_what_is_sampled(tmp_path):
    plain = jsonl(train(tmp_path / "plain") / "completions.jsonl")
    flags = {"micro_batch": 2, "chunk_tokens": 7, "sample_rows": 4, "gradient_checkpointing": True}
    changed = jsonl(train(tmp_path / "changed", **flags) / "completions.jsonl")
    for row, other in zip(plain, changed, strict=True):
        assert row["completion"] == other["completion"]
        assert row["kl_nats_per_token"] == pytest.approx(other["kl_nats_per_token"], abs=1e-4)


def test_micro_batches_change_an_adapter_by_rounding_and_by_no_more(tmp_path):
    # Products over other numbers of rows round otherwise. Bytes are the same at one micro-batch.
    found = {}
    for size in (1, 2, 6):
        setup, run = make_setup(tmp_path / str(size), micro_batch=size)
        copsd.train_copsd(setup, run, StepView(QUIET, 2))
        weights = torch.cat([tensor.detach().flatten() for tensor in setup.lora.parameters()])
        rows = jsonl(run.folder / "completions.jsonl")
        losses = [row["loss/objective_nats_per_token"] for row in run.metrics()]
        found[size] = (weights, [row["completion"] for row in rows], losses)
    weights, texts, losses = found[1]
    for size in (2, 6):
        other, same_texts, same_losses = found[size]
        assert_alike_but_for_rounding(weights, other, moved=2 * 1e-3)
        assert same_texts == texts and same_losses == pytest.approx(losses, rel=1e-5)


# The command line


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.copsd, list(arguments))


def test_train_prints_the_table_and_a_second_call_finds_the_finished_run(tmp_path):
    small = ["--steps", "1", "--batch-size", "4", "--eval-problems", "6", "--eval-samples", "2"]
    flags = [*small, "--out", str(tmp_path / "r")]
    result = run_cli("train", *flags)
    assert result.exit_code == 0, result.output
    tables = (
        "Hausa",
        "English",
        "before",
        "after",
        "greedy accuracy",
        "pass@2",
        "format rate",
        "KL to the teacher",
    )
    assert all(said in result.stdout for said in (*tables, "next: python eval.py"))
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    again = run_cli("train", *flags)
    assert again.exit_code == 0 and "greedy accuracy" in again.stdout
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    changed = run_cli("train", *flags, "--lr", "0.1")
    assert changed.exit_code == 2 and "differs in lr" in changed.stderr


def test_languages_prints_every_language():
    result = run_cli("languages")
    assert result.exit_code == 0
    assert len([line for line in result.stdout.splitlines() if line.strip()]) == 1 + 27


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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


def test_a_run_goes_on_tomorrow_with_the_date_that_its_template_wrote_today(tmp_path):
    model = tmp_path / "dated"
    shutil.copytree("lab/tiny", model)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    data = {name: "lab/problems/hau/train.jsonl" for name in ("data", "eval_data")}
    given = {**SMALL, **data, "model": str(model), "out": str(tmp_path / "run")}
    config, folder = configure(given)
    setup, run = prepare(config, folder, QUIET, "2025-01-09")
    assert read_json(run.record_file)["identity"]["template_date"] == "2025-01-09"
    again, _ = prepare(config, folder, QUIET)  # on another day
    problem = setup.train[0]
    assert again.student_prompt(problem) == setup.student_prompt(problem)
    assert str(again.tokenizer.decode(again.teacher_prompt(problem))).startswith("09 Jan 2025")
