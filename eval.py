"""Evaluate a model on maths problems: sample, grade, and estimate pass@k and its companions.

    python eval.py --pass-at-k 8                                  the lab model in Hausa
    python eval.py --pass-at-k 8 --adapter runs/copsd-lab-hau-0   the same with a trained adapter
    python eval.py --benchmark afrimgsm --lang all --pass-at-k 1,4,12 --out evaluations/base

Prompts are the student's training prompts, built by the same function; answers are judged by the same grader that
rewards GRPO. Every estimate carries a 95 % interval from a bootstrap over problems. With --out every completion is
written, and the same command goes on with an evaluation that was stopped; without it nothing is.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pycld2
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from parts import runs
from parts.benchmarks import BENCHMARKS, find_files, has_language
from parts.data import (
    Language,
    Problem,
    build_prompt,
    find_language,
    languages,
    load_problems,
)
from parts.grading import grade
from parts.machine import keep_freed_memory, pick_device, pick_dtype
from parts.metrics import (
    LEVEL_WEIGHTS,
    Attempt,
    Estimate,
    Graded,
    bootstrap,
    bootstrap_mean,
    paired_tests,
    pass_at_k,
    ratios,
    read_graded,
    summarise,
)
from parts.model import eos_ids, load_adapter, load_model, load_tokenizer, resolve_model, valid_ids
from parts.prompts import prompt_opens_think, template_hash
from parts.report import Evaluation, report_tables, write_report
from parts.sampler import SamplingParams, sample
from parts.view import SamplingProgress, cell, estimates_table, text_table

MAIN_METRICS = (
    "format rate",
    "accuracy given a box",
    "in the problem's language",
)  # of several languages
CHUNK = 64  # problems sampled and written together: what a stop can lose


def check_answers(problems: list[Problem]) -> None:
    """Raise ValueError for a problem whose gold answer is missing or is none that the grader takes."""
    for problem in problems:
        try:
            grade("", problem.answer or "")
        except ValueError as error:
            raise ValueError(
                f"problem {problem.id!r}: answer {problem.answer!r} cannot be graded: {error}"
            ) from error


def text_language(text: str) -> str:
    """Return the language a text is written in, an ISO 639 code (639-3 for those of languages.json), or "unknown".

    CLD2 decides, where it calls itself reliable: it knows all of languages.json but Ewe and Vai, and Twi as Akan. Vai
    is told by its script, and Ewe by its letters where CLD2 is not sure. Of several languages the largest part counts.

    >>> text_language("Jibu ni mayai kumi na nane."), text_language("18 + 1 = 19")
    ('swa', 'unknown')
    """
    # LaTeX commands are English words. One \boxed does no harm, and without it CLD2 finds the lab's answers too short.
    plain = re.sub(r"\\(?!boxed)[A-Za-z]+", " ", text)
    if len(re.findall("[\ua500-\ua63f]", plain)) > len(plain) / 3:
        return "vai"
    reliable, _, found = pycld2.detect("".join(c if c.isprintable() else " " for c in plain))
    if not reliable:
        return "ewe" if re.search("[ƒʋ]", plain) else "unknown"
    code = {"ak": "tw"}.get(found[0][1], found[0][1].partition("-")[0])
    return next((known.iso3 for known in languages().values() if known.iso1 == code), str(code))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    params: SamplingParams,
    *,
    samples: int = 1,
    thinking: str = "auto",
    first_index: int = 0,
    max_rows: int | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[Graded]:
    """Sample `samples` completions of every problem under the student's prompt and grade each.

    first_index  the place of the first problem in the whole evaluation, on which its random stream depends
    Never cuts a prompt: one that does not fit the model's context with max_new_tokens is the sampler's ValueError.
    """
    check_answers(problems)
    think_open = prompt_opens_think(tokenizer, thinking)
    prompts = [
        build_prompt(problem, problem.language, tokenizer, thinking=thinking)
        for problem in problems
    ]
    groups = sample(
        model,
        prompts,
        params,
        samples_per_prompt=samples,
        first_index=first_index,
        max_rows=max_rows,
        on_progress=on_progress,
        eos_ids=eos_ids(model, tokenizer),
        valid_ids=valid_ids(tokenizer),
    )
    results = []
    for index, (problem, rollouts) in enumerate(
        zip(problems, groups, strict=True), start=first_index
    ):
        attempts = []
        for number, rollout in enumerate(rollouts):
            text = str(tokenizer.decode(rollout.completion_ids, skip_special_tokens=True))
            graded = asdict(grade(text, str(problem.answer), think_open=think_open))
            end = {"tokens": len(rollout.completion_ids), "finish_reason": rollout.finish_reason}
            seed = f"{params.seed}/{index}/{number}"
            attempts.append(Attempt(text, **graded, **end, language=text_language(text), seed=seed))
        prompt_hash = hashlib.sha256(repr(rollouts[0].prompt_ids).encode()).hexdigest()[:12]
        level = next(
            (name for name in LEVEL_WEIGHTS if problem.id.startswith(f"{name}-")), None
        )  # PolyMath's ids
        about = (
            problem.id,
            problem.language,
            problem.problem,
            str(problem.answer),
            prompt_hash,
            level,
        )
        results.append(Graded(*about, attempts))
    return results


def evaluate_resumably(
    evaluate_chunk: Callable[..., list[Graded]],
    problems: list[Problem],
    run: runs.Run | None,
    console: Console,
    title: str,
) -> list[Graded]:
    """Evaluate in chunks of CHUNK problems, each written to the run's problems.jsonl when it is done.

    What is there already is kept and not sampled again. A chunk that was written in part is sampled whole once more, so
    that every problem is sampled beside the same others and a resumed file has the bytes of an unstopped one.
    """
    done = [read_graded(row) for row in run.whole_rows("problems.jsonl")] if run else []
    if run and [graded.id for graded in done] != [problem.id for problem in problems[: len(done)]]:
        raise ValueError(
            f"{run.folder / 'problems.jsonl'} has other problems; choose another --out"
        )
    for start in range(0, len(problems), CHUNK):
        chunk = problems[start : start + CHUNK]
        if len(done) < start + len(chunk):
            place = f"problems {start + 1} to {start + len(chunk)} of {len(problems)}"
            with SamplingProgress(console, f"{title}, {place}") as progress:
                graded = evaluate_chunk(chunk, first_index=start, on_progress=progress.update)[
                    len(done) - start :
                ]
            if run:
                run.append("problems.jsonl", [asdict(each) for each in graded])
            done += graded
    return done


def keep_fitting(
    problems: list[Problem],
    prompts: list[list[int]],
    console: Console,
    *,
    context: int,
    max_new_tokens: int,
) -> list[Problem]:
    """Return the problems whose prompts leave room for max_new_tokens; the others are left out whole, never cut.

    Says how many were left out. Raises ValueError if that is all of them.
    """
    kept = [
        p
        for p, prompt in zip(problems, prompts, strict=True)
        if len(prompt) + max_new_tokens <= context
    ]
    if problems and not kept:
        raise ValueError(
            f"no problem fits the model's context of {context} tokens: lower --max-new-tokens"
        )
    if len(kept) < len(problems):
        why = (
            f"their prompts and {max_new_tokens} new tokens exceed the model's context of {context}"
        )
        console.print(
            f"skipped {len(problems) - len(kept)} of {len(problems)} problems: {why}",
            soft_wrap=True,
        )
    return kept


def start_program() -> Console:
    """Set up the process of a command, keep the libraries' own progress bars off the screen, and return the console."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    return Console()


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn a wrong value, and a file that is missing, torn or unwritable, into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@dataclass(frozen=True)
class Settings:
    """What an evaluation's numbers depend on, beside weights, prompts and data, which its identity holds."""

    model: str
    adapter: str | None
    benchmark: str
    lang: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    thinking: str
    seed: int
    ks: list[int]
    limit: int | None

    def sampling(self) -> SamplingParams:
        """Return the sampler's part; ValueError for a value out of range."""
        return SamplingParams(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed
        )


def sampling_plan(
    pass_at_k: str | None, samples: int | None, temperature: float | None, greedy: bool
) -> tuple[list[int], int, float]:
    """Return the ks of pass@k with 1 among them, the completions per problem, and the temperature."""
    if greedy:
        if samples not in (None, 1) or temperature not in (None, 0):
            raise ValueError(
                "--greedy is one completion at temperature 0: leave out --samples and --temperature"
            )
        pass_at_k, samples, temperature = pass_at_k or "1", 1, 0.0
    try:
        ks = {int(k) for k in (pass_at_k or "8").split(",")}
    except ValueError as error:
        raise ValueError(
            f"--pass-at-k is {pass_at_k}; valid: numbers such as 8 or 1,4,8,12"
        ) from error
    samples = max(ks) if samples is None else samples
    if not 1 <= min(ks) <= max(ks) <= samples:
        raise ValueError(
            f"--pass-at-k is {pass_at_k or 8} and --samples {samples}; valid: 1 <= k <= samples"
        )
    return sorted({1, *ks}), samples, 1.0 if temperature is None else temperature


def pick_languages(lang: str, benchmark: str) -> list[Language]:
    """Return the languages that --lang names; "all" are those that the benchmark has."""
    if lang != "all":
        return list(dict.fromkeys(find_language(code.strip()) for code in lang.split(",")))
    found = [
        language for language in languages().values() if has_language(benchmark, asdict(language))
    ]
    if not found:
        raise FileNotFoundError(f"{benchmark} has no files that are known by a language")
    return found


def load_benchmark(
    benchmark: str, language: Language, revision: str, limit: int | None
) -> tuple[list[Problem], str | None]:
    """Return the first `limit` problems of a benchmark in a language, and the commit of the hub's data.

    A named benchmark must have as many rows as it is known to have; of other files the rows are taken as they are.
    """
    files, commit = find_files(benchmark, asdict(language), revision=revision)
    problems = []
    for file in files:
        rows = load_problems(file, language=language.iso3)
        if benchmark in BENCHMARKS and len(rows) != BENCHMARKS[benchmark].rows:
            raise ValueError(
                f"{file} has {len(rows)} problems, {benchmark} has {BENCHMARKS[benchmark].rows}"
            )
        problems += rows
    check_answers(problems)
    return problems[:limit], commit


def load_network(
    settings: Settings, folder: Path, *, device: str, dtype: str
) -> tuple[PreTrainedModel, dict[str, str | None]]:
    """Return the model with its adapter, and their fingerprints; an adapter that is not this model's is an error."""
    where = pick_device(device)
    network = load_model(folder, device=where, dtype=pick_dtype(dtype, where))
    base, adapter = runs.weights_fingerprint(dict(network.named_parameters())), None
    if settings.adapter is not None:
        path = Path(settings.adapter)
        if runs.recorded_fingerprint(path) not in (None, base):
            raise ValueError(
                f"adapter {path} was trained on other base weights than those of {settings.model}"
            )
        adapter = runs.weights_fingerprint(
            load_adapter(network, runs.adapter_folder(path)).state_dict()
        )
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return network, {"base_weights": base, "adapter_weights": adapter, "dtype": dtype}


def evaluate_all(
    settings: Settings,
    folder: Path,
    out: Path | None,
    console: Console,
    *,
    revision: str,
    device: str,
    dtype: str,
    batch_rows: int,
) -> dict[str, list[Graded]]:
    """Evaluate every language of the settings, each into a folder of its own where there are several."""
    settings.sampling()  # refuses what is out of range before anything is loaded
    chosen = pick_languages(settings.lang, settings.benchmark)
    loaded = [
        load_benchmark(settings.benchmark, language, revision, settings.limit)
        for language in chosen
    ]
    tokenizer = load_tokenizer(folder)
    network, weights = load_network(settings, folder, device=device, dtype=dtype)
    results = {}
    for language, (problems, commit) in zip(chosen, loaded, strict=True):
        one = replace(settings, lang=language.iso3)
        prompts = [
            build_prompt(problem, language, tokenizer, thinking=one.thinking)
            for problem in problems
        ]
        context = network.config.max_position_embeddings
        problems = keep_fitting(
            problems, prompts, console, context=context, max_new_tokens=one.max_new_tokens
        )
        data = hashlib.sha256(repr(problems).encode()).hexdigest()[:16]
        template = template_hash(tokenizer, language, one.thinking)
        identity = {**weights, "prompt_template": template, "data": data, "data_revision": commit}
        run = runs.Run(out / language.iso3 if len(chosen) > 1 else out, "settings") if out else None
        if run:
            run.check(asdict(one), identity)
            run.create(asdict(one), identity)
        evaluate_chunk = partial(
            evaluate,
            network,
            tokenizer,
            params=one.sampling(),
            samples=one.samples,
            thinking=one.thinking,
            max_rows=batch_rows,
        )
        title = f"{language.english}, {one.samples} samples a problem"
        results[language.iso3] = evaluate_resumably(evaluate_chunk, problems, run, console, title)
        if run:
            runs.write_json(
                run.folder / "summary.json", as_plain(summarise(results[language.iso3], one.ks))
            )
    return results


def results_table(settings: Settings, results: dict[str, list[Graded]]) -> Table:
    """Return a table: of one language every metric, of several the main ones, a row a language, and their mean."""
    counts = sorted({len(graded) for graded in results.values()})
    title = f"{settings.model}{f' + {settings.adapter}' if settings.adapter else ''}, {settings.benchmark}: "
    title += f"{' or '.join(map(str, counts))} problems x {settings.samples}"
    if len(results) == 1:
        summaries = {code: summarise(graded, settings.ks) for code, graded in results.items()}
        return estimates_table(title, summaries)
    found = {code: ratios(graded, settings.ks) for code, graded in results.items()}
    columns = {}
    for name in (*(f"pass@{k}" for k in settings.ks), *MAIN_METRICS):
        rows = {code: bootstrap(*metrics[name]) for code, metrics in found.items()}
        mean = bootstrap_mean([metrics[name] for metrics in found.values()])
        columns[name] = {**rows, "mean": mean}
    return estimates_table(title, columns)


def as_plain(summary: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    """Return a summary as JSON takes it."""
    return {name: asdict(estimate) for name, estimate in summary.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    pass_at_k: Annotated[
        str | None, typer.Option(help="k, or several: 1,4,8,12; 1 is always reported [8]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="completions per problem [the largest k]")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="one completion a problem, at temperature 0")
    ] = False,
    model: Annotated[
        str, typer.Option(help="a local folder, org/name, or a name such as Qwen2.5-1.5B")
    ] = "lab/tiny",
    adapter: Annotated[
        Path | None, typer.Option(help="a run folder, or an adapter folder as peft writes it")
    ] = None,
    lang: Annotated[
        str, typer.Option(help="ISO 639-1 or 639-3 code, several with commas, or all")
    ] = "hau",
    benchmark: Annotated[
        str | None, typer.Option(help=f"{', '.join(BENCHMARKS)}, a folder, a file [recipe's]")
    ] = None,
    revision: Annotated[
        str, typer.Option(help="of a benchmark on the hub: a branch, a tag or a commit")
    ] = "main",
    limit: Annotated[
        int | None, typer.Option(help="evaluate the first so many problems only")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy [1]", show_default=False)
    ] = None,
    top_p: Annotated[float, typer.Option(help="nucleus; 1 is off")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="tokens per completion [the recipe's, else 4096]")
    ] = None,
    thinking: Annotated[str, typer.Option(help="auto, on or off")] = "auto",
    batch_rows: Annotated[int, typer.Option(help="completions decoded at once")] = 256,
    seed: Annotated[int, typer.Option(help="of the sampler")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="folder for completions and results [nothing is written]")
    ] = None,
) -> None:
    """Sample, grade and print pass@k with its companions and 95 % intervals."""
    if context.invoked_subcommand:
        return
    console = start_program()
    with bad_input():
        ks, samples, temperature = sampling_plan(pass_at_k, samples, temperature, greedy)
        folder = resolve_model(model)
        recipe = runs.read_recipe(folder)
        source = benchmark or recipe.get("eval_data")
        tokens = recipe.get("max_new_tokens", 4096) if max_new_tokens is None else max_new_tokens
        if source is None:
            raise ValueError(f"{folder} has no recipe that names a benchmark; pass --benchmark")
        if limit is not None and limit < 1:
            raise ValueError(f"--limit is {limit}; valid: 1 or more")
        settings = Settings(
            model,
            str(adapter) if adapter else None,
            source,
            lang,
            samples,
            temperature,
            top_p,
            top_k,
            tokens,
            thinking,
            seed,
            ks,
            limit,
        )
        results = evaluate_all(
            settings,
            folder,
            out,
            console,
            revision=revision,
            device=device,
            dtype=dtype,
            batch_rows=batch_rows,
        )
    console.print(results_table(settings, results))
    if out:
        console.print(f"completions, verdicts and settings: {out}", soft_wrap=True)


def load_evaluations(
    folder: Path, name: str
) -> dict[str, tuple[dict[str, Any], list[Graded], Evaluation]]:
    """Return by language what --out wrote: the record of settings and identity, the problems, and the report's view."""
    found = {}
    for record_file in [*folder.glob("settings.json"), *sorted(folder.glob("*/settings.json"))]:
        run, record = runs.Run(record_file.parent, "settings"), runs.read_json(record_file)
        if not (run.folder / "summary.json").is_file():
            raise ValueError(
                f"{run.folder} is not finished: the command that began it goes on with it"
            )
        rows, settings = run.whole_rows("problems.jsonl"), record["settings"]
        results = [read_graded(row) for row in rows]
        counts = [
            (len(result.attempts), sum(a.correct for a in result.attempts)) for result in results
        ]
        passes = {
            k: [pass_at_k(n, c, k) for n, c in counts] for k in range(1, settings["samples"] + 1)
        }
        curve = {k: bootstrap(values, [1.0] * len(values)) for k, values in passes.items()}
        entries = runs.read_json(run.folder / "summary.json")
        summary = {metric: Estimate(**entry) for metric, entry in entries.items()}
        view = Evaluation(name, settings, rows, summary, curve)
        found[settings["lang"]] = (record, results, view)
    if not found:
        raise FileNotFoundError(f"{folder} holds no evaluation: pass what --out wrote")
    return found


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(help="what --out wrote; the others are compared with the first")
    ],
    out: Annotated[Path, typer.Option(help="folder for the report")] = Path("evaluations/report"),
) -> None:
    """Write tables, figures and a page for the browser; evaluations after the first are tested against it."""
    console = start_program()
    with bad_input():
        evaluations, tests, firsts = [], [], {}
        unique = len({folder.name for folder in folders}) == len(folders)
        for folder in folders:
            name = folder.name if unique else str(folder)
            for language, (record, results, view) in load_evaluations(folder, name).items():
                evaluations.append(view)
                first_record, first_results, first = firsts.setdefault(
                    language, (record, results, view)
                )
                if first_record["identity"]["data"] != record["identity"]["data"]:
                    raise ValueError(
                        f"{first.name} and {view.name} are of different problems in {language}"
                    )
                if first is not view:
                    change, *p_values = paired_tests(first_results, results)
                    cells = [cell("pass@1", change), *(f"{p:.3g}" for p in p_values)]
                    tests.append([language, f"{first.name} to {view.name}", *cells])
        benchmarks = {view.settings["benchmark"] for view in evaluations}
        if len(benchmarks) > 1:
            raise ValueError(
                f"these evaluations are of different benchmarks: {', '.join(sorted(benchmarks))}"
            )
        header = [
            "language",
            "runs",
            "change of pass@1",
            "p, permutation of pass@1",
            "p, McNemar of majorities",
        ]
        tables = [text_table("Paired tests over problems", header, tests)] if tests else []
        files = write_report(evaluations, tables, out)
    console.print(*report_tables(evaluations), *tables, sep="\n")
    console.print(f"report: {', '.join(map(str, files))}", soft_wrap=True)


if __name__ == "__main__":
    app()
