"""parts/curves.py: points of curves by hand, and which figures an experiment has."""

from test_results import (
    BASE,
    HALF,
    RIGHT,
    TITLES,
    WHOLE,
    WRONG,
    compared,
    experiment,
    in_full,
    measured,
)

from parts.curves import band, figures_of, over_training, right_within


def test_curves_over_training_begin_at_the_base_and_end_at_the_last_checkpoint():
    arms = {"base": [BASE], "copsd": [HALF, WHOLE]}
    arms = {TITLES.get(name, name): runs for name, runs in arms.items()}
    curves = over_training(arms, "greedy accuracy")
    assert list(curves) == ["COPSD"]
    assert curves["COPSD"][0] == (0.0, 0.0, 0.0, 0.0)
    assert curves["COPSD"][-1] == (0.9, 0.75, 0.5, 1.0)  # in thousands of tokens
    seconds = over_training(arms, "greedy accuracy", x="train_s", unit=1.0)
    assert seconds["COPSD"][-1][0] == 4.0


def test_a_band_spans_the_seeds_where_all_of_them_have_been():
    points = band([[(0.0, 0.0), (10.0, 1.0)], [(0.0, 0.0), (20.0, 1.0)]])
    assert points[-1] == (10.0, 0.75, 0.5, 1.0) and points[0] == (0.0, 0.0, 0.0, 0.0)


def test_a_comparison_has_an_overview_and_a_figure_a_language_and_an_ablation_none():
    figures = figures_of(compared())
    assert list(figures) == ["comparison", "comparison_hau", "comparison_swa"]
    titles = [panel.title for panel in figures["comparison"]]
    assert titles == ["Hausa: greedy accuracy", "Swahili: greedy accuracy"]
    panels = {panel.title: panel for panel in figures["comparison_hau"]}
    assert panels["pass@k after training"].curves["COPSD"] == [
        (1.0, 0.75, 0.5, 1.0),
        (2.0, 0.75, 0.5, 1.0),
    ]
    within = panels["Right within a limit"].curves
    assert list(within) == ["base", "GRPO", "COPSD"]
    assert within["GRPO"][2] == (3.0, 0.0, 0.0, 0.0)
    assert within["GRPO"][3] == (4.0, 0.5, 0.5, 0.5)
    assert "English: greedy accuracy" in panels
    assert figures_of(experiment(recipe=[HALF])) == {}


def test_an_arm_that_is_not_trained_has_no_curve_over_training():
    figures = figures_of(in_full())
    assert list(figures) == ["attribution", "attribution_hau"]
    (overview,) = figures["attribution"]
    assert list(overview.curves) == ["COPSD", "right box behind garbage"]
    at_the_end = {panel.title: panel for panel in figures["attribution_hau"]}
    assert "base, in English" in at_the_end["pass@k after training"].curves


def test_right_within_a_limit_is_what_had_ended_by_then():
    found = measured([RIGHT, WRONG])
    assert (right_within(found, 3), right_within(found, 4)) == (0.0, 0.5)
