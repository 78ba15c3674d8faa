"""The family: what each member reads, weighs and renews; a killed run ends as a whole one.

test_notes.py holds what is sampled for a teacher to read.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import die_at, few_flags, few_problems
from rich.console import Console
from test_grpo import jsonl, nudge
from typer.testing import CliRunner

import copsd
import methods
from copsd import Group, copsd_loss, grpo_loss, roll_out, roll_out_groups
from methods import LOOPS, egrsd_credit, group_weight, witness_pair
from parts import commands
from parts.experiments import EVIDENCE
from parts.lora import teacher_view
from parts.machine import Stopwatch
from parts.microbatch import Limit
from parts.prompts import encode_prompt, find_language, render_prompt
from parts.readings import render_witness
from parts.recipe import METHODS, Config, keeps_prompts
from parts.sampler import Rollout
from parts.settings import doubts_of
from parts.setup import configure, prepare
from parts.steplog import Tally
from parts.steps import share_done
from parts.view import StepView

SMALL = {
    "steps": 2,
    "batch_size": 8,
    "micro_batch": 3,
    "eval_problems": 0,
    "max_new_tokens": 24,
    "english_share": 0.0,
    "lr": 1e-3,
}
GROUPS = {"group_size": 4, "max_new_tokens": 40}
QUIET = Console(quiet=True)
# What a member is trained with here, beside SMALL; each is a member or a variant of one.
VARIANTS = {
    "opsdc": {"method": "opsdc", "teacher_every": 2},
    "ophsd": {"method": "ophsd", "note_tokens": 16},
    "egrsd": {"method": "egrsd", **GROUPS},
    "ssopd": {"method": "ssopd", **GROUPS, "witness_tokens": 9},
    "light egrsd": {"token_weight": "confidence", "gate_lookahead": 2},
    "explained": {"teacher_reads": "explained", "note_tokens": 16},
    "voted": {"teacher_reads": "voted", "vote_samples": 3},
}


def make_setup(tmp_path: Path, **given):
    config, folder = configure({**SMALL, **few_problems(), "out": str(tmp_path / "run"), **given})
    return prepare(config, folder, QUIET)


def train(tmp_path: Path, **given) -> Path:
    setup, run = make_setup(tmp_path, **given)
    assert LOOPS[setup.config.method](setup, run, StepView(QUIET, setup.config.steps))
    return run.folder


def gradient(setup) -> torch.Tensor:
    grads = [t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None]
    for tensor in setup.lora.parameters():
        tensor.grad = None
    return torch.cat(grads)


def every_second_is_right(monkeypatch) -> None:
    """Let groups be mixed: the lab model's own would depend on its weights."""
    monkeypatch.setattr(copsd, "is_correct", lambda text, gold, think_open: len(text) % 2 == 0)


# What every member owes


def test_every_method_has_a_loop_and_says_how_sure_we_are_of_it():
    assert tuple(LOOPS) == METHODS == tuple(EVIDENCE)
    for said in EVIDENCE.values():
        assert said.split(",")[0] in ("code", "second-hand", "ours")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch, variant):
    every_second_is_right(monkeypatch)
    flags = {"steps": 3, "save_every": 1, "batch_size": 4, **VARIANTS[variant]}
    straight = train(tmp_path / "straight", **flags)
    setup, run = make_setup(tmp_path / "killed", **flags)
    view = StepView(QUIET, 3)
    die_at(2, view, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        LOOPS[setup.config.method](setup, run, view)
    resumed = train(tmp_path / "killed", **flags)
    for name in (
        "adapters/step_00003/adapter_model.safetensors",
        "resume/step_00003.safetensors",
        "completions.jsonl",
    ):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    rows = [
        [{k: v for k, v in row.items() if "time_s" not in k and "memory" not in k} for row in each]
        for each in (jsonl(straight / "metrics.jsonl"), jsonl(resumed / "metrics.jsonl"))
    ]
    assert rows[0] == rows[1] and rows[0][-1]["sampled_tokens"] == sum(
        row["rollout/tokens"] for row in rows[0]
    )


@pytest.mark.parametrize("over", ["vocabulary", "top_k", "sampled"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_that_reads_the_students_prompt_gives_no_loss_and_no_gradient(
    tmp_path, kind, over
):
    # The current teacher is the initial one at the start, and reads as the student does, to the
    # bit; of the fixed one prompts are kept, which is rounded otherwise (test_copsd.py).
    given = {"divergence": kind, "clip_mode": "none", "teacher": "current"}
    setup, _ = make_setup(tmp_path, **given, loss_over=over, loss_top_k=5)
    rollouts = roll_out(setup, setup.train[:3], seed=0)
    loss_N, stats = copsd_loss(setup, [rollout.prompt_ids for rollout in rollouts], rollouts)
    loss_N.sum().backward()
    assert loss_N.abs().max() == 0
    assert ("clipped_N" in stats) == (over == "vocabulary"), "no other loss is the one that is cut"
    # Exactly 0 in closed form; autograd's p - q of the top-k loss is rounded, over some 70 tokens.
    assert gradient(setup).abs().max() <= (0 if over == "vocabulary" else 1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"teacher_reads": "brief", "brief": "difficulty", "brief_language": "english"},
        {"teacher_reads": "brief"},
        {"teacher_reads": "plan"},
        {"teacher_reads": "explained"},
        {"teacher_reads": "voted"},
    ],
)
def test_every_reading_ends_as_the_students_prompt_so_that_the_same_tokens_are_scored(
    tmp_path, given
):
    setup, _ = make_setup(tmp_path, **given)
    problem = setup.train[0]
    student = setup.student_prompt(problem)
    teacher = setup.teacher_prompt(problem, "First 14, then 27.")
    start = setup.tokenizer.encode("<|im_start|>", add_special_tokens=False)[0]
    assistant = student[len(student) - 1 - student[::-1].index(start) :]
    assert len(assistant) > 5 and teacher[-len(assistant) :] == assistant and teacher != student
    rollouts = roll_out(setup, [problem], seed=0)
    loss_N, _ = copsd_loss(setup, [teacher], rollouts)
    assert len(loss_N) == len(rollouts[0].completion_ids) and loss_N.abs().max() > 0


def test_ssopds_reading_ends_as_the_students_prompt_with_the_opening(tmp_path):
    setup, _ = make_setup(tmp_path, method="ssopd", **GROUPS)
    problem = setup.train[0]
    student = setup.student_prompt(problem)
    text = render_witness(setup.config, problem, setup.tokenizer, "First 14, then 27.")
    teacher = encode_prompt(text, setup.tokenizer)
    start = setup.tokenizer.encode("<|im_start|>", add_special_tokens=False)[0]
    assistant = student[len(student) - 1 - student[::-1].index(start) :]
    assert teacher[-len(assistant) :] == assistant and teacher != student
    assert text.endswith(f"{find_language('hau').opening}\n")


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_ssopds_term_is_nothing_where_its_teacher_reads_what_the_student_reads(
    tmp_path, monkeypatch, kind
):
    every_second_is_right(monkeypatch)
    given = {"divergence": kind, "clip_mode": "none", "teacher": "current", **GROUPS}
    setup, _ = make_setup(tmp_path, method="ssopd", **given)
    groups = roll_out_groups(setup, setup.train[:3], seed=0)
    monkeypatch.setattr(
        methods, "render_witness", lambda config, problem, *_: render_student(setup, problem)
    )
    tally = Tally()
    methods.add_ssopd_term(setup, groups, tally, Stopwatch("cpu"), False, Limit(2))
    assert tally.updated > 0, "a group is mixed"
    assert tally.loss == 0 and gradient(setup).abs().max() == 0


def render_student(setup, problem) -> str:
    return render_prompt(problem, "hau", setup.tokenizer, thinking=setup.config.thinking)


# OPSDC


def test_the_copied_teacher_is_the_student_after_a_refresh_and_stays_put_in_between(
    tmp_path, monkeypatch
):
    setup, run = make_setup(tmp_path, method="opsdc", teacher_every=3, steps=4, save_every=1)
    seen = {}
    real = setup.lora.update_teacher

    def remember(step, **options):
        real(step, **options)
        seen[step] = {
            kind: {name: t.detach().clone() for name, t in setup.lora.sets[kind].items()}
            for kind in ("current", "copy")
        }

    monkeypatch.setattr(setup.lora, "update_teacher", remember)
    start = {name: t.clone() for name, t in setup.lora.sets["copy"].items()}
    assert LOOPS["opsdc"](setup, run, StepView(QUIET, 4))

    def same(first, second):
        return all(torch.equal(first[name], second[name]) for name in first)

    assert same(seen[1]["copy"], start) and same(seen[2]["copy"], start)
    assert not same(seen[2]["current"], start)
    assert same(seen[3]["copy"], seen[3]["current"]) and same(seen[4]["copy"], seen[3]["copy"])
    assert not same(seen[4]["current"], seen[4]["copy"])
    saved = run.load_state()[2]
    for name, tensor in seen[4]["copy"].items():
        assert torch.equal(saved[f"lora/copy.{name}"], tensor)
    # A view of that teacher scores as the student did when it was copied.
    with teacher_view(setup.lora, "copy"):
        active = next(iter(setup.lora.layers.values())).active
    assert active is not None and active[0] is next(iter(setup.lora.sets["copy"].values()))


def test_opsdc_is_its_settings_and_its_teacher_reads_nothing_privileged(tmp_path):
    setup, _ = make_setup(tmp_path, method="opsdc")
    config = setup.config
    assert (config.divergence, config.clip_mode) == ("reverse_kl", "none")
    assert (config.teacher, config.teacher_every, config.temperature) == ("copy", 50, 1.0)
    problem = setup.train[0]
    text = str(setup.tokenizer.decode(setup.teacher_prompt(problem)))
    assert "taƙaita" in text and str(problem.problem_en) not in text
    assert str(problem.solution_en) not in text
    bare = replace(problem, problem_en=None, solution_en=None)
    assert setup.can_teach(bare) and setup.teacher_prompt(bare) == setup.teacher_prompt(problem)
    english = replace(setup, config=replace(config, brief_language="english", brief="difficulty"))
    said = str(setup.tokenizer.decode(english.teacher_prompt(problem)))
    assert "Match the length to the difficulty" in said and "mataki-mataki" in said


def test_what_collapsed_elsewhere_is_warned_of(tmp_path):
    given = {"method": "opsdc", "divergence": "forward_kl", "out": "runs/x"}
    config, _ = configure(given)
    assert any("unclipped forward KL" in said for said in doubts_of(config))
    for other in ({"divergence": "reverse_kl"}, {"clip_mode": "entry"}, {"teacher": "fixed"}):
        assert doubts_of(replace(config, **other)) == []
    # The loss over the sampled token estimates the reverse KL.
    assert doubts_of(replace(config, loss_over="sampled")) == []
    ssopd, _ = configure({"method": "ssopd", "teacher": "copy"})
    assert any("unclipped forward KL" in said for said in doubts_of(ssopd))
    assert doubts_of(replace(ssopd, clip_mode="entry")) == []
    every = replace(config, divergence="reverse_kl", teacher_every=1)
    assert any("--teacher-every 1 collapsed" in said for said in doubts_of(every))
    result = run_cli(
        "--method", "opsdc", "--divergence", "forward_kl", "--out", str(tmp_path / "r")
    )
    assert "warning: an unclipped forward KL" in result.stdout


def test_a_run_is_done_where_its_last_step_samples_past_the_budget():
    config = Config(token_budget=600)
    assert [share_done(config, 3, tokens) for tokens in (150, 600, 800)] == [0.25, 1.0, 1.0]
    assert share_done(Config(steps=4), 3, 800) == 0.75


def test_a_clip_that_no_second_update_meets_is_doubted():
    config = Config(method="grpo", clip_high=0.28)
    assert any("--inner-epochs is 1" in said for said in doubts_of(config))
    for other in ({"inner_epochs": 2}, {"clip_high": 0.2}, {"method": "copsd"}):
        assert doubts_of(replace(config, **other)) == []


@pytest.mark.parametrize("method", ["opsdc", "egrsd", "ssopd"])
def test_a_copied_teacher_that_is_never_renewed_is_warned_of(method):
    given = {"method": method, "teacher": "copy", "divergence": "reverse_kl", "steps": 49}
    config, _ = configure({**given, "teacher_every": 50})
    (said,) = doubts_of(config)
    assert "no step learns from a renewed teacher: --steps is 49, --teacher-every 50" in said
    for other in ({"steps": 51}, {"teacher": "fixed"}, {"token_budget": 10**6}):
        assert doubts_of(replace(config, **other)) == []
    # GRPO's loss has no teacher.
    assert doubts_of(replace(config, method="grpo")) == []


# EGRSD


def test_egrsd_without_teacher_or_weights_is_grpo_byte_for_byte(tmp_path, monkeypatch):
    every_second_is_right(monkeypatch)
    grpo = train(tmp_path / "grpo", method="grpo", **GROUPS)
    off = {"credit_mix": 0.0, "token_weight": "uniform"}
    egrsd = train(tmp_path / "egrsd", method="egrsd", **GROUPS, **off)
    light = train(tmp_path / "w", method="egrsd", **GROUPS, credit_mix=0.0)
    mixed = train(tmp_path / "m", method="egrsd", **GROUPS, token_weight="uniform")
    name = "adapters/step_00002/adapter_model.safetensors"
    assert (grpo / name).read_bytes() == (egrsd / name).read_bytes()
    assert len({(each / name).read_bytes() for each in (grpo, light, mixed)}) == 3
    rows = jsonl(mixed / "metrics.jsonl")
    assert all(row["credit/flipped_token_frac"] == 0 for row in rows)
    assert all(0.9 <= row["credit/mean"] <= 1.1 for row in rows)


def test_egrsds_advantage_is_the_formula_of_two_plain_forwards(tmp_path):
    setup, _ = make_setup(
        tmp_path, method="egrsd", **GROUPS, token_weight="uniform", credit_mix=0.4
    )
    nudge(setup)
    problem = setup.train[0]
    (rollout,) = roll_out(setup, [problem], seed=0)
    teacher_ids = setup.teacher_prompt(problem)

    def logprobs(prompt: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + rollout.completion_ids])
        with torch.no_grad():
            logits = setup.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        log_NV = (logits / setup.config.temperature).log_softmax(-1)
        return log_NV[range(len(rollout.completion_ids)), rollout.completion_ids]

    student_N = logprobs(rollout.prompt_ids)
    with teacher_view(setup.lora, "fixed"):
        teacher_N = logprobs(teacher_ids)
    for advantage in (1.5, -0.5):
        advantage_N = torch.full_like(student_N, advantage)
        found_N, stats = egrsd_credit(setup, [teacher_ids], [rollout], advantage_N, student_N)
        ratio_N = (advantage_N.sign() * (teacher_N - student_N)).exp().clamp(0.8, 1.2)
        torch.testing.assert_close(
            found_N, advantage_N * (0.6 + 0.4 * ratio_N), atol=1e-4, rtol=1e-4
        )
        assert not stats["flipped_N"].any() and len(stats["credit_N"].unique()) > 1


def test_a_reward_never_changes_its_sign_in_the_loss(tmp_path):
    setup, _ = make_setup(tmp_path, method="egrsd", **GROUPS)
    problem = setup.train[0]
    rollouts = roll_out(setup, [problem, problem], seed=0)
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    advantage_N = torch.tensor([1.0, -1.0]).repeat_interleave(lengths)
    prompts = [setup.teacher_prompt(problem)] * 2
    loss_N, stats = grpo_loss(setup, rollouts, advantage_N, None, egrsd_credit, prompts)
    # With a ratio of 1 the loss of a token is minus its advantage.
    assert torch.equal(loss_N.detach().sign(), -advantage_N.sign())
    assert stats["credit_N"].min() > 0


# SSOPD


def test_the_weight_of_a_group_is_0_where_all_or_none_are_right():
    assert group_weight(0.0, 0.5) == group_weight(1.0, 0.5) == 0
    assert group_weight(0.5, 0.5) == 0.5 and group_weight(0.25, 0.5) == pytest.approx(0.375)


def test_the_longest_wrong_completion_learns_from_the_shortest_right_one(tmp_path, monkeypatch):
    setup, _ = make_setup(tmp_path, method="ssopd", **GROUPS, witness_tokens=5)
    encode = setup.tokenizer.encode
    texts = ["one two three", "four", "five six", "seven eight nine ten one two"]
    rollouts = []
    for text in texts:
        ids = encode(text, add_special_tokens=False)
        rollouts.append(Rollout([5], ids, [0.0] * len(ids), "stop"))
    group = Group(setup.train[0], rollouts, [0.0, 1.0, 1.0, 0.0])
    pair = witness_pair(setup, group)
    assert pair is not None
    prompt, learner, weight, _ = pair
    text = str(setup.tokenizer.decode(prompt))
    assert "[farkon mafita]\nfour\n[ƙarshen mafita]" in text
    assert str(group.problem.solution_en) not in text
    assert learner.completion_ids == rollouts[3].completion_ids[:5] and weight == 0.5
    for reward in (0.0, 1.0):
        assert witness_pair(setup, replace(group, rewards=[reward] * 4)) is None
    needed = len(prompt) + len(learner.completion_ids)
    for context, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(methods, "context_length", lambda _, context=context: context)
        assert (witness_pair(setup, group) is not None) == fits


def test_groups_that_are_not_mixed_are_skipped_and_counted_and_leave_grpo(tmp_path, monkeypatch):
    name = "adapters/step_00002/adapter_model.safetensors"
    monkeypatch.setattr(copsd, "is_correct", lambda *_, **__: False)
    dead = train(tmp_path / "dead", method="ssopd", **GROUPS)
    rows = jsonl(dead / "metrics.jsonl")
    assert all(row["witness/skipped_group_frac"] == 1 for row in rows)
    assert all(row["witness/kl_nats_per_token"] is None for row in rows)
    every_second_is_right(monkeypatch)
    grpo = train(tmp_path / "grpo", method="grpo", **GROUPS)
    nothing = train(tmp_path / "nothing", method="ssopd", **GROUPS, witness_weight=0.0)
    ssopd = train(tmp_path / "ssopd", method="ssopd", **GROUPS)
    assert (grpo / name).read_bytes() == (nothing / name).read_bytes()
    assert (grpo / name).read_bytes() != (ssopd / name).read_bytes()
    row = jsonl(ssopd / "metrics.jsonl")[0]
    plain = jsonl(grpo / "metrics.jsonl")[0]
    assert row["rollout/tokens"] == plain["rollout/tokens"]
    assert row["update/tokens"] > plain["update/tokens"], "a witness's rows go backward, too"
    assert (
        row["score/tokens"] > plain["score/tokens"] + row["update/tokens"] - plain["update/tokens"]
    )
    assert row["witness/skipped_group_frac"] < 1 and row["witness/kl_nats_per_token"] > 0


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_ssopds_term_is_the_weighted_mean_over_groups_of_the_means_over_tokens(
    tmp_path, monkeypatch, micro_batch
):
    every_second_is_right(monkeypatch)
    given = {"method": "ssopd", **GROUPS, "witness_tokens": 9, "micro_batch": micro_batch}
    setup, _ = make_setup(tmp_path, **given)
    nudge(setup)
    groups = roll_out_groups(setup, setup.train[:4], seed=0)
    pairs = [pair for group in groups if (pair := witness_pair(setup, group))]
    assert pairs
    tally = Tally()
    watch = Stopwatch("cpu")
    methods.add_ssopd_term(setup, groups, tally, watch, False, Limit(micro_batch))
    found = gradient(setup)
    total = torch.tensor(0.0)
    for prompt, learner, weight, _ in pairs:
        loss_N, _ = copsd_loss(setup, [prompt], [learner])
        total = total + weight * loss_N.mean() / len(groups)
    total.backward()
    expected = gradient(setup)
    assert tally.loss == pytest.approx(total.item(), abs=1e-5)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)


def test_the_clip_of_ssopds_term_is_logged_as_copsds_is(tmp_path, monkeypatch):
    every_second_is_right(monkeypatch)
    given = {"method": "ssopd", **GROUPS, "steps": 3}
    clipped = train(tmp_path / "clipped", **given, clip_mode="entry", cosine_every=2)
    rows = jsonl(clipped / "metrics.jsonl")
    cosines = [row["loss/clip_gradient_cosine"] for row in rows]
    assert cosines[1] is None and all(-1 <= cosines[step] < 0.99 for step in (0, 2))
    assert all(0 < row["loss/clipped_token_frac"] <= 1 for row in rows)
    plain = jsonl(train(tmp_path / "plain", **given) / "metrics.jsonl")
    assert [row["loss/clip_gradient_cosine"] for row in plain] == [None] * 3
    never = train(tmp_path / "never", **given, clip_mode="entry", cosine_every=0)
    name = "adapters/step_00003/adapter_model.safetensors"
    assert (never / name).read_bytes() == (clipped / name).read_bytes()


# Out of memory, and prompts that are kept


@pytest.mark.parametrize(
    ("method", "place", "name"),
    [
        ("egrsd", copsd, "grpo_loss"),
        ("ssopd", copsd, "grpo_loss"),
        ("ssopd", copsd, "chunked_divergence"),
    ],
)
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_in_the_log(
    tmp_path, monkeypatch, capsys, method, place, name
):
    every_second_is_right(monkeypatch)
    # Five rows, then two: of three micro-batches of the second attempt one is half known.
    given = {"method": method, **GROUPS, "steps": 1, "micro_batch": 5, "inner_epochs": 2}
    straight = train(tmp_path / "a", **given)
    calls = []
    real = getattr(place, name)

    def fail_once(*arguments, **options):
        calls.append(1)
        found = real(*arguments, **options)
        if len(calls) == (2 if name == "grpo_loss" else 1):
            raise torch.OutOfMemoryError("as if")
        return found

    monkeypatch.setattr(place, name, fail_once)
    halved = train(tmp_path / "b", **given)
    assert "out of memory: micro-batches of 2 rows" in capsys.readouterr().err
    (first,), (second,) = (jsonl(run / "metrics.jsonl") for run in (straight, halved))
    assert first.keys() == second.keys()
    for metric, value in first.items():
        if "time_s" not in metric and "memory" not in metric:
            close = value is not None and value == pytest.approx(second[metric], rel=2e-3, abs=1e-5)
            assert value == second[metric] or close, metric


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"method": "copsd"}, True),
        ({"method": "opsdc", "teacher": "fixed"}, True),
        ({"method": "opsdc"}, False),
        ({"method": "ophsd"}, False),
        ({"teacher_reads": "explained"}, False),
        ({"teacher_reads": "voted"}, False),
        ({"method": "ssopd"}, False),
        # What the teacher read for the KL before training was kept, and no step reads it.
        ({"method": "grpo"}, False),
        ({"method": "egrsd"}, False),
        ({"completion": "reference"}, False),
    ],
)
def test_only_prompts_that_never_change_and_that_steps_read_are_kept(tmp_path, given, kept):
    setup, _ = make_setup(tmp_path, **given)
    assert setup.keeps_prompts == kept and not keeps_prompts(setup.config, on_cpu=False)
    problem = setup.train[0]
    rollouts = roll_out(setup, [problem], seed=0)
    copsd_loss(setup, [setup.teacher_prompt(problem, None)], rollouts)
    assert bool(setup.kept_prompts.kept) == kept


# The command line


def run_cli(*arguments: str):
    small = ["--steps", "1", "--batch-size", "8", "--eval-problems", "0"]
    return CliRunner().invoke(commands.copsd, ["train", *small, *few_flags(), *arguments])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("opsdc", ["Ka taƙaita", "every token weighs 1"]),
        ("ophsd", ["Tsari:", "Amsa, don tabbatarwa kawai:"]),
        ("egrsd", ["Mafita da Turanci", "weight", "each token's advantage is"]),
        ("ssopd", ["Mafita daidai ta wannan matsala:", "weight", "0.500"]),
        ("grpo", ["GRPO has no teacher"]),
    ],
)
def test_show_prints_a_members_teacher_and_weights(method, said):
    result = CliRunner().invoke(commands.copsd, ["show", "--lang", "hau", "--method", method])
    assert result.exit_code == 0, result.output
    for words in said:
        assert words in result.stdout, words
