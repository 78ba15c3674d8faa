"""parts/prompts.py: the languages, and what student and teacher read."""

import doctest
import json
import math
import re
import unicodedata
from dataclasses import FrozenInstanceError, asdict, fields, replace
from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from parts import prompts
from parts.prompts import (
    Problem,
    build_prompt,
    find_language,
    is_teachable,
    languages,
    pose_in_english,
    prompt_opens_think,
    read_languages,
    render_prompt,
    template_hash,
)

CHATML = (
    "<|im_start|>user\n{{messages[0].content}}<|im_end|>\n"
    "{{ add_generation_prompt * '<|im_start|>assistant\n' }}"
)
QWEN3 = (
    CHATML + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
R1 = "{{ bos_token }}<|User|>{{ messages[0].content }}<|Assistant|>{{ '<think>\n' }}"
AFRIMGSM = "amh ewe hau ibo kin lin lug orm sna sot swa twi vai wol xho yor zul"
POLYMATH = "ben deu fra jpn rus spa swa tel tha zho"
CODES = {
    "amh": "am",
    "ewe": "ee",
    "hau": "ha",
    "ibo": "ig",
    "kin": "rw",
    "lin": "ln",
    "lug": "lg",
    "orm": "om",
    "sna": "sn",
    "sot": "st",
    "swa": "sw",
    "twi": "tw",
    "vai": None,
    "wol": "wo",
    "xho": "xh",
    "yor": "yo",
    "zul": "zu",
    "ben": "bn",
    "deu": "de",
    "spa": "es",
    "fra": "fr",
    "jpn": "ja",
    "rus": "ru",
    "tel": "te",
    "tha": "th",
    "zho": "zh",
    "eng": "en",
}
SUM = Problem("s1", "Nawa ne 2 + 3?", "What is 2 + 3?", "2 + 3 = 5.", "5", "hau")


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with ChatML's control tokens.

    By itself it would put <s> before every text.
    """
    byte_ids = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(byte_ids, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    inner.add_tokens(["<think>", "</think>", "<|User|>", "\n\n", "<tool>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, bos_token="<s>")


def test_doctests():
    result = doctest.testmod(prompts)
    assert result.failed == 0 and result.attempted >= 7


@pytest.mark.parametrize("name", ["instruction", "opening", "own", "brief"])
def test_a_language_without_one_of_its_texts_is_refused(tmp_path, name):
    path = tmp_path / "languages.json"
    record = {**asdict(languages()["hau"]), name: None}
    del record["iso3"]
    path.write_text(json.dumps({"hau": record}), encoding="utf-8")
    with pytest.raises(ValueError, match="hau has something else where a text is to be"):
        read_languages(path)
    path.write_text(json.dumps({"hau": {**record, name: "x", "iso1": None}}), encoding="utf-8")
    assert read_languages(path)["hau"].iso1 is None


def test_the_languages_are_those_of_the_two_training_sets_and_english_and_all_differ():
    for name, codes in {"afrimgsm": AFRIMGSM, "polymath": POLYMATH}.items():
        covered = [code for code, each in languages().items() if name in each.training_sets]
        assert covered == codes.split()
    assert languages()["eng"].training_sets == ()
    for field in ("english", "transition", "instruction", "opening"):
        values = {getattr(language, field) for language in languages().values()}
        assert len(values) == len(CODES), field
    assert {code: language.iso1 for code, language in languages().items()} == CODES


@pytest.mark.parametrize("code", CODES)
def test_every_record_is_complete_nfc_and_asks_for_a_box(code):
    language = languages()[code]
    texts = [
        getattr(language, field.name)
        for field in fields(language)
        if field.name not in ("iso1", "training_sets")
    ]
    assert all(
        isinstance(text, str) and text and text == unicodedata.normalize("NFC", text.strip())
        for text in texts
    )
    assert language.iso3 == code and language.instruction.count(r"\boxed{}") == 1
    others = (
        language.transition,
        language.opening,
        language.problem_label,
        language.solution_begin,
    )
    assert not any("boxed" in text or "\n" in text for text in others)
    assert language.solution_begin != language.solution_end
    # A small model's context holds them.
    assert len(language.transition) < 120 and len(language.opening) < 80


def test_wording_is_in_the_languages_script():
    # Vai's wording is English: see the module's docstring.
    blocks = {"Han": "CJK", "Japanese": "(CJK|HIRAGANA)", "Vai": "LATIN"}
    for language in languages().values():
        wording = language.instruction.replace(r"\boxed{}", "").replace("ꕙꔤ", "")
        letters = [char for char in wording if char.isalpha()]
        block = blocks.get(language.script, language.script.upper())
        assert all(re.match(block, unicodedata.name(char)) for char in letters), language.english
    assert "ꕙꔤ" in languages()["vai"].opening


def test_a_language_is_found_by_either_code_in_any_case():
    for iso3, iso1 in CODES.items():
        for code in (iso3, iso3.title(), iso1 or iso3, (iso1 or iso3).upper()):
            assert find_language(code).iso3 == iso3


def test_an_unknown_language_is_an_error_that_lists_every_code():
    with pytest.raises(ValueError, match="unknown language 'xx'") as error:
        find_language("xx")
    assert all(f"{iso3} ({iso1})" in str(error.value) for iso3, iso1 in CODES.items() if iso1)
    assert "vai, " in str(error.value) and "None" not in str(error.value)


def test_a_problem_is_frozen_and_has_exactly_the_agreed_fields():
    names = " ".join(field.name for field in fields(Problem))
    assert names == "id problem problem_en solution_en answer language"
    with pytest.raises(FrozenInstanceError):
        SUM.id = "other"  # type: ignore[misc]


def test_the_student_prompt_is_problem_and_instruction_then_the_opening_in_a_think_block():
    hausa = find_language("ha")
    assert render_prompt(SUM, "HA", make_tokenizer(QWEN3)) == (
        f"<|im_start|>user\nNawa ne 2 + 3?\n\n{hausa.instruction}<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n{hausa.opening}\n"
    )
    assert find_language("yor").instruction in render_prompt(SUM, "yor", make_tokenizer(QWEN3))


def teacher_text(dropped: str = "") -> str:
    hausa = find_language("hau")
    solution = f"{hausa.solution_begin}\n2 + 3 = 5.\n{hausa.solution_end}"
    blocks = {
        "problem": f"{hausa.problem_label}\nNawa ne 2 + 3?",
        "english_problem": f"{hausa.english_problem_label}\nWhat is 2 + 3?",
        "english_solution": f"{hausa.english_solution_label}\n{solution}",
        "transition": hausa.transition,
        "instruction": hausa.instruction,
    }
    user_turn = "\n\n".join(text for name, text in blocks.items() if name != dropped)
    return f"<|im_start|>user\n{user_turn}<|im_end|>\n<|im_start|>assistant\n{hausa.opening}\n"


def test_the_teacher_prompt_has_its_blocks_in_order_and_an_ablation_drops_one():
    tokenizer = make_tokenizer(CHATML)
    assert render_prompt(SUM, find_language("hau"), tokenizer, role="teacher") == teacher_text()
    for option in ("english_problem", "english_solution"):
        options: dict[str, Any] = {option: False}
        teacher = render_prompt(SUM, "hau", tokenizer, role="teacher", **options)
        assert teacher == teacher_text(dropped=option)
        student = render_prompt(SUM, "hau", tokenizer, **options)
        assert student == render_prompt(SUM, "hau", tokenizer)


@pytest.mark.parametrize("field", ["problem_en", "solution_en"])
def test_a_teacher_prompt_without_a_field_it_shows_names_the_problem_and_the_column(field):
    tokenizer = make_tokenizer(CHATML)
    bare = replace(SUM, **{field: None})
    with pytest.raises(ValueError, match=f"'s1' has no English .*: {field[:-3]}$"):
        build_prompt(bare, "hau", tokenizer, role="teacher")
    option = {"problem_en": "english_problem", "solution_en": "english_solution"}[field]
    build_prompt(bare, "hau", tokenizer, role="teacher", **{option: False})
    build_prompt(bare, "hau", tokenizer)


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1])
def test_both_roles_end_in_the_same_tokens_and_ids_decode_to_the_text(template):
    tokenizer = make_tokenizer(template)
    student = build_prompt(SUM, "hau", tokenizer, role="student")
    teacher = build_prompt(SUM, "hau", tokenizer, role="teacher")
    text = render_prompt(SUM, "hau", tokenizer)
    mark = "assistant\n" if template != R1 else "<|Assistant|>"
    shared = tokenizer.encode(mark + text.split(mark)[1], add_special_tokens=False)
    assert student[-len(shared) :] == teacher[-len(shared) :] == shared
    assert tokenizer.decode(student) == text
    # One <s> where the template writes it, none from the tokenizer.
    assert student.count(256) == (template == R1)
    assert all(isinstance(i, int) for i in student) and student != teacher


def test_the_think_block_is_opened_once_where_the_template_has_one():
    def ends(tokenizer, thinking):
        text = render_prompt(SUM, "hau", tokenizer, thinking=thinking)
        return text.removesuffix(find_language("hau").opening + "\n")

    qwen3 = make_tokenizer(QWEN3)
    plain = make_tokenizer(CHATML)
    r1 = make_tokenizer(R1)
    unclosed = make_tokenizer(R1.replace("\n", ""))
    for thinking in ("auto", "on"):
        for tokenizer in (qwen3, r1, unclosed):
            assert ends(tokenizer, thinking).endswith("<think>\n")
            assert ends(tokenizer, thinking).count("<think>") == 1
            assert prompt_opens_think(tokenizer, thinking)
    assert ends(qwen3, "off").endswith("assistant\n<think>\n\n</think>\n\n")
    for thinking in ("auto", "off"):
        assert ends(plain, thinking).endswith("assistant\n")
        assert "<think>" not in ends(plain, thinking)
        assert not prompt_opens_think(plain, thinking)
    assert prompt_opens_think(qwen3) and not prompt_opens_think(qwen3, "off")


def test_a_mode_role_or_template_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"'on' does not fit .* has no think block"):
        build_prompt(SUM, "hau", make_tokenizer(CHATML), thinking="on")
    with pytest.raises(ValueError, match=r"'off' does not fit .* always opens"):
        build_prompt(SUM, "hau", make_tokenizer(R1), thinking="off")
    with pytest.raises(ValueError, match="'maybe'; valid: auto, on, off"):
        prompt_opens_think(make_tokenizer(QWEN3), "maybe")
    with pytest.raises(ValueError, match="'judge'; valid: student, teacher"):
        build_prompt(SUM, "hau", make_tokenizer(QWEN3), role="judge")
    with pytest.raises(ValueError, match="no chat template"):
        build_prompt(SUM, "hau", make_tokenizer(None))


@pytest.mark.parametrize("field", ["problem", "problem_en", "solution_en"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<s>", "<think>", "<|User|>"])
def test_a_problem_that_spells_a_control_token_is_refused(field, token):
    # R1's turn token is not marked special, but its template writes it.
    template = R1 if token == "<|User|>" else QWEN3
    bad = replace(SUM, **{field: f"2 {token} 3"})
    with pytest.raises(ValueError, match=r"'s1' spells the control token") as error:
        build_prompt(bad, "hau", make_tokenizer(template), role="teacher")
    assert token in str(error.value)


def test_added_tokens_that_control_nothing_are_ordinary_text():
    tokenizer = make_tokenizer(QWEN3)
    harmless = replace(SUM, problem="2\n\n3 <tool>", problem_en="a <|im_", solution_en="end|> b")
    ids = build_prompt(harmless, "hau", tokenizer, role="teacher")
    assert tokenizer.decode(ids) == render_prompt(harmless, "hau", tokenizer, role="teacher")


def test_the_template_hash_shows_every_change():
    tokenizer = make_tokenizer(QWEN3)
    base = template_hash(tokenizer, "hau")
    assert base == template_hash(make_tokenizer(QWEN3), find_language("ha"))
    assert len(base) == 12 and int(base, 16)
    changed = {template_hash(tokenizer, "yor"), template_hash(tokenizer, "hau", "off")}
    changed.add(template_hash(make_tokenizer(CHATML), "hau"))
    for field in (
        "transition",
        "instruction",
        "opening",
        "problem_label",
        "english_problem_label",
        "solution_end",
    ):
        reworded = replace(find_language("hau"), **{field: "other"})
        changed.add(template_hash(tokenizer, reworded))
    assert len(changed | {base}) == 10


def test_what_can_be_taught_is_what_the_teachers_prompt_takes():
    tokenizer = make_tokenizer(CHATML)
    rows = [SUM, replace(SUM, problem_en=None), replace(SUM, solution_en="")]
    taught = []
    for row, solution, problem in product(rows, (True, False), (True, False)):
        options: dict[str, Any] = {"english_problem": problem, "english_solution": solution}
        taught.append(is_teachable(row, **options))
        if taught[-1]:
            build_prompt(row, "hau", tokenizer, role="teacher", **options)
        else:
            with pytest.raises(ValueError, match="which the teacher's prompt shows"):
                build_prompt(row, "hau", tokenizer, role="teacher", **options)
    assert taught == [True] * 4 + [False, True, False, True] + [False, False, True, True]


def test_the_first_share_of_problems_is_posed_in_english_where_they_have_it():
    bare = replace(SUM, id="s2", problem_en=None)
    rows = [SUM, bare, SUM, SUM]
    english = replace(SUM, problem="What is 2 + 3?", language="eng")
    assert pose_in_english(rows, 0.0) == rows
    assert pose_in_english(rows, 0.5) == [english, bare, SUM, SUM]
    assert pose_in_english(rows, 1.0) == [english, bare, english, english]
    assert rows == [SUM, bare, SUM, SUM]  # the caller's list stays as it was


@pytest.mark.parametrize(
    ("share", "size"), [(0.06, 8), (0.5, 1), (0.3, 5), (0.29, 100), (0.5, 64), (1.0, 3)]
)
def test_the_share_in_english_holds_over_the_steps(share, size):
    """0.06 of 8 problems was rounded to none at every step, and so was 0.5 of a single one."""
    counts = []
    for step in range(1, 101):
        posed = pose_in_english([SUM] * size, share, step=step)
        counts.append(sum(problem.language == "eng" for problem in posed))
    assert sum(counts) == pytest.approx(share * size * 100)
    least = math.floor(share * size + 1e-9)
    assert set(counts) <= {least, least + 1}
    if share * size == pytest.approx(least):
        assert set(counts) == {least}, "a whole number of problems is the same at every step"
