"""Benchmarks: which languages each has, where its files are, and how many rows they hold.

The files come from the hub at a revision, or from a local folder or file. parts.data reads them.
The layouts of AfriMGSM, MGSM and MSVAMP were checked on copies of their files, PolyMath's on its
card. Nothing here has been run against the hub itself. PolyMath has 18 languages; those offered are
the ones that languages.json has wordings for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from parts.rows import EXTENSIONS

LAB = Path(__file__).resolve().parent.parent / "lab" / "problems"
LEVELS = ("low", "medium", "high", "top")  # PolyMath's, easiest first

DEFAULTS = ("afrimgsm", "polymath", "mgsm")  # what a language is evaluated on, in this order


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    repo       the data set on the hub; None for the lab's own folder
    files      how the paths of a language's files end; {iso3}, {iso1} and {english} stand for it
    rows       of each file
    languages  their ISO 639-3 codes, with spaces between
    """

    repo: str | None
    files: tuple[str, ...]
    rows: int
    languages: str


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


def default_benchmark(languages: list[Mapping[str, str | None]]) -> str:
    """Return the benchmark that has the languages, the first of DEFAULTS; ValueError: none has.

    languages  what each is called, as for find_files
    """
    for name in DEFAULTS:
        if all(has_language(name, names) for names in languages):
            return name
    called = ", ".join(str(names["english"]) for names in languages)
    raise ValueError(f"no benchmark has {called}: pass --benchmark")


def has_language(benchmark: str, names: Mapping[str, str | None]) -> bool:
    """Return whether a benchmark has a language; the arguments are those of find_files.

    ValueError: the benchmark is a single file, which does not tell its language.
    """
    if benchmark in BENCHMARKS:
        return names["iso3"] in BENCHMARKS[benchmark].languages.split()
    path = _local_path(benchmark, names)
    if path.is_file() and "{lang}" not in benchmark:
        raise ValueError(
            f"{benchmark} is one file: name its language, all is for named benchmarks and folders"
        )
    return path.is_file() or bool(_known_layouts(path, names))


def find_files(
    benchmark: str, names: Mapping[str, str | None], *, revision: str = "main"
) -> tuple[list[Path], str | None]:
    """Return a language's files of a benchmark, and the hub's commit that they are of.

    benchmark  a name in BENCHMARKS, a folder in the layout of one of them, or a file; {lang} in a
               path stands for the ISO 639-3 code
    names      what the language is called: iso3, iso1 and english
    revision   of a benchmark on the hub: a branch, a tag or a commit
    The commit is None for local files. ValueError: the benchmark has no such language.
    FileNotFoundError: the files are not there.
    """
    if benchmark not in BENCHMARKS:
        return _local_files(_local_path(benchmark, names), names), None
    layout = BENCHMARKS[benchmark]
    if not has_language(benchmark, names):
        raise ValueError(f"{benchmark} has no {names['english']}; valid: {layout.languages}")
    folder = _fetch(layout, names, revision) if layout.repo else LAB
    files = _files_inside(folder, layout, names)
    if len(files) != len(layout.files):
        raise FileNotFoundError(
            f"{benchmark} has {len(files)} files for {names['english']}, not {len(layout.files)}"
        )
    return files, folder.name if layout.repo else None


def _local_path(benchmark: str, names: Mapping[str, str | None]) -> Path:
    """Return the path that is meant by a benchmark without a name of its own."""
    return Path(benchmark.replace("{lang}", str(names["iso3"])))


def _local_files(path: Path, names: Mapping[str, str | None]) -> list[Path]:
    """Return the file itself, or a language's files in a folder of exactly one known layout."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"no benchmark {path}; valid: a file, a folder, {', '.join(BENCHMARKS)}"
        )
    found = _known_layouts(path, names)
    if not found:
        raise FileNotFoundError(
            f"{path} is a folder in which no file for {names['english']} is called as those of a "
            f"benchmark are; {name_a_file()}"
        )
    if len(found) > 1:
        raise FileNotFoundError(
            f"{path} is a folder with files for {names['english']} of {len(found)} benchmarks; "
            f"name the folder of one of them, or {name_a_file()}"
        )
    return found[0]


def name_a_file() -> str:
    """Return what to do about a folder that is no benchmark's, for an error's message."""
    return f"name one file: {', '.join(EXTENSIONS)}"


def _known_layouts(folder: Path, names: Mapping[str, str | None]) -> list[list[Path]]:
    """Return a language's files in a folder, one list for each layout that finds any."""
    found = [_files_inside(folder, layout, names) for layout in BENCHMARKS.values()]
    return [files for files in found if files]


def _files_inside(folder: Path, layout: Benchmark, names: Mapping[str, str | None]) -> list[Path]:
    """Return a language's files anywhere below a folder, in the order of the layout.

    FileNotFoundError where one of them is there twice, as under two snapshots of the hub's cache.
    """
    found = []
    for end in layout.files:
        files = sorted(folder.rglob(end.format(**names)))
        if len(files) > 1:
            raise FileNotFoundError(
                f"{folder} has {len(files)} files for one, such as {files[0]} and {files[1]}; "
                "name a folder that holds one of them"
            )
        found += files
    return found


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
            f"cannot reach revision {revision} of {layout.repo} on the hub; "
            "pass --benchmark FOLDER instead"
        ) from error
    return Path(folder)
