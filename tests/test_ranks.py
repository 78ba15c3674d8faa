"""Several processes, one run: what torchrun's ranks give is what one process gives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_alike_but_for_rounding, few_flags
from safetensors.torch import load_file
from typer.testing import CliRunner

from parts import commands, ranks
from parts.files import read_json

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps", "2", "--batch-size", "6", "--micro-batch", "2", "--eval-problems", "0"]
SMALL += few_flags()
GROUPS = ["--group-size", "2", "--temperature", "1.5", "--lr", "1e-3"]
MEMBERS = {
    "copsd": SMALL,
    "grpo": [*SMALL, "--method", "grpo", *GROUPS],
    "ophsd": [*SMALL, "--method", "ophsd", "--note-tokens", "16"],
    "egrsd": [*SMALL, "--method", "egrsd", *GROUPS],
    "ssopd": [*SMALL, "--method", "ssopd", *GROUPS],
}


def command(program: str, flags: list[str], count: int) -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return [*torchrun, *place, program, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(program: str, flags: list[str], count: int) -> str:
    """Run a program in so many processes, in this one where it is one; return what it prints."""
    if count == 1:
        within = {"copsd.py": commands.copsd, "eval.py": commands.evaluation}[program]
        result = CliRunner().invoke(within, flags)
        assert result.exit_code == 0, result.output
        return result.stdout
    done = subprocess.run(
        command(program, flags, count),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def measured(log: list[dict]) -> list[dict]:
    """Return the rows of a log without seconds and bytes."""
    return [
        {name: row[name] for name in row if "time_s" not in name and "memory" not in name}
        for row in log
    ]


def assert_alike(one: Path, other: Path) -> None:
    """Two runs have the same completions, and the same losses and adapter but for rounding."""
    adapters = [
        sorted(each.glob("adapters/*/adapter_model.safetensors"))[-1] for each in (one, other)
    ]
    first, second = map(load_file, adapters)
    assert first.keys() == second.keys()
    flat = [torch.cat([file[name].flatten() for name in first]) for file in (first, second)]
    lr = read_json(one / "config.json")["config"]["lr"]
    logs = [rows(each / "metrics.jsonl") for each in (one, other)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] != []
    assert_alike_but_for_rounding(*flat, moved=len(logs[0]) * lr, share=5e-5)
    for mine, theirs in zip(*map(measured, logs), strict=True):
        assert theirs.keys() == mine.keys()
        for name, value in mine.items():
            like = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert theirs[name] == like, name
    texts = [
        [
            (row["step"], row["problem_id"], row["completion"])
            for row in rows(each / "completions.jsonl")
        ]
        for each in (one, other)
    ]
    assert texts[0] == texts[1]


# To start ranks takes longer than such a run, so they are started once for all of them.
DRIVER = """
import json, sys
from contextlib import suppress
sys.path.insert(0, {root!r})
from parts import commands, ranks
ranks.join()
left = []
ranks.join = lambda: None
ranks.leave = lambda: left.append(1)
for program, flags in json.loads(sys.argv[1]):
    with suppress(SystemExit):
        getattr(commands, program)(flags)
if ranks.is_first():
    print(len(left), "left")
"""


def test_two_ranks_train_and_evaluate_as_one_process_does(tmp_path):
    def _calls(count: int) -> list[tuple[str, list[str]]]:
        trained = [
            ("copsd", ["train", *MEMBERS[member], "--out", str(tmp_path / member / str(count))])
            for member in MEMBERS
        ]
        out = ["--out", str(tmp_path / "eval" / str(count))]
        return [*trained, ("evaluation", ["--pass-at-k", "2", "--limit", "5", *out])]

    for program, flags in _calls(1):
        run({"copsd": "copsd.py", "evaluation": "eval.py"}[program], flags, 1)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT)), encoding="utf-8")
    printed = run(str(driver), [json.dumps(_calls(2))], 2)
    assert printed.count("done in") == len(MEMBERS), "one of them prints"
    assert f"{len(MEMBERS) + 1} left" in printed, "each of the programs parts from the other rank"
    for member in MEMBERS:
        assert_alike(tmp_path / member / "1", tmp_path / member / "2")
    one, other = (tmp_path / "eval" / str(count) for count in (1, 2))
    assert [row["id"] for row in rows(other / "problems.jsonl")] != []
    assert rows(other / "problems.jsonl") == rows(one / "problems.jsonl")
    assert (other / "summary.json").read_bytes() == (one / "summary.json").read_bytes()


def test_a_rank_that_dies_ends_the_run_which_goes_on_with_another_number(tmp_path):
    flags = ["train", *SMALL, "--steps", "12", "--save-every", "1"]
    straight = tmp_path / "straight"
    run("copsd.py", [*flags, "--out", str(straight)], 1)
    out = tmp_path / "killed"
    flags += ["--out", str(out)]
    started = subprocess.Popen(
        command("copsd.py", flags, 2),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (log.is_file() and len(rows(log)) >= 2) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = started.communicate(timeout=200)
    assert started.returncode != 0
    assert len(rows(log)) < 12, "it was killed too late to show anything"
    assert "another process of this run has ended" in said or "SIGTERM" in said
    run("copsd.py", flags, 1)  # alone, from the last save
    assert_alike(straight, out)


# One process


def test_without_torchrun_nothing_is_divided_or_changed():
    items = [3, 1, 2]
    assert ranks.gather(items) is items and ranks.decide(items) is items
    assert (ranks.count(), ranks.number(), ranks.is_first()) == (1, 0, True)
    assert ranks.own_device("cuda") == "cuda"
    weight = torch.ones(2, requires_grad=True)
    ranks.sum_gradients([weight])
    # An optimiser would pass by a parameter without a gradient.
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(2))
    ranks.refuse("compare.py")


@pytest.mark.parametrize(
    ("processes", "device", "own"),
    [
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (1, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda:1"),
        (2, "cuda:0", "would be one GPU for 2 processes: leave --device out"),
        (4, "cuda", "4 processes a machine, and GPUs on this one: 2; valid are"),
    ],
)
def test_each_process_has_one_gpu_which_is_the_current_one(monkeypatch, processes, device, own):
    """Graphs were recorded on cuda:0 while cuda:1 computed: they were empty, and said nothing."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "count", lambda: processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "1")
    if " " in own:
        with pytest.raises(ValueError, match=own):
            ranks.own_device(device)
    else:
        assert ranks.own_device(device) == own
    assert current == ([own] if own.startswith("cuda:") else [])


@pytest.mark.parametrize("program", ["copsd.py", "eval.py", "show.py", "bench/gpu.py"])
def test_every_program_that_picks_a_device_makes_it_its_own(program):
    source = "parts/setup.py" if program == "copsd.py" else program
    text = (ROOT / source).read_text(encoding="utf-8")
    assert text.count("pick_device(") == text.count("ranks.own_device(pick_device(") == 1


@pytest.mark.parametrize("items", [0, 1, 5, 8])
def test_shares_are_neighbours_that_add_up(monkeypatch, items):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    found = []
    for number in range(3):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        found.append(list(range(items))[ranks.share(items)])
    assert [item for part in found for item in part] == list(range(items))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    ("program", "flags"),
    [(commands.copsd, ["train", *SMALL]), (commands.evaluation, ["--limit", "2"])],
    ids=["train", "eval"],
)
def test_rank_0_decides_the_day_and_refuses_another_model(tmp_path, monkeypatch, program, flags):
    """An evaluation asked neither, and each rank of both programs had a today of its own."""
    model = tmp_path / "dated"
    shutil.copytree("lab/tiny", model)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    identities = []

    def _as_rank_0_says(value):
        if isinstance(value, dict) and "base_weights" in value:
            identities.append(value)
            return {**value, "base_weights": "0" * 16}
        return "2001-02-03" if isinstance(value, str) else value

    monkeypatch.setattr(ranks, "decide", _as_rank_0_says)
    data = ["--data", "lab/problems/hau/train.jsonl"]
    if program is commands.evaluation:
        data = ["--benchmark", "lab"]
    out = ["--model", str(model), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(program, [*flags, *data, *out])
    assert result.exit_code == 2, result.output
    assert "another model, data or prompts than that of rank 0" in result.stderr
    assert [each["template_date"] for each in identities] == ["2001-02-03"]
    assert not (tmp_path / "out").exists()


def test_a_program_for_one_process_refuses_several(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ValueError, match="without torchrun"):
        ranks.refuse("compare.py")
    for program, name in (
        (commands.copsd, "copsd.py show"),
        (commands.copsd, "copsd.py plan"),
        (commands.copsd, "copsd.py export-data"),
        (commands.evaluation, "eval.py report"),
        (commands.comparison, "compare.py"),
    ):
        command = name.split()[1:]
        result = CliRunner().invoke(program, [*command, *(["any"] if "report" in name else [])])
        assert result.exit_code == 2, result.output
        assert result.stderr == f"error: {name} is for one process: start it without torchrun\n"
