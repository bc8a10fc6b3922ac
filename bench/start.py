"""Benchmark: time until the server is ready, and resident memory, in fresh processes, against ONNX Runtime.

The process of each step does everything that the previous step does, and one thing more, so that the
differences show what takes the time and the memory. Anonymous memory belongs to the process; pages of files
are shared, and can be reclaimed by the system.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from layertap_server.config import Config

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "bench"

# Runs its remaining arguments as a program, and prints the time that it took and its memory at the end.
MEASURE = """
import sys, time
begun = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - begun
with open("/proc/self/status") as status:
    fields = dict(line.split(":", 1) for line in status)
kilobytes = [int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")]
print(seconds, *(number / 1024 for number in kilobytes))
"""

IMPORTS = "from layertap_server.engine import Engine, load_model"
LOAD = f"""{IMPORTS}
from layertap_server.engine.threads import use_threads
use_threads(0)
loaded = load_model("bench", sys.argv[2], device="cpu", dtype=sys.argv[3], trust_remote_code=False, max_input_tokens=0)
"""
ANSWER = f"""{LOAD}
from layertap_server.scheduling.calibration import warm_up_work
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization
Tokenization(load_tokenizer(sys.argv[2]), max_tokens=loaded.facts.max_tokens)
Engine(loaded).run([warm_up_work(loaded.facts, 32)])
"""
SERVE = """
import asyncio
from layertap_server.app import Server
from layertap_server.config import Config
server = Server(Config(model=(f"bench={sys.argv[2]}",), port=0, dtype=sys.argv[3], log_level="error"))
asyncio.run(server.startup())
"""
ONNX = """
import numpy as np, onnxruntime, tokenizers
tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
options = onnxruntime.SessionOptions()
session = onnxruntime.InferenceSession(sys.argv[4], options, providers=["CPUExecutionProvider"])
ids = np.ones((1, 32), np.int64)
session.run(None, {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids})
"""

STEPS = {
    "import torch": ("import torch", "float32"),
    "import transformers' models": ("import transformers.modeling_utils", "float32"),
    "import the engine": (IMPORTS, "float32"),
    "load the model, float32": (LOAD, "float32"),
    "answer a text, float32": (ANSWER, "float32"),
    "load the model, bfloat16": (LOAD, "bfloat16"),
    "answer a text, bfloat16": (ANSWER, "bfloat16"),
    "the server is ready, float32": (SERVE, "float32"),
    "ONNX Runtime answers a text": (ONNX, "float32"),
}


def export_model(source: str, path: Path) -> None:
    """Writes the model for ONNX Runtime in a separate process, so that its imports do not count here."""
    program = (
        "import sys, pathlib; from transformers import AutoModel; from bench.onnx_peer import export; "
        "export(AutoModel.from_pretrained(sys.argv[1], attn_implementation='eager').eval(), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, source, str(path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def measure(program: str, *arguments: str) -> tuple[float, float, float]:
    """(seconds, MiB of anonymous memory, MiB of files) of a fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, program, *arguments]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    seconds, anonymous, files = map(float, done.stdout.splitlines()[-1].split())
    return seconds, anonymous, files


@click.command()
@click.option(
    "--model", default="", help="A BERT: a hub name or a folder. [default: the server's default model]"
)
@click.option("--rounds", default=3, show_default=True, help="Processes of each kind; medians are reported.")
def main(model: str, rounds: int) -> None:
    """Print the time and memory of each step until the server is ready, against ONNX Runtime. Linux only."""
    [source] = Config(model=(model,) if model else ()).models().values()
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "model.onnx")
        export_model(source, exported)
        for _ in range(rounds):
            for name, (program, dtype) in STEPS.items():
                results[name].append(measure(program, source, dtype, str(exported)))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    click.echo(source)
    click.echo(f"{'':<32}{'seconds':>10}{'own MiB':>10}{'files MiB':>11}")
    for name, (seconds, anonymous, files) in medians.items():
        click.echo(f"{name:<32}{seconds:>10.2f}{anonymous:>10.0f}{files:>11.0f}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "start.json").write_text(json.dumps(medians, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
