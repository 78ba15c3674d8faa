"""parts/readings.py: the wordings of the family's teachers, in every language."""

import re
import unicodedata
from dataclasses import replace

import pytest

from parts import readings
from parts.identity import fingerprint
from parts.prompts import languages
from parts.readings import wordings

WORDINGS = (
    "brief",
    "brief_by_difficulty",
    "plan_request",
    "plan_label",
    "answer_label",
    "witness_label",
)


@pytest.mark.parametrize("code", languages())
def test_every_language_has_the_wordings_of_the_family(code):
    language = languages()[code]
    texts = [getattr(language, name) for name in WORDINGS]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text and text == unicodedata.normalize("NFC", text.strip()) and "\n" not in text
        assert "boxed" not in text and "  " not in text
    assert all(text[-1] in ":：፦" for text in texts[3:]), "labels end as labels do"
    assert len(language.brief) < 100 and len(language.plan_request) < 220


@pytest.mark.parametrize("name", [name for name in WORDINGS if name != "plan_label"])
def test_no_two_languages_have_the_same_wording(name):
    own = {code: getattr(language, name) for code, language in languages().items()}
    own.pop("vai")  # whose labels are English
    assert len(set(own.values())) == len(own)


@pytest.mark.parametrize("name", WORDINGS)
def test_a_wording_is_in_the_languages_script(name):
    blocks = {"Han": "CJK", "Japanese": "(CJK|HIRAGANA|KATAKANA)", "Vai": "(LATIN|VAI)"}
    for language in languages().values():
        letters = [char for char in getattr(language, name) if char.isalpha()]
        block = blocks.get(language.script, language.script.upper())
        assert all(re.match(block, unicodedata.name(char)) for char in letters), language.english


def test_a_plan_is_asked_for_in_the_language_it_is_to_be_written_in():
    names = {
        "hau": "Hausa",
        "swa": "Kiswahili",
        "yor": "Yorùbá",
        "deu": "Deutsch",
        "eng": "English",
    }
    for code, name in names.items():
        assert name in languages()[code].plan_request


def wordings_hash(language: str) -> str:
    """Return what stands in a run's identity."""
    return fingerprint(wordings(language))


def test_the_hash_of_the_wordings_shows_every_change(monkeypatch):
    base = wordings_hash("hau")
    assert len(base) == 16 and base == wordings_hash("ha") and int(base, 16)
    changed = {wordings_hash("yor")}
    for name in (*WORDINGS, "transition"):
        reworded = replace(languages()["hau"], **{name: "other"})
        with monkeypatch.context() as patch:
            patch.setattr(
                readings,
                "find_language",
                lambda code, other=reworded: languages()[code] if code == "eng" else other,
            )
            changed.add(wordings_hash("hau"))
    with monkeypatch.context() as patch:
        patch.setattr(readings, "EXPLAIN_REQUEST", "other")
        changed.add(wordings_hash("hau"))
    assert len(changed) == 9 and base not in changed
