"""parts/chat.py: what a chat template does is seen in what it renders, whatever its source says."""

import pytest
from test_prompts import CHATML, QWEN3, R1, SUM, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parts.chat import completion_text, freeze_date, prompt_opens_think, turn_end_ids
from parts.prompts import find_language, render_prompt, template_hash

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n"
NOT_OPEN = "assistant\n"
EMPTY = "assistant\n<think>\n\n</think>\n\n"
OPENED = "assistant\n<think>\n"


def chatml(after_header: str, turns: str = TURNS) -> str:
    """Return a ChatML template that writes something after the header of a fresh turn."""
    return f"{turns}{START}{after_header}{{% endif %}}"


def ending(template: str, thinking: str) -> str:
    """Return how a prompt ends before the opening sentence, or the error."""
    try:
        text = render_prompt(SUM, "hau", make_tokenizer(template), thinking=thinking)
    except ValueError as error:
        return str(error)
    return text.removesuffix(find_language("hau").opening + "\n").rpartition("<|im_start|>")[2]


def make_tokenizer_without_tags() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer in which a think block's tags are ordinary text."""
    byte_ids = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(byte_ids, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BY_SWITCH = "{{% if {switch} %}}<think>\n{{% else %}}{other}{{% endif %}}"
NO_BLOCK = "has no think block"
HABITS = {
    "none": (chatml(""), NOT_OPEN, NO_BLOCK, NOT_OPEN),
    "mentioned in a comment": (
        chatml("{# <think> enable_thinking #}"),
        NOT_OPEN,
        NO_BLOCK,
        NOT_OPEN,
    ),
    "mentioned for history": (
        chatml("", TURNS.replace("m.content", "m.content.split('</think>')[-1]")),
        NOT_OPEN,
        NO_BLOCK,
        NOT_OPEN,
    ),
    "mentioned in the system's turn": (
        f"<|im_start|>system\nYou may <think>.<|im_end|>\n{chatml('')}",
        NOT_OPEN,
        NO_BLOCK,
        NOT_OPEN,
    ),
    "by itself": (chatml("<think>\n"), OPENED, OPENED, "always opens a think block"),
    "by itself, and can be switched off": (
        chatml(
            BY_SWITCH.format(
                switch="enable_thinking is not defined or enable_thinking", other=EMPTY[10:]
            )
        ),
        OPENED,
        OPENED,
        EMPTY,
    ),
    "on request": (
        chatml(BY_SWITCH.format(switch="enable_thinking", other="")),
        NOT_OPEN,
        OPENED,
        NOT_OPEN,
    ),
    "on request, by another keyword": (
        chatml(BY_SWITCH.format(switch="thinking", other="</think>")),
        "assistant\n</think>",
        OPENED,
        "assistant\n</think>",
    ),
    "an empty one by default": (
        chatml(BY_SWITCH.format(switch="enable_thinking", other=EMPTY[10:])),
        EMPTY,
        OPENED,
        EMPTY,
    ),
    "always an empty one": (chatml(EMPTY[10:]), EMPTY, NO_BLOCK, EMPTY),
    "left to the model unless off": (QWEN3, OPENED, OPENED, EMPTY),
    "another name": (chatml("<thought>\n"), *["thoughts with <thought>, and only <think>"] * 3),
    "another name, on request": (
        chatml("{% if enable_thinking %}<thought>{% endif %}"),
        NOT_OPEN,
        "thoughts with <thought>",
        NOT_OPEN,
    ),
    "another name, unless off": (
        chatml("{% if enable_thinking is false %}[THINK][/THINK]{% endif %}"),
        "use --thinking off",
        "use --thinking off",
        "assistant\n[THINK][/THINK]",
    ),
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_think_block_is_opened_where_the_model_would(habit):
    template, *expected = HABITS[habit]
    for thinking, end in zip(("auto", "on", "off"), expected, strict=True):
        found = ending(template, thinking)
        if end.startswith("assistant"):
            assert found == end
            is_open = prompt_opens_think(make_tokenizer(template), thinking)
            assert is_open == (end == OPENED)
        else:
            assert end in found and "\n" not in found


def test_a_template_that_names_a_channel_before_an_answer_is_refused():
    header = "<|im_start|>{{ m.role }}{{ '<s>final' * (m.role == 'assistant') }}\n"
    turns = TURNS.replace("<|im_start|>{{ m.role }}\n", header)
    assert "writes <s> before an answer" in ending(chatml("", turns), "auto")


@pytest.mark.parametrize(
    "content",
    [
        "{% for p in m.content %}{{ p.text if p.type == 'text' }}{% endfor %}",
        "{{ m.content[0]['text'] }}",
        "{% if m.content is string %}{{ raise_exception('no') }}{% endif %}{{m.content[0].text}}",
    ],
)
def test_content_is_a_list_of_parts_where_only_then_the_words_appear(content):
    tokenizer = make_tokenizer(chatml("", TURNS.replace("{{ m.content }}", content)))
    plain = make_tokenizer(chatml(""))
    for role in ("student", "teacher"):
        text = render_prompt(SUM, "hau", tokenizer, role=role)
        assert text == render_prompt(SUM, "hau", plain, role=role)
    assert turn_end_ids(tokenizer) == turn_end_ids(plain) != set()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (chatml("", "<|im_start|>user\n<|im_end|>\n"), "drops the user's words"),
        (
            chatml("", TURNS.replace("m.content", "m.content | upper")),
            "changes the problem and the English problem in",
        ),
        (
            chatml("", TURNS.replace("m.content", "m.content[:40]")),
            "the English problem and the English solution in",
        ),
        (
            chatml("", TURNS.replace("m.content", "m.content.replace('boxed', 'b')")),
            "changes the wording",
        ),
        ("{% for m in", "the chat template fails: unexpected 'end of template'"),
        ("{{ raise_exception('needs\na system turn') }}", "fails: needs a system turn"),
        ("{{ messages[0].content + 1 }}", "the chat template fails: can only concatenate"),
    ],
)
def test_a_template_that_fails_or_loses_the_problem_is_an_error_of_one_line(template, said):
    with pytest.raises(ValueError, match="chat template") as error:
        render_prompt(SUM, "hau", make_tokenizer(template), role="teacher")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_templates_with_habits_of_their_own_work():
    refusal = "{% if enable_thinking is defined %}{{ raise_exception('unknown') }}{% endif %}"
    system = "<|im_start|>system\nYou help.<|im_end|>\n"
    plain = render_prompt(SUM, "hau", make_tokenizer(chatml("")))
    for extra, shown in ((refusal, ""), (system, system), ("{{ bos_token }}", "<s>")):
        tokenizer = make_tokenizer(extra + chatml(""))
        assert render_prompt(SUM, "hau", tokenizer) == shown + plain
    trimmed = make_tokenizer(chatml("", TURNS.replace("m.content", "m.content | trim")))
    assert render_prompt(SUM, "hau", trimmed) == plain


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (chatml(""), ["<|im_end|>"]),
        (f"<|im_start|>system\nYou help.<|im_end|>\n{chatml('')}", ["<|im_end|>"]),
        (chatml("", TURNS.replace("m.content", "m.content | capitalize")), ["<|im_end|>"]),
        (
            chatml(
                "", TURNS.replace("m.content", "m.content[:3]  if loop.index == 2 else m.content")
            ),
            [],
        ),
        (CHATML, []),  # knows one turn only
        (R1, []),
        # It always begins another turn of the assistant, whose start ends nothing.
        ("{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|im_start|>", []),
    ],
)
def test_only_what_closes_an_answer_ends_a_completion(template, ends):
    tokenizer = make_tokenizer(template)
    assert turn_end_ids(tokenizer) == {tokenizer.get_vocab()[token] for token in ends}


DATED = [
    "{{ strftime_now('%d %b %Y') }}",
    "{% macro day() %}{{ strftime_now('%A, %-d.%m.%y %H:%M') }}{% endmacro %}{{ day() }}",
    "{% if strftime_now is defined %}{% set day = strftime_now('%F') %}{{ day }}{% endif %}",
]


@pytest.mark.parametrize(
    ("source", "written"),
    list(zip(DATED, ["09 Jan 2025", "Thursday, 9.01.25 00:00", "2025-01-09"], strict=True)),
)
def test_a_date_is_frozen_where_a_template_writes_one(source, written):
    tokenizer = make_tokenizer(f"{source}\n{chatml('')}")
    frozen, day = freeze_date(tokenizer, "2025-01-09")
    assert day == "2025-01-09"
    text = render_prompt(SUM, "hau", frozen)
    plain = render_prompt(SUM, "hau", make_tokenizer(chatml("")))
    assert text == f"{written}\n{plain}" or text == f"{written}{plain}"
    again, today = freeze_date(tokenizer, None)
    assert today and today > "2025-01-09"
    assert template_hash(again, "hau") != template_hash(frozen, "hau")


@pytest.mark.parametrize("asked", ["enable_thinking", "enable_thinking is false"])
def test_a_date_that_is_written_in_one_mode_only_is_frozen(asked):
    """It was looked for where no keyword is given, and not found."""
    source = f"{{% if {asked} %}}{{{{ strftime_now('%F') }}}}{{% endif %}}"
    frozen, day = freeze_date(make_tokenizer(source + QWEN3), "2025-01-09")
    assert day == "2025-01-09"
    mode = "off" if "false" in asked else "on"
    assert render_prompt(SUM, "hau", frozen, thinking=mode).startswith(day)


def test_a_template_without_a_date_stays_as_it_is():
    tokenizer = make_tokenizer(QWEN3)
    assert freeze_date(tokenizer, "2025-01-09") == (tokenizer, None)


@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_of_a_think_block_are_kept_and_ends_and_pads_are_not(special):
    tokenizer = make_tokenizer(QWEN3)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.pad_token = "<s>"

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    end, close = (tokenizer.get_vocab()[token] for token in ("<|im_end|>", "</think>"))
    completion = [*ids_of("a"), close, *ids_of("\n\nካ \\boxed{18}"), end]
    text = completion_text([*completion, *ids_of("<s><s>")], tokenizer, {end})
    assert text == "a</think>\n\nካ \\boxed{18}"
    # Another control token is not dropped: an answer that holds one is not that answer.
    assert completion_text([*ids_of("18<|im_start|>"), end], tokenizer, {end}) == "18<|im_start|>"
    spelled = [*ids_of("</thi"), *ids_of("nk>5")]
    assert completion_text(spelled, tokenizer, {end}) == "</think >5"
    assert completion_text([end], tokenizer, {end}) == ""


def test_where_the_tags_are_no_tokens_their_text_counts():
    plain = make_tokenizer_without_tags()
    assert completion_text(plain.encode("a</think>5"), plain, set()) == "a</think>5"
