"""Benchmarks: the languages each has, where its files are, and how many rows they hold. parts.data reads the files.

They come from the hub at a revision, or from a local folder or file. The layouts of AfriMGSM, MGSM and MSVAMP were
checked on copies of their files, PolyMath's on its card; nothing here has been run against the hub itself. PolyMath has
18 languages: offered are those that languages.json has wordings for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

LAB = Path(__file__).resolve().parent.parent / "lab" / "problems"
LEVELS = ("low", "medium", "high", "top")  # PolyMath's, easiest first


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where it is, a language's files in it, the rows of each file."""

    repo: str | None  # a data set of the hub; None: the lab's folder
    files: tuple[str, ...]  # ends of paths; {iso3}, {iso1} and {english} stand for the language
    rows: int
    languages: str  # ISO 639-3


BENCHMARKS = {
    "lab": Benchmark(None, ("{iso3}/test.jsonl",), 250, "eng hau swa yor"),
    "afrimgsm": Benchmark(
        "masakhane/afrimgsm",
        ("{iso3}/test.tsv",),
        250,
        "amh eng ewe fra hau ibo kin lin lug orm sna sot swa twi vai wol xho yor zul",
    ),
    "mgsm": Benchmark(
        "juletxara/mgsm", ("mgsm_{iso1}.tsv",), 250, "ben deu eng fra jpn rus spa swa tel tha zho"
    ),
    "msvamp": Benchmark(
        "Mathoctopus/MSVAMP",
        ("test_{english}.json",),
        1000,
        "ben deu eng fra jpn rus spa swa tha zho",
    ),
    "polymath": Benchmark(
        "Qwen/PolyMath",
        tuple(f"{{iso1}}/{level}.parquet" for level in LEVELS),
        125,
        "ben deu eng fra jpn rus spa swa tel tha zho",
    ),
}


def has_language(benchmark: str, names: Mapping[str, str | None]) -> bool:
    """Say whether a benchmark has a language, both as in find_files. A single file does not tell: ValueError."""
    if benchmark in BENCHMARKS:
        return names["iso3"] in BENCHMARKS[benchmark].languages.split()
    path = _local(benchmark, names)
    if path.is_file() and "{lang}" not in benchmark:
        raise ValueError(
            f"{benchmark} is one file: name its language, all is for named benchmarks and folders"
        )
    return path.is_file() or any(_inside(path, layout, names) for layout in BENCHMARKS.values())


def find_files(
    benchmark: str, names: Mapping[str, str | None], *, revision: str = "main"
) -> tuple[list[Path], str | None]:
    """Return a language's files of a benchmark, and the hub's commit that they are of, None for local files.

    benchmark  a name in BENCHMARKS, a folder in the layout of one, or a file; {lang} in its path is the ISO 639-3 code
    names      what the language is called: iso3, iso1, english
    ValueError: the benchmark has no such language. FileNotFoundError: the files are not there.
    """
    if benchmark not in BENCHMARKS:
        path = _local(benchmark, names)
        if path.is_file():
            return [path], None
        if not path.is_dir():
            raise FileNotFoundError(
                f"no benchmark {path}; valid: a file, a folder, {', '.join(BENCHMARKS)}"
            )
        found = list(filter(None, (_inside(path, layout, names) for layout in BENCHMARKS.values())))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{path} has files for {names['english']} in {len(found)} known layouts, not in 1"
            )
        return found[0], None
    layout = BENCHMARKS[benchmark]
    if not has_language(benchmark, names):
        raise ValueError(f"{benchmark} has no {names['english']}; valid: {layout.languages}")
    folder = _fetch(layout, names, revision) if layout.repo else LAB
    files = _inside(folder, layout, names)
    if len(files) != len(layout.files):
        raise FileNotFoundError(
            f"{benchmark} has {len(files)} files for {names['english']}, not {len(layout.files)}"
        )
    return files, folder.name if layout.repo else None


def _local(benchmark: str, names: Mapping[str, str | None]) -> Path:
    return Path(benchmark.replace("{lang}", str(names["iso3"])))


def _inside(folder: Path, layout: Benchmark, names: Mapping[str, str | None]) -> list[Path]:
    return [file for end in layout.files for file in folder.rglob(end.format(**names))]


def _fetch(layout: Benchmark, names: Mapping[str, str | None], revision: str) -> Path:
    """Return the folder, named by its commit, that the hub's files are in."""
    ends = [end.format(**names) for end in layout.files]
    wanted = [*ends, *(f"*/{end}" for end in ends)]
    try:
        folder = snapshot_download(
            str(layout.repo), repo_type="dataset", revision=revision, allow_patterns=wanted
        )
    except OSError as error:
        raise FileNotFoundError(
            f"cannot reach revision {revision} of {layout.repo} on the hub; pass --benchmark FOLDER instead"
        ) from error
    return Path(folder)
