"""A rollout, token by token: the numbers are the loss's, and no token breaks table or page."""

import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kernels import chunked_divergence
from parts.model import final_hidden, head_weight, load_tokenizer
from parts.tokens import (
    BROKEN,
    ROWS,
    TokenRow,
    explain_tokens,
    tokens_table,
    visible,
    write_tokens_page,
)

LOSS = {"kind": "forward_kl", "beta": 0.5, "temperature": 1.1, "clip_mode": "entry", "clip": 0.05}
EVIL = "</script><b>\"'&\ud800"


def letters(ids: list[int]) -> str:
    """Decode each id as one character that is its own: no two tokens read alike."""
    return "".join(chr(0x4E00 + token) for token in ids)


@pytest.fixture
def scored(tiny_model):
    """Return states of student and teacher, the head and the ids, more than are scored at once."""
    ids = torch.randint(300, (ROWS + 7,), generator=torch.manual_seed(1)).tolist()
    prompts = [5, 6], [7, 8, 9]
    with torch.no_grad():
        student_ND, teacher_ND = (
            final_hidden(tiny_model, torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            for prompt in prompts
        )
    return student_ND, teacher_ND, head_weight(tiny_model), ids


def row(text: str = "a", **changes) -> TokenRow:
    top = [("a", 0.5), ("b", 0.25)]
    plain = TokenRow(text, 0.5, 0.5, text, 0.2, 0.2, False, top, top)
    return replace(plain, **changes)


def printed(table, width: int = 80, **options) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(table)
    return stream.getvalue().splitlines()


def cells(table) -> list[list[str]]:
    stacked = [column.cells for column in table.columns]
    return [[str(cell) for cell in line] for line in zip(*stacked, strict=True)]


def embedded(path: Path) -> dict:
    page = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_each_number_is_what_fp64_says(scored):
    student_ND, teacher_ND, head_VD, ids = scored
    rows = explain_tokens(student_ND, teacher_ND, head_VD, ids, letters, **LOSS)
    head_VD = head_VD.detach().double()
    for place, (token, found) in enumerate(zip(ids, rows, strict=True)):
        q_V = torch.exp(student_ND[place].double() @ head_VD.T / 1.1)
        p_V = torch.exp(teacher_ND[place].double() @ head_VD.T / 1.1)
        q_V = q_V / q_V.sum()
        p_V = p_V / p_V.sum()
        summands = [p * log(p / q) for p, q in zip(p_V.tolist(), q_V.tolist(), strict=True)]
        assert found.text == letters([token])
        assert found.student == pytest.approx(q_V[token].item(), rel=1e-4)
        assert found.teacher == pytest.approx(p_V[token].item(), rel=1e-4)
        assert found.kl == pytest.approx(sum(summands), abs=1e-4)
        assert found.loss == pytest.approx(sum(min(x, 0.05) for x in summands), abs=1e-4)
        for top, share_V in ((found.student_top, q_V), (found.teacher_top, p_V)):
            best = sorted(range(300), key=lambda v, share_V=share_V: -share_V[v].item())[:5]
            assert [text for text, _ in top] == [letters([v]) for v in best]
            assert [share for _, share in top] == pytest.approx(share_V[best].tolist(), rel=1e-4)
        assert found.favourite == letters([int(p_V.argmax())])


@pytest.mark.parametrize("clip_mode", ["none", "entry", "token"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_footer_is_the_loss_that_training_takes(scored, kind, clip_mode):
    settings = {**LOSS, "kind": kind, "clip_mode": clip_mode, "beta": 0.3}
    student_ND, teacher_ND, head_VD, ids = scored
    rows = explain_tokens(student_ND, teacher_ND, head_VD, ids, letters, **settings)
    loss_N, stats = chunked_divergence(student_ND, teacher_ND, head_VD, **settings)
    clipped_N = loss_N.detach() < stats["kl_N"]
    assert [r.loss for r in rows] == pytest.approx(loss_N.tolist(), abs=1e-4)
    assert [r.clipped for r in rows] == clipped_N.tolist()
    assert clipped_N.any() == (clip_mode != "none")
    footers = [str(column.footer) for column in tokens_table(rows).columns]
    assert footers[4].split()[0] == f"{stats['kl_N'].mean().item():.3f}"
    assert footers[-1] == f"{loss_N.mean().item():.3f}\n= loss"
    assert sum("loss" in footer for footer in footers) == 1


def test_the_clip_has_a_column_only_where_it_cut():
    kept, cut = row("a"), row("b", kl=2.0, loss=-0.0517, clipped=True)
    assert "leaves" not in "\n".join(printed(tokens_table([kept])))
    table = tokens_table([kept, cut])
    assert [line[-2:] for line in cells(table)] == [["0.200", ""], ["2.000", "-0.052"]]
    assert [str(column.footer) for column in table.columns][-2:] == ["1.100", "0.074\n= loss"]


def test_the_teachers_favourite_is_shown_only_where_it_is_another_token():
    table = tokens_table([row("a"), row("b", favourite=" c")])
    assert [line[3] for line in cells(table)] == ["", "␣c"]


def test_small_numbers_do_not_read_as_nothing():
    line = cells(tokens_table([row(student=4e-5, teacher=0.0, kl=-1e-8)]))[0]
    assert line[1:3] == ["<0.001", "0.000"] and line[4] == "0.000"


def test_after_puts_the_trained_student_beside_the_untrained():
    before = [row("a", student=0.1, kl=3.0, loss=3.0), row("b", student=0.2, kl=1.0, loss=1.0)]
    after = [row("a", student=0.7, kl=0.5), row("b", student=0.8, kl=0.25)]
    table = tokens_table(before, after=after)
    assert [line[1] for line in cells(table)] == ["0.100", "0.200"]
    assert [line[-2:] for line in cells(table)] == [["0.700", "0.500"], ["0.800", "0.250"]]
    assert [str(c.footer) for c in table.columns][4:] == ["2.000\n= loss", "", "0.375"]


@pytest.mark.parametrize("after", [[row("a")], [row("a"), row("c")]])
def test_after_must_be_of_the_same_tokens(tmp_path, after):
    rows = [row("a"), row("b")]
    with pytest.raises(ValueError, match="the same 2 tokens"):
        tokens_table(rows, after=after)
    with pytest.raises(ValueError, match="the same 2 tokens"):
        write_tokens_page(
            tmp_path / "page.html", title="", prompts={}, rows=rows, after=after, notes=[]
        )
    assert not list(tmp_path.iterdir())


def test_a_rollout_without_tokens_is_an_error(scored):
    student_ND, teacher_ND, head_VD, ids = scored
    with pytest.raises(ValueError, match="at least one"):
        explain_tokens(student_ND[:0], teacher_ND[:0], head_VD, [], letters, **LOSS)
    with pytest.raises(ValueError, match=f"{len(ids)} and {len(ids)} hidden states for 1"):
        explain_tokens(student_ND, teacher_ND, head_VD, ids[:1], letters, **LOSS)
    with pytest.raises(ValueError, match="at least one"):
        tokens_table([])


def test_tokens_read_as_they_stand_in_their_text(lab_folder, tiny_model):
    tokenizer = load_tokenizer(lab_folder)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    # The bytes of the last letter lie on both sides of the place where the next tokens are scored.
    ids = tokenizer.encode(" Da\n\nƙ猫 ce")
    ids += tokenizer.encode("1") * (ROWS - 1 - len(ids)) + tokenizer.encode("猫")
    hidden_ND = torch.zeros(len(ids), 32)
    head_VD = torch.zeros(len(tokenizer), 32)
    rows = explain_tokens(hidden_ND, hidden_ND, head_VD, ids, decode, **LOSS)
    texts = [found.text for found in rows]
    assert "".join(text for text in texts if text != BROKEN) == decode(ids)
    assert (
        texts.count("猫") == 2 and BROKEN in texts
    )  # three bytes, of which only the last completes it


def test_a_first_word_keeps_its_space_and_an_id_without_text_is_named(tiny_model):
    words = {0: "▁two", 1: "▁apples", 2: "\N{COMBINING ACUTE ACCENT}"}

    def sentencepiece(ids: list[int]) -> str:
        return "".join(words.get(token, "") for token in ids).replace("▁", " ").removeprefix(" ")

    hidden_ND = torch.zeros(4, 32)
    rows = explain_tokens(
        hidden_ND, hidden_ND, head_weight(tiny_model), [0, 1, 2, 250], sentencepiece, **LOSS
    )
    assert [found.text for found in rows] == ["two", " apples", words[2], "[id 250]"]
    assert visible(words[2]) == "◌" + words[2]


def test_nothing_carries_a_gradient_and_nothing_is_changed(scored):
    student_ND, teacher_ND, head_VD, ids = scored
    student_ND = student_ND.clone().requires_grad_()
    before_ND = teacher_ND.clone()

    def decode(ids: list[int]) -> str:
        assert (
            not torch.is_grad_enabled()
        )  # or two [C, V] tensors would be kept for a backward pass
        return letters(ids)

    explain_tokens(student_ND, teacher_ND, head_VD, ids, decode, **LOSS)
    assert torch.equal(before_ND, teacher_ND)


def test_the_table_shows_every_token_literally_and_fits_80_columns():
    texts = [" [red]x[/]", "\n\n", "\t", "[/nope]", "a\x1b[2J", "x\u202ey", EVIL[-1], ":smile:"]
    rows = [row(text, kl=12.5, loss=-0.25, clipped=True, favourite="a" * 30) for text in texts]
    lines = printed(tokens_table(rows, after=rows))
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines[4 : 4 + len(texts)]]
    assert shown == ["␣[red]x[/]", "↵↵", "⇥", "[/nope]", "a␛[2J", f"x{BROKEN}y", BROKEN, ":smile:"]
    numbers = "0.500 0.500 aaaaaaaaaa… 12.500 -0.250 0.500 12.500"
    assert all(" ".join(line.split()[1:]) == numbers for line in lines[4 : 4 + len(texts)])
    assert "\x1b[1;31m" in "\n".join(printed(tokens_table(rows), force_terminal=True))


def test_the_page_holds_every_text_as_text(tmp_path):
    path = tmp_path / "page.html"
    rows = [row(EVIL, favourite=EVIL, teacher_top=[(EVIL, 1.0)]), row(" two\nlines")]
    after = [replace(found, kl=0.1, loss=0.05, clipped=True) for found in rows]
    write_tokens_page(
        path, title=EVIL, prompts={EVIL: EVIL, "b": "@DATA@"}, rows=rows, after=after, notes=[EVIL]
    )
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "</script><b>" not in text
    assert not re.search(
        r'src="|href="|url\(|@import|https?://', text
    )  # it opens without a network
    data, clean = embedded(path), EVIL.replace("\ud800", BROKEN)
    assert data["title"] == clean and data["notes"] == [clean]
    assert data["prompts"] == {clean: clean, "b": "@DATA@"}
    before, trained = data["views"].values()
    assert [found["text"] for found in before["rows"]] == [clean, " two↵\nlines"]
    assert before["rows"][0]["teacher_top"] == [[clean, 1.0]]
    assert before["loss"] == pytest.approx(0.2) and trained["loss"] == pytest.approx(0.05)
    assert [found["clipped"] for found in trained["rows"]] == [True, True]


WEIGHED = [row("a", kl=0.5, loss=0.2, clipped=True, weight=2.0), row(" b", weight=0.0)]


def test_the_mean_is_of_the_weighted_tokens_where_it_is_trained_on(tmp_path):
    """The page read no weight, and told of a loss for methods that have none such."""
    path = tmp_path / "page.html"
    means = {}
    for mean_is in ("loss", "SSOPD's term", ""):
        write_tokens_page(
            path,
            title="t",
            prompts={},
            rows=WEIGHED,
            after=[row("a"), row(" b")],
            mean_is=mean_is,
            notes=[],
        )
        data = embedded(path)
        assert data["mean_is"] == mean_is
        means[mean_is] = [(view["kl"], view["loss"]) for view in data["views"].values()]
        footers = [str(column.footer) for column in tokens_table(WEIGHED, mean_is=mean_is).columns]
        # The mean below the weights was of the weighted KL.
        shown = {"loss": "\n0.200\n= loss", "SSOPD's term": "\n0.200\n= SSOPD's\nterm", "": ""}
        first = "mean\nweighted mean" if mean_is else "mean"
        assert footers == [first, "", "", "", "0.350", f"0.200{shown[mean_is]}", "1.000"]
    assert means["loss"] == means["SSOPD's term"] == [(0.5, 0.2), (0.2, 0.2)]
    assert means[""] == [(0.35, 0.2), (0.2, 0.2)]


def test_each_column_has_a_mean_of_its_own_and_the_weighted_one_is_the_loss():
    """The mean of the weighted KL stood below the weights."""
    rows = [row("a", kl=0.8, loss=0.8, weight=0.5), row("b", kl=0.2, weight=1.5)]
    footers = [str(column.footer) for column in tokens_table(rows).columns]
    assert footers == ["mean\nweighted mean", "", "", "", "0.500\n0.350\n= loss", "1.000"]
    lines = [line.split() for line in printed(tokens_table(rows))]
    assert ["mean", "0.500", "1.000"] in lines and ["weighted", "mean", "0.350"] in lines


def test_a_table_with_every_column_fits_80_columns_and_cuts_no_number():
    made = {"kl": 12.5, "loss": -0.25, "clipped": True, "weight": 1.5, "favourite": "b" * 30}
    rows = [row("a" * 30, **made)] * 2
    lines = printed(tokens_table(rows, after=rows, mean_is="SSOPD's term"))
    assert max(map(len, lines)) <= 80
    numbers = [line.split()[1:] for line in lines if line.strip().startswith("aaa")]
    shown = ["0.500", "0.500", "bbbbbbbb…", "12.500", "-0.250", "1.500", "0.500", "12.500"]
    assert numbers == [shown, shown]
    assert sum("…" in line for line in lines) == 2


def test_a_number_that_is_not_finite_leaves_no_page(tmp_path):
    with pytest.raises(ValueError):
        write_tokens_page(
            tmp_path / "page.html", title="", prompts={}, rows=[row(kl=float("nan"))], notes=[]
        )
    assert not list(tmp_path.iterdir())


USER = """<script>
const loss = () => document.querySelector("#sum b").textContent;
const tokens = [...document.querySelectorAll("#text span")];
const looks = () => tokens.map(token => [token.textContent, token.className]);
const seen = {before: looks(), loss: loss()};
tokens[0].dispatchEvent(new FocusEvent("focusin", {bubbles: true}));  // a window may not have it
seen.card = document.getElementById("card").textContent;
document.querySelectorAll("#switch input")[1].click();
Object.assign(seen, {after: looks(), trained: loss()});
const note = document.createElement("pre");
note.textContent = JSON.stringify(seen);
document.body.replaceChildren(note);
</script></body>"""
WEIGHTS = """<script>
const drawn = [...document.querySelectorAll("#bars > div:not(.mean)")];
document.querySelector("#text span").dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
const seen = {
  bars: drawn.map(token => [...token.children].map(bar => bar.style.height)),
  bars_say: document.querySelector("#bars > span").textContent,
  sum: document.getElementById("sum").textContent,
  scale: document.querySelector("#scale").outerHTML,
  card: document.getElementById("card").textContent,
};
const note = document.createElement("pre");
note.textContent = JSON.stringify(seen);
document.body.replaceChildren(note);
</script></body>"""


def seen_in_a_browser(path: Path, script: str) -> dict:
    """Return what a script finds on a page, once a browser has drawn it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</body>", script), encoding="utf-8")
    me = f"--user-data-dir={path.with_suffix('')}"
    flags = ["--no-sandbox", "--headless", "--disable-gpu", me, "--dump-dom"]
    found = subprocess.run(
        [browser, *flags, path.as_uri()], capture_output=True, text=True, check=True
    )
    return json.loads(html.unescape(found.stdout.split("<pre>")[1].split("</pre>")[0]))


@pytest.mark.parametrize("mean_is", ["loss", "SSOPD's term", ""])
def test_a_browser_draws_the_weighted_tokens_and_calls_their_mean_what_it_is(tmp_path, mean_is):
    path = tmp_path / "page.html"
    write_tokens_page(path, title="t", prompts={}, rows=WEIGHED, mean_is=mean_is, notes=[])
    seen = seen_in_a_browser(path, WEIGHTS)
    first, second = ([round(float(bar[:-1]), 1) for bar in bars] for bars in seen["bars"])
    largest = 1.0 if mean_is else 0.5
    assert first == [round(100 * part / 1.2, 1) for part in (0.4, 1.0)]
    # The second token's weight is 0, and its KL 0.2.
    assert second == ([0.0] if mean_is else [round(100 * 0.4 / 1.2, 1)])
    assert f"the tallest bar is {largest:.3f} nats" in seen["bars_say"]
    assert "weight 2.000" in seen["card"] and "0.200 nats per token" in seen["sum"]
    called = {"loss": "the loss", "SSOPD's term": "SSOPD's term"}.get(mean_is)
    assert (f"Their mean is {called}: " in seen["sum"]) is bool(mean_is)
    assert (f"adds to {called}" in seen["bars_say"]) is bool(mean_is)
    assert ("not what is trained on" in seen["sum"]) is not bool(mean_is)


def test_the_tallest_bar_is_one_that_is_drawn(tmp_path):
    path = tmp_path / "page.html"
    low = row("a", kl=0.001, loss=0.001)
    write_tokens_page(path, title="t", prompts={}, rows=[low], name="JSD", notes=[])
    seen = seen_in_a_browser(path, WEIGHTS)
    assert "JSD &lt;0.01" in seen["scale"] and "colour by JSD, in nats" in seen["scale"]
    assert "JSD 0.001 nats" in seen["card"]
    assert "the tallest bar is 0.001 nats" in seen["bars_say"] and "weight" not in seen["card"]


def test_a_browser_shows_the_tokens_both_opinions_and_the_switch(tmp_path):
    rows = [row("<i>a", favourite="b", student=0.25, kl=4.0, loss=0.05, clipped=True), row(" c")]
    after = [replace(rows[0], kl=0.001, loss=0.001, clipped=False), rows[1]]
    path = tmp_path / "page.html"
    write_tokens_page(path, title="t", prompts={"a": "b"}, rows=rows, after=after, notes=["n"])
    views = seen_in_a_browser(path, USER)
    assert views["before"] == [["<i>a", "k6 other cut"], [" c", "k3"]]
    assert views["after"] == [["<i>a", "k0 other"], [" c", "k3"]]
    assert (views["loss"], views["trained"]) == ("0.125 nats per token", "0.101 nats per token")
    assert "token 1 of 2" in views["card"] and "KL 4.000 nats" in views["card"]
    assert "student 25.0 %" in views["card"] and "the clip leaves 0.050" in views["card"]
