"""Every shell block of the documentation can be typed: each line is read by the real parsers, and the quick ones run.

``<!-- not run: REASON -->`` above a block keeps it from running, not from being parsed.
"""

import re
import shlex
import webbrowser
from pathlib import Path

import pytest

from dq_plugins.cli import main, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: (.+?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:dq-plugins|python -m|make|pip install) [^`\n]*)`")
SHORT = {
    "record": ["--steps", "2", "--images", "2"],
    "quantize": ["--steps", "2", "--images", "2"],
    "gate": ["--images", "2"],
}
MAKEFILE, PROJECT = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()


def commands(block: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def shell_blocks(page: Path) -> list[tuple[str, list[list[str]]]]:
    """(reason why it is not run, its commands) of each block."""
    found = BLOCK.findall(page.read_text())
    return [(reason, commands(text)) for _, reason, language, text in found if language in ("", "sh")]


def prepared(folder: Path) -> None:
    """What lines of a page take as given: folders that an earlier command of the reader wrote."""
    for name in ("calib/manifest.json", "plan/plan.json", "quantized/plan/plan.json", "run/plan/plan.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def source_of(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def check(words: list[str]) -> None:
    match words:
        case ["dq-plugins", *arguments]:
            parse(arguments)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), words
        case ["pip", "install", package]:
            name, extras = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", package).groups()
            assert name == "dq-plugins"
            assert all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras.split(",")), words
        case ["python", "-m", module, *arguments]:
            source = source_of(module)
            source += "".join(map(source_of, re.findall(r"^from (benchmarks\.\w+) import", source, re.MULTILINE)))
            for option in (word.strip("[]") for word in arguments if word.strip("[").startswith("--")):
                assert f'"{option}"' in source, f"{module} has no {option}"
        case _:
            pytest.fail(f"nothing is known of {words}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_line_is_understood(page: Path, tmp_path: Path, monkeypatch) -> None:
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    for _, lines in shell_blocks(page):
        for words in lines:
            check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_quick_blocks_run(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    ran = 0
    for reason, lines in shell_blocks(page):
        for words in lines if not reason else []:
            if words[0] == "dq-plugins":
                status = main([*words[1:], *SHORT.get(words[1], [])])
                assert status == 0, f"{words}: {capsys.readouterr().err}"
                ran += 1
    assert len(opened) == sum("--open" in words for _, lines in shell_blocks(page) for words in lines)
    if not ran:
        pytest.skip(f"{page.name} has no quick commands")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_named_in_sentences_exist(page: Path, capsys) -> None:
    for text in INLINE.findall(page.read_text()):
        program, *words = shlex.split(text.replace("...", ""))
        if program != "dq-plugins":
            check([program, *words])
            continue
        with pytest.raises(SystemExit):
            main([words[0], "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--")), text


def test_a_line_that_cannot_be_typed_is_found() -> None:
    for line in ("dq-plugins recipes --nonsense", "make nonsense", "python -m benchmarks.demo --nonsense"):
        with pytest.raises(BaseException, match="nonsense"):
            check(shlex.split(line))
