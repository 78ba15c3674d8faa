"""parts/checkpoints.py: a state vouches for itself and its logs, and several are kept."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from parts import checkpoints
from parts.checkpoints import (
    check_state,
    newest,
    optimizer_tensors,
    restore_optimizer,
    saved_steps,
)
from parts.files import read_sealed, write_sealed
from parts.runs import LOGS, Run


def save(run: Run, step: int, **options) -> None:
    run.log({"step": step, "sampled_tokens": 10 * step}, [{"step": step, "text": "so"}])
    run.save_state(step, {"a": torch.full((3,), float(step))}, **options)


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path)
    for step in (1, 2, 3, 4):
        save(made, step)
    return made


def newest_step(run: Run) -> int | None:
    state, _ = newest(run.folder)
    return state.step if state else None


def state_file(run: Run, step: int, suffix: str = "safetensors"):
    return run.folder / "resume" / f"step_{step:05d}.{suffix}"


def test_the_last_three_are_kept_and_the_newest_is_used(run):
    assert saved_steps(run.folder) == [4, 3, 2]
    assert len(list((run.folder / "resume").iterdir())) == 6
    step, tokens, tensors = run.load_state()
    assert (step, tokens) == (4, 40) and tensors["a"].tolist() == [4, 4, 4]
    save(run, 5, keep=1)
    assert saved_steps(run.folder) == [5]


def test_a_signals_state_goes_with_the_next_save(run):
    save(run, 5, due=False)
    assert saved_steps(run.folder) == [5, 4, 3]
    assert run.load_state()[0] == 5
    save(run, 6)
    assert saved_steps(run.folder) == [6, 4, 3]  # as in a run without a signal at 5


def test_states_to_spare_stay(run):
    tensors = {"a": torch.zeros(3)}
    checkpoints.save(run.folder, 5, tensors, logs=LOGS, keep=2, spare=[2])
    assert saved_steps(run.folder) == [5, 4, 2]


def test_any_flipped_byte_is_seen_and_an_older_state_is_used(run):
    for suffix in ("safetensors", "json"):
        path = state_file(run, 4, suffix)
        held = path.read_bytes()
        for place in range(0, len(held), 7):
            flipped = bytearray(held)
            flipped[place] ^= 0x10
            path.write_bytes(flipped)
            if suffix == "json" and newest_step(run) == 4:
                # White space, or the name of the seal: what the file says is unharmed.
                assert chr(held[place]).isspace() or b"sha256" in held[place - 8 : place + 8]
                continue
            state, passed_over = newest(run.folder)
            assert state and state.step == 3
            assert len(passed_over) == 1 and "step_00004" in passed_over[0]
        path.write_bytes(held)
    assert newest_step(run) == 4


def test_a_state_that_is_passed_over_is_named(run):
    state_file(run, 4).write_bytes(b"half")
    (said,) = run.check_whole()
    assert "step_00004.safetensors is damaged" in said and said.endswith("going on from step 3")
    assert run.load_state()[0] == 3
    save(run, 4)
    assert newest_step(run) == 4 and run.check_whole() == []


def test_a_log_that_changed_or_is_shorter_is_seen(run):
    log = run.folder / "metrics.jsonl"
    held = log.read_bytes()
    log.write_bytes(held.replace(b"40", b"41"))
    assert newest_step(run) == 3  # what came before it is whole
    log.write_bytes(held[: held.index(b"\n") + 1])
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: the log up to step 4 is not"):
        run.check_whole()
    log.unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: .*; no older state is whole"):
        run.load_state()
    log.write_bytes(held + b'{"step": 5}\n')  # logged, not saved
    assert newest_step(run) == 4


def test_a_wrong_step_is_seen(run):
    voucher = read_sealed(state_file(run, 4, "json"))
    write_sealed(state_file(run, 4, "json"), {**voucher, "step": 3})
    state, passed_over = newest(run.folder)
    assert state and state.step == 3 and "is of another step" in passed_over[0]
    for content in ({}, {"step": 4}, {"step": 4, "state": 1, "logs": 2}):
        write_sealed(state_file(run, 4, "json"), content)
        assert "does not vouch" in newest(run.folder)[1][0]


def test_a_state_without_its_voucher_was_never_finished(run):
    state_file(run, 4, "json").unlink()
    assert newest_step(run) == 3 and newest(run.folder)[1] == []


def test_other_files_beside_the_states_are_not_theirs(run):
    for name in ("step_00009.bak", "step_00009.json.bak", "notes.txt", "step_9_copy.json"):
        (run.folder / "resume" / name).write_text("mine")
    assert newest_step(run) == 4
    save(run, 5)
    assert (run.folder / "resume" / "step_00009.bak").read_text() == "mine"


def test_what_a_kill_left_of_a_save_is_removed_by_the_next(run):
    left = run.folder / "resume" / "step_00005.safetensors.partial"
    left.write_bytes(b"half")
    save(run, 6)
    assert not left.exists()


def test_a_state_that_lacks_a_tensor_is_refused(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    adapter = {"current.layer.lora_A": parameter.detach()}
    state = {"lora/current.layer.lora_A": parameter.detach()}
    run = Run(tmp_path)
    run.log({"step": 1, "sampled_tokens": 1}, [])
    run.save_state(1, state)
    check_state(tmp_path, adapter, [parameter])  # no update has been made: no optimiser state
    parameter.sum().backward()
    optimizer.step()
    whole = {**state, **optimizer_tensors(optimizer)}
    run.save_state(1, whole)
    check_state(tmp_path, adapter, [parameter])
    for name in whole:
        run.save_state(1, {each: tensor for each, tensor in whole.items() if each != name})
        with pytest.raises(ValueError, match=f"such as {name}; start anew"):
            check_state(tmp_path, adapter, [parameter])
    run.save_state(1, {**whole, "other": torch.ones(1)})
    with pytest.raises(ValueError, match="such as other"):
        check_state(tmp_path, adapter, [parameter])
    run.save_state(1, {**whole, "lora/current.layer.lora_A": torch.ones(3)})
    with pytest.raises(ValueError, match="misshapen"):
        check_state(tmp_path, adapter, [parameter])


def test_tensors_are_saved_as_they_are(tmp_path):
    run = Run(tmp_path)
    run.log({"step": 1, "sampled_tokens": 1}, [])
    run.save_state(1, {"a": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(load_file(state_file(run, 1))["a"], torch.arange(6.0).reshape(2, 3).T)
    save_file({"a": torch.zeros(1)}, state_file(run, 1))
    assert newest(tmp_path)[0] is None


def test_optimizer_state_survives_the_round_trip_through_flat_tensors():
    def fresh():
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def step(parameter, optimizer):
        (parameter**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight, optimizer = fresh()
    step(straight, optimizer)
    resumed, other = fresh()
    with torch.no_grad():
        resumed.copy_(straight)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    # An adapter's tensors stand in the same file and are not the optimiser's.
    restore_optimizer(other, {**saved, "lora/current.layer.lora_A": torch.ones(1)})
    step(straight, optimizer)
    step(resumed, other)
    assert torch.equal(straight, resumed)
