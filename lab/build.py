"""Make the lab again from a seed: problems, tokenizer, a tiny Qwen3 that reads only English well.

    python lab/build.py            # everything, about 45 minutes on two cores

The training mix is what makes the gap honest; lab/README.md gives the numbers it led to. The model
learns arithmetic from English problems, and learns to use what the teachers of the family read, in
every language. But it sees almost no target-language problem on its own. What COPSD then has to add
is the reading of the language, not the arithmetic. Every solution is put in one of many wordings,
so that the model is as unsure of the next word as a real one.
"""

import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab.problems import (
    KNOWN_WORDING,
    LANGUAGES,
    TARGETS,
    Drawn,
    brief_solution,
    draw_set,
    draw_training,
    equations,
    plan,
    slipped,
    solution,
    words,
    write_problems,
)
from parts.data import Problem, build_prompt, find_language
from parts.grading import is_correct
from parts.heap import keep_freed_memory
from parts.prompts import encode_prompt
from parts.readings import note_request, reading, render_witness
from parts.recipe import Config
from parts.sampler import Rollout, SamplingParams, sample

HERE = Path(__file__).resolve().parent
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS_ID = 2  # the special tokens come first: <|endoftext|>, <|im_start|>, <|im_end|>
IGNORED = -100  # F.cross_entropy's default ignore_index
REPORT_EVERY = 800  # steps
LONGEST = 64  # tokens of a completion
BRIEF = tuple(
    Config(teacher_reads="brief", brief=brief, brief_language=language)
    for brief in ("uniform", "difficulty")
    for language in ("target", "english")
)
PLAN = Config(teacher_reads="plan")
HELPED = ("privileged", "planning", "planned", "witnessed")  # rows whose prompt holds the solution
Row = tuple[list[int], list[int], list[bool]]  # prompt ids, completion ids, which are learned


@dataclass(frozen=True)
class Mix:
    """The training mix and its schedule.

    rows          of an optimiser step
    privileged    the share of rows that read COPSD's teacher's prompt, in one of the languages
    whole         the share of the privileged rows that read both the English problem and the
                  English solution. The rest lack one of the two, half of them each, so that the
                  ablations of the teacher's context mean something here
    slips         the share of the privileged rows whose solution slips and goes on consistently
    brief         the share of rows that are asked to be brief. Their problem is English in every
                  language, so that they teach none to be read
    planning      the share of rows that write a plan from a solution
    planned       the share of rows that read a plan
    witnessed     the share of rows that read a right solution in the problem's language
    decoys        of the rows that are helped so in a target language, the share whose problem in
                  that language is another one than what the help is for. Rows whose problem fits
                  teach the language to be read, and that is to be left to COPSD
    target_alone  the share of rows that read a target-language problem with no help
    lr            at its peak, after a linear warm-up and before a cosine to zero
    warmup        steps

    All other rows read an English problem with no help.
    """

    steps: int = 1600
    rows: int = 64
    privileged: float = 0.28
    whole: float = 0.7
    slips: float = 0.0
    brief: float = 0.06
    planning: float = 0.03
    planned: float = 0.06
    witnessed: float = 0.04
    decoys: float = 0.7
    target_alone: float = 0.0002
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0


# First to calculate and to read; then to go on from a slip; last a glimpse of the languages, about
# 140 rows of them in all, so that a method which can learn only from what is sometimes right has
# something to learn from.
SECOND = Mix(steps=400, privileged=0.45, slips=0.5, lr=1e-3, warmup=20, seed=1000)
GLIMPSE = replace(SECOND, steps=110, target_alone=0.02, lr=5e-4, seed=2000)
STAGES = (Mix(), SECOND, GLIMPSE)


def build_tokenizer(rng: random.Random, vocabulary: int = 1536) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on problems, prompts and solutions of all four languages.

    Every digit is a token of its own.
    """
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["user\n", "assistant\n"] * 2000
    for code in LANGUAGES:
        wordings = asdict(find_language(code))
        del wordings["training_sets"]
        texts += [str(wording) for wording in wordings.values()] * 2000
    for _ in range(4000):
        drawn = draw_training(rng)
        for code in LANGUAGES:
            texts += [words(drawn, code), solution(drawn, code)]
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(vocabulary: int, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained Qwen3 of about one million parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=0,
            eos_token_id=EOS_ID,
            bos_token_id=None,
        )
    )


def problem_of(drawn: Drawn, code: str, *, in_english: bool = False) -> Problem:
    """Return a drawn problem in the language `code`.

    in_english  the problem itself is English, and only what stands around it in `code`
    """
    return Problem(
        id="",
        problem=words(drawn, "eng" if in_english else code),
        problem_en=words(drawn, "eng"),
        solution_en=solution(drawn, "eng"),
        answer=str(equations(drawn)[-1][1]),
        language=code,
    )


def make_row(
    prompt_ids: list[int], pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast
) -> Row:
    """Return the row of a prompt whose completion is `pieces` and EOS.

    pieces  texts, and whether the model learns to write them; a piece begins with a space or with
            the completion, so tokenising them one by one is tokenising them together
    """
    completion_ids = []
    learned = []
    for text, is_learned in pieces:
        ids = tokenizer.encode(text, add_special_tokens=False)
        completion_ids += ids
        learned += [is_learned] * len(ids)
    return prompt_ids, [*completion_ids, EOS_ID], [*learned, True]


def shares_of(mix: Mix) -> dict[str, float]:
    """Return the share of each kind of row."""
    helped = {
        "privileged": mix.privileged,
        "brief": mix.brief,
        "planning": mix.planning,
        "planned": mix.planned,
        "witnessed": mix.witnessed,
    }
    alone = {"target_alone": mix.target_alone}
    return {**helped, **alone, "english": 1 - sum(helped.values()) - mix.target_alone}


def draw_row(rng: random.Random, mix: Mix, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Draw one training row from the mix."""
    drawn = draw_training(rng)
    shares = shares_of(mix)
    (kind,) = rng.choices([*shares], [*shares.values()])
    code = rng.choice(TARGETS if kind == "target_alone" else LANGUAGES)
    code = "eng" if kind == "english" else code
    problem = problem_of(drawn, code, in_english=kind == "brief")
    if kind in HELPED and code != "eng" and rng.random() < mix.decoys:
        problem = replace(problem, problem=words(draw_training(rng), code))
    pieces = [(solution(drawn, code), True)]
    match kind:
        case "privileged":
            prompt_ids = draw_privileged(rng, mix, problem, tokenizer)
            if mix.slips and rng.random() < mix.slips:
                pieces = slipped(drawn, code, rng)
        case "brief":
            prompt_ids = reading(rng.choice(BRIEF), problem, tokenizer)
            pieces = [(brief_solution(drawn), True)]
        case "planning":
            prompt_ids = note_request(PLAN, problem, tokenizer) or []
            pieces = [(plan(drawn), True)]
        case _:
            prompt_ids = prompt_of(kind, problem, drawn, tokenizer)
    return make_row(prompt_ids, pieces, tokenizer)


def prompt_of(
    kind: str, problem: Problem, drawn: Drawn, tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """Return what is read of a problem: alone, or with what a teacher is given beside it.

    kind  "privileged", "brief", "planned" or "witnessed", as of the rows; else the problem alone
    """
    match kind:
        case "privileged":
            return build_prompt(problem, problem.language, tokenizer, role="teacher")
        case "brief":
            return reading(BRIEF[0], problem, tokenizer)
        case "planned":
            return reading(PLAN, problem, tokenizer, plan(drawn))
        case "witnessed":
            witness = solution(drawn, problem.language, again=1)
            return encode_prompt(render_witness(PLAN, problem, tokenizer, witness), tokenizer)
    return build_prompt(problem, problem.language, tokenizer)


def draw_privileged(
    rng: random.Random, mix: Mix, problem: Problem, tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """Return the prompt of COPSD's teacher, whole or with one of its two parts left out."""
    context = rng.random()
    english_problem = context < (1 + mix.whole) / 2
    return build_prompt(
        problem,
        problem.language,
        tokenizer,
        role="teacher",
        english_problem=english_problem,
        english_solution=context < mix.whole or not english_problem,
    )


def collate(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return ids_BT, padded on the right, and labels_BT.

    The labels are the completion's ids, shifted so that label t belongs to hidden state t. They are
    IGNORED in the prompt, in the pads, and where nothing is learned.
    """
    width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT = torch.full((len(rows), width), IGNORED)
    for row, (prompt, completion, learned) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids_BT[row, :end] = torch.tensor(prompt + completion)
        labels = torch.tensor(completion).masked_fill(~torch.tensor(learned), IGNORED)
        labels_BT[row, len(prompt) - 1 : end - 1] = labels
    return ids_BT, labels_BT


def attempts(
    model: Qwen3ForCausalLM, prompts: list[list[int]], temperature: float
) -> list[Rollout]:
    """Return a completion of each prompt; at temperature 0 the greedy one."""
    params = SamplingParams(LONGEST, temperature)
    return [rollout for (rollout,) in sample(model, prompts, params, eos_ids={EOS_ID})]


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Return greedy accuracies on held-out problems, tokens and entropy, as text.

    Each language alone comes first; then, in the target languages, each with what its teachers
    read. The entropy of COPSD's teacher is estimated on what it writes itself, -log p of a token.
    """
    drawns = draw_set(random.Random(seed + 1), 100, KNOWN_WORDING, held_out=True)
    lines = []
    for kind in ("alone", "privileged", "brief", "planned", "witnessed"):
        lines.append(f"{kind}:")
        for code in LANGUAGES:
            problems = [problem_of(drawn, code) for drawn in drawns]
            prompts = [
                prompt_of(kind, problem, drawn, tokenizer)
                for problem, drawn in zip(problems, drawns, strict=True)
            ]
            rollouts = attempts(model, prompts, 0.0)
            right = sum(
                is_correct(str(tokenizer.decode(rollout.completion_ids)), str(problem.answer))
                for rollout, problem in zip(rollouts, problems, strict=True)
            )
            tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
            lines.append(f"{code} {right / len(drawns):.2f} ({tokens / len(drawns):.0f} tokens)")
            if kind == "privileged":
                logprobs = [
                    p for rollout in attempts(model, prompts, 1.0) for p in rollout.logprobs
                ]
                lines.append(f"entropy {-sum(logprobs) / len(logprobs):.2f}")
    return " ".join(lines)


def lr_at(step: int, mix: Mix) -> float:
    """Return the learning rate of `step`: linear warm-up, then half a cosine down to zero."""
    if step < mix.warmup:
        return mix.lr * (step + 1) / mix.warmup
    return mix.lr * 0.5 * (1 + math.cos(math.pi * (step - mix.warmup) / (mix.steps - mix.warmup)))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, mix: Mix, out: Path) -> None:
    """Train on rows drawn from the mix, and save to `out` at every report."""
    rng = random.Random(mix.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": mix.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    started = time.monotonic()
    for step in range(mix.steps):
        rows = [draw_row(rng, mix, tokenizer) for _ in range(mix.rows)]
        rows.sort(key=lambda row: len(row[0]))  # by the prompt's length, so little is padding
        tokens = sum(sum(learned) for _, _, learned in rows)
        total = 0.0
        for start in range(0, len(rows), 32):
            ids_BT, labels_BT = collate(rows[start : start + 32])
            hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            scored_BT = labels_BT != IGNORED
            logits_NV = model.lm_head(hidden_BTD[scored_BT])
            loss = F.cross_entropy(logits_NV, labels_BT[scored_BT], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, mix)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % REPORT_EVERY == 0 or step == mix.steps - 1:
            seconds = time.monotonic() - started
            shares = report(model, tokenizer, mix.seed)
            print(
                f"step {step + 1}  {seconds:.0f} s  loss {total:.4f} nats/token\n    {shares}",
                flush=True,
            )
            model.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="folder for the model and the problems")] = HERE,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
) -> None:
    """Write problems/, then train and write tiny/."""
    keep_freed_memory()
    write_problems(out / "problems", seed)
    tokenizer = build_tokenizer(random.Random(seed))
    model = build_model(len(tokenizer), seed)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens")
    tokenizer.save_pretrained(out / "tiny")
    for stage in STAGES:
        train(model, tokenizer, replace(stage, seed=stage.seed + seed), out / "tiny")


if __name__ == "__main__":
    typer.run(main)
