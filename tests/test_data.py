"""parts/data.py: languages, the prompt builder, loading, splitting and ordering problems."""

import doctest
import json
import random
import re
import unicodedata
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from parts import data
from parts.data import Problem, build_prompt, find_language, load_problems, render_prompt

CHATML = "<|im_start|>user\n{{messages[0].content}}<|im_end|>\n{{ add_generation_prompt * '<|im_start|>assistant\n' }}"
QWEN3 = (
    CHATML
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
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
    """Return a byte tokenizer with ChatML's control tokens, which by itself would put <s> before every text."""
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


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_doctests():
    result = doctest.testmod(data)
    assert result.failed == 0 and result.attempted >= 7


def test_the_languages_are_those_of_the_two_benchmarks_and_english_and_all_differ():
    for name, codes in {"afrimgsm": AFRIMGSM, "polymath": POLYMATH}.items():
        assert (
            " ".join(
                code for code, language in data.languages().items() if name in language.benchmarks
            )
            == codes
        )
    assert data.languages()["eng"].benchmarks == ()
    for field in ("english", "transition", "instruction", "opening"):
        assert len({getattr(language, field) for language in data.languages().values()}) == len(
            CODES
        ), field
    assert {code: language.iso1 for code, language in data.languages().items()} == CODES


@pytest.mark.parametrize("code", CODES)
def test_every_record_is_complete_nfc_and_asks_for_a_box(code):
    language = data.languages()[code]
    texts = [
        getattr(language, field.name)
        for field in fields(language)
        if field.name not in ("iso1", "benchmarks")
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
    assert (
        len(language.transition) < 120 and len(language.opening) < 80
    )  # a small model's context holds them


def test_wording_is_in_the_languages_script():
    blocks = {
        "Han": "CJK",
        "Japanese": "(CJK|HIRAGANA)",
        "Vai": "LATIN",
    }  # Vai is English: see the module's docstring
    for language in data.languages().values():
        letters = [
            char
            for char in language.instruction.replace(r"\boxed{}", "").replace("ꕙꔤ", "")
            if char.isalpha()
        ]
        block = blocks.get(language.script, language.script.upper())
        assert all(re.match(block, unicodedata.name(char)) for char in letters), language.english
    assert "ꕙꔤ" in data.languages()["vai"].opening


def test_a_language_is_found_by_either_code_in_any_case():
    for iso3, iso1 in CODES.items():
        assert all(
            find_language(code).iso3 == iso3
            for code in (iso3, iso3.title(), (iso1 or iso3), (iso1 or iso3).upper())
        )


def test_an_unknown_language_is_an_error_that_lists_every_code():
    with pytest.raises(ValueError, match="unknown language 'xx'") as error:
        find_language("xx")
    assert all(f"{iso3} ({iso1})" in str(error.value) for iso3, iso1 in CODES.items() if iso1)
    assert "vai, " in str(error.value) and "None" not in str(error.value)


def test_a_problem_is_frozen_and_has_exactly_the_agreed_fields():
    assert (
        " ".join(field.name for field in fields(Problem))
        == "id problem problem_en solution_en answer language"
    )
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
    blocks = {
        "problem": f"{hausa.problem_label}\nNawa ne 2 + 3?",
        "english_problem": f"{hausa.english_problem_label}\nWhat is 2 + 3?",
        "english_solution": f"{hausa.english_solution_label}\n{hausa.solution_begin}\n2 + 3 = 5.\n{hausa.solution_end}",
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
        assert render_prompt(SUM, "hau", tokenizer, role="teacher", **options) == teacher_text(
            dropped=option
        )
        assert render_prompt(SUM, "hau", tokenizer, **options) == render_prompt(
            SUM, "hau", tokenizer
        )


@pytest.mark.parametrize("field", ["problem_en", "solution_en"])
def test_a_teacher_prompt_without_a_field_it_shows_names_the_problem(field):
    tokenizer = make_tokenizer(CHATML)
    bare = replace(SUM, **{field: None})
    with pytest.raises(ValueError, match=f"'s1' has no {field}"):
        build_prompt(bare, "hau", tokenizer, role="teacher")
    option = {"problem_en": "english_problem", "solution_en": "english_solution"}[field]
    build_prompt(bare, "hau", tokenizer, role="teacher", **{option: False})
    build_prompt(bare, "hau", tokenizer)


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1])
def test_both_roles_end_in_the_same_tokens_and_ids_decode_to_the_text(template):
    tokenizer = make_tokenizer(template)
    student, teacher = (
        build_prompt(SUM, "hau", tokenizer, role=role) for role in ("student", "teacher")
    )
    text = render_prompt(SUM, "hau", tokenizer)
    mark = "assistant\n" if template != R1 else "<|Assistant|>"
    shared = tokenizer.encode(mark + text.split(mark)[1], add_special_tokens=False)
    assert student[-len(shared) :] == teacher[-len(shared) :] == shared
    assert tokenizer.decode(student) == text
    assert student.count(256) == (
        template == R1
    )  # one <s> where the template writes it, none from the tokenizer
    assert all(isinstance(i, int) for i in student) and student != teacher


def test_the_think_block_is_opened_once_where_the_template_has_one():
    def ends(tokenizer, thinking):
        return render_prompt(SUM, "hau", tokenizer, thinking=thinking).removesuffix(
            find_language("hau").opening + "\n"
        )

    qwen3, plain, r1 = make_tokenizer(QWEN3), make_tokenizer(CHATML), make_tokenizer(R1)
    unclosed = make_tokenizer(R1.replace("\n", ""))
    mentions = [
        make_tokenizer(CHATML + text) for text in ("{# <think> #}", "{# enable_thinking #}")
    ]
    for thinking in ("auto", "on"):
        for tokenizer in (qwen3, r1, unclosed, *mentions):
            assert ends(tokenizer, thinking).endswith("<think>\n")
            assert ends(tokenizer, thinking).count("<think>") == 1
            assert data.prompt_opens_think(tokenizer, thinking)
    assert ends(qwen3, "off").endswith("assistant\n<think>\n\n</think>\n\n")
    for thinking in ("auto", "off"):
        assert ends(plain, thinking).endswith("assistant\n") and "<think>" not in ends(
            plain, thinking
        )
        assert not data.prompt_opens_think(plain, thinking)
    assert data.prompt_opens_think(qwen3) and not data.prompt_opens_think(qwen3, "off")


def test_a_mode_role_or_template_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"'on' does not fit .* has no think block"):
        build_prompt(SUM, "hau", make_tokenizer(CHATML), thinking="on")
    with pytest.raises(ValueError, match=r"'off' does not fit .* always opens"):
        build_prompt(SUM, "hau", make_tokenizer(R1), thinking="off")
    with pytest.raises(ValueError, match="'maybe'; valid: auto, on, off"):
        data.prompt_opens_think(make_tokenizer(QWEN3), "maybe")
    with pytest.raises(ValueError, match="'judge'; valid: student, teacher"):
        build_prompt(SUM, "hau", make_tokenizer(QWEN3), role="judge")
    with pytest.raises(ValueError, match="no chat template"):
        build_prompt(SUM, "hau", make_tokenizer(None))


@pytest.mark.parametrize("field", ["problem", "problem_en", "solution_en"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<s>", "<think>", "<|User|>"])
def test_a_problem_that_spells_a_control_token_is_refused(field, token):
    template = (
        R1 if token == "<|User|>" else QWEN3
    )  # R1's turn token is not marked special, its template writes it
    bad = replace(SUM, **{field: f"2 {token} 3"})
    with pytest.raises(ValueError, match=r"'s1' spells the control token") as error:
        build_prompt(bad, "hau", make_tokenizer(template), role="teacher")
    assert token in str(error.value)


def test_added_tokens_that_control_nothing_are_ordinary_text():
    tokenizer = make_tokenizer(QWEN3)
    build_prompt(
        replace(SUM, problem="2\n\n3 <tool>", problem_en="a <|im_", solution_en="end|> b"),
        "hau",
        tokenizer,
    )


def test_the_template_hash_shows_every_change():
    tokenizer = make_tokenizer(QWEN3)
    base = data.template_hash(tokenizer, "hau")
    assert (
        base == data.template_hash(make_tokenizer(QWEN3), find_language("ha"))
        and len(base) == 12
        and int(base, 16)
    )
    changed = {data.template_hash(tokenizer, "yor"), data.template_hash(tokenizer, "hau", "off")}
    changed.add(data.template_hash(make_tokenizer(CHATML), "hau"))
    for field in (
        "transition",
        "instruction",
        "opening",
        "problem_label",
        "english_problem_label",
        "solution_end",
    ):
        changed.add(
            data.template_hash(tokenizer, replace(find_language("hau"), **{field: "other"}))
        )
    assert len(changed | {base}) == 10


TRAIN = {
    "source": "openthoughts",
    "problem": "What?",
    "solution": "So.",
    "Answer": "4",
    "problem_translated": "Nini?",
}


def jsonl(folder: Path, *rows) -> Path:
    return write(
        folder, "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )


def test_the_training_layout_loads_alike_from_every_format(tmp_path):
    row = TRAIN | {"language": "Swahili", "language_short": "sw"}
    table = [row, row | {"problem_translated": "Ngapi\u2028gani?", "Answer": "5"}]
    first = Problem("0", "Nini?", "What?", "So.", "4", "swa")
    expected = [first, replace(first, id="1", problem="Ngapi\u2028gani?", answer="5")]
    lines = ["\t".join(row), *("\t".join(cells.values()) for cells in table)]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    paths = [
        tmp_path / "rows.parquet",
        write(
            tmp_path,
            "rows.jsonl",
            "\ufeff" + "\n".join(json.dumps(cells, ensure_ascii=False) for cells in table),
        ),
        write(tmp_path, "rows.json", "\ufeff" + json.dumps(table)),
        write(tmp_path, "rows.TSV", "\n".join(lines) + "\n"),
        write(tmp_path, "rows.csv", "\ufeff" + "\r\n".join(lines).replace("\t", ",") + "\r\n"),
    ]
    for path in paths:
        assert load_problems(path) == expected, path
        assert load_problems(path, language="sw") == expected, path


def test_rows_of_other_languages_are_left_out_and_keep_their_row_numbers(tmp_path):
    names = ["Swahili", "hau", "KISWAHILI", "sw", "Klingon"]
    path = jsonl(tmp_path, *(TRAIN | {"language": name} for name in names))
    assert [(row.id, row.language) for row in load_problems(path, language="swa")] == [
        (i, "swa") for i in "023"
    ]
    assert [row.id for row in load_problems(path, language="ha")] == ["1"]
    with pytest.raises(
        ValueError, match=r"rows.jsonl: no problems in yor; .*Klingon.*Swahili.*hau"
    ):
        load_problems(path, language="yor")
    with pytest.raises(ValueError, match=r"line 5: unknown language 'Klingon'"):
        load_problems(path)
    path = jsonl(tmp_path, TRAIN | {"language": "whatever", "language_short": "HA"})
    assert load_problems(path)[0].language == "hau"
    path = jsonl(tmp_path, *(TRAIN | {"id": "x", "language": code} for code in ("sw", "ha")))
    assert len(load_problems(path)) == 2  # one id may stand in several languages


def test_the_plain_layout_needs_a_language_and_has_no_english_side(tmp_path):
    path = jsonl(tmp_path, {"id": 7, "Question": " Nawa? ", "answer": 12, "solution": "Haka."})
    assert load_problems(path, language="ha") == [Problem("7", "Nawa?", None, None, "12", "hau")]
    assert load_problems(path, language="en") == [
        Problem("7", "Nawa?", "Nawa?", "Haka.", "12", "eng")
    ]
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: no language named"):
        load_problems(path)
    assert load_problems(jsonl(tmp_path, {"problem": "Nawa?"}), language="ha")[0].answer is None
    path = jsonl(
        tmp_path, TRAIN | {"problem": None}
    )  # enough for the ablation without the English problem
    assert load_problems(path, language="ha") == [Problem("0", "Nini?", None, "So.", "4", "hau")]


def test_afrimgsm_rows_with_raw_line_breaks_and_quotes(tmp_path):
    rows = 'Ya ce "nawa\t\t11\t\nDaya\n\nbiyu" ne?\tAmsa: 29\t29\t1 + 28\nUku?\t\t0\t\n\n'
    path = write(
        tmp_path, "test.tsv", "question\tanswer\tanswer_number\tequation_solution\n" + rows
    )
    expected = [("0", 'Ya ce "nawa', "11"), ("1", 'Daya\nbiyu" ne?', "29"), ("2", "Uku?", "0")]
    assert [
        (row.id, row.problem, row.answer) for row in load_problems(path, language="hau")
    ] == expected


def test_mgsm_has_no_header_and_msvamp_a_line_of_json_per_row(tmp_path):
    path = write(tmp_path, "mgsm_sw.tsv", "Mayai mangapi?\t1,450\nSiku\nngapi?\t-3\n")
    rows = [(row.id, row.problem, row.answer) for row in load_problems(path, language="sw")]
    assert rows == [("0", "Mayai mangapi?", "1,450"), ("1", "Siku\nngapi?", "-3")]
    row = {
        "query": "how many ?",
        "equation": "- number0 number1",
        "response": "8.0",
        "m_query": "Ngapi?",
    }
    path = write(
        tmp_path,
        "test_Swahili.json",
        json.dumps(row) + "\n" + json.dumps(row | {"response": "1.5"}) + "\n",
    )
    assert [row.answer for row in load_problems(path, language="sw")] == ["8.0", "1.5"]
    assert load_problems(path, language="sw")[0] == Problem("0", "Ngapi?", None, None, "8.0", "swa")


def test_a_csv_field_may_be_quoted_and_text_becomes_nfc(tmp_path):
    path = write(tmp_path, "rows.csv", 'question,answer\n"Daya,\nbiyu?",3\n')
    assert load_problems(path, language="ha")[0].problem == "Daya,\nbiyu?"
    decomposed = unicodedata.normalize("NFD", "Mélòó ni ọ́ọ́lù?")
    row = load_problems(jsonl(tmp_path, {"problem": decomposed}), language="yo")[0]
    assert row.problem == unicodedata.normalize("NFC", decomposed) != decomposed


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"title": "x", "answer": 1}\n',
            "line 1: needs a column .*question.*; has title, answer",
        ),
        ("a.jsonl", '{"problem": "x"}\n\n{"problem": " "}\n', "line 3: empty problem"),
        ("a.jsonl", '{"problem": "x"}\n{"problem": }\n', "line 2, column 13: Expecting value"),
        ("a.jsonl", '{"problem": ["x"]}\n', "line 1: problem must be text or a number, not a list"),
        ("a.jsonl", '["x"]\n', "line 1: must be an object, not a list"),
        (
            "a.jsonl",
            '{"id": 1, "problem": "x"}\n{"id": "1", "problem": "y"}\n',
            "line 2: duplicate id '1'",
        ),
        ("a.jsonl", "\n", "no problems in ha; languages: \\[\\]"),
        ("a.json", '[\n{"problem": "x"},\n{"problem" "y"}]', ".* line 3 column 12"),
        ("a.json", '{"data": []}', "line 1: needs a column .* has data"),
        ("a.json", "5", "line 1: must be an object, not a int"),
        ("a.tsv", "question\tanswer\nx\t1\t2\n", "line 2: 3 fields where the header has 2"),
        ("a.tsv", "question\tanswer\nx\t1\ny\n", "line 3: 1 fields where the header has 2"),
        ("a.tsv", "question\tanswer\n\t1\n", "line 2: empty question"),
        ("a.csv", "question,answer\nx,1\ny\n", "line 3: 1 fields where the header has 2"),
        ("a.csv", f"question\n{'x' * 140_000}\n", "field larger than field limit"),
        ("a.csv", "", "no problems"),
        ("a.parquet", "not parquet at all", ".*not a parquet file"),
        ("a.txt", "x", "unknown extension '.txt'; valid: .jsonl, .json, .tsv, .csv, .parquet"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_file_and_the_place(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=f"{name}: {message}") as error:
        load_problems(path, language="ha")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_not_utf8_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nothing.parquet"):
        load_problems(tmp_path / "nothing.parquet", language="ha")
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"problem": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl: 'utf-8' codec"):
        load_problems(path, language="ha")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return a function that puts a file into an offline hub cache, as a download would leave it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(kind: str, name: str) -> Path:
        repo = tmp_path / f"datasets--yihongLiu--COPSD-{kind}-TrainDataset"
        file = repo / "snapshots" / ("c" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text("c" * 40)
        parquet.write_table(pa.Table.from_pylist([TRAIN | {"language": "Swahili"}]), file)
        return file

    return put


@pytest.mark.parametrize(
    "name", ["data/swa-00000-of-00001.parquet", "sw.parquet", "Swahili/train_SWA.parquet"]
)
def test_the_training_file_is_found_in_the_hubs_cache_by_code_or_name(hub_cache, name):
    hub_cache(
        "AfriMGSM", "data/swap-00000-of-00001.parquet"
    )  # names that only start or end like the language
    hub_cache("AfriMGSM", "data/biswa-00000-of-00001.parquet")
    file, polymath_file = hub_cache("AfriMGSM", name), hub_cache("PolyMath", "data/th.parquet")
    assert data.hub_training_file("sw") == data.hub_training_file(find_language("swa")) == file
    assert load_problems(file, language="swa")[0].problem_en == "What?"
    assert data.hub_training_file("tha") == polymath_file


def test_a_training_file_that_cannot_be_had_says_what_to_pass_instead(hub_cache):
    with pytest.raises(
        FileNotFoundError, match=r"yihongLiu/COPSD-AfriMGSM-TrainDataset.*pass --data FILE"
    ):
        data.hub_training_file("hau")
    for count, name in enumerate(["data/amh.parquet", "data/hau-0.parquet", "data/hau-1.parquet"]):
        hub_cache("AfriMGSM", name)
        if count != 1:
            with pytest.raises(
                FileNotFoundError, match=f"has {count} files for Hausa, not 1; pass --data FILE"
            ):
                data.hub_training_file("hau")


TEN = [
    Problem(str(i), f"text {i % 8}", None, None, None, "hau") for i in range(10)
]  # texts 0 and 1 stand twice


def test_held_out_problems_are_disjoint_in_text_and_decided_by_the_seed():
    sizes, draws = set(), set()
    for seed in range(60):
        train, heldout = data.split_heldout(TEN, 3, seed)
        assert not {row.problem for row in train} & {row.problem for row in heldout}
        assert len({row.problem for row in heldout}) == 3
        assert sorted([*train, *heldout], key=lambda row: int(row.id)) == TEN
        assert (train, heldout) == data.split_heldout(TEN, 3, seed)
        sizes.add(len(heldout))
        draws.add(tuple(row.id for row in heldout))
    assert sizes == {3, 4, 5} and len(draws) > 10
    assert data.split_heldout(TEN, 0, 1) == (TEN, [])
    for count in (-1, 8, 10):
        with pytest.raises(
            ValueError, match=f"hold out {count} of 8 distinct problems; valid: 0 to 7"
        ):
            data.split_heldout(TEN, count, 0)


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (6, 3), (5, 5), (3, 8), (1, 4)])
def test_every_epoch_is_a_permutation_of_all_problems(count, batch):
    steps = [data.pick_order(count, seed=4, step=step, batch=batch) for step in range(3 * count)]
    assert all(len(step) == batch for step in steps)
    flat = [i for step in steps for i in step]
    epochs = [flat[start : start + count] for start in range(0, len(flat), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # not one order for ever


def test_the_order_is_a_pure_function_of_its_arguments():
    state = random.getstate()
    late = data.pick_order(50, seed=1, step=9, batch=8)
    assert (
        late
        == data.pick_order(50, seed=1, step=9, batch=8)
        != data.pick_order(50, seed=2, step=9, batch=8)
    )
    assert random.getstate() == state
