"""The pages say what the code does: their lists are held against it, and their examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import unicodedata
from dataclasses import fields
from pathlib import Path

import pytest
from google.protobuf import json_format

import families
import layertap
from layertap.v1 import encoder_pb2 as pb
from layertap_server.config import CHECKS, Config
from layertap_server.config_sources import flag_of, load
from layertap_server.engine.loading.families import FAMILIES
from layertap_server.rpc.security import Guard

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = {path.name: path for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}
FOLDERS = ("server", "client", "tests", "bench", "tools", "examples")
SERVER = ROOT / "server" / "src" / "layertap_server"
CLIENT = ROOT / "client" / "src" / "layertap"
ADDRESS = "127.0.0.1:50051"
NUMBER = re.compile(r"-?\d+\.\d+")
EXAMPLE = "## The example"  # where the README's model changes


def read(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def first_column(text: str) -> list[str]:
    """The words in backticks that begin a table's row."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks in these languages."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(language, content) for language, content in found if language in languages]


# ----------------------------------------------------------------------------------- what is named exists


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = [
        c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN" or c == "\N{HYPHEN}"
    ]
    return "".join(kept).strip().replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", read(name))
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", read(name))) <= targets


def test_every_page_is_listed_in_the_readme() -> None:
    listed = set(re.findall(r"\(docs/(\w+\.md)\)", section(read("README.md"), "Documentation")))
    assert listed == set(PAGES) - {"README.md"}


def test_every_package_is_in_the_table() -> None:
    packages = {
        path.parent.relative_to(SERVER).as_posix()
        for path in SERVER.rglob("__init__.py")
        if path.parent != SERVER
    }
    rows = re.findall(r"^\| (`.+?) \|", section(read("architecture.md"), "The packages"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == packages


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    """By their path, or the end of it."""
    files = {f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for named in re.findall(r"`([\w/]+\.(?:py|c|h))`", read(name)):
        assert any(path.endswith(f"/{named}") for path in files), named


# ------------------------------------------------------------------------------------- lists and tables


def settings_table() -> str:
    """The table of every setting, as configuration.md has it."""
    rows = ["| flag, variable, key | default | allowed | meaning |", "|---|---|---|---|"]
    for spec in fields(Config):
        names = f"`{flag_of(spec.name)}`<br>`LAYERTAP_{spec.name.upper()}`<br>`{spec.name}`"
        default = str(spec.default).lower() if isinstance(spec.default, bool) else str(spec.default)
        default = "" if spec.default in ("", ()) else f"`{default}`"
        rows.append(f"| {names} | {default} | {CHECKS[spec.name].allowed} | {spec.metadata['help']} |")
    return "\n".join(rows)


def test_settings_are_those_of_the_code() -> None:
    assert settings_table() in read("configuration.md"), f"docs/configuration.md needs:\n\n{settings_table()}"


def test_configuration_samples_are_accepted(tmp_path: Path) -> None:
    (_, settings), (_, tokens), (_, certificates) = blocks(read("configuration.md"), "toml")
    (tmp_path / "layertap.toml").write_text(settings, encoding="utf-8")
    (tmp_path / "tokens.toml").write_text(tokens + certificates, encoding="utf-8")
    tls = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
    flags = {"tokens_file": str(tmp_path / "tokens.toml")} | tls
    config = load(flags, {}, str(tmp_path / "layertap.toml"))
    assert config.max_batch_tokens == 8192
    guard = Guard.from_config(config)
    client = guard.authenticate([("authorization", "Bearer a-long-random-text")])
    assert client.name == "notebook"
    assert client.may_use("bert-base-chinese")
    assert not client.may_use("minilm")
    assert guard.authenticate((), [b"indexer.internal"]).name == "indexer"


def test_families_are_those_of_the_code() -> None:
    page = read("families.md")
    assert first_column(section(page, "Packed")) == sorted(FAMILIES)
    tested = {family.model_type for family in families.FAMILIES.values()}
    assert first_column(section(page, "Padded")) == sorted(tested - set(FAMILIES))


def raised_reasons() -> set[str]:
    """The reasons in every call that makes an error, of the makers in errors.py those that are called."""
    makers = ast.parse((SERVER / "errors.py").read_text(encoding="utf-8")).body
    others = [path for path in SERVER.rglob("*.py") if path.name != "errors.py"]
    called = {
        getattr(node.func, "attr", getattr(node.func, "id", ""))
        for tree in [*map(parse, others), *makers]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    functions = [node for node in makers if isinstance(node, ast.FunctionDef)]
    made = {node.name: node for node in functions if node.name in called}
    constants = {
        constant.value
        for function in made.values()
        for statement in function.body
        for constant in ast.walk(statement)
        if isinstance(constant, ast.Constant)
    }
    for node in (node for path in others for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
        if getattr(node.func, "attr", getattr(node.func, "id", "")) in made:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            constants |= {one.value for one in given if isinstance(one, ast.Constant)}
    return {
        value for value in constants if isinstance(value, str) and re.fullmatch(r"[A-Z]+(_[A-Z]+)*", value)
    }


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_error_reasons_are_those_of_the_code() -> None:
    documented = re.findall(r"^\|[^|]*\| `([A-Z_]+)` \|", read("errors.md"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == raised_reasons()
    # All reasons named on other pages exist.
    for name in PAGES:
        named = re.findall(r"\(`([A-Z]+(?:_[A-Z]+)+)`(?:, `([A-Z]+(?:_[A-Z]+)+)`)?\)", read(name))
        assert {reason for pair in named for reason in pair if reason} <= set(documented)


def test_exceptions_and_options_are_those_of_the_sdk() -> None:
    page = read("clients.md")
    drawn = re.findall(r"^[├└]── (\w+)", page, re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in layertap.LayertapError.__subclasses__())
    assert set(layertap.EncodeOptions.__annotations__) <= set(re.findall(r"`(\w+)`", page))


def test_requests_of_the_tools_are_requests() -> None:
    service = pb.DESCRIPTOR.services_by_name["EncoderService"]
    num_found = 0
    for name in PAGES:
        for _, console in blocks(read(name), "console"):
            for command in re.findall(
                r"^\$ (?:grpcurl|ghz) .*?(?=^\$ |\Z)", console, re.MULTILINE | re.DOTALL
            ):
                data = re.search(r"-d '(.*?)'", command, re.DOTALL)
                method = re.search(r"layertap\.v1\.EncoderService[/.](\w+)", command)
                assert method is None or method[1] in service.methods_by_name
                if data:
                    assert json_format.Parse(data[1], pb.EncodeRequest()).HasField("outputs")
                    num_found += 1
    assert num_found >= 2


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("go", "go/main.go"),
        ("java", "java/src/main/java/layertap/example/Client.java"),
        ("typescript", "typescript/client.ts"),
    ],
)
def test_lines_in_other_languages_are_those_of_the_examples(language: str, source: str) -> None:
    """The examples are compiled and run (`tests/examples`)."""
    lines = iter([line.strip() for line in (ROOT / "examples" / source).read_text("utf-8").splitlines()])
    shown = [content for _, content in blocks(read("clients.md"), language)]
    assert shown
    for line in "".join(shown).splitlines():
        code = line.partition("//")[0].strip()
        assert not code or code in lines, code  # `in` goes on from the line of before


# --------------------------------------------------------------------------------- examples, really run


def output_of(*command: str, address: str) -> str:
    environment = {"LAYERTAP_ADDRESS": address, "COLUMNS": "130", "PYTHONIOENCODING": "utf-8"}
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode()


def run_python(code: str, address: str) -> str:
    assert ADDRESS in code
    return output_of(sys.executable, "-W", "error", "-c", code.replace(ADDRESS, address), address=address)


def commands_in(console: str) -> list[tuple[list[str], str]]:
    """(arguments, output) of each `$ layertap …` in a block."""
    found = re.findall(r"^\$ layertap (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    return [([part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)], shown) for line, shown in found]


def lines_of(table: str) -> list[str]:
    """A table's lines without what a terminal changes: widths, empty lines, rules."""
    lines = (" ".join(re.sub("─+", "─", line).split()) for line in table.splitlines())
    return [line for line in lines if line]


def masked(lines: list[str]) -> list[str]:
    return [NUMBER.sub("#", line) for line in lines]


def values(lines: list[str]) -> list[float]:
    return [float(number) for line in lines for number in NUMBER.findall(line)]


def check_commands(text: str, address: str, *, weights_are_random: bool) -> None:
    commands = [command for _, console in blocks(text, "console") for command in commands_in(console)]
    assert commands
    layertap_command = str(Path(sys.executable).with_name("layertap"))
    for arguments, output in commands:
        printed, shown = lines_of(output_of(layertap_command, *arguments, address=address)), lines_of(output)
        assert masked(printed) == masked(shown)
        if not weights_are_random:  # their values depend on the versions of the libraries that draw them
            assert values(printed) == pytest.approx(values(shown), abs=2e-3)


def test_first_success_is_as_shown(default_server: str) -> None:
    check_commands(read("README.md").split(EXAMPLE)[0], default_server, weights_are_random=False)


@pytest.mark.long
def test_the_examples_commands_print_what_the_readme_says(example_server: str) -> None:
    check_commands(read("README.md").split(EXAMPLE)[1], example_server, weights_are_random=True)


@pytest.mark.long
def test_the_examples_scripts_print_what_the_readme_says(example_server: str) -> None:
    shown = blocks(read("README.md"), "python", "text")
    assert [language for language, _ in shown] == ["python", "text"] * 2
    for (_, code), (_, printed) in zip(shown[::2], shown[1::2], strict=True):
        assert run_python(code, example_server) == printed


def test_the_attention_map_in_the_terminal_is_as_shown(default_server: str) -> None:
    (_, _), (_, console) = blocks(read("pictures.md"), "console")
    ((arguments, shown),) = commands_in(console)
    command = str(Path(sys.executable).with_name("layertap"))
    assert lines_of(output_of(command, *arguments, address=default_server)) == lines_of(shown)


def test_the_page_of_attention_maps_is_as_described(default_server: str, tmp_path: Path) -> None:
    (_, console), _ = blocks(read("pictures.md"), "console")
    ((arguments, shown),) = commands_in(console)
    arguments[-1] = str(tmp_path / arguments[-1])
    command = [str(Path(sys.executable).with_name("layertap")), *arguments, "--address", default_server]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert ended.stderr.decode() == f"{tmp_path}/{shown}"


def test_the_script_on_the_page_of_pictures_runs(
    default_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    monkeypatch.chdir(tmp_path)
    ((_, code),) = blocks(read("pictures.md"), "python")
    assert run_python(code, default_server) == ""
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_scripts_on_the_page_of_saving_run(
    default_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (_, saves), (_, makes_frames) = blocks(read("saving.md"), "python")
    assert "'embeddings': [Embedding(" in run_python(saves, default_server)
    assert (tmp_path / "results.safetensors").exists()
    pytest.importorskip("pandas", reason="the extra 'pandas' is not installed")
    assert "(2, 384)" in run_python(makes_frames, default_server)


def test_the_scripts_on_other_pages_run(default_server: str) -> None:
    scripts = blocks(read("clients.md"), "python") + blocks(read("vectors.md"), "python")[:2]
    assert len(scripts) == 8
    for _, code in scripts:
        assert run_python(code, default_server)
