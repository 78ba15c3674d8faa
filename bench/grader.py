"""Say how well the grader agrees with its table of cases, and how it reads golds.

    python bench/grader.py                                  tests/grading_cases.tsv
    python bench/grader.py --golds FILE ... [--lang CODE]   golds of data, in every decimal script

precision  of the cases graded right, the share that is right: the rest pays for wrong answers
recall     of the cases that are right, the share graded right: the rest is work that is not paid
"""

import argparse
import re
import sys
import unicodedata
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.data import load_problems
from parts.grading import is_correct

CASES = Path(__file__).resolve().parent.parent / "tests/grading_cases.tsv"

# The zero of each script that has decimal digits.
ZEROS = [chr(code) for code in range(0x110000) if unicodedata.decimal(chr(code), None) == 0]


def read_cases(path: Path) -> list[tuple[str, str, bool]]:
    """Return completion, gold and whether it is right, of each case."""
    rows = [
        line.split("\t")
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.startswith(("#", "text\tgold"))
    ]
    cases = []
    for text, gold, verdict, _ in rows:
        text = re.sub(r"<U\+(\w+)>", lambda code: chr(int(code[1], 16)), text)
        is_completion = "boxed" in text or "think>" in text
        cases.append((text if is_completion else rf"\boxed{{{text}}}", gold, verdict == "right"))
    return cases


def grade_cases(path: Path) -> None:
    """Print precision and recall, and each case that is graded otherwise than the table says."""
    cases = read_cases(path)
    verdicts = [is_correct(completion, gold) for completion, gold, _ in cases]
    for (completion, gold, is_right), verdict in zip(cases, verdicts, strict=True):
        if verdict != is_right:
            print(f"graded {'right' if verdict else 'wrong'}: {completion} beside {gold}")
    right = sum(is_right for _, _, is_right in cases)
    both = sum(
        verdict and is_right for (_, _, is_right), verdict in zip(cases, verdicts, strict=True)
    )
    print(f"{len(cases)} cases, {right} of them right")
    print(f"precision {both / sum(verdicts):.4f} ({both} of {sum(verdicts)} graded right)")
    print(f"recall    {both / right:.4f} ({both} of {right})")


def grade_golds(paths: list[Path], language: str | None) -> None:
    """Print how often golds, their successors and their thousandfolds are graded right."""
    problems = [problem for path in paths for problem in load_problems(path, language=language)]
    golds = sorted({str(problem.answer) for problem in problems})
    counts = {"gold": 0, "gold + 1": 0, "gold thousand": 0, "thousandfold": 0}
    for gold in golds:
        value = Decimal(gold.replace(",", ""))
        for zero in ZEROS:
            written = _in_script(str(value), zero)
            counts["gold"] += is_correct(rf"\boxed{{{written}}}", gold)
            counts["gold + 1"] += is_correct(rf"\boxed{{{_in_script(str(value + 1), zero)}}}", gold)
            counts["gold thousand"] += value != 0 and is_correct(
                rf"\boxed{{{written} thousand}}", gold
            )
            thousandfold = f"{value * 1000:f}"
            counts["thousandfold"] += is_correct(rf"\boxed{{{written} thousand}}", thousandfold)
    total = len(golds) * len(ZEROS)
    print(f"{len(golds)} different golds in {len(ZEROS)} scripts; graded right of {total}:")
    for name, count in counts.items():
        print(f"{name:14} {count}")


def _in_script(figure: str, zero: str) -> str:
    return "".join(chr(ord(zero) + int(part)) if part.isdecimal() else part for part in figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--golds", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--lang", help="language of the files, where their rows name none")
    given = parser.parse_args()
    if given.golds:
        grade_golds(given.golds, given.lang)
    else:
        grade_cases(CASES)
