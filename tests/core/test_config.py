"""Options: declared once, read from YAML and from the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pharmacist.core.config import from_mapping, method, parse
from pharmacist.core.errors import ConfigError, PharmacistError, UnknownNameError
from pharmacist.core.typed import AtLeast1
from pharmacist.selectors import SELECTORS


@dataclass
class Inner:
    """Options with a name of their own."""

    r: int = 8
    """Rank of the update."""
    rate: float = 1e-3
    """Step size."""
    names: list[str] | None = None
    """Targets."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"inner.r must be positive, not {self.r}")


@dataclass
class Options:
    """Stir the cauldron."""

    output_dir: str
    """Where it goes."""
    stirs: int = 1
    """How often to stir."""
    heat: float | None = None
    """How hot."""
    quiet: bool = False
    """Say nothing."""
    lid: bool = True
    """Put the lid on."""
    kind: Literal["thick", "thin"] = "thick"
    """What it becomes."""
    parts: list[float] = field(default_factory=list)
    """Shares."""
    numbers: list[AtLeast1] = field(default_factory=list)
    """Numbers from 1 on."""
    inner: Inner = field(default_factory=Inner)
    """Inner options."""
    train: dict[str, Any] = field(default_factory=dict)
    """Passed on."""
    selector: dict[str, Any] = method("random", "pharmacist.selectors:SELECTORS")
    """Who chooses."""


def read(*words: str, yaml: str | None = None, tmp_path: Path | None = None, required: bool = True) -> Options:
    given = ["--output-dir", "out"] if required else []
    if yaml is not None:
        assert tmp_path is not None
        (tmp_path / "options.yaml").write_text(yaml)
        given += ["--config", str(tmp_path / "options.yaml")]
    return parse(Options, [*given, *words], prog="cauldron", example="cauldron --stirs 3")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--stirs", "3"], "stirs", 3),
        (["--stirs=-3"], "stirs", -3),
        (["--stirs", "010"], "stirs", 10),
        (["--stirs", "0x10"], "stirs", 16),
        (["--heat", "5e-4"], "heat", 5e-4),
        (["--heat", "1E3"], "heat", 1000.0),
        (["--heat", "7"], "heat", 7.0),
        (["--heat", "null"], "heat", None),
        (["--quiet"], "quiet", True),
        (["--no-lid"], "lid", False),
        (["--lid"], "lid", True),
        (["--quiet", "--no-quiet", "--quiet"], "quiet", True),
        (["--no-lid", "--lid", "--no-lid"], "lid", False),
        (["--kind", "thin"], "kind", "thin"),
        (["--parts", "[0.5, 5e-4]"], "parts", [0.5, 5e-4]),
        (["--inner.r", "3", "--inner.rate", "5e-4", "--inner.names", "[a,b]"], "inner", Inner(3, 5e-4, ["a", "b"])),
        (["--parts", "0.5"], "parts", [0.5]),
        (["--numbers", "15"], "numbers", [15]),
        (["--inner.names", "q_proj"], "inner", Inner(names=["q_proj"])),
        (["--inner.names", "1"], "inner", Inner(names=["1"])),
        (["--inner.names", "null"], "inner", Inner()),
        (["--train.a", "1", "--train", "{b: 2}", "--train", "{c: 3}"], "train", {"a": 1, "b": 2, "c": 3}),
        (["--inner.names", "a", "1", "--inner.names", "b"], "inner", Inner(names=["a", "1", "b"])),
        (["--train.max_steps", "20", "--train.lr", "5e-4"], "train", {"max_steps": 20, "lr": 5e-4}),
        (["--selector", "full"], "selector", {"name": "full"}),
        (["--selector=full"], "selector", {"name": "full"}),
        (["--output_dir", "under_score"], "output_dir", "under_score"),
        (["--output-dir", "1"], "output_dir", "1"),
        (["--output-dir", "[a]: {b}"], "output_dir", "[a]: {b}"),
        (["--output-dir=--x"], "output_dir", "--x"),
    ],
)
def test_the_line(words: list[str], name: str, value: object) -> None:
    found = getattr(read(*words), name)
    assert found == value
    assert type(found) is type(value)
    untouched = [other for other in vars(Options(output_dir="out")) if other != name]
    assert all(getattr(read(*words), other) == getattr(read(), other) for other in untouched)


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("stirs: 3", "stirs", 3),
        ("stirs: -010", "stirs", -10),
        ("heat: 5e-4", "heat", 5e-4),
        ("heat: 5.0e-4", "heat", 5e-4),
        ("heat: null", "heat", None),
        ("quiet: true", "quiet", True),
        ("lid: false", "lid", False),
        ("kind: thin", "kind", "thin"),
        ("parts: [0.5, 5e-4]", "parts", [0.5, 5e-4]),
        ("parts:\n- 1\n- 2.5", "parts", [1, 2.5]),
        ("inner: {r: 3, rate: 5e-4, names: [a, b]}", "inner", Inner(3, 5e-4, ["a", "b"])),
        (
            "train: {max_steps: 20, learning_rate: 5e-4, tags: [a]}",
            "train",
            {"max_steps": 20, "learning_rate": 5e-4, "tags": ["a"]},
        ),
        ("selector: full", "selector", {"name": "full"}),
        ("selector: {name: full}", "selector", {"name": "full"}),
        ("output_dir: 'a: b'", "output_dir", "a: b"),
        ("output-dir: hyphen", "output_dir", "hyphen"),
        ("output_dir: 2026-11-29", "output_dir", "2026-11-29"),
        ("output_dir: 007", "output_dir", "007"),
        ("output_dir: yes", "output_dir", "yes"),
        ("output_dir: 12:30", "output_dir", "12:30"),
        ("inner:\n  # r: 3", "inner", Inner()),
        ("train: {a: [2, yes, 3e-4], b: {c: 0.5}}", "train", {"a": [2, True, 3e-4], "b": {"c": 0.5}}),
        ("train: {run_name: '1e5', tags: ['2e3', 2e3]}", "train", {"run_name": "1e5", "tags": ["2e3", 2e3]}),
        ("train: &base {a: 1, b: 2}\ninner: {}", "train", {"a": 1, "b": 2}),
        ("train:\n  <<: {a: 1, b: 2}\n  b: 3", "train", {"a": 1, "b": 3}),
    ],
)
def test_the_file(yaml: str, name: str, value: object, tmp_path: Path) -> None:
    found = getattr(
        read(yaml=yaml + "\noutput_dir: x" * ("output" not in yaml), tmp_path=tmp_path, required=False), name
    )
    assert found == value
    assert type(found) is type(value)


def test_the_line_wins_over_the_file(tmp_path: Path) -> None:
    yaml = "\n".join(
        [
            "stirs: 3",
            "heat: 2",
            "quiet: true",
            "lid: false",
            "inner: {r: 3, rate: 0.5}",
            "train: {a: 1, b: 2}",
            "selector: {name: pharmacist, gamma: 0.25, mu: 0.75}",
        ]
    )
    words = ["--stirs", "4", "--no-quiet", "--lid", "--inner.r", "5", "--train.b", "3", "--selector.gamma", "0.1"]
    for order in (0, len(words)):  # wherever --config stands
        (tmp_path / "options.yaml").write_text(yaml)
        line = [*words[:order], "--config", str(tmp_path / "options.yaml"), *words[order:], "--output-dir", "x"]
        found = parse(Options, line)
        assert (found.stirs, found.heat, found.quiet, found.lid) == (4, 2.0, False, True)
        assert found.inner == Inner(5, 0.5)
        assert found.train == {"a": 1, "b": 3}
        assert parse(Options, [*line, "--train", "{b: {c: 4}}"]).train == {"a": 1, "b": {"c": 4}}
        chosen = {name: found.selector[name] for name in ("name", "gamma", "mu", "tau")}
        assert chosen == {"name": "pharmacist", "gamma": 0.1, "mu": 0.75, "tau": 1.0}


def test_the_line_wins_over_keys_with_hyphens(tmp_path: Path) -> None:
    yaml = "train: {max-steps: 1, on-bad-row: skip}"
    expected = {"max_steps": 2, "on_bad_row": "skip"}
    assert read("--train.max_steps", "2", yaml=yaml, tmp_path=tmp_path).train == expected
    assert read("--train.max-steps", "2", yaml=yaml, tmp_path=tmp_path).train == expected
    assert read("--train", "{max-steps: 2}", yaml=yaml, tmp_path=tmp_path).train == expected
    with pytest.raises(ConfigError, match="--train: the key 'max_steps' is given twice, once with a hyphen"):
        read("--train.a", "1", yaml="train: {max-steps: 1, max_steps: 2}", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("words", "yaml", "judge"),
    [
        ("--train.judge probe --train.judge.epochs 3", None, {"name": "probe", "epochs": 3}),
        ("--train.judge.epochs 3 --train.judge probe", None, {"name": "probe", "epochs": 3}),
        ("--train.judge.epochs 3", "train: {judge: probe}", {"name": "probe", "epochs": 3}),
        ("--train.judge probe", "train: {judge: {name: probe, epochs: 3}}", {"name": "probe", "epochs": 3}),
        ("--train.judge keyword", "train: {judge: {name: probe, epochs: 3}}", "keyword"),
    ],
)
def test_a_method_within_a_mapping_has_a_name_and_options(
    words: str, yaml: str | None, judge: object, tmp_path: Path
) -> None:
    assert read(*words.split(), yaml=yaml, tmp_path=tmp_path).train == {"judge": judge}


def test_another_method_on_the_line_leaves_the_files_options_behind(tmp_path: Path) -> None:
    yaml = "selector: {name: pharmacist, gamma: 0.25}"
    assert read("--selector", "full", yaml=yaml, tmp_path=tmp_path).selector == {"name": "full"}
    assert read("--selector", "pharmacist", yaml=yaml, tmp_path=tmp_path).selector["gamma"] == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stirz", "3"], "unknown option '--stirz'; did you mean '--stirs'?"),
        (["--stirz=3"], "unknown option '--stirz'; did you mean '--stirs'?"),
        (["--stir", "3"], "unknown option '--stir'; did you mean '--stirs'?"),
        (["--zzz"], "unknown option '--zzz'; see cauldron --help"),
        (["--inner.q", "1"], "unknown option '--inner.q'; did you mean '--inner.r'?"),
        (["--inner", "1"], "--inner has options of its own, such as --inner.r"),
        (["--selector.gamma", "1"], "unknown option '--selector.gamma'"),
        (["--selector", "pharmacist", "--selector.gama", "1"], "did you mean '--selector.gamma'?"),
        (["--stirs", "3.5"], "--stirs 3.5: must be a whole number"),
        (["--stirs", "many"], "--stirs many: must be a whole number"),
        (["--stirs", "!!bool many"], "--stirs !!bool many: must be a whole number"),
        (["--stirs", "!!int ''"], "must be a whole number"),
        (["--stirs", "1:20"], "--stirs 1:20: must be a whole number"),
        (["--stirs"], "--stirs needs a value"),
        (["--heat", "hot"], "--heat hot: must be a number"),
        (["--kind", "thi"], "--kind thi: must be one of thick, thin"),
        (["--parts", "half"], "--parts ['half']: must be a list of numbers, written [0.1, 2]"),
        (["--inner.rate", "fast"], "--inner.rate fast: must be a number"),
        (["--inner.r", "0"], "inner.r must be positive, not 0"),
        (["--selector", "pharmacist", "--selector.gamma", "x"], "--selector.gamma x: must be a number"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config needs the path of a single YAML file"),
        (["--config", "a.yaml", "b.yaml"], "--config needs the path of a single YAML file"),
        (["--no-lid", "x"], "--no-lid takes no value"),
        (["--output-dir", ""], "--output-dir is empty"),
        (["--output-dir= "], "--output-dir is empty"),
        (["--output-dir", "x\udcff"], r"--output-dir x\udcff: holds a null character, or bytes that are not UTF-8"),
        (["--train.a", "x\0"], r"--train.a x\x00: holds a null character"),
        (["--train.a", "1", "--train.a.b", "2"], "option 'a.b': 'a' has a value already"),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_a_bad_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("stirz: 3", "unknown key 'stirz'; did you mean 'stirs'?"),
        ("inner: {q: 1}", "unknown key 'inner.q'; did you mean 'inner.r'?"),
        ("inner: 3", "key 'inner' needs keys and values of its own"),
        ("config: other.yaml", "unknown key 'config'"),
        ("selectr: full", "unknown key 'selectr'; did you mean 'selector'?"),
        ("selector: {gamma: 1}", "unknown key 'selector.gamma'"),
        ("selector: {name: pharmacist, gama: 1}", "did you mean 'selector.gamma'?"),
        ("selector: [full]", "'selector' needs the name of a method"),
        ("selector: 3", "unknown selector '3'; known: "),
        ("stirs: many", "--stirs many: must be a whole number"),
        ("stirs: 3.5", "--stirs 3.5: must be a whole number"),
        ("stirs: true", "must be a whole number"),
        ("heat: hot", "--heat hot: must be a number"),
        ("kind: thi", "--kind thi: must be one of thick, thin"),
        ("kind: no", "--kind no: must be one of thick, thin"),
        ("quiet: maybe", "quiet maybe: must be true or false"),
        ("quiet: 1", "quiet 1: must be true or false"),
        ("parts: [a]", "must be a list"),
        ("- a\n- b", "needs keys and values at its top level"),
        ("", "needs keys and values at its top level"),
        ("a: [", "not valid YAML"),
        ("stirs: 1\nstirs: 2", "not valid YAML (the key 'stirs' is given twice"),
        ("inner: {r: 1, rate: 2, r: 3}", "the key 'r' is given twice"),
        ("output-dir: a\noutput_dir: b", "the key 'output_dir' is given twice, once with a hyphen"),
        ("inner: {na-mes: [a], na_mes: [b]}", "the key 'inner.na_mes' is given twice, once with a hyphen"),
        (
            "selector: {name: seal, inner-steps: 1, inner_steps: 2}",
            "the key 'selector.inner_steps' is given twice, once with a hyphen",
        ),
        ("1: 2", "unknown key '1'"),
        ("on: 2", "unknown key 'on'"),
        ("stirs: 2026-11-29", "--stirs 2026-11-29: must be a whole number"),
        ("stirs: 1:20", "--stirs 1:20: must be a whole number"),
        ("parts: !!set {7}", "--parts {'7'}: must be a list"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: 1\nb: !!timestamp noon", "the value does not fit tag:yaml.org,2002:timestamp in"),
        ("a: [!!bool many]", "not valid YAML (the value does not fit tag:yaml.org,2002:bool"),
        ("a: !!float ''", "the value does not fit tag:yaml.org,2002:float"),
        ("? !!set {a}\n: b", "not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("stirs: " + "9" * 5000, "not valid YAML (Exceeds the limit"),
        ("stirs: " + "9" * 30, "is too large; whole numbers go up to 9223372036854775807"),
        ("inner: {rate: .inf}", "must be a finite number"),
    ],
)
def test_a_bad_file(yaml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(yaml=yaml, tmp_path=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(PharmacistError, match="missing.yaml: cannot be read"):
        read("--config", str(tmp_path / "missing.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"kind: th\xefn")
    with pytest.raises(PharmacistError, match="latin.yaml: cannot be read"):
        read("--config", str(tmp_path / "latin.yaml"))


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--output-dir must be given; see cauldron --help"):
        read(required=False)


def test_keys_and_values_of_no_command_name_no_help() -> None:
    for values, message in (
        ({"zzz": 1}, "grid: unknown key 'zzz'; known: heat, inner.names, "),
        ({"stirs": 1}, "grid: --output-dir must be given"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_mapping(Options, values, where="grid")
        assert str(caught.value).startswith(message) and "--help" not in str(caught.value)


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown selector 'ful'; did you mean 'full'?"):
        read("--selector", "ful")


def test_help_shows_what_the_fields_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help", "--selector", "pharmacist", required=False)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Stir the cauldron." in text
    for doc in ("Where it goes.", "How often to stir. (type: int, default: 1)", "Rank of the update.", "Who chooses."):
        assert doc in text
    assert f"One of: {', '.join(SELECTORS.names())}" in text
    assert "Numbers from 1 on. (type: list[int])" in text  # ranges are no types
    assert "--selector.gamma" in text  # the chosen method's options
    assert "--selector NAME" in text and "selector.name" not in text
    assert "example: cauldron --stirs 3" in text
    assert "configuration file" not in text.replace("YAML file", "")


@dataclass
class Several:
    """Options of which one takes several words."""

    words: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Words."""
    stirs: int = 1
    """How often to stir."""


def test_options_of_several_words_add_up_on_the_line_and_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("words: [x=1, y=2]\n")
    for given, expected in (
        ([], []),
        (["--words", "a", "b"], ["a", "b"]),
        (["--words", "a", "--stirs", "2", "--words", "b"], ["a", "b"]),
        (["--config", str(file)], ["x=1", "y=2"]),
        (["--config", str(file), "--words=a"], ["a"]),
        ([], []),
    ):
        assert parse(Several, given).words == expected
    file.write_text("words: []\n")
    assert parse(Several, ["--config", str(file)]).words == []
