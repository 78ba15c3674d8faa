"""Measure the gap that COPSD closes on the lab: `copsd.py train` per language and seed, as one table and one figure.

    python bench/gap.py                  # 3 languages x 3 seeds, about 15 minutes on two cores
    python bench/gap.py --clip-mode none --out runs/gap-none

Runs already finished are not run again. Extra flags go to `copsd.py train`. A cell reads "before to after (smallest
seed, largest seed), n/m": means over m seeds, of which n have before and after outside each other's 95 % interval.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.data import find_language
from parts.report import cell_of_seeds, gap_figure, markdown_table, mean_of_seeds
from parts.runs import read_json

ROOT = Path(__file__).resolve().parent.parent
Ends = dict[str, list[dict]]  # "before" and "after" -> an evaluation per seed, language -> metric -> estimate


def run_all(languages: list[str], seeds: int, out: Path, flags: list[str]) -> dict[str, Ends]:
    """Train every (language, seed) and return both evaluations of each run."""
    found: dict[str, Ends] = {}
    for language in languages:
        folders = [out / f"{language}-{seed}" for seed in range(seeds)]
        for seed, folder in enumerate(folders):
            command = [
                sys.executable,
                "copsd.py",
                "train",
                "--lang",
                language,
                "--seed",
                str(seed),
                "--out",
                str(folder),
            ]
            subprocess.run([*command, *flags], cwd=ROOT, check=True)
        found[language] = {
            end: [read_json(folder / f"{end}.json") for folder in folders] for end in ("before", "after")
        }
    return found


def names_of(found: dict[str, Ends]) -> list[str]:
    """Return the English names of the languages."""
    return [find_language(code).english for code in found]


def table(found: dict[str, Ends]) -> str:
    """Return the Markdown table: a column per language trained on, a row per metric in it and then in English."""
    rows = []
    for english in (False, True):
        codes = {language: "eng" if english else language for language in found}
        metrics = next(iter(found.values()))["before"][0]["eng" if english else next(iter(found))]
        for metric in metrics:
            cells = []
            for language, ends in found.items():
                before, after = ([run[codes[language]][metric] for run in ends[end]] for end in ("before", "after"))
                apart = sum(a["low"] > b["high"] or a["high"] < b["low"] for a, b in zip(after, before, strict=True))
                cells.append(f"{mean_of_seeds(metric, before)} to {cell_of_seeds(metric, after)}, {apart}/{len(after)}")
            rows.append([f"English: {metric}" if english else metric, *cells])
    return markdown_table(["", *names_of(found)], rows)


def main(
    context: typer.Context,
    lang: Annotated[str, typer.Option(help="languages, separated by commas")] = "hau,swa,yor",
    seeds: Annotated[int, typer.Option(help="seeds per language", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="folder of the runs, the table and the figure")] = Path("runs/gap"),
) -> None:
    """Run, then write table.md, gap.png and gap.svg."""
    found = run_all(lang.split(","), seeds, out.resolve(), context.args)
    text = table(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    gap_figure(found, names_of(found), [out / "gap.png", out / "gap.svg"])
    print(text)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
