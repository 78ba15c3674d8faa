"""The method end to end on the lab model: what is scored, the loss, what the loop leaves behind.

test_flags.py holds what each flag changes, and test_refusals.py what `train` refuses.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import die_at, few_flags, few_problems, stop_at
from rich.console import Console
from typer.testing import CliRunner

import copsd
from copsd import completion_hidden, copsd_loss, roll_out
from kernels import chunked_logprob, divergence, reduce_loss
from parts import commands, ranks, steplog, steps
from parts.lora import teacher_view
from parts.microbatch import Limit, micro_batches
from parts.model import head_weight
from parts.prompts import pose_in_english
from parts.runs import Run
from parts.setup import configure, prepare
from parts.view import StepView

SMALL = {"steps": 2, "batch_size": 6, "micro_batch": 4, "eval_problems": 0, "max_new_tokens": 24}
QUIET = Console(quiet=True)


def make_setup(tmp_path: Path, **given):
    config, folder = configure({**SMALL, **few_problems(), "out": str(tmp_path / "run"), **given})
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


def test_each_rank_scores_its_share_of_the_held_out_rollouts(tmp_path, monkeypatch):
    """Every rank scored all of them."""
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    problems = setup.train[:5]
    rollouts = roll_out(setup, problems, seed=3)
    monkeypatch.setattr(copsd, "roll_out", lambda *given, **options: rollouts)
    whole, lengths = copsd.heldout_kl(setup, problems, seed=3)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda items: items)
    found = []
    for number in range(2):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        share, of_all = copsd.heldout_kl(setup, problems, seed=3)
        assert of_all == lengths and 0 < len(share) < len(whole)
        found += share
    assert found == pytest.approx(whole, rel=1e-4)


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
    # Of steps with a single problem each, every second is in English; in further draws, too.
    drawn = [steps.draw_problems(setup, 1, step=step) for step in range(1, 9)]
    others = [steps.draw_others(setup, 1, [], step=step, draw=1) for step in range(1, 9)]
    for found in (drawn, others):
        assert sum(posed.language == "eng" for (posed,) in found) == 4


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


def test_a_step_says_how_many_tokens_went_forward_and_backward(tmp_path):
    """Student and teacher go forward, each with its prompt; the student goes backward."""
    folder = train(tmp_path, steps=1, batch_size=4)
    (row,) = jsonl(folder / "metrics.jsonl")
    setup, _ = make_setup(tmp_path / "again", steps=1, batch_size=4)
    problems = steps.draw_problems(setup, 4, step=1)
    rollouts = roll_out(setup, problems, seed=steps.rollout_seed(setup.config, 1))
    written = sum(len(rollout.completion_ids) for rollout in rollouts)
    student = sum(len(rollout.prompt_ids) for rollout in rollouts)
    teacher = sum(map(len, read_by_teacher(setup, problems)))
    assert row["rollout/tokens"] == row["sampled_tokens"] == written
    assert row["update/tokens"] == student + written
    assert row["score/tokens"] == student + teacher + 2 * written


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


@pytest.mark.parametrize("step", [2, 5])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, monkeypatch, step):
    setup, run = make_setup(tmp_path, steps=5)
    view = StepView(QUIET, 5)
    stop_at(step, view, monkeypatch)
    assert copsd.train_copsd(setup, run, view) is False
    assert run.load_state()[0] == step and len(jsonl(run.folder / "metrics.jsonl")) == step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("when", ["in the last step", "while its state is saved"])
def test_a_run_stopped_in_its_last_step_has_only_its_evaluation_left(tmp_path, monkeypatch, when):
    flags = ["--steps", "2", "--batch-size", "4", "--eval-problems", "2", "--eval-samples", "2"]
    flags += ["--max-new-tokens", "8"]
    straight = run_cli("train", *flags, "--out", str(tmp_path / "straight"))
    assert straight.exit_code == 0, straight.output
    flags += ["--out", str(tmp_path / "stopped")]
    place, name = (StepView, "show") if when == "in the last step" else (Run, "save_state")
    plain = getattr(place, name)

    def _stop(self: Any, told: Any, *rest: Any, **options: Any) -> None:
        plain(self, told, *rest, **options)
        step = told if isinstance(told, int) else told["step"]
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, _stop)
        stopped = run_cli("train", *flags)
    assert stopped.exit_code == 130 and "stopped and saved" in stopped.stdout
    folder = tmp_path / "stopped"
    assert not (folder / "after.json").exists()
    state = (folder / "resume" / "step_00002.safetensors").read_bytes()
    resumed = run_cli("train", *flags)
    assert resumed.exit_code == 0 and "step 2/2" not in resumed.stdout, resumed.output
    assert (folder / "resume" / "step_00002.safetensors").read_bytes() == state
    for name in ("after.json", "completions.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_kill_while_an_adapter_is_written_anew_leaves_nothing_damaged(tmp_path, monkeypatch):
    setup, run = make_setup(tmp_path, steps=1)
    assert copsd.train_copsd(setup, run, StepView(QUIET, 1))

    def _die(lora: Any, folder: Path, **options: Any) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"other bytes, as a GPU may make them")
        raise SystemExit("killed")

    monkeypatch.setattr(steps, "save_adapter", _die)
    with pytest.raises(SystemExit):
        steps.save(run, setup, torch.optim.AdamW(setup.lora.parameters()), 1, 1.0)
    run.check_digests()


def test_an_evaluation_before_training_that_nothing_vouches_for_is_vouched_for(tmp_path):
    flags = ["--steps", "1", "--batch-size", "2", "--eval-problems", "1", "--eval-samples", "1"]
    flags += ["--max-new-tokens", "8", "--out", str(tmp_path / "run")]
    assert run_cli("train", *flags).exit_code == 0
    (tmp_path / "run" / "digests.json").unlink()
    assert run_cli("train", *flags).exit_code == 0
    before = tmp_path / "run" / "before.json"
    before.write_text(before.read_text().replace("0", "1"))
    result = run_cli("train", *flags)
    assert result.exit_code == 2 and "before.json is damaged" in result.stderr


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


# The command line


def run_cli(command: str, *arguments: str):
    few = few_flags() if command == "train" else []
    return CliRunner().invoke(commands.copsd, [command, *few, *arguments])


def test_a_run_whose_numbers_end_says_what_it_keeps_and_no_more(tmp_path):
    """It kept "the last save" where nothing had been saved."""
    small = ["--steps", "1", "--batch-size", "4", "--eval-problems", "0", "--max-new-tokens", "8"]
    result = run_cli("train", *small, "--lr", "1e30", "--out", str(tmp_path / "run"))
    assert result.exit_code == 1 and not (tmp_path / "run" / "resume").exists()
    assert f"; {tmp_path / 'run'} keeps nothing but its settings; " in result.stderr


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
        "forward KL to the teacher, nats/token",
    )
    assert all(said in result.stdout for said in (*tables, "next: python eval.py"))
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    again = run_cli("train", *flags)
    assert again.exit_code == 0 and "greedy accuracy" in again.stdout
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    changed = run_cli("train", *flags, "--lr", "0.1")
    assert changed.exit_code == 2 and "differs in lr" in changed.stderr


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "forward KL"),
        (["--divergence", "jsd"], "JSD"),
        (["--method", "opsdc"], "reverse KL"),
        (["--completion", "reference"], "-log q"),
    ],
)
def test_a_step_is_shown_with_the_name_of_its_divergence(tmp_path, flags, name):
    small = ["--steps", "1", "--batch-size", "2", "--eval-problems", "0", "--max-new-tokens", "8"]
    result = run_cli("train", *small, *flags, "--out", str(tmp_path / "run"))
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("step 1/1")]
    assert f"  {name} " in line
    assert "loss/kl_nats_per_token" in jsonl(tmp_path / "run" / "metrics.jsonl")[0]


def test_languages_prints_every_language():
    result = run_cli("languages")
    assert result.exit_code == 0
    assert len([line for line in result.stdout.splitlines() if line.strip()]) == 1 + 27
