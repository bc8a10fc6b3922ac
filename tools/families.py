"""Tests every configuration class of transformers with a tiny random model, and writes the tables of
docs/families.md.

Model types that the server rejects are grouped by the reason. Run it with another version of transformers to
see what changes: `make families`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded from a hub

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402

import every_model  # noqa: E402
from layertap_server.engine import ModelLoadError, load_model  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
# Patterns of the server's error messages, and the reasons on the page.
REASONS = (
    (r"is a decoder", "decoders"),
    (r"transformers has no encoder for", "encoder-decoders without a class for the encoder alone"),
    (
        r"no table of token embeddings|does not read token ids",
        "no table of token embeddings: models of images, sound, series or characters",
    ),
    (r"does not return a hidden state for each layer", "hidden states are not one a layer and token"),
    (r"returns no last_hidden_state", "no `last_hidden_state`"),
    (
        r"cannot serve|cannot load",
        "the tiny model does not run on token ids alone, in `transformers` itself",
    ),
)


def outcome(model_type: str) -> tuple[str, str, str] | str:
    """The row of a model type that is served, or the reason why it is not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            every_model.build(model_type, Path(folder))
            loaded = load_model(
                model_type, folder, device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
            )
        except every_model.NotMadeError as error:
            return (
                "no class of AutoModel"
                if "AutoModel has no class" in str(error)
                else "no tiny model could be made"
            )
        except ModelLoadError as error:
            said = str(error).replace(folder, model_type)
            print(f"{model_type}: {said}", flush=True)
            return next((reason for pattern, reason in REASONS if re.search(pattern, said)), said)
        return every_model.row_of(loaded)


def table(outcomes: dict[str, tuple[str, str, str] | str]) -> str:
    rows = ["| model_type | runs | pooler | attentions |", "|---|---|---|---|"]
    refused: dict[str, list[str]] = defaultdict(list)
    for model_type, found in sorted(outcomes.items()):
        if isinstance(found, str):
            refused[found].append(f"`{model_type}`")
        else:
            rows.append(f"| `{model_type}` | {' | '.join(found)} |")
    lists = [
        f"- {reason} ({len(names)}): {', '.join(names)}"
        for reason, names in sorted(refused.items())
        if reason != "no class of AutoModel"
    ]
    return "\n".join(
        [
            f"With transformers {transformers.__version__}, {len(rows) - 2} types are served:",
            "",
            *rows,
            "",
            "Not served, by the reason:",
            "",
            *lists,
        ]
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = {model_type: outcome(model_type) for model_type in sys.argv[1:] or CONFIG_MAPPING_NAMES}
    if sys.argv[1:]:
        print(table(outcomes))
        return
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(every_model.BEGIN)
    _, _, after = rest.partition(every_model.END)
    PAGE.write_text(f"{before}{every_model.BEGIN}\n{table(outcomes)}\n{every_model.END}{after}", "utf-8")


if __name__ == "__main__":
    main()
