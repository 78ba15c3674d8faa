"""What stands around the method in a step: drawing, sampling, updating, logging, saving."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parts import ranks, runs
from parts.adapters import save_adapter
from parts.checkpoints import optimizer_tensors, restore_optimizer
from parts.data import pick_order
from parts.lossscale import LossScale
from parts.machine import stop_unless_finite
from parts.model import published_name, valid_ids
from parts.prompts import Problem, pose_in_english
from parts.recipe import Config
from parts.sampler import Rollout, SamplingParams, sample
from parts.setup import Setup
from parts.steplog import completion_rows
from parts.view import Watcher
from parts.watch import best_row, is_look_due, look

MAX_SKIPPED = 3  # updates in a row without a finite gradient before a run gives up


def draw_problems(setup: Setup, count: int, *, step: int) -> list[Problem]:
    """Return the problems of a step, the first --english-share of them posed in English."""
    config = setup.config
    order = pick_order(len(setup.train), seed=config.seed, step=step - 1, batch=count)
    problems = [setup.train[index] for index in order]
    return pose_in_english(problems, config.english_share, step=step)


def draw_others(
    setup: Setup, count: int, taken: list[Problem], *, step: int, draw: int
) -> list[Problem]:
    """Return further problems for a step, none of which is in it: fewer where there are no others.

    taken  those that are in the step, in whatever language they are posed
    draw   counts such draws of a step, from 1; each has an order of its own of all problems, and
           --english-share is of each draw
    """
    config = setup.config
    everything = len(setup.train)
    order = pick_order(everything, seed=config.seed + draw, step=step - 1, batch=everything)
    ids = {problem.id for problem in taken}
    others = [setup.train[index] for index in order if setup.train[index].id not in ids]
    return pose_in_english(others[:count], config.english_share, step=step)


def rollout_seed(config: Config, step: int) -> int:
    """Return the seed of a step's rollouts, another one at every step of every run."""
    return config.seed * 1_000_003 + step


def write_completions(
    setup: Setup, prompts: list[list[int]], *, seed: int, samples: int = 1, limit: int | None = None
) -> list[list[Rollout]]:
    """Sample completions of each prompt, `samples` of them, from the model as it is now.

    limit  new tokens at most; None: --max-new-tokens
    Each process samples its share of the prompts; all get every completion.
    """
    config = setup.config
    mine = ranks.share(len(prompts))
    params = SamplingParams(
        limit or config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed
    )
    groups = sample(
        setup.model,
        prompts[mine],
        params,
        samples_per_prompt=samples,
        first_index=mine.start,
        max_rows=config.sample_rows,
        eos_ids=setup.end_ids,
        valid_ids=valid_ids(setup.tokenizer),
    )
    return ranks.gather(groups)


def share_done(config: Config, step: int, sampled_tokens: int) -> float:
    """Return how much of the run is done after `step`, of its token budget or else of its steps.

    1 at its end, also where the last step samples past the budget.
    """
    if config.token_budget:
        return min(1.0, sampled_tokens / config.token_budget)
    return step / config.steps


def rows_in_the_loss(config: Config, rollouts: list[Rollout]) -> list[int]:
    """Return the rows that count in the loss: all, or with --mask-truncated those that ended."""
    return [
        row
        for row, rollout in enumerate(rollouts)
        if not (config.mask_truncated and rollout.finish_reason == "length")
    ]


def loss_reduction(config: Config, tokens: int, rows: int) -> tuple[str, int]:
    """Return how --loss-norm reduces the loss of a step: reduce_loss's reduction and step_tokens.

    tokens, rows  of the completions that count in the loss
    """
    if config.loss_norm == "constant":  # Dr. GRPO: no token's weight depends on any length
        return "token", rows * config.max_new_tokens
    return {"token": "token", "sequence": "trajectory"}[config.loss_norm], tokens


def take_step(optimizer: torch.optim.Optimizer, *, setup: Setup, lr: float) -> float:
    """Cut the gradient's norm, step, clear; return the norm before the cut.

    A gradient that is not finite is dropped: one step with it would turn every weight into NaN.
    What a loss was multiplied by, in float16, is divided out first, and then made to fit.
    """
    optimizer.param_groups[0]["lr"] = lr
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients(parameters)
    setup.loss_scale.unscale(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, setup.config.max_grad_norm)
    grad_norm = ranks.decide(norm.item())
    if math.isfinite(grad_norm):
        optimizer.step()
        stop_unless_finite(parameters)
    optimizer.zero_grad()
    losses_finite = all(ranks.gather([setup.loss_scale.losses_finite]))
    setup.loss_scale.adapt(math.isfinite(grad_norm), losses_finite)
    return grad_norm


def count_skipped(skipped: int, grad_norm: float, step: int, loss_scale: LossScale) -> int:
    """Return how many updates in a row were dropped, this one included.

    One that made the loss scale fall is not counted: with the next, smaller one it would have been
    finite. As the scale ends at 1, so does the falling.
    Raises FloatingPointError when they are too many.
    """
    if math.isfinite(grad_norm):
        return 0
    if loss_scale.fell:
        return skipped
    if skipped + 1 == MAX_SKIPPED:
        raise FloatingPointError(
            f"no finite gradient in {MAX_SKIPPED} updates up to step {step}: try a lower --lr"
        )
    return skipped + 1


def begin(setup: Setup, run: runs.Run) -> tuple[torch.optim.AdamW, int, int, int]:
    """Return the optimiser, the last saved step, the tokens sampled and the updates last skipped.

    The numbers are 0 in a new run; the last is of updates in a row, up to that step.
    Adapter, optimiser and logs are brought to that step, so that a stopped run goes on exactly.
    """
    config = setup.config
    optimizer = torch.optim.AdamW(
        setup.lora.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    saved = logged = None
    if ranks.is_first():
        saved = run.load_state()
        run.cut_back(saved[0])
        logged = run.logged(saved[0])
    step, sampled_tokens, tensors = ranks.decide(saved)
    if step:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("lora/")}
        setup.lora.load_state_dict({name.removeprefix("lora/"): own[name] for name in own})
        restore_optimizer(optimizer, tensors)
    logged = ranks.decide(logged)
    setup.loss_scale.restore(logged)
    setup.model.train()
    return optimizer, step, sampled_tokens, logged.get("update/skipped_in_a_row", 0)


def finish_step(
    setup: Setup,
    run: runs.Run,
    view: Watcher,
    optimizer: torch.optim.Optimizer,
    metrics: dict[str, Any],
    problems: list[Problem],
    rollouts: list[Rollout],
    scores: Mapping[str, Any],
    stopped: list[int],
) -> bool:
    """Log a step, show it, and save where it is due; say whether the run ends here before its end.

    A signal ends it, or the view, such as at an alarm. After the last step there is no end to come
    before; whether a signal came then, the loop asks itself.

    problems, scores  of each rollout: they stand beside it in completions.jsonl
    """
    step = metrics["step"]
    done = metrics["progress"]
    metrics = ranks.decide(look(setup, run, rollouts, metrics))
    if ranks.is_first():
        decode = setup.tokenizer.decode
        run.log(metrics, completion_rows(step, problems, rollouts, scores, decode))
    ending = view.show(metrics) or bool(stopped)
    stop = any(ranks.gather([ending]))  # whichever rank it reached
    if is_due(setup.config, step, done) or stop:
        save(run, setup, optimizer, step, done)
    return stop and done < 1


def is_due(config: Config, step: int, done: float) -> bool:
    """Say whether the adapter after `step` is one that is kept: as asked for, or as looked at."""
    return step % config.save_every == 0 or done >= 1 or is_look_due(config, step, done)


def save(
    run: runs.Run, setup: Setup, optimizer: torch.optim.Optimizer, step: int, done: float
) -> None:
    """Save the state for going on and, where it is due, the adapter for use.

    A run that was stopped in between so leaves no adapter that an unstopped one lacks.
    """
    if not ranks.is_first():
        return
    if is_due(setup.config, step, done):
        name, revision = published_name(Path(str(setup.model.name_or_path)))
        folder = run.adapter_folder(step)
        run.disown(folder)  # a step that is taken again may, on a GPU, end in other bytes
        save_adapter(setup.lora, folder, base_model=name, revision=revision)
    adapter = {f"lora/{name}": tensor for name, tensor in setup.lora.state_dict().items()}
    state = {**adapter, **optimizer_tensors(optimizer)}
    best = best_row(run.metrics()) if setup.config.eval_every else None
    run.save_state(
        step,
        state,
        setup.config.keep,
        due=is_due(setup.config, step, done),
        spare={best["step"]} if best else (),
    )
