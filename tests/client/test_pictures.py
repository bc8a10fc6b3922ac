"""Pictures of attention maps: the page's data, the terminal, matplotlib, bertviz."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import types
import unicodedata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from click.testing import Result as Ran
from rich.cells import cell_len
from rich.console import Console

import layertap
from layertap import Client, Pair, Tokens
from layertap._commands import commands
from layertap._pictures import page, plots, ramp, terminal
from layertap._pictures.attention_maps import AttentionMaps
from layertap._pictures.labels import token_labels, visible

from . import fake_server
from .fake_server import token_ids
from .pictures import HOSTILE, Page, result_of, tokens_of

NAMES = ["[CLS]", "the", "cat", "sat", "[SEP]"]


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LAYERTAP_ADDRESS", address)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object, code: int = 0) -> Ran:
        ran = CliRunner().invoke(commands, ["attend", *map(str, arguments)])
        assert ran.exit_code == code, ran.output
        return ran

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `Client.encode` is called with."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    encode = Client.encode

    def spy(self: Client, inputs: Any, **options: Any) -> Any:
        calls.append((inputs, options))
        return encode(self, inputs, **options)

    monkeypatch.setattr(Client, "encode", spy)
    return calls


def page_of(names: list[str], texts: tuple[str, ...] = ("",), **options: Any) -> Page:
    maps = AttentionMaps.of(result_of(names, **options), layers=(0, 1, 2), heads=(0, 1), texts=texts)
    return Page(page.page(maps, page.Heading("a model", texts)))


# ------------------------------------------------------------------------------------------- the page


def test_a_page_has_the_maps(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "maps.html"
    ran = run("abc", "-o", path)
    assert ran.stdout == ""
    assert ran.stderr == f"{path}: 6 attention maps of 5 tokens\n"
    assert [file.name for file in tmp_path.iterdir()] == ["maps.html"]
    read = Page(path.read_bytes())
    assert read.data["model"] == "fake"
    assert read.data["texts"] == ["abc"]
    assert read.data["labels"] == ["[CLS]", "t107", "t108", "t109", "[SEP]"]
    assert read.data["ids"] == token_ids("abc")
    assert read.data["special"] == [True, False, False, False, True]
    assert read.data["segments"] == [-1, 0, 0, 0, -1]
    assert read.data["pieces"] == ["", "a", "b", "c", ""]
    assert (read.data["layers"], read.data["heads"]) == (["0", "1", "2"], ["0", "1"])
    assert read.data["titles"][2][1] == "layer 2, head 1"
    assert read.data["bits"] == 16
    np.testing.assert_allclose(read.maps(), fake_server.attentions(token_ids("abc")), rtol=0, atol=8e-6)


def test_large_maps_have_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(NAMES)
    fine = page_of(NAMES)
    monkeypatch.setattr(page, "MAX_FINE_VALUES", result.attentions.size - 1)
    coarse = page_of(NAMES)
    assert (fine.data["bits"], coarse.data["bits"]) == (16, 8)
    assert len(coarse.data["maps"]) < len(fine.data["maps"])
    np.testing.assert_allclose(coarse.maps(), result.attentions, rtol=0, atol=4e-3)
    # The page says how exact its values are.
    values = np.linspace(0, 1, 100_001, dtype=np.float32)
    read = np.frombuffer(page.quantized(values, 16), "<u2") / 65535
    assert np.abs(read - values).max() <= 8e-6
    read = (np.frombuffer(page.quantized(values, 8), np.uint8) / 255) ** 2
    assert np.abs(read - values).max() <= 4e-3


def test_only_what_is_shown_is_asked_for(
    run: Any, tmp_path: Path, asked: list[tuple[Any, dict[str, Any]]]
) -> None:
    path = tmp_path / "maps.HTML"
    maps = fake_server.attentions(token_ids("abc"))

    run("abc", "--layer", "-1,0,2", "--head", "1", "-o", path)
    read = Page(path.read_bytes())
    assert (read.data["layers"], read.data["heads"]) == (["2", "0"], ["1"])
    np.testing.assert_allclose(read.maps(), maps[[2, 0]][:, [1]], atol=8e-6)

    run("abc", "--mean", "-o", path)
    read = Page(path.read_bytes())
    assert (read.data["layers"], read.data["heads"]) == (["0", "1", "2"], ["mean"])
    assert read.data["titles"][1] == ["layer 1, mean of 2 heads"]
    np.testing.assert_allclose(read.maps(), maps.mean(1, keepdims=True), atol=8e-6)

    run("abc", "--head", "0", "--mean", "-o", path)
    assert Page(path.read_bytes()).data["titles"][1] == ["layer 1, mean of 1 heads"]

    selections = [options["attentions"] for _, options in asked]
    assert [(one.layers, one.heads, one.mean_over_heads) for one in selections] == [
        ((2, 0), (1,), False),
        ((0, 1, 2), (0, 1), True),
        ((0, 1, 2), (0,), True),
    ]
    run("abc", "--pair", "de", "--truncation", "end", "--prompt", "query", "-o", path)
    inputs, options = asked[-1]
    assert inputs == Pair("abc", "de")
    assert (options["truncation"], options["prompt_name"]) == ("end", "query")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_shows_any_text_as_text(text: str) -> None:
    plain = page_of(NAMES)
    names = ["[CLS]", text, "cat", "sat", text]
    read = page_of(names, texts=(text, text))
    assert read.elements == plain.elements
    assert read.attributes == plain.attributes
    assert read.elements.count("script") == 2
    assert len(read.texts["title"]) == 1
    assert read.data["texts"] == [visible(text)] * 2
    assert read.data["labels"][2] == "cat"
    if text.strip() and text.isascii():
        assert read.data["labels"][1] == visible(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_data_of_a_page_has_no_markup(text: str) -> None:
    maps = AttentionMaps.of(result_of([text, "b"]), texts=[text])
    file = page.page(maps, page.Heading(text, (text,))).decode("utf-8")
    data = file.split('id="data">')[1].split("</script>")[0]
    assert data.isascii()
    assert not set("<>&") & set(data)
    title = file.split("<title>")[1].split("</title>")[0]
    assert "<" not in title
    assert all(unicodedata.category(character) != "Cc" for character in title)


def test_a_page_runs_its_own_script_and_asks_for_nothing() -> None:
    read = page_of(NAMES)
    (policy,) = [one["content"] for one in read.attributes if one.get("http-equiv")]
    assert policy is not None

    def hash_of(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    (script,) = [text for text in read.texts["script"] if not text.startswith("{")]
    (style,) = read.texts["style"]
    assert policy == (f"default-src 'none'; style-src '{hash_of(style)}'; script-src '{hash_of(script)}'")
    assert not any(key in one for one in read.attributes for key in ("src", "href", "style"))
    assert "http" not in re.sub(r"http-equiv", "", script + style)


def test_a_page_that_would_be_too_large_is_refused_first(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.setattr(page, "MAX_VALUES", 100)
    path = tmp_path / "maps.html"
    path.write_text("before")
    message = run("abc", "-o", path, code=1).stderr
    assert "the maps have 150 values, more than the 100 of one picture: choose maps with --layer" in message
    assert not asked
    assert path.read_text() == "before"
    run("abc", "--mean", "--layer", "0", "-o", path)
    assert Page(path.read_bytes()).data["layers"] == ["0"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["abc", "-o", "maps.pdf"], 2, "maps.pdf must end in .html, .png or .svg"),
        (["abc", "--layer", "3"], 2, "--layer 3: the model has 3 layers, 0 to 2"),
        (["abc", "--head", "-3"], 2, "--head -3: the model has 2 heads, 0 to 1"),
        (["abc", "--head", "x"], 2, "'x' is not a list of numbers"),
        (["poison"], 1, "inputs[0].text: is poison"),
        (["abc", "--model", "nobody"], 1, "no model named 'nobody'"),
        (["abc", "--model", "plain"], 1, "no such output"),
    ],
)
def test_errors(run: Any, arguments: list[str], code: int, message: str) -> None:
    assert message in run(*arguments, code=code).stderr


def test_a_failed_write_leaves_what_was_there(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "maps.html"
    path.write_text("before")

    def fail(*_: object) -> bytes:
        raise OSError("no space")

    monkeypatch.setattr(page, "page", fail)
    assert "no space" in run("abc", "-o", path, code=1).stderr
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["maps.html"]


# ------------------------------------------------------------------------------------------- the labels


def test_visible() -> None:
    assert visible("a\x00\t\n\x1b[0m") == "a␀␉␊␛[0m"
    assert visible("\x7f\x85\u202e\u2028\ufeff") == "␡<0085><202E><2028><FEFF>"
    assert visible("שלום 👨‍👩‍👧 é") == "שלום 👨‍👩‍👧 é"


def test_labels_are_tokens_or_their_part_of_the_text() -> None:
    given = tokens_of(["<s>", "Hello", "Ġwörld", "ä½ł", "##é", "Ġ", "", " "], special={"<s>"})
    text = "Hello wörld 你é x"
    tokens = Tokens(
        **{name: getattr(given, name) for name in given.__dataclass_fields__}
        | {"starts": np.array([0, 0, 5, 12, 13, 14, 0, 0]), "ends": np.array([0, 5, 11, 13, 14, 15, 0, 0])}
    )
    # Without the text, they are what the model has.
    assert token_labels(tokens)[:4] == ("<s>", "Hello", "Ġwörld", "ä½ł")
    assert token_labels(tokens, [text]) == ("<s>", "Hello", "wörld", "你", "##é", "Ġ", "∅", "␣")


def test_the_colours_go_from_light_to_dark_and_back() -> None:
    def lightness(value: float, stops: tuple[str, ...]) -> float:
        red, green, blue = ramp.color(value, stops)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [lightness(value, ramp.LIGHT) for value in np.linspace(0, 1, 33)]
    assert shades == sorted(shades, reverse=True)
    shades = [lightness(value, ramp.DARK) for value in np.linspace(0, 1, 33)]
    assert shades == sorted(shades)
    assert ramp.color(-1) == ramp.color(0) == (0xF1, 0xF8, 0xFD)
    assert ramp.color(2) == ramp.color(1) == (0x1D, 0x16, 0x73)


def test_maps_and_their_numbers() -> None:
    result = result_of(NAMES)
    maps = AttentionMaps.of(result, layers=[3, 5, 7], heads=[2, 4])
    assert maps.title(1, 0) == "layer 5, head 2"
    chosen = maps.chosen(7, -1)
    assert chosen.title() == "layer 7, head 4"
    np.testing.assert_array_equal(chosen.maps, result.attentions[2:, 1:])
    # Numbers that only count what the result holds say so.
    unknown = AttentionMaps.of(result)
    assert unknown.chosen(2, 1).title() == "layer [2], head [1]"
    assert unknown.layer_labels() == ["[0]", "[1]", "[2]"]
    mean = maps.chosen(5, None).mean_over_heads()
    assert mean.title() == "layer 5, mean of 2 heads"
    np.testing.assert_array_equal(mean.maps, result.attentions[1:2].mean(1, keepdims=True))
    rows = AttentionMaps.of(
        result_of(NAMES, attentions=result.attentions[:, :, [1, 4], :3]),
        query_positions=[1, -1],
        key_positions=[0, 1, 2],
    )
    assert (rows.rows, rows.columns, rows.is_whole) == ((1, 4), (0, 1, 2), False)


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        ({"attentions": None}, {}, "ask for them with attentions=True"),
        ({"tokens": None}, {}, "ask for them with tokens=True"),
        ({}, {"layers": [1]}, "layers has 1 numbers, and this result holds 3"),
        ({}, {"heads": [1, 2, 3]}, "heads has 3 numbers, and this result holds 2"),
        ({}, {"query_positions": [1, 2]}, "query_positions has 2 numbers, and this result holds 5"),
        ({}, {"key_positions": [0, 1, 2, 3, 9]}, "key_positions must be from 0 to 4"),
        ({"attentions": np.ones((1, 1, 2, 5), np.float32)}, {}, "name them with query_positions="),
        ({"attentions": np.ones((1, 1, 5, 2), np.float32)}, {}, "name them with key_positions="),
        ({"attentions": np.full((1, 1, 5, 5), np.nan, np.float32)}, {}, "not finite"),
    ],
)
def test_what_a_picture_needs(outputs: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionMaps.of(result_of(NAMES, **outputs), **options)


# ----------------------------------------------------------------------------------------- the terminal


def drawn(names: list[str], width: int, *, in_color: bool = False) -> list[str]:
    maps = AttentionMaps.of(result_of(names), layers=[0, 1, 2], heads=[0, 1])
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=in_color, color_system="truecolor" if in_color else None
    )
    console.print(terminal.heat_map(maps, 2, 1, width, in_color=in_color))
    return file.getvalue().splitlines()


def test_a_heat_map_in_percent() -> None:
    lines = drawn(NAMES, 80)
    assert lines[0] == "Layer 2, head 1"
    assert lines[1] == "Each row shows where its token looks, in percent."
    assert lines[2].split() == ["0", "1", "2", "3", "4"]
    values = result_of(NAMES).attentions[2, 1]
    for position, line in enumerate(lines[3:]):
        number, name, *shown = line.split()
        assert (number, name) == (str(position), NAMES[position])
        assert shown == [
            f"{round(100 * float(value))}".replace("0", "·")
            if value < 0.005
            else f"{round(100 * float(value))}"
            for value in values[position]
        ]
    assert len(lines) == 8


def test_a_heat_map_in_shades_fits_the_width() -> None:
    names = [f"t{position}" for position in range(58)]
    lines = drawn(names, 80)
    assert "from ' ' (0 %) to '@' (" in lines[1]
    assert max(map(len, lines)) == 80
    body = "".join(line[22:] for line in lines[3:])
    assert set(body) <= set(" .:-=+*#%@")
    assert "@" in body
    assert lines[2].split() == ["0", "10", "20", "30", "40", "50"]


def test_a_heat_map_in_colour() -> None:
    lines = drawn(["[CLS]", "[red]x[/]", "[SEP]"], 80, in_color=True)
    values = result_of(["a", "b", "c"]).attentions[2, 1]
    first = re.findall(r"48;2;(\d+);(\d+);(\d+)", lines[3])
    assert [tuple(map(int, one)) for one in first] == [
        ramp.color(value / values.max()) for value in values[0].tolist()
    ]
    assert "[red]x[/]" in lines[4]  # no markup


def test_labels_keep_the_columns_straight() -> None:
    lines = drawn(["让我们看一下让我们看一下", "a" * 40, "é", "\x1b[2J"], 80)
    assert {cell_len(line[: line.rindex("  ")]) for line in lines[3:]} <= set(range(22, 40))
    assert len({cell_len(line) for line in lines[3:]}) == 1
    assert "\x1b" not in "".join(lines)


def test_attend_in_the_terminal(run: Any, asked: list[tuple[Any, dict[str, Any]]]) -> None:
    ran = run("abc")
    assert ran.stdout.startswith("Layer 2, mean of 2 heads\n")
    assert "\x1b" not in ran.stdout
    assert ran.stderr == ""
    selection = asked[-1][1]["attentions"]
    assert (selection.layers, selection.heads, selection.mean_over_heads) == ((2,), (0, 1), True)
    ran = run("abc", "--layer", "0,1", "--head", "1,0")
    titles = re.findall(r"^Layer .*", ran.stdout, re.MULTILINE)
    assert titles == [f"Layer {layer}, head {head}" for layer in (0, 1) for head in (1, 0)]


def test_a_long_text_is_cut_in_words(run: Any, asked: list[tuple[Any, dict[str, Any]]]) -> None:
    ran = run("x" * 98)
    assert ran.stderr == (
        "Shown are the first 58 of 100 tokens, which fit the width of the terminal. "
        "All are in the page that -o FILE.html writes.\n"
    )
    assert len(ran.stdout.splitlines()) == 3 + 58
    assert asked[-1][1]["attentions"].key_positions == tuple(range(58))


# --------------------------------------------------------------------------------------------- the plots


@pytest.fixture
def pyplot() -> Any:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def labels_on(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_plot_of_one_map(pyplot: Any) -> None:
    names = ["[CLS]", "$a$", "\\frac{", "x_^2$", "[SEP]"]
    result = result_of(names)
    ax = result.plot_attention(2, 1, layers=[0, 1, 2], heads=[0, 1])
    np.testing.assert_array_equal(ax.images[0].get_array(), result.attentions[2, 1])
    assert labels_on(ax.xaxis) == labels_on(ax.yaxis) == names
    assert ax.get_title() == "Layer 2, head 1"
    ax.figure.canvas.draw()  # a formula would raise here
    figure, own = pyplot.subplots()
    assert result.plot_attention(0, mean=True, ax=own) is own
    np.testing.assert_allclose(own.images[0].get_array(), result.attentions[0].mean(0))
    assert own.get_title() == "Layer [0], mean of 2 heads"
    assert own.figure is figure


def test_plot_of_some_rows(pyplot: Any) -> None:
    held = result_of(NAMES).attentions[:, :, [1, 4], :]
    ax = result_of(NAMES, attentions=held).plot_attention(0, 0, query_positions=[1, 4])
    assert labels_on(ax.yaxis) == ["the", "[SEP]"]
    assert labels_on(ax.xaxis) == NAMES


def test_plot_of_all_maps(pyplot: Any) -> None:
    result = result_of(NAMES)
    ax = result.plot_attention(layers=[1, 3, 5])
    assert labels_on(ax.yaxis) == ["1", "3", "5"]
    assert labels_on(ax.xaxis) == ["[0]", "[1]"]
    grid = np.asarray(ax.images[0].get_array()) ** 2
    for layer in range(3):
        for head in range(2):
            there = grid[layer * 6 : layer * 6 + 5, head * 6 : head * 6 + 5]
            np.testing.assert_allclose(there, result.attentions[layer, head], rtol=1e-5)


def test_plot_of_the_layers(pyplot: Any) -> None:
    result = result_of(NAMES)
    states = result.hidden_states.astype(np.float64)

    def cosine(first: np.ndarray, second: np.ndarray) -> float:
        return float(first @ second / np.sqrt(first @ first) / np.sqrt(second @ second))

    previous = result.plot_layers(layers=[0, 1, 2, 3])
    assert labels_on(previous.xaxis) == ["0→1", "1→2", "2→3"]
    assert labels_on(previous.yaxis) == NAMES
    first = result.plot_layers("first", layers=[0, 2, 4, 6])
    assert labels_on(first.xaxis) == ["2", "4", "6"]
    assert "layer 0" in first.get_title()
    norm = result.plot_layers("norm")
    assert labels_on(norm.xaxis) == ["[0]", "[1]", "[2]", "[3]"]
    for token in range(5):
        for layer in range(1, 4):
            here = states[layer, token]
            shown = previous.images[0].get_array()[token, layer - 1]
            assert shown == pytest.approx(cosine(here, states[layer - 1, token]))
            assert first.images[0].get_array()[token, layer - 1] == pytest.approx(
                cosine(here, states[0, token])
            )
            assert norm.images[0].get_array()[token, layer] == pytest.approx(np.sqrt(here @ here))
    rows = result_of(NAMES, hidden_states=result.hidden_states[:, [2, 0]])
    assert labels_on(rows.plot_layers(positions=[2, 0]).yaxis) == ["cat", "[CLS]"]
    previous.figure.canvas.draw()


def test_a_zero_vector_has_no_cosine(pyplot: Any) -> None:
    states = result_of(NAMES).hidden_states.copy()
    states[1, 2] = 0
    shown = result_of(NAMES, hidden_states=states).plot_layers().images[0].get_array()
    assert np.isnan(np.ma.filled(shown, np.nan)).sum() == 2


@pytest.mark.parametrize(
    ("outputs", "call", "message"),
    [
        ({"attentions": None}, lambda result: result.plot_attention(), "attentions=True"),
        ({"tokens": None}, lambda result: result.plot_attention(), "tokens=True"),
        ({}, lambda result: result.plot_attention(3), "layer 3: this result holds 0, 1, 2"),
        ({}, lambda result: result.plot_attention(0, 5, heads=[4, 6]), "head 5: this result holds 4, 6"),
        ({"hidden_states": None}, lambda result: result.plot_layers(), "hidden_states=True"),
        ({"tokens": None}, lambda result: result.plot_layers(), "tokens=True"),
        ({"hidden_states": np.ones((1, 5, 4))}, lambda result: result.plot_layers(), "two or more"),
        ({"hidden_states": np.ones((2, 3, 4))}, lambda result: result.plot_layers(), "with positions="),
        ({}, lambda result: result.plot_layers("angle"), "previous, first, norm"),
    ],
)
def test_plots_say_what_they_need(pyplot: Any, outputs: dict[str, Any], call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(result_of(NAMES, **outputs))


def test_without_matplotlib(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    message = "pictures need matplotlib, of the extra 'plot': pip install 'layertap[plot]'"
    for plot in (result_of(NAMES).plot_attention, result_of(NAMES).plot_layers):
        with pytest.raises(ImportError, match=re.escape(message)):
            plot()
    assert message in run("abc", "-o", tmp_path / "maps.png", code=1).stderr
    run("abc", "-o", tmp_path / "maps.html")  # needs none


def test_pictures_in_files(run: Any, pyplot: Any, tmp_path: Path) -> None:
    run("abc", "-o", tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG\r\n")
    run("abc", "--layer", "1", "--head", "0", "-o", tmp_path / "one.svg")
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert not pyplot.get_fignums()


# --------------------------------------------------------------------------------------------- bertviz


def fake_bertviz(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, list[str], dict[str, Any]]]:
    """A module with the functions of bertviz 1.4, which records what they are called with."""
    calls: list[tuple[str, Any, list[str], dict[str, Any]]] = []
    module = types.ModuleType("bertviz")

    def view(name: str) -> Any:
        def show(
            attention: Any = None, tokens: Any = None, sentence_b_start: Any = None, **options: Any
        ) -> str:
            calls.append((name, attention, tokens, {"sentence_b_start": sentence_b_start, **options}))
            return name

        return show

    module.head_view = view("head_view")  # type: ignore[attr-defined]
    module.model_view = view("model_view")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bertviz", module)
    return calls


def test_bertviz_gets_maps_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_bertviz(monkeypatch)
    result = result_of(NAMES)
    assert layertap.bertviz(result) == "head_view"
    assert (
        layertap.bertviz(result_of(NAMES, second=3), "model", layers=[1, 4, 2], html_action="return")
        == "model_view"
    )
    (_, tensors, tokens, options), (_, some, _, paired) = calls
    assert tokens == NAMES
    assert [tuple(tensor.shape) for tensor in tensors] == [(1, 2, 5, 5)] * 3
    np.testing.assert_array_equal(np.concatenate([tensor.numpy() for tensor in tensors]), result.attentions)
    assert options == {"sentence_b_start": None, "include_layers": [0, 1, 2]}
    assert [None if tensor is None else tensor.numpy().tolist() for tensor in some] == [
        None,
        result.attentions[:1].tolist(),
        result.attentions[2:].tolist(),
        None,
        result.attentions[1:2].tolist(),
    ]
    assert paired == {"sentence_b_start": 3, "include_layers": [1, 4, 2], "html_action": "return"}


def test_what_bertviz_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bertviz(monkeypatch)
    with pytest.raises(ValueError, match="view must be 'head' or 'model', not 'neuron'"):
        layertap.bertviz(result_of(NAMES), "neuron")  # type: ignore[arg-type]
    held = result_of(NAMES).attentions[:, :, [1, 4], :]
    with pytest.raises(ValueError, match="name them with query_positions"):
        layertap.bertviz(result_of(NAMES, attentions=held))
    with pytest.raises(ValueError, match="attentions=True"):
        layertap.bertviz(result_of(NAMES, attentions=None))
    monkeypatch.setitem(sys.modules, "bertviz", None)
    with pytest.raises(ImportError, match="bertviz needs bertviz: pip install bertviz"):
        layertap.bertviz(result_of(NAMES))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of bertviz's own scripts
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("view", ["head", "model"])
def test_the_real_bertviz_shows_them(view: Any) -> None:
    pytest.importorskip("bertviz", reason="bertviz is not installed")
    result = result_of(NAMES, second=3)
    shown = layertap.bertviz(result, view, layers=[0, 1, 4], html_action="return").data
    assert all(f'"{name}"' in shown for name in NAMES)
    # Its values are in the page as JSON, and its layers by their numbers.
    assert f"{float(result.attentions[2, 1, 0, 0])}"[:8] in shown
    assert re.search(r'"include_layers": \[0, 1, 4\]', shown)
    assert "Sentence A" in shown
