"""Evaluate a model on maths problems: sample, grade, and estimate pass@k and its companions.

    python eval.py --pass-at-k 8                                   the lab model in Hausa
    python eval.py --pass-at-k 8 --adapter runs/copsd-tiny-hau-0   the same with a trained adapter
    python eval.py --benchmark afrimgsm --lang all --pass-at-k 1,4,12 --out evaluations/base

Prompts are the student's training prompts, built by the same function; answers are judged by the
same grader that rewards GRPO; parts/measure.py is the way from one to the other. Every estimate
carries a 95 % interval from a bootstrap over problems. With --out every completion is written, and
the same command goes on with an evaluation that was stopped; without it nothing is.
"""

if __name__ == "__main__":
    # Read before torch is loaded: `--help` and a mistyped flag answer at once. See copsd.py.
    from parts import heap, stops

    heap.restart_with_joined_holes()
    stops.say_stops()
    from parts import commands

    commands.evaluation()

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parts import ranks, runs
from parts.adapters import load_adapter
from parts.benchmarks import (
    BENCHMARKS,
    default_benchmark,
    find_files,
    has_language,
    name_a_file,
)
from parts.chat import freeze_date
from parts.data import keep_fitting, load_aloud
from parts.evaluations import Settings, check_alike, naming, read_record
from parts.family import context_length
from parts.files import read_rows, remedied, require_space
from parts.identity import (
    files_fingerprints,
    fingerprint,
    folder_fingerprint,
    refuse_foreign_adapter,
    tell_other_prompts,
    thinking_of,
    weights_fingerprint,
)
from parts.machine import pick_device, pick_dtype
from parts.measure import check_answers, evaluate
from parts.metrics import (
    Graded,
    bootstrap,
    mean_of_languages,
    ratios,
    read_graded,
    summarise,
)
from parts.metrics import pass_at_k as pass_at_k  # stays importable from here
from parts.model import check_vocabulary, load_model, load_tokenizer, resolve_model
from parts.prompts import (
    Language,
    Problem,
    build_prompt,
    find_language,
    languages,
    template_hash,
)
from parts.recipe import EVAL_TOKENS, EvalConfig
from parts.selfcheck import check_model
from parts.settings import check_settings, flag_of, read_recipe
from parts.tables import estimates_table, print_table
from parts.typed import read_number
from parts.view import SamplingProgress, say

# Shown where several languages share a table, beside pass@k.
MAIN_METRICS = ("format rate", "accuracy given a box", "in the problem's language")
COMPLETION_BYTES = 2048  # that a completion and its grade take in a file, about
CHUNK = 64  # problems sampled and written together: what a stop can lose


@dataclass(frozen=True)
class Part:
    """One language of an evaluation, ready to be sampled."""

    language: Language
    settings: Settings
    problems: list[Problem]
    identity: dict[str, Any]  # what the numbers depend on beside the settings; see identify
    run: runs.Run | None  # its folder, where the evaluation is kept
    done: list[Graded]  # the first problems, where the folder holds them already


@dataclass(frozen=True)
class Job:
    """An evaluation that was read, checked and loaded."""

    settings: Settings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_rows: int
    parts: list[Part]
    out: Path | None

    def kept(self) -> str:
        """Return, for a line about a stop, what is written of the evaluation."""
        if not self.out:
            return "nothing is kept without --out"
        problems = sum(len(part.problems) for part in self.parts)
        done = 0
        for part in self.parts:
            done += len(read_rows(part.run.folder / "problems.jsonl")) if part.run else 0
        what = f"{done} of {problems} problems"
        return f"{self.out} keeps {what}; the same command goes on from there"


def prepare(given: dict[str, Any], console: Console) -> Job:
    """Return the evaluation that the typed flags ask for; see parts.recipe.EvalConfig.

    Everything is read and checked before a folder is made. Raises ValueError or OSError.
    """
    config = EvalConfig(**{**given, **thinking_of(given, console)})
    check_settings(config)
    folder = resolve_model(config.model)
    settings = read_settings(config, folder, console)
    settings.sampling()  # refuses what is out of range before anything is loaded
    refuse_idle(given, settings)
    chosen = pick_languages(settings.lang, settings.benchmark)
    loaded = [
        load_benchmark(settings.benchmark, language, config.revision, settings.limit, console)
        for language in chosen
    ]
    out = Path(config.out) if config.out else None
    kept = kept_runs(out, chosen)
    day = claim_folders(kept, console)
    tokenizer, day = freeze_date(load_tokenizer(folder), day)
    model, weights = load_weights(settings, folder, tokenizer, config, console)
    context = context_length(model.config)
    ready = []
    for language, (problems, commit) in zip(chosen, loaded, strict=True):
        own = replace(settings, lang=language.iso3)
        problems = fitting(own, problems, tokenizer, context, console)
        identity = identify(own, problems, tokenizer, weights=weights, day=day, commit=commit)
        part = Part(language, own, problems, identity, kept.get(language.iso3), [])
        tell_other_prompts(own.adapter, asdict(own), identity, console)
        refuse_other(part)
        ready.append(part)
    if out:
        attempts = settings.samples * sum(len(part.problems) for part in ready)
        require_space(out, attempts * COMPLETION_BYTES, "what is written of the completions")
    refuse_mixture(out, ready)
    ready = open_folders(ready, console)
    return Job(settings, model, tokenizer, config.batch_rows, ready, out)


def claim_folders(kept: dict[str, runs.Run], console: Console) -> str:
    """Own the folders that are there already; return the day for prompts that write the date.

    An evaluation that goes on keeps the day that its template wrote; a new one has today.
    """
    for run in kept.values():
        if taken_over := run.claim():
            say(console, taken_over)
    days = [run.recorded_day() for run in kept.values()]
    return ranks.decide(next(filter(None, days), date.today().isoformat()))


def identify(
    settings: Settings,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: dict[str, Any],
    day: str | None,
    commit: str | None,
) -> dict[str, Any]:
    """Return what the numbers in a language depend on beside its settings, mostly fingerprints.

    weights  as load_weights returns them
    day      that the template writes; None: it writes none
    commit   of the hub's data; None: they are files
    ValueError where rank 0 has other ones.
    """
    return ranks.agreed(
        **weights,
        prompt_template=template_hash(tokenizer, settings.lang, settings.thinking),
        template_date=day,
        data=fingerprint(problems),
        data_revision=commit,
        problems=len(problems),
        problem_ids=fingerprint([problem.id for problem in problems]),
    )


def refuse_other(part: Part) -> None:
    """Raise ValueError where a language's folder holds something else, or what is damaged."""
    if part.run:
        part.run.check(asdict(part.settings), part.identity)
        read_done(part.run, part.problems, part.settings.samples)


def fitting(
    settings: Settings,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    console: Console,
) -> list[Problem]:
    """Return the problems that fit the model's context, asked under these settings."""
    lengths = [
        len(build_prompt(problem, settings.lang, tokenizer, thinking=settings.thinking))
        for problem in problems
    ]
    room = settings.max_new_tokens
    return keep_fitting(problems, lengths, console, context=context, max_new_tokens=room)


def open_folders(ready: list[Part], console: Console) -> list[Part]:
    """Make each part's folder, or find it and own it; return the parts with what is done of them.

    That is read last: another process may have written there, and ended, since prepare looked.
    """
    for part in ready:
        if part.run and (taken_over := part.run.create(asdict(part.settings), part.identity)):
            say(console, taken_over)

    def _done(part: Part) -> list[Graded]:
        return read_done(part.run, part.problems, part.settings.samples) if part.run else []

    return [replace(part, done=ranks.decide(_done(part))) for part in ready]


def refuse_mixture(out: Path | None, ready: list[Part]) -> None:
    """Raise ValueError where --out holds other languages of an evaluation that is another one.

    One of a single language has the folder for itself: no other can stand below it.
    """
    asked = {
        part.run.folder: {"settings": asdict(part.settings), "identity": part.identity}
        for part in ready
        if part.run
    }
    # Ranks after the first keep nothing.
    if out is None or not asked or out in asked:
        return
    if (out / "settings.json").is_file():
        raise ValueError(f"{out} holds an evaluation of one language; choose another --out")
    held = {file.parent.name: read_record(file) for file in sorted(out.glob("*/settings.json"))}
    check_alike(out, held | {folder.name: record for folder, record in asked.items()})


def kept_runs(out: Path | None, chosen: list[Language]) -> dict[str, runs.Run]:
    """Return the folder of each language, by its code; {} where this process is to keep nothing."""
    if out is None or not ranks.is_first():
        return {}
    if len(chosen) == 1:
        return {chosen[0].iso3: runs.Run(out, "settings")}
    return {language.iso3: runs.Run(out / language.iso3, "settings") for language in chosen}


def read_settings(config: EvalConfig, folder: Path, console: Console) -> Settings:
    """Return what the numbers depend on; the model folder's recipe fills what was not typed.

    Where nothing names a benchmark, it is the languages' own, and the console says which.
    ValueError: flags that do not go together, or a language that no benchmark has.
    """
    ks, samples, temperature = sampling_plan(config)
    recipe = read_recipe(folder)
    benchmark = config.benchmark or recipe.get("eval_data")
    if benchmark is None:
        if config.lang == "all":
            raise ValueError("--lang all is all languages of a benchmark: pass --benchmark")
        chosen = pick_languages(config.lang, "")
        benchmark = default_benchmark([asdict(language) for language in chosen])
        names = ", ".join(language.english for language in chosen)
        say(console, f"benchmark {benchmark}, which has {names}: no --benchmark was given")
    max_new_tokens = config.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = recipe.get("max_new_tokens", EVAL_TOKENS)
    return Settings(
        model=config.model,
        adapter=str(Path(config.adapter)) if config.adapter else None,
        benchmark=benchmark,
        lang=config.lang,
        samples=samples,
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=max_new_tokens,
        thinking=config.thinking,
        seed=config.seed,
        ks=ks,
        limit=config.limit,
    )


def sampling_plan(config: EvalConfig) -> tuple[list[int], int, float]:
    """Return the ks of pass@k, 1 among them, the completions per problem, and the temperature.

    ValueError: flags that do not go together.
    """
    # Where only the most likely token can be drawn, every completion of a problem is the same.
    is_greedy = config.greedy or config.temperature == 0 or config.top_k == 1
    asked = config.pass_at_k or ("1" if is_greedy else str(min(8, config.samples or 8)))
    samples = config.samples
    temperature = config.temperature
    if config.greedy:
        if samples not in (None, 1) or temperature not in (None, 0):
            raise ValueError(
                "--greedy is one completion at temperature 0: leave out --samples and --temperature"
            )
        if asked != "1":
            raise ValueError("--greedy is one completion: leave out --pass-at-k")
        samples = 1
        temperature = 0.0
    largest = max_samples()
    try:
        ks = {read_number(k, int) for k in asked.split(",")}
    except ValueError as error:
        raise ValueError(f"--pass-at-k is {asked}; valid: numbers such as 8 or 1,4,8,12") from error
    if samples is None:
        samples = max(ks)
    if not 1 <= min(ks) <= max(ks) <= samples <= largest:
        valid = f"1 <= k <= samples <= {largest}"
        raise ValueError(f"--pass-at-k is {asked} and --samples {samples}; valid: {valid}")
    if is_greedy and samples > 1:
        raise ValueError(
            f"{samples} completions would be equal at --temperature 0 or --top-k 1; valid: "
            "--samples 1 and --pass-at-k 1, or a temperature above 0"
        )
    return sorted({1, *ks}), samples, 1.0 if temperature is None else temperature


def refuse_idle(given: dict[str, Any], settings: Settings) -> None:
    """Raise ValueError for a typed flag that would do nothing."""
    cuts = [flag for flag in ("top_k", "top_p") if flag in given]
    if settings.temperature == 0 and cuts:
        flags = " and ".join(map(flag_of, cuts))
        raise ValueError(
            f"at temperature 0 only the most likely token is drawn: leave out {flags}, "
            "or set --temperature above 0"
        )
    if settings.top_k == 1 and "top_p" in given:
        raise ValueError(
            "--top-k 1 leaves --top-p only the most likely token; leave out one of them"
        )
    if "revision" in given and settings.benchmark not in BENCHMARKS:
        raise ValueError(
            f"--revision is of a benchmark on the hub, and {settings.benchmark} is not one: leave "
            f"it out; valid with it: {', '.join(BENCHMARKS)}"
        )


def max_samples() -> int:
    """Return how many completions of a problem may be asked for."""
    return {f.name: f for f in fields(EvalConfig)}["samples"].metadata["most"]


def pick_languages(lang: str, benchmark: str) -> list[Language]:
    """Return the languages that --lang names; "all" are those that the benchmark has.

    ValueError: an unknown language. FileNotFoundError: "all" of a benchmark that has none.
    """
    if lang != "all":
        return list(dict.fromkeys(find_language(code.strip()) for code in lang.split(",")))
    found = [each for each in languages().values() if has_language(benchmark, asdict(each))]
    if not found:
        raise FileNotFoundError(
            f"{benchmark} has no files that are known by a language; {name_a_file()}, "
            "and its --lang"
        )
    return found


def load_benchmark(
    benchmark: str,
    language: Language,
    revision: str,
    limit: int | None,
    console: Console | None = None,
) -> tuple[list[Problem], str | None]:
    """Return the first `limit` problems of a benchmark in a language, and the hub data's commit.

    A named benchmark must have as many rows as it is known to have; of other files all rows are
    taken. Rows that are left out are counted on the console. ValueError: a damaged file, another
    number of rows, an id twice, or an answer that cannot be graded. OSError: no such file.
    """
    files, commit = find_files(benchmark, asdict(language), revision=revision)
    problems = []
    for file in files:
        rows = load_aloud(file, language.iso3, console)
        if benchmark in BENCHMARKS and len(rows) != BENCHMARKS[benchmark].rows:
            known = BENCHMARKS[benchmark].rows
            raise ValueError(f"{file} has {len(rows)} problems, {benchmark} has {known}")
        problems += rows
    ids = Counter(problem.id for problem in problems)
    if twice := [each for each, count in ids.items() if count > 1]:
        raise ValueError(f"{benchmark}: two problems of its files have the id {min(twice)!r}")
    check_answers(problems)
    return problems[:limit], commit


def load_weights(
    settings: Settings,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    console: Console,
) -> tuple[PreTrainedModel, dict[str, str | float | None]]:
    """Return the model with its adapter, and the fingerprints of both.

    tokenizer  the one that the model is to be used with
    config     says on what the model runs
    An adapter that is missing or is not this model's is an error, never the model without it.
    """
    where = ranks.own_device(pick_device(config.device))
    model = load_model(folder, device=where, dtype=pick_dtype(config.dtype, where))
    check_model(model, f"model {settings.model}")
    check_vocabulary(model, tokenizer, f"model {settings.model}")
    base = folder_fingerprint(folder)
    adapter = None
    scale = None
    if settings.adapter is not None:
        path = Path(settings.adapter)
        refuse_foreign_adapter(path, base, settings.model, folder, console)
        lora = load_adapter(model, runs.last_adapter_folder(path))
        adapter = weights_fingerprint(lora.state_dict())
        scale = lora.alpha / lora.rank
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    files = files_fingerprints(folder)
    return model, {
        "base_weights": base,
        **files,
        "adapter_weights": adapter,
        "adapter_scale": scale,
        "dtype": name,
    }


def read_done(run: runs.Run, problems: list[Problem], samples: int) -> list[Graded]:
    """Return what the folder holds of an evaluation; ValueError where it is of other problems.

    samples  the attempts at each of them
    """
    file = run.folder / "problems.jsonl"
    with remedied(runs.MAKE_AGAIN):
        rows = read_rows(file)
        with naming(file):
            done = [read_graded(row) for row in rows]
    held = [(graded.id, graded.problem, graded.gold) for graded in done]
    asked = [(each.id, each.problem, str(each.answer)) for each in problems[: len(done)]]
    if held != asked or any(len(graded.attempts) != samples for graded in done):
        raise ValueError(f"{file} has other problems, or other attempts; choose another --out")
    run.check_digests()
    return done


def carry_out(job: Job, console: Console) -> None:
    """Evaluate every language, keep what --out asks to keep, and print the table."""
    results = {}
    for part in job.parts:
        graded = evaluate_resumably(job, part, console)
        results[part.language.iso3] = graded
        if part.run:
            summary = summarise(graded, part.settings.ks)
            plain = {name: asdict(estimate) for name, estimate in summary.items()}
            part.run.write_evaluation("summary", plain)
    print_table(results_table(job.settings, results), console)
    if job.out:
        say(console, f"completions, verdicts and settings: {job.out}")


def evaluate_resumably(job: Job, part: Part, console: Console) -> list[Graded]:
    """Evaluate in chunks of CHUNK problems, each written to problems.jsonl when it is done.

    What is there already is kept and not sampled again. A chunk that was written in part is sampled
    whole once more, so that every problem is sampled beside the same others and a resumed file has
    the bytes of an unstopped one.
    """
    settings = part.settings
    file = part.run.folder / "problems.jsonl" if part.run else None
    done = list(part.done)
    count = len(part.problems)
    for start in range(0, count, CHUNK):
        chunk = part.problems[start : start + CHUNK]
        kept = len(done) - start
        if kept >= len(chunk):
            continue
        attempts = "1 sample" if settings.samples == 1 else f"{settings.samples} samples"
        title = f"{part.language.english}, {attempts} a problem"
        place = f"problems {start + 1} to {start + len(chunk)} of {count}"
        with SamplingProgress(console, f"{title}, {place}") as progress:
            graded = evaluate(
                job.model,
                job.tokenizer,
                chunk,
                settings.sampling(),
                samples=settings.samples,
                thinking=settings.thinking,
                first_index=start,
                max_rows=job.batch_rows,
                on_progress=progress.update,
            )
        if file and part.run:
            part.run.add_rows(file, [asdict(each) for each in graded[kept:]], after=len(done))
        done += graded[kept:]
    return done


def results_table(settings: Settings, results: dict[str, list[Graded]]) -> Table:
    """Return every metric of one language; of several the main ones, a row each, and their mean."""
    counts = sorted({len(graded) for graded in results.values()})
    adapter = f" + {settings.adapter}" if settings.adapter else ""
    title = (
        f"{settings.model}{adapter}, {settings.benchmark}: "
        f"{' or '.join(map(str, counts))} problems x {settings.samples}"
    )
    if len(results) == 1:
        columns = {code: summarise(graded, settings.ks) for code, graded in results.items()}
        return estimates_table(title, columns)
    found = {code: ratios(graded, settings.ks) for code, graded in results.items()}
    columns = {}
    for name in (*(f"pass@{k}" for k in settings.ks), *MAIN_METRICS):
        columns[name] = {code: bootstrap(*metrics[name]) for code, metrics in found.items()}
        counted = sum(sum(metrics[name][1]) > 0 for metrics in found.values())
        row = "mean" if counted in (0, len(found)) else f"mean of {counted} of {len(found)}"
        columns[name][row] = mean_of_languages([metrics[name] for metrics in found.values()])
    return estimates_table(title, columns)
