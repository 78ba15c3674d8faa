"""parts/outcome.py: estimates and tests of an experiment by hand, its tables, its sections."""

import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_results import (
    BASE,
    BOXED,
    HALF,
    RIGHT,
    WHOLE,
    WRONG,
    compared,
    experiment,
    graded,
    in_full,
    measured,
    run_of,
)

from parts import outcome
from parts.curves import figures_of
from parts.files import read_json
from parts.measure import KL_NAME
from parts.metrics import bootstrap, paired_tests, ratios
from parts.outcome import arms_table, compare_arms, over_seeds, pairs_table, write_section
from parts.results import Sweep


def cells(table: str) -> list[list[str]]:
    """Return the header and the rows of a Markdown table."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_estimates_by_hand():
    found = measured([RIGHT, WRONG])
    assert over_seeds("accuracy given a box", [found])["value"] == 1.0
    assert over_seeds("greedy accuracy", [found, found])["by_seed"] == [0.5, 0.5]
    # Of seeds the numerators and the denominators are averaged, not the ratios: boxes count alike.
    other = measured([BOXED, BOXED])
    both = over_seeds("accuracy given a box", [found, other])
    assert both["by_seed"] == [1.0, 0.0] and both["value"] == pytest.approx(1 / 3)
    mean = over_seeds("greedy accuracy", [found, measured([RIGHT, RIGHT])])
    assert mean == {**asdict(bootstrap([1.0, 0.5], [1.0, 1.0])), "by_seed": [0.5, 1.0]}


def test_two_arms_are_tested_as_two_evaluations_of_the_same_attempts_are():
    first = [[RIGHT, WRONG], [WRONG, WRONG], [WRONG, BOXED], [RIGHT, RIGHT], [WRONG, WRONG]]
    second = [[RIGHT, RIGHT], [RIGHT, WRONG], [RIGHT, RIGHT], [WRONG, WRONG], [RIGHT, WRONG]]
    change, p_value, _ = paired_tests(graded(*first), graded(*second))
    arms = [measured([WRONG] * 5, attempts) for attempts in (first, second)]
    assert compare_arms("pass@1", arms[:1], arms[1:]) == {**asdict(change), "p": p_value}
    assert change.value == pytest.approx(0.3)
    # Over seeds a problem's score is the mean over them.
    twice = compare_arms("pass@1", [arms[0], arms[0]], [arms[1], arms[0]])
    assert twice["value"] == pytest.approx(0.15)


def test_only_shares_of_right_or_formatted_attempts_are_tested():
    summary = outcome.summarise_language({"base": [BASE], "copsd": [HALF]}, [("base", "copsd")])
    tested = ["greedy accuracy", "pass@1", "pass@2", "format rate", "English greedy accuracy"]
    assert list(summary["pairs"]["copsd - base"]) == tested
    shown = [*tested[:4], "accuracy given a box", tested[4], "mean tokens", KL_NAME]
    assert list(summary["arms"]["copsd"]) == [*shown, *outcome.COSTS]
    assert summary["arms"]["copsd"][KL_NAME] == {"value": 0.5, "by_seed": [0.5]}
    assert summary["arms"]["base"]["train_s"] == [0]  # it was not trained


def test_english_is_left_out_where_the_data_has_none():
    runs = [{"points": run["points"], "final": dict(run["final"])} for run in (BASE, HALF)]
    for run in runs:
        del run["final"]["english"]
    summary = outcome.summarise_language({"base": runs[:1], "copsd": runs[1:]}, [("base", "copsd")])
    names = [*summary["arms"]["base"], *summary["pairs"]["copsd - base"]]
    assert not any("English" in name for name in names)


def test_the_arms_table_has_means_over_seeds_with_the_smallest_and_the_largest():
    header, base, copsd = cells(arms_table(experiment(base=[BASE], copsd=[HALF, WHOLE])))
    assert (base[0], copsd[0]) == ("Hausa: base", "Hausa: COPSD")
    row = dict(zip(header, copsd, strict=True))
    assert row["greedy accuracy"] == "0.750 (0.500, 1.000)"
    assert row["mean tokens"] == "5.0 (4.0, 6.0)"
    assert row[KL_NAME] == "0.375 (0.250, 0.500)"
    assert row["sampled tokens"] == "900" and row["seconds"] == "4" and row["updates"] == "3"
    assert dict(zip(header, base, strict=True))["greedy accuracy"] == "0.000"  # one run, no ends


def test_columns_that_never_vary_are_left_out_of_the_tables():
    same = experiment(recipe=[HALF], other=[run_of(measured([RIGHT, WRONG]), updates=7)])
    assert cells(arms_table(same)) == [
        ["", "updates"],
        ["Hausa: recipe", "3"],
        ["Hausa: other", "7"],
    ]
    header, *_ = cells(arms_table(experiment(recipe=[HALF], other=[WHOLE])))
    assert "greedy accuracy" in header and "format rate" in header
    assert "sampled tokens" not in header  # both spent the same
    assert "accuracy given a box" not in header  # all that is boxed is right in both
    alone, _ = cells(arms_table(experiment(recipe=[HALF])))  # one row has nothing to vary from
    assert "greedy accuracy" in alone and "updates" in alone


def test_a_zero_stands_where_no_problem_differs():
    table = cells(pairs_table(experiment(base=[BASE], same=[BASE], copsd=[WHOLE])))
    header, same, copsd = table
    assert same[0] == "Hausa: same against base" and copsd[0] == "Hausa: COPSD against base"
    assert set(same[1:]) == {"0"} and "greedy accuracy" in header
    place = header.index("greedy accuracy")
    assert copsd[place] == "+1.000 [+1.000, +1.000], p 0.5000"
    # Where problems differ and cancel, the test was made and is shown.
    turned = run_of(measured([WRONG, RIGHT]))
    _, row = cells(pairs_table(experiment(recipe=[HALF], turned=[turned])))
    assert row[1].startswith("+0.000 [-1.000, +1.000], p 1.0000")


def test_a_p_value_too_small_for_its_digits_is_a_bound():
    many = [run_of(measured([attempt] * 40)) for attempt in (WRONG, RIGHT)]
    _, row = cells(pairs_table(experiment(recipe=many[:1], other=many[1:])))
    assert row[1] == "+1.000 [+1.000, +1.000], p < 0.0001"


def test_what_has_no_value_is_a_dash_in_the_tables():
    header, base, _ = cells(arms_table(experiment(base=[BASE, BASE], copsd=[HALF])))
    assert dict(zip(header, base, strict=True))["accuracy given a box"] == "-"
    # A seed without a value is none of the ends.
    mixed = run_of(measured([WRONG, WRONG]))
    header, _, copsd = cells(arms_table(experiment(base=[BASE], copsd=[mixed, HALF])))
    found = dict(zip(header, copsd, strict=True))["accuracy given a box"]
    assert found == "1.000 (1.000, 1.000)"


def test_the_sweep_is_a_row_a_method():
    sweep = {
        "grpo": Sweep([0.5, 1.0], {0.0005: 0.25, 0.001: 0.5}, 0.001, 0.125),
        "copsd": Sweep([0.5, 1.0], {0.0005: 0.75, 0.001: 0.5}, 0.0005, 0.125),
    }
    found = replace(compared(), sweep=sweep)
    assert cells(outcome.sweep_table(found)) == [
        ["dev accuracy at lr times", "0", "0.5", "1", "picked lr"],
        ["GRPO", "0.125", "0.250", "0.500", "0.001"],
        ["COPSD", "0.125", "0.750", "0.500", "0.0005"],
    ]


def test_a_section_is_replaced_and_nothing_around_it(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("# Title\n\nWords of a person.\n", encoding="utf-8")
    write_section(file, "comparison", "| old |")
    write_section(file, "ablation", "| ablated |")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nWords of a person.\n\n<!-- begin comparison")
    written = text.replace("<!-- begin ablation", "More words.\n\n<!-- begin ablation") + "\nEnd.\n"
    file.write_text(written, encoding="utf-8")
    write_section(file, "comparison", "| new |\n| rows |")
    assert file.read_text(encoding="utf-8") == written.replace("| old |", "| new |\n| rows |")
    write_section(file, "comparison", "| old |")  # and back, byte for byte
    assert file.read_text(encoding="utf-8") == written


def test_a_section_of_a_new_file_is_all_of_it(tmp_path):
    file = tmp_path / "RESULTS.md"
    write_section(file, "comparison", "| a |")
    first = file.read_bytes()
    write_section(file, "comparison", "| a |")
    assert file.read_bytes() == first and first.count(b"| a |") == 1


def test_the_folder_gets_everything_and_a_results_file_its_section(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    results = tmp_path / "lab" / "RESULTS.md"
    results.parent.mkdir()
    results.write_text("By hand.\n", encoding="utf-8")
    files = outcome.write_experiment(compared(), outcome.tables(compared()), out, results)
    assert all(file.is_file() for file in files) and out / "compare.json" in files
    content = read_json(out / "compare.json")
    pair = content["languages"]["swa"]["pairs"]["copsd - grpo"]["greedy accuracy"]
    assert pair["value"] == 0.25
    assert content["sweep"]["grpo"]["picked"] == 0.1
    own = (out / "RESULTS.md").read_text(encoding="utf-8")
    assert own.startswith("<!-- begin comparison")
    assert results.read_text(encoding="utf-8") == f"By hand.\n\n{own}"
    for table in outcome.tables(compared()):
        assert table in own
    pictures = {name: f"{name}.png" for name in figures_of(compared())}
    for folder in (out, results.parent):
        assert {path.name for path in folder.glob("*.png")} == set(pictures.values())
    assert all(f"({picture})" in own for picture in pictures.values())
    assert sorted(path.suffix for path in out.glob("comparison*.svg")) == [".svg"] * 3


def test_the_panels_of_many_languages_stand_in_rows_of_three(tmp_path, monkeypatch):
    """Those of 17 languages stood in one row."""
    found = compared()
    arms = next(iter(found.arms.values()))
    sizes = []
    for codes in (("hau", "swa", "yor"), ("hau", "swa", "yor", "zul")):
        panels = figures_of(replace(found, arms=dict.fromkeys(codes, arms)))[found.name]
        drawn = {found.name: panels}
        monkeypatch.setattr(outcome, "figures_of", lambda _, drawn=drawn: drawn)
        outcome.write_experiment(found, outcome.tables(found), tmp_path, None)
        header = (tmp_path / f"{found.name}.png").read_bytes()[16:24]
        sizes.append(struct.unpack(">II", header))  # width and height of a PNG
    (three, one_row), (four, two_rows) = sizes
    assert three == four and one_row < two_rows


def test_without_a_results_file_only_the_folder_is_written(tmp_path: Path):
    found = experiment(recipe=[HALF], other=[WHOLE])
    outcome.write_experiment(found, outcome.tables(found), tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "compare.json"]


def test_a_pick_at_the_sweeps_edge_is_said_below_the_table_and_one_inside_is_not():
    rates = {0.1: 0.2, 0.3: 0.5, 0.9: 0.4}
    inside = Sweep([1.0, 3.0, 9.0], rates, 0.3, 0.1)
    edges = [Sweep([1.0, 3.0, 9.0], rates, picked, 0.1) for picked in (0.1, 0.9)]
    assert not inside.at_edge and all(edge.at_edge for edge in edges)
    found = replace(compared(), sweep={"grpo": inside, "copsd": edges[1]})
    (note,) = outcome.edge_note(found)
    assert note.endswith("a better rate may lie beyond: COPSD.") and "GRPO" not in note
    assert outcome.tables(found)[-1] == note
    assert outcome.edge_note(replace(found, sweep={"grpo": inside})) == []


def test_an_arm_that_every_rate_hurts_is_said_to_be_one_and_not_to_lack_a_lower_rate():
    falling = {0.1: 0.3, 0.3: 0.2, 0.9: 0.1}
    hurt, level, helped = (Sweep([1.0, 3.0, 9.0], falling, 0.1, base) for base in (0.4, 0.3, 0.25))
    assert (hurt.helps, level.helps, helped.helps) == (False, False, True)
    assert (hurt.at_edge, level.at_edge, helped.at_edge) == (False, False, True)
    found = replace(compared(), sweep={"grpo": hurt, "copsd": helped})
    at_edge, none_helps = outcome.edge_note(found)
    assert at_edge.endswith("may lie beyond: COPSD.")
    assert none_helps == "No rate does better than no training: GRPO."
    # It learns more at each higher rate, and may pass the base beyond the highest.
    rising = Sweep([1.0, 3.0], {0.1: 0.1, 0.3: 0.2}, 0.3, 0.4)
    assert rising.at_edge and not rising.helps


def test_in_full_an_arm_has_its_interval_language_evidence_and_seconds_in_two_tables():
    found = in_full()
    tokens, seconds, pairs, *_ = [cells(table) for table in outcome.tables(found)]
    assert (tokens[0][0], seconds[0][0]) == ("at equal sampled tokens", "at equal seconds")
    rows = {row[0]: dict(zip(tokens[0], row, strict=True)) for row in tokens[1:]}
    copsd = rows["Hausa: COPSD"]
    assert copsd["greedy accuracy"] == "0.750 [0.500, 1.000]" and copsd["seeds"] == "0.500 to 1.000"
    assert copsd["evidence"] == "code" and rows["Hausa: base"]["evidence"] == "-"
    assert rows["Hausa: right box behind garbage"]["greedy accuracy"].startswith("0.500")
    row = next(row for row in seconds if row[0] == "Hausa: right box behind garbage")
    longer = dict(zip(seconds[0], row, strict=True))
    assert longer["greedy accuracy"].startswith("1.000") and longer["seconds"] == "8"
    assert pairs[1][0] == "Hausa: right box behind garbage against COPSD"
    # All columns stand in both, though some say the same in every row.
    assert tokens[0][1:] == seconds[0][1:]
    assert {"format rate", "in the problem's language", "in English", "pass@2"} <= set(tokens[0])
    assert copsd["in the problem's language"] == "1.000 [1.000, 1.000]"


def test_pass_at_k_is_told_at_the_powers_of_two_up_to_the_samples():
    eight = measured([RIGHT, WRONG])
    attempts = [[RIGHT, *[WRONG] * 7], [WRONG] * 8]
    eight["sampled"] = ratios(graded(*attempts), list(range(1, 9)))
    names = [name for name in outcome.metrics_of(eight, in_full=True) if name.startswith("pass@")]
    assert names == ["pass@1", "pass@2", "pass@4", "pass@8"]
    assert "pass@4" not in outcome.metrics_of(eight)
