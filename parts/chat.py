"""What the model's chat template does, found out by running it, and how a completion is read back.

A chat template is a small program that writes a conversation as the text that the model was trained
on. Its source says little about what it does. One that mentions <think> may open a think block,
where a reasoning model writes before it answers; open it only when a keyword asks; close an empty
one; or merely drop old thoughts. Another loses the user's words, or writes today's date. So turns
with known words are rendered, and what comes out is looked at.
"""

import copy
import re
import string
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

# transformers takes seconds to load, and `copsd.py languages` needs this file but not that one.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

THINKING = ("auto", "on", "off")
OPEN = "<think>"
CLOSE = "</think>"
# Keywords that templates take to turn thinking on or off: Qwen3's and most others', DeepSeek-V3.1's
# and Granite's, Command A's.
SWITCHES = ("enable_thinking", "thinking", "reasoning")
# Figures, so that a template that changes the case of letters leaves them as they are.
ASKED = "20571113"
ANSWERED = "17192329"
ASKED_NEXT = "31374143"
# What a template can raise: jinja's errors, and Python's, for its expressions are Python's.
TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    SyntaxError,
)
# "<think>", "<|assistant|>", "[/INST]"
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class Template:
    """What a chat template does with a fresh turn of the assistant.

    as_parts  it takes a turn's content as a list of parts only
    switch    the keyword that turns thinking on and off; None: it has none
    unasked   the tag of a think block that the fresh turn ends in, where no keyword is given:
              "<think>" opens the block, "</think>" closes an empty one, "" is no block
    on, off   the same where the switch says so; without a switch, as unasked
    """

    as_parts: bool
    switch: str | None
    unasked: str
    on: str
    off: str

    def keywords(self, thinking: str) -> dict[str, bool]:
        """Return what the template is called with."""
        if thinking == "auto" or self.switch is None:
            return {}
        return {self.switch: thinking == "on"}

    def last_tag(self, thinking: str) -> str:
        """Return the tag of a think block that the fresh turn ends in, "" if none."""
        return {"auto": self.unasked, "on": self.on, "off": self.off}[thinking]

    def opens_think(self, thinking: str) -> bool:
        """Say whether a prompt is to end inside an opened think block.

        ValueError: the mode does not fit the template, or its block has a name that is not ours.
        """
        if thinking not in THINKING:
            raise ValueError(f"unknown thinking mode {thinking!r}; valid: {', '.join(THINKING)}")
        tag = self.last_tag(thinking)
        opened = "" if _is_closing(tag) else tag
        if not tag and thinking != "off":
            # Qwen3 writes an empty block where thinking is switched off, and otherwise nothing: it
            # leaves the block to the model, so the prompt opens it.
            closed = [each for each in (self.unasked, self.off) if _is_closing(each)]
            opened = OPEN if CLOSE in closed else "".join(closed[:1])
        if opened not in ("", OPEN):
            fits = not self.off or _is_closing(self.off)
            advice = "; use --thinking off" if fits and thinking != "off" else ""
            raise ValueError(
                f"this chat template marks thoughts with {opened}, and only {OPEN} and {CLOSE} "
                f"are known here{advice}"
            )
        is_open = opened == OPEN
        if thinking != "auto" and is_open != (thinking == "on"):
            habit = "always opens a think block" if is_open else "has no think block"
            raise ValueError(
                f"thinking {thinking!r} does not fit this chat template, which {habit}; use 'auto'"
            )
        return is_open


def read_template(tokenizer: "Tokenizer") -> Template:
    """Return what the tokenizer's chat template does, found out by rendering turns.

    ValueError: there is none, it fails, with its own message, or it drops the user's words.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "use an instruction-tuned model"
        )
    return _read_template(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _read_template(tokenizer: "Tokenizer", source: str) -> Template:
    """Read it once: every prompt asks. `source` is there because a tokenizer may be given another.

    A keyword that the template refuses is not its switch.
    """
    as_parts = _takes_parts_only(tokenizer)

    def _render(*turns: tuple[str, str], **options: Any) -> str:
        return _render_turns(tokenizer, [("user", ASKED), *turns], as_parts=as_parts, **options)

    plain = _render(add_generation_prompt=True)
    try:
        question = _render()
        answered = _render(("assistant", ANSWERED))
    except ValueError:  # some insist on an assistant's turn that is still to be written
        question = answered = ""
    header = _written_after(answered.rpartition(ANSWERED)[0], question)
    _refuse_longer_header(tokenizer, _written_after(plain, question), header)

    def _last_tag(text: str) -> str:
        return _think_tag(_written_after(text, question), header)

    for switch in SWITCHES:
        try:
            on = _render(add_generation_prompt=True, **{switch: True})
            off = _render(add_generation_prompt=True, **{switch: False})
        except ValueError:
            continue
        if (on, off) != (plain, plain):
            return Template(as_parts, switch, _last_tag(plain), _last_tag(on), _last_tag(off))
    unasked = _last_tag(plain)
    return Template(as_parts, None, unasked, unasked, unasked)


def prompt_opens_think(tokenizer: "Tokenizer", thinking: str = "auto") -> bool:
    """Say whether prompts end inside an opened think block, so that answers count only after it."""
    return read_template(tokenizer).opens_think(thinking)


def open_turn(user_turn: str, tokenizer: "Tokenizer", thinking: str) -> str:
    """Return the text of a user's turn, up to where the assistant writes.

    ValueError: the template fails, loses or changes the user's words, or does not fit the mode.
    """
    template = read_template(tokenizer)
    is_open = template.opens_think(thinking)
    text = _render_turns(
        tokenizer,
        [("user", user_turn)],
        as_parts=template.as_parts,
        add_generation_prompt=True,
        **template.keywords(thinking),
    )
    if not is_open:
        return text
    if template.last_tag(thinking) == OPEN:  # DeepSeek-R1 and Qwen3-Thinking write it themselves
        return text.rstrip("\n") + "\n"
    return f"{text}{OPEN}\n"


def turn_end_ids(tokenizer: "Tokenizer") -> set[int]:
    """Return the id of the control token that the template closes an assistant's turn with.

    Empty where it writes none, or where that is not clear: another token, such as one that starts
    a turn, would cut completions short.
    """
    as_parts = read_template(tokenizer).as_parts
    turns = [("user", ASKED), ("assistant", ANSWERED)]
    added = tokenizer.added_tokens_decoder
    ends = set(added)  # not a word of the template's text
    rendered = 0
    # What follows an answer closes it only if it does so at the end and before another turn alike.
    for conversation in (turns, [*turns, ("user", ASKED_NEXT)]):
        try:
            text = _render_turns(tokenizer, conversation, as_parts=as_parts)
        except ValueError:
            continue
        rendered += 1
        before, _, after = text.rpartition(ANSWERED)
        starts = TAG.findall(before.partition(ASKED)[0])[-1:]
        after = after if before else ""  # the answer was dropped or changed
        ends &= set(tokenizer.encode(after.strip(), add_special_tokens=False)[:1])
        ends -= {token_id for token_id, token in added.items() if token.content in starts}
    return ends if rendered else set()


def freeze_date(tokenizer: "Tokenizer", day: str | None) -> tuple["Tokenizer", str | None]:
    """Return the tokenizer with a template that writes `day` as today's date for ever, and the day.

    day  YYYY-MM-DD; None: today
    A template that writes no date stays as it is, and there is no day. Some write today's date into
    the system's turn, and a run that is stopped and goes on tomorrow must not change its prompts.
    """
    moments = [datetime(2001, 2, 3, 4, 5, 6), datetime(2014, 11, 25, 18, 37, 59)]
    copies = [_at(tokenizer, moment) for moment in moments]
    template = read_template(tokenizer)

    def _texts(dated: "Tokenizer") -> list[str]:
        """Return a turn in each mode: some write the date in one of them only."""
        return [
            _render_turns(
                dated,
                [("user", ASKED)],
                as_parts=template.as_parts,
                add_generation_prompt=True,
                **template.keywords(thinking),
            )
            for thinking in THINKING
        ]

    first, second = map(_texts, copies)
    if first == second:
        return tokenizer, None
    chosen = datetime.fromisoformat(day) if day else datetime.now()
    day = chosen.date().isoformat()
    return _at(tokenizer, datetime.fromisoformat(day)), day


def completion_text(completion_ids: list[int], tokenizer: "Tokenizer", end_ids: set[int]) -> str:
    """Return the text of a completion: what is graded, measured and shown.

    end_ids  the ids that end a completion; they and pads are dropped, and no other token is, for
             <think> and </think> may be special tokens as well
    Where these are tokens, only the tokens count: a tag that is spelled in ordinary ones gets a
    blank, "</think >", so that nobody takes it for the end of a thought.
    """
    dropped = end_ids | {cast(int, tokenizer.pad_token_id)}
    kept = [token for token in completion_ids if token not in dropped]
    tags = _think_ids(tokenizer)
    text = ""
    for tag, run in groupby(kept, key=tags.get):
        ids = list(run)
        if tag:
            text += tag * len(ids)
            continue
        ordinary = str(tokenizer.decode(ids))
        for known in tags.values():
            ordinary = ordinary.replace(known, f"{known[:-1]} >")
        text += ordinary
    return text


def _think_ids(tokenizer: "Tokenizer") -> dict[int, str]:
    """Return the tags of a think block that are one token each, by id."""
    found = {}
    for tag in (OPEN, CLOSE):
        for token in tokenizer.encode(tag, add_special_tokens=False):
            if tokenizer.convert_ids_to_tokens(token) == tag:
                found[token] = tag
    return found


def _render_turns(
    tokenizer: "Tokenizer", turns: list[tuple[str, str]], *, as_parts: bool, **options: Any
) -> str:
    """Return the text of a conversation; what the template raises is a ValueError of one line."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for role, text in turns
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TEMPLATE_FAILURES as error:
        message = " ".join(str(error).split())
        raise ValueError(f"the chat template fails: {message}") from error


def _takes_parts_only(tokenizer: "Tokenizer") -> bool:
    """Say whether the user's words appear only where a turn's content is a list of parts."""
    failure = ValueError("the chat template drops the user's words: prompts would lack the problem")
    for as_parts in (False, True):
        try:
            text = _render_turns(
                tokenizer, [("user", ASKED)], as_parts=as_parts, add_generation_prompt=True
            )
        except ValueError as error:
            failure = failure if as_parts else error
            continue
        if ASKED in text:
            return as_parts
    raise failure


def _written_after(text: str, question: str) -> str:
    """Return what a rendered text has after the user's turn.

    question  the user's turn alone; where a template writes the assistant's header there as well,
              the end of the user's turn stays in what is returned
    """
    after = text.rpartition(ASKED)[2]
    end_of_turn = question.rpartition(ASKED)[2]
    return after if after == end_of_turn else after.removeprefix(end_of_turn)


def _refuse_longer_header(tokenizer: "Tokenizer", opened: str, header: str) -> None:
    """Raise ValueError where the model is to write control tokens of its own before an answer.

    gpt-oss names a channel there. A prompt that goes on with words in that place is none the model
    knows.
    """
    tag = "".join(TAG.findall(header)[-1:])
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tag in special - {OPEN, CLOSE} and tag not in opened:
        raise ValueError(
            f"this chat template writes {tag} before an answer and leaves it to the model in a "
            "new turn; prompts that go on with a sentence do not fit it"
        )


def _is_closing(tag: str) -> bool:
    return tag[1:2] == "/" or "end" in tag.lower()


def _think_tag(opened: str, header: str) -> str:
    """Return the tag of a think block that a fresh turn ends in, "" if none.

    opened  what the template writes for the assistant to go on
    header  what it writes before an answer that is there already, "" if that is not known. A tag of
            a block of any name is in `opened` only, or is closed in the header
    """
    tag = "".join(TAG.findall(opened)[-1:])
    if tag in ("", OPEN, CLOSE):
        return tag
    known = TAG.findall(header)
    is_block = known and (tag not in known or f"{tag[0]}/{tag[1:]}" in known)
    return tag if is_block else ""


def _at(tokenizer: "Tokenizer", moment: datetime) -> "Tokenizer":
    """Return a copy of the tokenizer whose template takes `moment` for now.

    transformers gives templates a function strftime_now; a macro of that name takes its place.
    """
    codes = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("", "-")]
    pairs = [(code, moment.strftime(code)) for code in codes]
    macro = (
        "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
        "{% for code, value in " + repr(pairs) + " %}"
        "{% set now.text = now.text.replace(code, value) %}{% endfor %}"
        "{{ now.text }}{% endmacro %}\n"
    )
    frozen = copy.copy(tokenizer)
    frozen.chat_template = macro + tokenizer.get_chat_template()
    return frozen
