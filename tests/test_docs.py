"""The docs say what the program does: commands, options, public names, and what importing costs."""

import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pharmacist
from pharmacist.cli.main import COMMANDS, main
from pharmacist.core.config import docs_of, parse
from pharmacist.defenses import DEFENSES


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def options_of(name: str) -> type[Any]:
    return COMMANDS[name].options


def commands_in(text: str) -> list[list[str]]:
    """Words of every pharmacist command in the bash blocks of a page, lines that end with a backslash joined."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("pharmacist ")]


def without_file(words: list[str]) -> list[str]:
    """Options without a file of options, which a page writes before it runs the command."""
    place = words.index("--config") if "--config" in words else len(words)
    return words[:place] + words[place + 2 :]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_the_help_parses(name: str) -> None:
    program, command, *words = shlex.split(COMMANDS[name].example)
    assert (program, command) == ("pharmacist", name)
    parse(options_of(name), words)


@pytest.mark.slow
def test_the_examples_of_the_help_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(ROOT / "examples" / "world_files.py"))["write_world"](tmp_path)
    monkeypatch.chdir(tmp_path)
    quick = {
        "curate": "--selector.form evidence --selector.readers lexical",
        "align": "--train.max_steps 2",
        "attack": "--train.max_steps 2",
        "evaluate": "--max-new-tokens 8",
        "sweep": "--train.max_steps 2 --evaluate.max_new_tokens 8",
    }
    for name, command in COMMANDS.items():
        if name not in ("demo", "bench", "label"):  # take minutes, or ask a person, and have tests of their own
            assert main(shlex.split(f"{command.example} {quick.get(name, '')}")[1:]) == 0, name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_whose_examples_parse(name: str) -> None:
    page = COMMANDS[name].page or name
    text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    examples = [words[2:] for words in commands_in(text) if words[1] == name]
    assert examples, f"docs/how-to/{page}.md shows no `pharmacist {name} ...` in a bash block"
    for words in examples:
        parse(options_of(name), without_file(words))
    assert f"{{{{ options {name} }}}}" in text, "the table of options comes from the dataclass"


PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_on_a_page_parses(page: Path) -> None:
    for words in commands_in((ROOT / page).read_text(encoding="utf-8")):
        if not words[1].startswith("-") and words[2:] != ["--help"]:
            parse(options_of(words[1]), without_file(words[2:]))


def test_no_page_is_missing_from_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to("docs")) for page in PAGES if page.parts[0] == "docs"]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: pharmacist\.(\w+)$", text, flags=re.M))
    assert documented == set(pharmacist.__all__) - {"__version__"}
    assert all(getattr(pharmacist, name).__doc__ for name in documented)
    assert not re.search(r"\S {2,}\S", pharmacist.repair.__doc__ or ""), "descriptions of options are wrapped anew"


def test_the_files_and_names_of_the_code_on_its_pages_are_there() -> None:
    pages = [DOCS / "explanation" / name for name in ("how-it-works-inside.md", "adding-a-method.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"`((?!src/)(?:[\w-]+/)+[\w-]+\.\w+)`(?:: `(\w+)`)?", text)
    assert len(found) > 40, "the pattern finds what the pages name"
    for path, name in found:
        file = (ROOT if path.startswith("tests/") else ROOT / "src" / "pharmacist") / path
        assert file.is_file(), path
        code = file.read_text(encoding="utf-8")
        assert not name or re.search(rf"^(?:def|class) {name}\b", code, flags=re.M), f"{path} has no {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    explained = docs_of(options_of(name))
    assert [field.name for field in fields(options_of(name)) if not explained.get(field.name)] == []


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell; pipes that are escaped part no cells."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| `--")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_tables_of_options_show_every_default_and_whole_meanings() -> None:
    tables = runpy.run_path(str(DOCS / "_hooks.py"))
    curate, repair = cells(tables["options"]("curate")), cells(tables["methods"]("repair"))
    assert curate["--max-length"][:2] == ["`int`", "`0`"] and curate["--top"][:2] == ["`float`", ""]
    assert cells(tables["common"]())["--seed"][1] == "`0`" and curate["--fill"][:2] == ["", ""]
    assert cells(tables["methods"]("curate"))["--selector.per_word"][:2] == ["`true` `false`", "`false`"]
    assert len(repair["--method.projector"]) == 3 and repair["--method.projector"][2].endswith("only shrinks.")
    evaluate = tables["methods"]("evaluate")
    assert "### `--second-judge probe`" in evaluate
    assert "Stands for no second judge." in evaluate and "Base class of all methods." not in evaluate


@pytest.mark.parametrize(("command", "stage"), [("align", "align"), ("attack", "finetune")])
def test_the_docs_tell_which_defenses_a_command_takes(command: str, stage: str) -> None:
    methods = runpy.run_path(str(DOCS / "_hooks.py"))["methods"](command)
    taken = {name for name in DEFENSES.names() if stage in DEFENSES.get(name).stages}
    assert set(re.findall(r"^### `--defense ([\w-]+)`$", methods, flags=re.M)) == taken


@pytest.mark.parametrize(
    "code", ["import pharmacist", "from pharmacist.cli.main import main; main(['--help'])"], ids=["import", "help"]
)
def test_light_commands_leave_torch_alone(code: str) -> None:
    heavy = "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; {heavy}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_torch_is_seen_when_it_is_loaded() -> None:
    code = "import sys; from pharmacist import rank; import pharmacist.nn.losses; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
