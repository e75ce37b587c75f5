"""What models wrote must not be able to do anything to the page, the Markdown or the reader's eyes."""

import html
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.report.text import markdown, visible
from tests.helpers.fake_run import HOSTILE


@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_hides_nothing(text: str) -> None:
    text_shown = visible(text, limit=10_000)
    assert not {unicodedata.category(c) for c in text_shown if c not in "\n\t"} & {
        "Cc",
        "Cf",
        "Cs",
        "Cn",
        "Zl",
        "Zp",
    }
    text_shown.encode("utf-8")


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S"))))
def test_visible_text_keeps_what_can_be_seen(text: str) -> None:
    assert visible(text, limit=10_000) == text


def test_long_text_is_cut_and_says_so() -> None:
    assert visible("a" * 1000, limit=10) == "a" * 10 + " … (+990 characters)"


def test_bidirectional_controls_are_shown_by_number() -> None:
    assert visible("a\u202eb\u2066") == "a⟨U+202E⟩b⟨U+2066⟩"
    assert visible("\x00\x1b\x7f") == "\u2400\u241b\u2421"


SIGNS = [*'\\`*_{}[]()#+-.!|~$&<>=:;/?" 019ax\n\t', "&amp;", "<b>", "1. ", "2_sft", "![x](y)"]


@given(st.text() | st.lists(st.sampled_from(SIGNS)).map("".join))
def test_markdown_is_one_literal_line(text: str) -> None:
    """A parser shows the text as it is: at the beginning of a paragraph, in a list and in a cell of a table."""
    line = markdown(text)
    assert "\n" not in line
    assert not re.search(r"<(?!br>)[a-z/!?]", line, re.IGNORECASE)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[]", line)
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    literal = " ".join(visible(text, limit=10_000).strip().split())
    for source, tag in ((line, "p"), (f"- {line}", "li"), (f"| a |\n| --- |\n| {line} |", "td")):
        html_text = parser.render(source).replace("<br>", " ")
        if literal:
            content = re.findall(rf"<{tag}>(.*?)</{tag}>", html_text, re.DOTALL)[-1]
            assert " ".join(html.unescape(content).split()) == literal, source


@pytest.mark.parametrize(
    "text",
    [
        "2_sft: 0.18 (2.64 before)!",
        "noise-free, x + 7 - 3 * 4 = -5",
        "torch 2.13.0+cpu; x86_64",
        "3 > 2, 2 < 3 & #7 {}",
    ],
)
def test_markdown_without_a_meaning_is_left_as_it_is(text: str) -> None:
    assert markdown(text) == text


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_markdown_makes_no_link_of_an_address() -> None:
    assert markdown("see https://example.com or www.example.com") == ("see https\\://example.com or www\\.example.com")


def test_hostile_answers_stay_text(hostile_run: Path, tmp_path: Path) -> None:
    assert main(["report", str(hostile_run), "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    parser = _Elements()
    parser.feed(page)
    tags = {tag for tag, _ in parser.found}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form"}
    for _, attributes in parser.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert not any(re.search(r"https?://|//", attributes.get(name) or "") for name in ("href", "src", "action"))
    # The expression is shown, not evaluated.
    assert "{{ 7 * 7 }}" in page
    assert html.escape("</script><script>") in page
    assert not set(page) & {"\u202e", "\u200b", "\x00", "\x1b"}
    json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    twin = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in twin and "<img" not in twin


def test_hostile_file_names_and_notes_stay_text(short_run: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "<b>run<img src=x>"
    shutil.copytree(short_run, run)
    record = json.loads((run / "run.json").read_text())
    record["seed"] = HOSTILE
    for entry in record["steps"].values():
        entry |= {"commit": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "versions": {"x": HOSTILE}}
    (run / "run.json").write_text(json.dumps(record))
    (run / "evaluations" / "<i>.json").write_text("broken")
    main(["report", str(run)])
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    for tag in ("<b>run", "<img", "<script", "<i>"):
        assert tag not in page
    assert not set(page) & {"\u202e", "\u200b", "\x00", "\x1b"}
