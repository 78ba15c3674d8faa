"""Shared fixtures: a random two-layer model that every module can be tested on in milliseconds."""

import atexit
import json
import os
import shutil
import signal
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# A test that reaches for the network is a broken test. The libraries read this when imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run beside each other, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from lab.problems import write_few
from parts.settings import flag_of
from parts.view import StepView

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
# A row of COPSD's training layout, which has the English side beside the translation.
TRAINING_ROW = {
    "source": "openthoughts",
    "problem": "What?",
    "solution": "So.",
    "Answer": "4",
    "problem_translated": "Nini?",
}
# Qwen2.5-1.5B's published sizes.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def build_tiny_model(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    """Return a random fp32 Qwen2 in eval mode.

    Its head (300) is wider than its tokenizer (290), as those of the real Qwens are. Its weights
    are ten times as large as usual, so that the logits lie far enough apart for a wrong position to
    show.
    """
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides})).eval()


def write_file(folder: Path, name: str, text: str) -> Path:
    """Write a file into a folder, its line ends as they are, and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def die_at(step: int, view: StepView, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run die after a step was logged, before it was saved."""

    def _show(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(view, "show", _show)


def stop_at(step: int, view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a scheduler ask the process to end while a step is shown, which is in its middle."""

    def _show(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(view, "show", _show)


@cache
def few_problems() -> dict[str, str]:
    """Return the settings of a run on a few of the lab's problems."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_few(folder)


def few_flags() -> list[str]:
    """Return the same as words of a command line."""
    return [word for name, path in few_problems().items() for word in (flag_of(name), path)]


def assert_alike_but_for_rounding(
    one: Tensor, other: Tensor, moved: float, share: float = 1e-5
) -> None:
    """Two adapters, flattened, are of runs that differ in nothing but the order of sums.

    share  of the adapter's norm that the difference's may be
    moved  how far a weight can have gone: steps times the learning rate. Where a gradient is next
           to nothing, Adam's division makes a visible part of a step of its rounding.
    """
    difference = other - one
    assert difference.norm() < share * one.norm()
    assert difference.abs().max() < 0.1 * moved


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    return build_tiny_model()


@pytest.fixture
def lab_folder() -> Path:
    return ROOT / "lab" / "tiny"


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """Return a folder with no more of a Qwen2.5-1.5B than its config.json; it stays as it is."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """Let commands find an idle machine, and put back what they set for the threads."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "PASSIVE")  # so that it is put back as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("parts.program._machine_is_idle", lambda: True)
