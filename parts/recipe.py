"""Every setting: its default, range, unit and source, and the value that another method takes.

`Config` is a training run, `CompareConfig` a comparison of runs, `EvalConfig` an evaluation. A
field holds the default, the valid values and the help; flag and check are made of it. How a run
comes by its settings is in parts/settings.py.

Sources: "paper" is the released scripts of COPSD (arXiv 2605.09548); "OPSD" those of its parent
(arXiv 2601.18734), which give GRPO's values, as COPSD released none; TRL is Hugging Face's trainer;
OPSDC, OPHSD, EGRSD and SSOPD are COPSD's neighbours (methods.py says what is known of each); "ours"
is this project, also where a neighbour published no value.

A neighbour is COPSD's or GRPO's recipe with other values. What the teacher reads, how a token is
weighted, which divergence is taken, and when the teacher's weights are refreshed can be set for any
method with COPSD's loop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from parts.prompts import THINKING

# Each method, and the one whose recipe it follows where it has no value of its own.
PARENTS = {
    "copsd": "copsd",
    "grpo": "grpo",
    "opsdc": "copsd",
    "ophsd": "copsd",
    "egrsd": "grpo",
    "ssopd": "grpo",
}
METHODS = tuple(PARENTS)
LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow; an entropy, of --gate-scale, is nan
GROUPED = tuple(method for method, parent in PARENTS.items() if parent == "grpo")
DISTILLED = tuple(method for method, parent in PARENTS.items() if parent == "copsd")
LABELS = ("reference", "garbage")  # completions that nobody samples, learned as hard labels
SCORED = ("student", "teacher")  # completions on which the student learns a teacher's distribution
COMPLETIONS = (*SCORED, *LABELS)
DIVERGENCES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}  # as shown
# Who chose the values that a method has of its own, where that was not us.
CHOSEN_BY = {"grpo": "OPSD", "opsdc": "OPSDC", "ophsd": "OPHSD", "egrsd": "EGRSD", "ssopd": "SSOPD"}
NOTELESS = ("solution", "brief")  # what a teacher reads that is the same at every step
OWN_SETTINGS = {  # flags of a run that an experiment sets by itself
    "method": "it trains with several",
    "seed": "--seeds says which",
    "save_every": "it says by itself when an arm is measured",
    "eval_every": "it says by itself when an arm is measured",
}
TYPED_ONLY = {  # settings that a model folder's recipe.json cannot give
    "method": "a recipe is read for a method, whose values would not be taken",
    "model": "a recipe belongs to the model that it stands beside",
    "out": "a folder holds one run",
}
EVAL_TOKENS = 4096  # the length limit of an evaluation that neither a flag nor a recipe names
LONGEST = 10**8  # tokens of a text, ten times what any model reads


@dataclass(frozen=True)
class Such:
    """Values that are told by a rule, where a tuple would have to list them.

    words  the rule, as a message says it
    """

    words: str
    holds: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        """Say whether the rule holds for a value."""
        return self.holds(value)


Needs = dict[str, tuple[Any, ...] | Such]  # of a setting: by another's name, values it goes with
SOME = Such("1 or more", lambda value: value >= 1)
SEVERAL = Such("2 or more", lambda value: value >= 2)
POSITIVE = Such("above 0", lambda value: value > 0)
NOT_ONE = Such("0, or 2 or more", lambda value: value != 1)


def setting(
    default: Any,
    doc: str,
    *,
    section: str,
    source: str = "paper",
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    needs: Needs | None = None,
    in_training: Needs | None = None,
    **by_method: Any,
) -> Any:
    """Return a dataclass field that is also a flag.

    doc          one or two whole sentences: what it does, in which unit; the flag's help
    section      the heading it stands under
    source       who chose the default
    least ...    what check_settings holds it to: least <= value <= most, above < value < below
    choices      the words that are valid
    needs        other settings, and for each the values with which this one has an effect. To
                 change only the KL in the tables counts, too. It does not for settings of what a
                 teacher is shown in training, such as --swap-solutions, where a method trains with
                 no teacher
    in_training  likewise, the values with which training reads it. With others it changes only the
                 KL in the tables, and nothing where --eval-problems is 0
    by_method    its default where a method's recipe has another, such as grpo=1.2, of CHOSEN_BY
    """
    metadata = {"doc": doc, "section": section, "source": source, "by_method": by_method}
    limits = {"least": least, "above": above, "most": most, "below": below, "choices": choices}
    effects = {"needs": needs or {}, "in_training": in_training or {}}
    return field(default=default, metadata=metadata | limits | effects)


# Whose loss is a divergence, with the teacher or behind a witness.
DIVERGES: Needs = {"method": (*DISTILLED, "ssopd"), "completion": SCORED}
# Whose loss reads the teacher.
TEACHES: Needs = {"method": (*DISTILLED, "egrsd", "ssopd"), "completion": SCORED}
SAMPLES: Needs = {"completion": SCORED}  # whose completions are sampled
CLIPS: Needs = {**DIVERGES, "loss_over": ("vocabulary", "top_k")}
CLIP_MODES = ("entry", "token")  # that clip
# Whose teacher is shown a solution of the data's, as it is or for what is written of it.
SHOWS_SOLUTION: Needs = {
    "method": (*DISTILLED, "egrsd"),
    "teacher_reads": ("solution", "plan", "explained"),
    "english_solution": (True,),
}

task = partial(setting, section="What to train")
objective = partial(setting, section="Objective of COPSD: what the student is pulled towards")
weights = partial(
    setting,
    section="Token weights: how much each token counts",
    source="ours",
    needs={"method": (*DISTILLED, "egrsd")},
)
gate = partial(weights, needs={"token_weight": ("confidence",)})
reading = partial(setting, section="What the teacher reads", source="ours")
grpo = partial(
    setting,
    section="Objective of GRPO: the baseline",
    source="OPSD",
    needs={"method": GROUPED},
)
egrsd = partial(
    setting,
    section="EGRSD: GRPO's advantages, token by token",
    source="ours",
    needs={"method": ("egrsd",)},
)
ssopd = partial(
    setting,
    section="SSOPD: a term beside GRPO's",
    source="SSOPD",
    needs={"method": ("ssopd",)},
)
rollouts = partial(setting, section="Rollouts: what the student writes in training")
optimiser = partial(setting, section="Optimiser")
adapter = partial(setting, section="Adapter (LoRA): the few weights that are trained")
machine = partial(setting, section="Machine: device, precision, memory, saving", source="ours")
evaluation = partial(
    setting, section="Evaluation: before and after training, and on the way", source="ours"
)
comparison = partial(setting, section="Comparison", source="ours")
asked = partial(setting, section="What to evaluate", source="ours")
attempts = partial(setting, section="Attempts: how completions are sampled")


@dataclass(frozen=True)
class Config:
    """The settings of a training run."""

    method: str = task("copsd", "The method to train with.", source="ours", choices=METHODS)
    model: str = task(
        "lab/tiny",
        "A local folder, org/name on the hub, or a bare name such as Qwen2.5-1.5B.",
        source="ours",
    )
    lang: str = task("hau", "The target language, an ISO 639-1 or 639-3 code.", source="ours")
    data: str | None = task(
        None,
        "A file of training problems, .jsonl, .json, .tsv, .csv or .parquet. Its columns stand "
        'in parts/README.md, "Your own data". Without it: the hub\'s COPSD set for the language.',
    )
    # Not idle without an evaluation: a run ends by naming the command that evaluates on this file.
    eval_data: str | None = task(
        None,
        "A file of problems to evaluate on, as --data is. Without it: problems held out of the "
        "data.",
        source="ours",
    )
    out: str | None = task(
        None, "The run's folder. Without it: runs/METHOD-MODEL-LANG-SEED.", source="ours"
    )
    seed: int = task(
        0,
        "The seed of the adapter, the order of problems, the split and the sampler.",
        source="ours",
        least=-(10**9),
        most=10**9,
    )
    steps: int = task(
        100, "How many batches to sample. COPSD updates once on each.", least=1, grpo=500
    )
    token_budget: int | None = task(
        None, "Stop at so many sampled tokens, in place of --steps.", source="ours", least=1
    )
    warm_start: str | None = task(
        None,
        "A run's folder, from whose last adapter to start, as COPSD then GRPO. A fixed teacher and "
        "the initial model of --kl-coef stay the base, without it.",
        source="ours",
    )

    divergence: str = objective(
        "forward_kl",
        "How student and teacher are compared. forward_kl is KL(teacher || student).",
        choices=tuple(DIVERGENCES),
        in_training=DIVERGES,
        opsdc="reverse_kl",
        ophsd="reverse_kl",
    )
    beta: float = objective(
        0.5,
        "The teacher's weight in the mixture of jsd.",
        source="ours",
        above=0,
        below=1,
        needs={"divergence": ("jsd",)},
        in_training=DIVERGES,
    )
    clip_mode: str = objective(
        "entry",
        "What the clip caps: every entry of the vocabulary, a token's whole loss, or nothing.",
        choices=("none", *CLIP_MODES),
        needs=CLIPS,
        opsdc="none",
        ophsd="none",
    )
    clip: float = objective(
        0.05, "The cap, in nats.", above=0, needs={**CLIPS, "clip_mode": CLIP_MODES}
    )
    reduction: str = objective(
        "token",
        "The mean over all tokens of a step, or the mean of the completions' means "
        "(the paper's text).",
        choices=("token", "trajectory"),
        needs={"method": DISTILLED},
    )
    teacher: str = objective(
        "fixed",
        "The teacher's weights: the initial ones, the current ones, a moving average, or a copy "
        "that is renewed every --teacher-every steps.",
        choices=("fixed", "current", "ema", "copy"),
        in_training=TEACHES,
        opsdc="copy",
    )
    teacher_every: int = objective(
        50,
        "Steps from one copy of the student to the next. 1 collapsed in OPSDC's paper.",
        source="OPSDC",
        least=1,
        needs={"teacher": ("copy",)},
        in_training=TEACHES,
    )
    ema_decay: float = objective(
        0.99,
        "How much of the moving average is kept at a step.",
        source="ours",
        least=0,
        most=1,
        needs={"teacher": ("ema",)},
        in_training=TEACHES,
    )
    loss_over: str = objective(
        "vocabulary",
        "What a token's loss is taken over: the vocabulary, the teacher's --loss-top-k most likely "
        "tokens renormalised, or the sampled token alone, a policy gradient of the reverse KL "
        "without a clip.",
        source="paper, ours",
        choices=("vocabulary", "top_k", "sampled"),
        needs=DIVERGES,
    )
    loss_top_k: int = objective(
        100,
        "With --loss-over top_k: how many of the teacher's most likely tokens.",
        source="ours",
        least=2,
        needs={"loss_over": ("top_k",)},
    )
    # What the teacher would be shown also decides which problems fit the context, of any method and
    # any completion. So these two are not idle where no teacher reads.
    english_problem: bool = objective(
        True,
        "Show the teacher the English problem.",
        needs={"teacher_reads": ("solution", "plan", "explained", "voted")},
    )
    english_solution: bool = objective(
        True,
        "Show the teacher the English solution.",
        needs={"method": (*DISTILLED, "grpo", "egrsd"), "teacher_reads": ("solution",)},
    )
    swap_solutions: bool = objective(
        False,
        "Show the teacher the solution of another problem, as an ablation.",
        source="ours",
        needs=SHOWS_SOLUTION,
    )
    answer_only: bool = objective(
        False,
        "Show the teacher only the final answer, in a box, where the solution would stand; a "
        "control.",
        source="ours",
        needs=SHOWS_SOLUTION,
    )
    completion: str = objective(
        "student",
        "Who writes what COPSD learns on. The student, or as a control the teacher; or, learned as "
        "hard labels: the reference solution, or its words in disorder and a box with the answer.",
        choices=COMPLETIONS,
        needs={"method": ("copsd",)},
    )
    cosine_every: int = objective(
        10,
        "Steps between measurements of how far the clip turns the gradient. 0 is never.",
        source="ours",
        least=0,
        needs={**DIVERGES, "loss_over": ("vocabulary",), "clip_mode": CLIP_MODES},
    )
    thinking: str = objective(
        "auto",
        "Whether prompts open a think block. auto: where the model would unasked.",
        source="ours",
        choices=THINKING,
    )

    teacher_reads: str = reading(
        "solution",
        "What the teacher has beside the problem: the English solution; a request to be brief and "
        "nothing else; a plan that the student writes, and the answer; the solution explained by "
        "itself (reason_first); or the answer that most attempts at the English problem agree on.",
        choices=("solution", "brief", "plan", "explained", "voted"),
        needs={"method": DISTILLED},
        opsdc="brief",
        ophsd="plan",
    )
    brief: str = reading(
        "uniform",
        "The request to be brief: always, or by how hard the problem is.",
        source="OPSDC",
        choices=("uniform", "difficulty"),
        needs={"teacher_reads": ("brief",)},
    )
    brief_language: str = reading(
        "target",
        "The language of that request: the problem's, or English.",
        choices=("target", "english"),
        needs={"teacher_reads": ("brief",)},
    )
    note_tokens: int = reading(
        128,
        "The length limit of a plan or an explanation, in tokens.",
        least=1,
        needs={"teacher_reads": ("plan", "explained")},
    )
    vote_samples: int = reading(
        8, "Attempts that vote on an answer.", least=2, needs={"teacher_reads": ("voted",)}
    )

    token_weight: str = weights(
        "uniform",
        "How a completion's tokens weigh, their mean being 1: alike, by how sure the teacher is "
        "(the formula is ours), or by their place, falling to 0.",
        choices=("uniform", "confidence", "position"),
        egrsd="confidence",
    )
    gate_scale: float = gate(
        1.0,
        "The teacher's entropy, in nats, at which confidence falls to 1/e.",
        least=LEAST_TEMPERATURE,
    )
    gate_floor: float = gate(
        0.1, "The least weight of an unsure token, before weights are normalised.", above=0, most=1
    )
    gate_lookahead: int = gate(
        0, "Judge a token by the least entropy of itself and this many tokens after it.", least=0
    )
    loss_prefix: float = weights(
        1.0, "The share of each completion, from its start, that is learned from.", above=0, most=1
    )

    group_size: int = grpo(8, "Completions per problem, compared with each other.", least=2)
    scale_rewards: str = grpo(
        "group",
        "Divide a group's rewards by their standard deviation, or do not (Dr. GRPO).",
        choices=("group", "none"),
    )
    inner_epochs: int = grpo(1, "Updates on each batch.", source="TRL", least=1)
    clip_low: float = grpo(
        0.2,
        "Tokens of completions below their group's mean are pushed down no further once their "
        "probability is below the old times (1 - this).",
        source="PPO, TRL",
        least=0,
        most=1,
    )
    clip_high: float = grpo(
        0.2,
        "Tokens of completions above their group's mean are pushed up no further once it is above "
        "the old times (1 + this). DAPO has 0.28.",
        source="PPO, TRL",
        least=0,
    )
    kl_coef: float = grpo(
        0.0,
        "The weight of the KL to the initial model, which costs another forward pass. That is the "
        "base without any adapter, with --warm-start, too.",
        least=0,
    )
    loss_norm: str = grpo(
        "token",
        "The mean over tokens (DAPO), over completions' means (OPSD), or over the longest "
        "possible completions (Dr. GRPO).",
        source="DAPO",
        choices=("token", "sequence", "constant"),
    )
    mask_truncated: bool = grpo(
        False,
        "Leave completions that were cut by the length limit out of the loss (DAPO).",
        source="TRL",
    )
    resample_dead_groups: bool = grpo(
        False,
        "Draw other problems for those whose completions are all right or all wrong (DAPO).",
        source="TRL",
    )

    credit_mix: float = egrsd(
        0.5,
        "How much of an advantage is reweighted by the teacher. 0 is GRPO with the token weights.",
        least=0,
        most=1,
    )
    credit_clip: float = egrsd(
        0.2,
        "The teacher's ratio is held to 1 plus or minus this; --credit-mix of that changes the "
        "advantage.",
        least=0,
        below=1,
    )
    witness_weight: float = ssopd(
        0.5, "The most that the term weighs, in groups that are half right.", least=0
    )
    witness_tokens: int = ssopd(
        256,
        "How many of the first tokens of the longest wrong completion are learned from.",
        source="ours",
        least=1,
    )

    batch_size: int = rollouts(
        32,
        "Completions per step. COPSD writes one for each problem, GRPO a group.",
        least=1,
        most=10**6,
    )
    english_share: float = rollouts(
        0.0,
        "The share of problems posed in English, so that it is not forgotten.",
        source="ours",
        least=0,
        most=1,
    )
    temperature: float = rollouts(
        1.1,
        "Divides the logits, of the rollouts and of all distributions in the loss.",
        least=LEAST_TEMPERATURE,
        grpo=1.2,
        opsdc=1.0,
    )
    top_p: float = rollouts(
        0.95,
        "Sample among the fewest tokens that hold this probability together. 1 is off.",
        above=0,
        most=1,
        needs={"top_k": NOT_ONE},
        in_training=SAMPLES,
        grpo=1.0,
    )
    top_k: int = rollouts(
        20,
        "Sample among so many most likely tokens. 0 is off.",
        least=0,
        in_training=SAMPLES,
        grpo=0,
    )
    max_new_tokens: int = rollouts(
        2048,
        "The length limit of a completion, in tokens.",
        least=1,
        most=LONGEST,
        grpo=16384,
    )

    lr: float = optimiser(
        5e-6,
        "AdamW's peak learning rate. It falls linearly to 0, without warm-up.",
        least=0,
        opsdc=1e-6,
    )
    # AdamW multiplies the decay by the learning rate, as it does the gradient.
    weight_decay: float = optimiser(0.0, "AdamW's weight decay.", least=0, needs={"lr": POSITIVE})
    max_grad_norm: float = optimiser(
        0.1, "The gradient's norm is cut to this.", above=0, needs={"lr": POSITIVE}
    )

    lora_rank: int = adapter(64, "The rank r of the adapter's matrices.", least=1, most=4096)
    lora_alpha: float = adapter(128.0, "The adapter is scaled by alpha / r.", above=0)
    lora_targets: str = adapter(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "The layers to adapt, by name, separated by commas.",
    )

    micro_batch: int = machine(
        4, "Rows per forward and backward pass. It does not change the gradient.", least=1
    )
    micro_tokens: int | None = machine(
        None,
        "Positions per forward and backward pass, pads and prompts among them, of the role that "
        "reads more: fewer than --micro-batch rows where rows are long. A row that is longer "
        "stands alone, and at most a tenth are pads. It does not change the gradient.",
        least=1,
        needs={"micro_batch": SEVERAL},
    )
    chunk_tokens: int | None = machine(
        None,
        "Rows of logits that exist at a time. Without it: 256, and 1024 for a divergence that runs "
        "compiled on CUDA.",
        least=1,
        most=8192,
    )
    sample_rows: int = machine(256, "Completions decoded at once.", least=1)
    gradient_checkpointing: bool = machine(
        True, "Recompute activations in the backward pass: less memory, more time.", source="paper"
    )
    compile: bool | None = machine(
        None,
        "Run torch.compile on the divergence. Without it: where that pays.",
        in_training=DIVERGES,
    )
    device: str = machine(
        "auto",
        "Where to compute: auto, cpu, cuda, cuda:N or mps. auto is the first GPU that works.",
    )
    dtype: str = machine(
        "auto",
        "The base weights' type: auto, float32, bfloat16 or float16. auto is the best 16-bit type "
        "of a CUDA card, and float32 elsewhere. The adapter is always float32.",
    )
    save_every: int = machine(5, "Steps between saves.", source="paper", least=1)
    keep: int = machine(
        3,
        "Saved states to keep, beside the best one's with --eval-every: a stopped run goes on from "
        "the newest that is whole.",
        least=1,
    )

    eval_problems: int = evaluation(
        32, "Problems to evaluate on, before and after. 0 is none.", least=0
    )
    eval_samples: int = evaluation(
        8,
        "Completions per problem. pass@k is given for k = 1 and this.",
        least=1,
        most=10**5,
        needs={"eval_problems": SOME},
    )
    eval_temperature: float = evaluation(
        1.0,
        "The temperature of those completions. Top-k is off.",
        source="paper",
        least=0,
        needs={"eval_problems": SOME},
    )
    eval_top_p: float = evaluation(
        0.95,
        "The top-p of those completions.",
        source="paper",
        above=0,
        most=1,
        needs={"eval_problems": SOME, "eval_temperature": POSITIVE},
    )
    eval_every: int = evaluation(
        0,
        "Steps between looks at development problems; the best adapter by them is named. 0 is off.",
        least=0,
    )
    dev_problems: int = evaluation(
        32,
        "Training problems set aside for --eval-every. They are neither trained on nor reported.",
        least=1,
        needs={"eval_every": SOME},
    )


@dataclass(frozen=True)
class CompareConfig(Config):
    """The settings of a comparison, beside those of its runs. `lang` may name several languages."""

    lang: str = task("hau", "ISO 639-1 or 639-3 codes, separated by commas.", source="ours")
    out: str | None = task(
        None, "The experiment's folder. Without it: runs/EXPERIMENT-MODEL-LANGUAGES.", source="ours"
    )
    steps: int = task(
        100,
        "How many steps of COPSD give the budget of sampled tokens. --family and --attribute: 30.",
        least=1,
    )
    seeds: str = comparison("3", "Runs of each arm: a count, or seeds such as 0,4,7.")
    sweep: str | None = comparison(
        None,
        "Learning rates tried for each arm on development problems, as factors of its --lr. "
        "Without it: 0.03,0.1,0.3,1,3,9,27; for --family 0.1,0.3,1,3,9; for --attribute "
        "0.3,1,3,9,27.",
    )
    dev_problems: int = comparison(
        100, "Training problems of each language set aside for that choice.", least=1
    )
    ablate: bool = comparison(
        False, "Compare COPSD with one part changed at a time, in place of base, GRPO and COPSD."
    )
    attribute: bool = comparison(
        False, "Compare COPSD with controls that ask where its gain comes from."
    )
    family: bool = comparison(False, "Compare every method, each with its own recipe.")
    jobs: int = comparison(
        1,
        "Runs at a time, each in a process with its share of the processors. On a CPU two take two "
        "thirds of the time of one after the other; their sums round otherwise.",
        least=1,
        most=64,
    )
    results: str | None = comparison(
        None, "A Markdown file whose section for this experiment is written anew."
    )


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation."""

    pass_at_k: str | None = asked(
        None,
        "The k of pass@k, or several: 1,4,8,12. 1 is always reported. Without it: 8, greedy 1.",
    )
    model: str = asked(
        "lab/tiny", "A local folder, org/name on the hub, or a bare name such as Qwen2.5-1.5B."
    )
    adapter: str | None = asked(
        None, "A training run's folder, or an adapter's folder as peft writes it."
    )
    lang: str = asked("hau", "ISO 639-1 or 639-3 codes, separated by commas, or all.")
    benchmark: str | None = asked(
        None,
        "One of afrimgsm, mgsm, msvamp, polymath and lab, or a folder, or a file. "
        "Without it: what the model's recipe names, else the first of afrimgsm, polymath and mgsm "
        "that has the language.",
    )
    revision: str = asked("main", "A branch, tag or commit of a benchmark on the hub.")
    limit: int | None = asked(None, "Evaluate the first so many problems only.", least=1)
    out: str | None = asked(
        None, "A folder for completions and results. Without it nothing is written."
    )
    samples: int | None = attempts(
        None,
        "Completions per problem. Without it: the largest k.",
        source="ours",
        least=1,
        most=10**5,
    )
    greedy: bool = attempts(
        False, "One completion a problem, the most likely token each time.", source="ours"
    )
    temperature: float | None = attempts(
        None, "Divides the logits. 0 is greedy. Without it: 1.", least=0
    )
    top_p: float = attempts(
        0.95,
        "Sample among the fewest tokens that hold this probability together. 1 is off.",
        above=0,
        most=1,
    )
    top_k: int = attempts(0, "Sample among so many most likely tokens. 0 is off.", least=0)
    max_new_tokens: int | None = attempts(
        None,
        "The length limit of a completion, in tokens. Without it: the recipe's, else "
        f"{EVAL_TOKENS}.",
        least=1,
        most=LONGEST,
    )
    thinking: str = attempts(
        "auto",
        "Whether prompts open a think block. auto: where the model would unasked. Without it, the "
        "value of the run that --adapter is of.",
        source="ours",
        choices=THINKING,
    )
    seed: int = attempts(0, "The sampler's seed.", source="ours", least=-(10**9), most=10**9)
    batch_rows: int = machine(256, "Completions decoded at once.", least=1)
    device: str = machine(
        "auto",
        "Where to compute: auto, cpu, cuda, cuda:N or mps. auto is the first GPU that works.",
    )
    dtype: str = machine("auto", "The weights' type: auto, float32, bfloat16 or float16.")


def largest_step(config: Config) -> int:
    """Return how many tokens a step may sample at most, for what the teacher reads among them."""
    note = {
        "plan": config.note_tokens,
        "explained": config.note_tokens,
        "voted": config.vote_samples * config.max_new_tokens,
    }.get(config.teacher_reads, 0)
    return config.batch_size * (config.max_new_tokens + note)


def keeps_prompts(config: Config, *, on_cpu: bool) -> bool:
    """Say whether a teacher's prompts are computed once and kept, as parts/prefixes.py does.

    They are where training reads them again and the teacher makes the same of them: its weights are
    fixed, and it reads no note and no completion that training has written. On a CPU only: what is
    kept was computed alone, and a GPU needs about as long for one prompt as for a whole batch.
    """
    is_read = config.method in DISTILLED and config.completion not in LABELS
    never_changes = config.teacher == "fixed" and config.teacher_reads in NOTELESS
    return on_cpu and is_read and never_changes


def divergence_options(config: Config) -> dict[str, Any]:
    """Return the settings of Eq. (1)'s D as the functions of kernels.py take them."""
    return {
        "kind": config.divergence,
        "beta": config.beta,
        "temperature": config.temperature,
        "clip_mode": config.clip_mode,
        "clip": config.clip,
        "chunk_tokens": config.chunk_tokens,
    }


def step_kl_name(config: Config) -> str:
    """Return what it is called that a step logs under loss/kl_nats_per_token.

    The divergence of what is distilled, -log q of hard labels, which no --divergence changes, and
    of methods with rewards an estimate of the KL to the initial model.

    >>> [step_kl_name(Config(divergence="jsd", completion=each)) for each in ("student", "garbage")]
    ['JSD', '-log q']
    """
    if config.completion in LABELS:
        return "-log q"
    return DIVERGENCES[config.divergence] if config.method in DISTILLED else "KL"


def of_method(values: dict[str, Any], method: str, default: Any) -> Any:
    """Return a method's value: its own, else that of the method it follows, else the default.

    >>> [of_method({"grpo": 1.2, "opsdc": 1.0}, name, 1.1) for name in METHODS]
    [1.1, 1.2, 1.0, 1.1, 1.2, 1.2]
    """
    return values.get(method, values.get(PARENTS.get(method, method), default))
