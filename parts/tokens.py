"""A rollout, token by token: what the student wrote, what the teacher thinks of it, what it costs.

The student wrote the tokens. At each of them the teacher, whose prompt holds more, has an opinion
of its own. The divergence between the two distributions is what the token adds to the loss, so
every token can teach something. GRPO hears one number of the same rollout: right or wrong.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from kernels import divergence
from parts.files import write_text

PAGE = Path(__file__).with_name("tokens.html")  # but for its data
TOP = 5  # tokens shown of each distribution
ROWS = 64  # tokens whose logits are alive at a time: 0.3 GiB or so with a vocabulary of 150,000
# Ids before a token that can change how it is written: a character has at most four bytes.
CONTEXT = 4
BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a decoder writes a part of a character
STYLES = ((1.0, "bold red"), (0.1, "yellow"))  # from how many nats on
MARKS = {
    # Some of these move the cursor or turn a line around. Half a surrogate pair cannot be printed.
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], BROKEN),
    **dict.fromkeys(range(0xD800, 0xE000), BROKEN),
    **{code: chr(0x2400 + code) for code in range(0x20)},  # Unicode's pictures of the controls
    0x7F: "\N{SYMBOL FOR DELETE}",
    ord("\t"): "⇥",
    ord("\n"): "↵",
    ord(" "): "␣",
}


@dataclass(frozen=True)
class TokenRow:
    """A token of a rollout, as student and teacher see it.

    text       the token as it reads in its place: BROKEN where it ends within a character, and
               "[id 7]" where it has no text
    student    the student's probability q of it, at the loss's temperature
    teacher    the teacher's probability p of it, likewise
    favourite  the teacher's most likely token
    kl         the divergence between p and q at this token, unclipped, in nats
    loss       what the token adds to the loss, after the clip, in nats
    clipped    whether the clip made it smaller
    weight     how much the token counts among its completion's, 1 where all count alike
    student_top, teacher_top   the most likely tokens and their probabilities, from the top
    """

    text: str
    student: float
    teacher: float
    favourite: str
    kl: float
    loss: float
    clipped: bool
    student_top: list[tuple[str, float]]
    teacher_top: list[tuple[str, float]]
    weight: float = 1.0


@torch.no_grad()
def explain_tokens(
    student_ND: Tensor,
    teacher_ND: Tensor,
    head_VD: Tensor,
    completion_ids: list[int],
    decode: Callable[[list[int]], str],
    *,
    kind: str,
    beta: float,
    temperature: float,
    clip_mode: str,
    clip: float | None,
) -> list[TokenRow]:
    """Return a row for each token of one completion. Nothing carries a gradient.

    student_ND, teacher_ND   hidden states that predict the N completion tokens, under either prompt
    head_VD                  the output projection
    decode                   ids -> text, special tokens included: the end of text is a token, too
    kind, ..., clip          the loss's settings, as kernels.divergence takes them
    Raises ValueError as kernels.divergence does, and unless there are as many states as tokens,
    and at least one.
    """
    if not len(student_ND) == len(teacher_ND) == len(completion_ids) > 0:
        raise ValueError(
            f"got {len(student_ND)} and {len(teacher_ND)} hidden states for {len(completion_ids)} "
            "tokens; valid: as many as tokens, and at least one"
        )
    loss = {"kind": kind, "beta": beta, "temperature": temperature}
    rows: list[TokenRow] = []
    for first in range(0, len(completion_ids), ROWS):
        some = slice(first, first + ROWS)
        student_CV = student_ND[some] @ head_VD.T
        teacher_CV = teacher_ND[some] @ head_VD.T
        kl_C = divergence(student_CV, teacher_CV, **loss)
        loss_C = divergence(student_CV, teacher_CV, clip_mode=clip_mode, clip=clip, **loss)
        q_CV = _probabilities(student_CV, temperature)
        p_CV = _probabilities(teacher_CV, temperature)
        for place, token in enumerate(completion_ids[some]):
            before = completion_ids[max(first + place - CONTEXT, 0) : first + place]
            student_top = _most_likely(q_CV[place], before, decode)
            teacher_top = _most_likely(p_CV[place], before, decode)
            row = TokenRow(
                text=_piece(token, before, decode),
                student=q_CV[place, token].item(),
                teacher=p_CV[place, token].item(),
                favourite=teacher_top[0][0],
                kl=kl_C[place].item(),
                loss=loss_C[place].item(),
                clipped=bool(loss_C[place] < kl_C[place]),
                student_top=student_top,
                teacher_top=teacher_top,
            )
            rows.append(row)
    return rows


def visible(text: str) -> str:
    """Return a token's text with marks for its white space, controls and broken characters.

    >>> visible(" apples"), visible("}.\\n\\n")
    ('␣apples', '}.↵↵')
    """
    # A vowel sign of an Indic script is a token of its own, and needs a letter to sit on.
    alone = unicodedata.category(text[:1] or " ").startswith("M")
    return ("◌" if alone else "") + text.translate(MARKS)


def tokens_table(
    rows: list[TokenRow],
    *,
    after: list[TokenRow] | None = None,
    mean_is: str = "loss",
    name: str = "KL",
) -> Table:
    """Return a table of at most 80 columns: a line per token and, last, the mean of each column.

    The teacher's favourite is shown only where it is another token, and what the clip leaves of a
    token's KL only where it cut. Nothing is read as rich's markup.

    after    the same tokens after training, for two more columns; ValueError if they are other
             tokens
    mean_is  what the method makes of the mean of what the clip leaves, "" where it does not train
             on it. Where a weight is not 1, it is that of what the clip leaves times the weight,
             which has a line of its own below the other
    name     what the divergence is called, in one word
    """
    _check_same_tokens(rows, after)
    clips = any(row.clipped for row in rows)
    weighted = any(row.weight != 1 for row in rows)
    columns = _columns(rows, after, mean_is, name, clips=clips, weighted=weighted)
    for column in columns:
        column.no_wrap = True
    table = Table(*columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    if weighted and after:  # with all columns there is little room for their words, and for blanks
        columns[3].max_width = 9
        table.padding = 0
    table.show_footer = True
    for place, row in enumerate(rows):
        cells = [
            Text(visible(row.text), _style(row.kl)),
            Text(_share(row.student)),
            Text(_share(row.teacher)),
            Text("" if row.favourite == row.text else visible(row.favourite)),
            Text(_nats(row.kl), _style(row.kl) or "dim"),
        ]
        if clips:
            cells.append(Text(_nats(row.loss) if row.clipped else ""))
        if weighted:
            cells.append(Text(_nats(row.weight)))
        if after:
            trained = after[place]
            cells.append(Text(_share(trained.student)))
            cells.append(Text(_nats(trained.kl), _style(trained.kl) or "dim"))
        table.add_row(*cells)
    return table


def _columns(
    rows: list[TokenRow],
    after: list[TokenRow] | None,
    mean_is: str,
    name: str,
    *,
    clips: bool,
    weighted: bool,
) -> list[Column]:
    """Return the columns of tokens_table, each with its mean below it."""
    kl, loss = _means(rows)
    mark = f"\n= {mean_is}".replace(" term", "\nterm") if mean_is else ""
    if mark and weighted:
        mark = f"\n{_nats(_means(rows, weighted=True)[1])}{mark}"
    columns = [
        Column("token", "mean\nweighted mean" if mark and weighted else "mean", max_width=13),
        Column("student", justify="right"),
        Column("teacher", justify="right"),
        Column("teacher\nwould say", max_width=11),
        Column(f"{name},\nnats", _nats(kl) + ("" if clips else mark), justify="right"),
    ]
    if clips:
        columns.append(Column("clip\nleaves", _nats(loss) + mark, justify="right"))
    if weighted:
        mean = fmean(row.weight for row in rows)
        columns.append(Column("weight", _nats(mean), justify="right"))
    if after:
        columns.append(Column("student\nafter", justify="right"))
        columns.append(Column(f"{name}\nafter", _nats(_means(after)[0]), justify="right"))
    return columns


def write_tokens_page(
    path: Path,
    *,
    title: str,
    prompts: dict[str, str],
    rows: list[TokenRow],
    after: list[TokenRow] | None = None,
    mean_is: str = "loss",
    name: str = "KL",
    notes: list[str],
) -> None:
    """Write an HTML file that loads nothing: the completion coloured by KL, with both opinions.

    prompts  what to call each prompt -> its text
    after    the same tokens after training, for a switch; ValueError if they are other tokens
    mean_is  as for tokens_table; where it is "", the page shows the divergences as they are
    name     as for tokens_table
    notes    lines to end with, such as what GRPO hears of this rollout
    All of it enters the page as text. Half a surrogate pair, which UTF-8 cannot write, becomes
    BROKEN. Raises ValueError for a number that is not finite.
    """
    _check_same_tokens(rows, after)
    views = {"before training": rows} | ({"after training": after} if after else {})
    data = {
        "title": title,
        "prompts": prompts,
        "mean_is": mean_is,
        "name": name,
        "views": {name: _view(tokens, mean_is) for name, tokens in views.items()},
        "notes": notes,
    }
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False)
    embedded = embedded.replace("<", "\\u003c")  # no </script> can end it
    embedded = re.sub("[\ud800-\udfff]", BROKEN, embedded)
    write_text(path, PAGE.read_text(encoding="utf-8").replace("@DATA@", embedded))


def _view(rows: list[TokenRow], mean_is: str) -> dict[str, Any]:
    """Return what the page shows of one scoring of the tokens."""
    kl, loss = _means(rows, weighted=mean_is != "")
    return {"kl": kl, "loss": loss, "rows": [asdict(row) | _words(row) for row in rows]}


def _words(row: TokenRow) -> dict[str, Any]:
    """Return a row's texts for the page; only in the running text is a space a space."""
    return {
        "text": row.text.translate({**MARKS, ord(" "): " ", ord("\n"): "↵\n"}),
        "label": visible(row.text),
        "agrees": row.favourite == row.text,
        "favourite": visible(row.favourite),
        "student_top": [(visible(text), share) for text, share in row.student_top],
        "teacher_top": [(visible(text), share) for text, share in row.teacher_top],
    }


def _probabilities(logits_CV: Tensor, temperature: float) -> Tensor:
    """Return the distributions that the loss compares, in fp32 or, if the logits are, in fp64."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return (logits_CV / temperature).softmax(-1)


def _most_likely(
    share_V: Tensor, before: list[int], decode: Callable[[list[int]], str]
) -> list[tuple[str, float]]:
    """Return the TOP most likely tokens with their probabilities, from the top."""
    shares, tokens = share_V.topk(min(TOP, len(share_V)))
    texts = [_piece(token, before, decode) for token in tokens.tolist()]
    return list(zip(texts, shares.tolist(), strict=True))


def _piece(token: int, before: list[int], decode: Callable[[list[int]], str]) -> str:
    """Return what the token adds to the text of the ids before it.

    Alone it may read otherwise. Some tokenizers drop the space of a first word, and a token can be
    half a character, which is then shown at the token that completes it.
    """
    settled = decode(before).rstrip(BROKEN)
    return decode([*before, token]).removeprefix(settled) or f"[id {token}]"


def _check_same_tokens(rows: list[TokenRow], after: list[TokenRow] | None) -> None:
    """Raise ValueError unless both score the same tokens, and at least one."""
    if not rows:
        raise ValueError("a rollout has at least one token; got none")
    if after is not None and [row.text for row in after] != [row.text for row in rows]:
        raise ValueError(f"`after` must score the same {len(rows)} tokens; got others")


def _means(rows: list[TokenRow], *, weighted: bool = False) -> tuple[float, float]:
    """Return the mean KL and the mean loss, in nats per token; `weighted`: times the weights."""
    weights = [row.weight if weighted else 1.0 for row in rows]
    kl = fmean(weight * row.kl for weight, row in zip(weights, rows, strict=True))
    return kl, fmean(weight * row.loss for weight, row in zip(weights, rows, strict=True))


def _nats(value: float) -> str:
    """Return the number with three decimals, and what rounds to zero without a sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def _share(value: float) -> str:
    """Return a probability with three decimals; a small one does not read as zero."""
    return "<0.001" if 0 < value < 0.001 else f"{value:.3f}"


def _style(kl: float) -> str:
    """Return the rich style of a token on which student and teacher are far apart, else ""."""
    return next((style for least, style in STYLES if kl >= least), "")
