"""The batch and its cache: rows come and go and columns are added, and no result changes."""

import pytest
import torch
from conftest import build_tiny_model
from test_sampler import HEADS, PLAIN, SIZES, full_logprobs, ids_of, random_prompts, watch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from parts import batch, sampler
from parts.lora import attach_lora
from parts.sampler import SamplingParams, sample


def test_a_batch_of_mixed_lengths_equals_one_by_one(tiny_model):
    prompts = random_prompts(3, 12, 1, 7)
    together = sample(tiny_model, prompts, PLAIN, eos_ids={4, 9}, samples_per_prompt=2)
    for index, prompt in enumerate(prompts):
        # Equal short prompts in front keep the prompt's index, on which its random stream depends.
        alone = sample(
            tiny_model, [prompt] * (index + 1), PLAIN, eos_ids={4, 9}, samples_per_prompt=2
        )[index]
        for batched, single in zip(together[index], alone, strict=True):
            assert batched.completion_ids == single.completion_ids
            assert batched.logprobs == pytest.approx(single.logprobs, abs=1e-4)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7])
def test_max_rows_bounds_the_batch_and_changes_no_result(tiny_model, max_rows):
    prompts = random_prompts(3, 9, 1, 9)
    eos_ids = set(range(0, 290, 10))  # rows end at many different steps
    free = sample(tiny_model, prompts, PLAIN, eos_ids=eos_ids, samples_per_prompt=3)
    shapes: list = []
    watch(tiny_model.model, shapes)
    finished: list[int] = []
    bound = sample(
        tiny_model,
        prompts,
        PLAIN,
        eos_ids=eos_ids,
        samples_per_prompt=3,
        max_rows=max_rows,
        on_progress=lambda count, *_: finished.append(count),
    )
    assert ids_of(bound) == ids_of(free)
    assert finished == sorted(finished)
    assert finished[0] <= max_rows and finished[-1] == 12  # waiting rows are not finished ones
    assert max(rows for rows, columns in shapes if columns == 1) <= max_rows


def test_finished_rows_leave_the_batch(tiny_model):
    shapes, progress = [], []
    watch(tiny_model.model, shapes)
    eos_ids = set(range(0, 290, 6))
    params = SamplingParams(30, temperature=1.0)
    groups = sample(
        tiny_model,
        random_prompts(4, 2),
        params,
        eos_ids=eos_ids,
        samples_per_prompt=8,
        on_progress=lambda *counts: progress.append(counts),
    )
    lengths = [len(ids) for group in ids_of(groups) for ids in group]
    steps = [rows for rows, columns in shapes if columns == 1]
    assert len(steps) == max(lengths) - 1
    for step, rows in enumerate(steps):
        # The rows that still generate after this step, and at most an eighth more.
        assert sum(length > step + 1 for length in lengths) <= rows <= 16
        assert rows <= 8 / 7 * sum(length > step for length in lengths)
    assert min(steps) < 8
    assert progress == [
        (
            sum(length <= step for length in lengths),
            16,
            sum(min(length, step) for length in lengths),
        )
        for step in range(1, max(lengths) + 1)
    ]


@pytest.mark.parametrize("max_rows", [1, 3])
def test_completions_longer_than_the_caches_room_equal_a_full_forward(max_rows):
    # The room for columns to come is 256, and is made again when it is full: twice here.
    torch.manual_seed(3)
    sizes = HEADS | {"max_position_embeddings": 1024, "initializer_range": 0.2}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **sizes)).eval()
    rollouts = sample(
        model, random_prompts(2, 30, 9), SamplingParams(560), eos_ids=set(), max_rows=max_rows
    )
    for (rollout,) in rollouts:
        assert len(rollout.completion_ids) == 560
        assert rollout.logprobs == pytest.approx(full_logprobs(model, rollout, 1.0), abs=1e-3)


def test_the_cache_grows_past_its_first_block(tiny_model, monkeypatch):
    prompts = random_prompts(6, 2)
    expected = ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set()))
    monkeypatch.setattr(batch, "GROWTH_COLUMNS", 5)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set())) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_is_right_past_its_growth(tiny_model, monkeypatch, attention):
    # Room for 3 columns only: 20 tokens fill it six times, with rows that end and rows that join in
    # between. What a fresh allocation holds is made NaN, so that reading it would show.
    monkeypatch.setattr(batch, "GROWTH_COLUMNS", 3)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes: empty(*sizes).fill_(float("nan")))
    grown: list[int] = []
    grow = batch.WrittenLayer.grow

    def watched(layer, columns):
        assert layer.cursor.filled == layer.keys.shape[2]
        grown.append(columns)
        return grow(layer, columns)

    monkeypatch.setattr(batch.WrittenLayer, "grow", watched)
    tiny_model.set_attn_implementation(attention)
    params = SamplingParams(20, temperature=1.1)
    eos_ids = set(range(0, 290, 60))
    prompts = random_prompts(9, 2, 5, 14)
    groups = sample(tiny_model, prompts, params, eos_ids=eos_ids, samples_per_prompt=3, max_rows=4)
    assert sum(grown) >= 12  # two layers
    assert {rollout.finish_reason for group in groups for rollout in group} == {"stop", "length"}
    for group in groups:
        for rollout in group:
            assert rollout.logprobs == pytest.approx(
                full_logprobs(tiny_model, rollout, 1.1), abs=1e-4
            )


def test_the_room_for_all_columns_is_allocated_at_once(tiny_model, monkeypatch):
    made: list[list[int]] = []
    join = batch.right_aligned

    def watched(parts, room):
        made.append([part.shape[2] for part in parts] + [room])
        return join(parts, room)

    monkeypatch.setattr(batch, "right_aligned", watched)
    sample(tiny_model, random_prompts(6, 2), PLAIN, eos_ids=set())
    assert made == [[6, 2, 11]] * 4  # keys and values of two layers; the twelfth token needs none


def test_parts_end_at_one_column_with_zeros_around_them():
    one, two = torch.ones(1, 1, 1, 1), torch.full((2, 1, 3, 1), 2.0)
    aligned = batch.right_aligned([one, two], room=1)
    assert aligned[:, 0, :, 0].tolist() == [[0, 0, 1, 0], [2, 2, 2, 0], [2, 2, 2, 0]]


def test_a_finished_row_that_stays_does_not_run_past_the_context(monkeypatch):
    """Learned positions end with the context, and a finished row counted on beside living ones.

    Of nine rows eight end after 6 tokens and make room for others. The ninth ends at the context's
    limit, where the others are 6 tokens old, and stays until one of them ends.
    """
    torch.manual_seed(3)
    sizes = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3}
    model = OPTForCausalLM(OPTConfig(**sizes, **heads, num_hidden_layers=2)).eval()
    prompts = random_prompts(*[52] * 18)
    early = [tuple(ids) for ids in sorted(prompts)[1:9]]
    extend = batch.Row.extend

    def end_early(row, ids, logprobs, eos_ids, max_new_tokens):
        limit = 6 if row.prompt_ids in early else max_new_tokens
        return extend(row, ids, logprobs, eos_ids, limit)

    monkeypatch.setattr(batch.Row, "extend", end_early)
    groups = sample(model, prompts, PLAIN, eos_ids=set(), max_rows=9)
    assert sorted(len(rollout.completion_ids) for (rollout,) in groups) == [6] * 8 + [12] * 10
    for (rollout,) in groups:
        assert rollout.logprobs == pytest.approx(full_logprobs(model, rollout, 1.1), abs=1e-4)


EOS = set(range(0, 290, 20))


def ragged(model) -> list:
    """Sample rows of several lengths, of which some wait for others to end."""
    prompts = random_prompts(6, 2, 9, 4)
    return sample(model, prompts, PLAIN, eos_ids=EOS, samples_per_prompt=3, max_rows=5)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_what_attention_sees_of_the_columns_to_come_changes_no_result(
    tiny_model, monkeypatch, size
):
    expected = ids_of(ragged(tiny_model))
    monkeypatch.setattr(batch, "SMALL_BUCKET", size)
    assert ids_of(ragged(tiny_model)) == expected


@pytest.mark.parametrize("every", [3, 8, 99])
def test_rows_that_are_looked_at_every_few_steps_are_those_of_a_look_at_each(
    tiny_model, monkeypatch, every
):
    expected, seen, shapes = ragged(tiny_model), [], []
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": every})
    watch(tiny_model.model, shapes)
    found = sample(
        tiny_model,
        random_prompts(6, 2, 9, 4),
        PLAIN,
        eos_ids=EOS,
        samples_per_prompt=3,
        max_rows=5,
        on_progress=lambda *counts: seen.append(counts),
    )
    assert ids_of(found) == ids_of(expected)
    for group, other in zip(found, expected, strict=True):
        for rollout, row in zip(group, other, strict=True):
            assert rollout.finish_reason == row.finish_reason
            assert rollout.logprobs == pytest.approx(row.logprobs, abs=1e-4)
    # What rows generate past their ends counts for nothing, and there are fewer looks than steps.
    assert seen[-1] == (12, 12, sum(len(ids) for group in ids_of(expected) for ids in group))
    assert len(seen) < sum(columns == 1 for _, columns in shapes)


def addresses(rows: batch.Batch) -> list[int]:
    """Return where all tensors lie that a step of the batch reads or writes."""
    tensors = [rows.ids_B1, rows.position_B1, rows.mask_B11T, rows.cursor.column_C]
    tensors += [tensor for layer in rows.layers for tensor in (layer.keys, layer.values)]
    return [tensor.data_ptr() for tensor in [*tensors, *rows.decoder.parameters()]]


def let_it_record(monkeypatch) -> list[str]:
    """Let steps on a CPU be recorded, by a Recorder.record that the test puts in place.

    Returns what CUDA is told to do where a step waits for it, one after the other.
    """
    told: list[str] = []
    monkeypatch.setattr(batch, "RECORDED", ("cpu",))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told.append)
    return told


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_recorded_step_holds_for_the_steps_after_it(tiny_model, monkeypatch, attention):
    """Replay one step's operations, with every number and address of that step, for the next ones.

    That is what a CUDA graph does. A column, position or length that Python reads at each step
    would be that of the recorded one.
    """
    tiny_model.set_attn_implementation(attention)
    adapter = attach_lora(tiny_model, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=0)
    torch.nn.init.normal_(adapter.parameters()[1], std=0.3)
    expected, counts, places = ragged(tiny_model), [], []

    def record(recorder, step):
        rows = step.__self__
        held = [rows.position_B1, rows.mask_B11T, rows.cursor.column_C]
        held += [tensor for layer in rows.layers for tensor in (layer.keys, layer.values)]
        before = [tensor.clone() for tensor in held]
        traced = make_fx(lambda unused: step())(held[0])  # runs it; recording a graph does not
        for tensor, content in zip(held, before, strict=True):
            tensor.copy_(content)
        place = addresses(rows)
        counts.append(0)

        def replay():
            counts[-1] += 1
            places.append(addresses(rows) == place)
            return traced(held[0])

        return replay

    monkeypatch.setattr(batch, "BUCKET_COLUMNS", {"cpu": 8})
    monkeypatch.setattr(batch.Recorder, "record", record)
    let_it_record(monkeypatch)
    assert ids_of(ragged(tiny_model)) == ids_of(expected)
    assert len(counts) > 1 and max(counts) > 1 and all(places)


def test_a_step_that_cannot_be_recorded_is_run_and_said_once(tiny_model, monkeypatch):
    expected = ids_of(ragged(tiny_model))
    let_it_record(monkeypatch)

    def record(recorder, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(batch.Recorder, "record", record)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted") as said:
        for _ in range(2):
            assert ids_of(ragged(tiny_model)) == expected
    assert len(said) == 1, "every rollout has a batch of its own, and the model is the same"


def test_a_step_that_waits_for_the_device_is_never_recorded(tiny_model, monkeypatch):
    expected = ids_of(ragged(tiny_model))
    told = let_it_record(monkeypatch)

    def wait(module, inputs):  # at the end of a step, when all of its columns are written
        if told and told[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    tiny_model.model.norm.register_forward_pre_hook(wait)
    with pytest.warns(UserWarning, match="without CUDA graphs: called a synchronizing") as said:
        for _ in range(2):
            assert ids_of(ragged(tiny_model)) == expected
    assert len(said) == 1 and told == ["error", "default"]


def test_a_recording_that_fails_leaves_the_stream_as_it_was(tiny_model, monkeypatch):
    """torch's own context stays on its side stream where the end of a recording raises."""
    expected = ids_of(ragged(tiny_model))
    let_it_record(monkeypatch)
    current = ["the stream of the program"]

    class Graph:
        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            current.append("the stream of the recording")

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    append = batch.Batch._append

    def append_or_record(rows):  # recording runs nothing
        return append(rows) if current[-1] == "the stream of the program" else None

    monkeypatch.setattr(batch.Batch, "_append", append_or_record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation failed"):
        assert ids_of(ragged(tiny_model)) == expected
    program, recording = "the stream of the program", "the stream of the recording"
    assert current == [program, recording, program]


def test_what_is_sampled_after_an_update_is_of_the_new_weights(tiny_model):
    adapter = attach_lora(tiny_model, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=0)
    for _ in range(2):
        for tensor in adapter.parameters():
            torch.nn.init.normal_(tensor, std=0.3)
        for group in ragged(tiny_model):
            for rollout in group:
                full = full_logprobs(tiny_model, rollout, 1.1)
                assert rollout.logprobs == pytest.approx(full, abs=1e-4)


@pytest.mark.parametrize(
    ("tokens", "groups"), [(10, [(1, 6), (2, 5), (1, 2)]), (1, [(1, 6), (1, 5), (1, 4), (1, 2)])]
)
def test_small_prefill_groups_change_no_result(tiny_model, monkeypatch, tokens, groups):
    prompts, shapes = random_prompts(6, 2, 5, 4), []
    expected = ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set()))
    monkeypatch.setattr(batch, "SMALL_PREFILL", tokens)
    watch(tiny_model.model, shapes)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set())) == expected
    assert [shape for shape in shapes if shape[1] > 1] == groups


# With 2, the three samples of a prompt are not admitted together.
@pytest.mark.parametrize("max_rows", [None, 2])
def test_each_distinct_prompt_is_prefilled_once(tiny_model, max_rows):
    prompts, shapes = random_prompts(4, 6), []
    watch(tiny_model.model, shapes)
    sample(
        tiny_model,
        [*prompts, *prompts],
        PLAIN,
        eos_ids=set(),
        samples_per_prompt=3,
        max_rows=max_rows,
    )
    assert sum(rows for rows, columns in shapes if columns > 1) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_all_prompts_begin_with_is_computed_once(attention, monkeypatch):
    model = build_tiny_model(attn_implementation=attention)
    start, *ends = random_prompts(6, 5, 1, 4, 2)
    prompts = [start + end for end in ends]
    expected = sample(model, prompts, PLAIN, eos_ids=set())
    shapes: list = []
    watch(model.model, shapes)
    monkeypatch.setattr(batch, "SMALL_PREFILL", 19)  # what is spared is 6 ids three times
    sample(model, prompts, PLAIN, eos_ids=set())
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 11), (1, 10), (2, 8)]
    shapes.clear()
    monkeypatch.setattr(batch, "SMALL_PREFILL", 18)
    shared = sample(model, prompts, PLAIN, eos_ids=set())
    assert shapes[:4] == [(1, 6), (1, 5), (1, 4), (2, 2)]
    assert ids_of(shared) == ids_of(expected)
    for (rollout,) in shared:
        full = full_logprobs(model, rollout, PLAIN.temperature or 1.0)
        assert rollout.logprobs == pytest.approx(full, abs=1e-4)


def test_a_prompt_that_is_the_beginning_of_others_keeps_its_last_id(tiny_model, monkeypatch):
    (longest,) = random_prompts(9)
    prompts = [longest, longest[:7], longest[:4], longest[:4]]
    expected = sample(tiny_model, prompts, PLAIN, eos_ids=set())
    monkeypatch.setattr(batch, "SMALL_PREFILL", 6)
    shapes: list = []
    watch(tiny_model.model, shapes)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set())) == ids_of(expected)
    assert shapes[:2] == [(1, 3), (1, 6)]
