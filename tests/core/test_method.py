"""The base of all methods: keyword arguments, what they show of themselves, names."""

import inspect
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter

import pytest

import pharmacist as ph
from pharmacist.core.errors import ConfigError
from pharmacist.core.method import Method
from pharmacist.core.registry import Registry


REGISTRIES: list[Registry] = [
    getattr(import_module(f"pharmacist.{package}"), name) for package, name in ph._REGISTRIES.items()
]
NAMED = [(registry, name) for registry in REGISTRIES for name in registry.names()]
GIVEN = {"guard": {"model": "llama-guard"}, "beaver-dam": {"model": "MODEL"}}
"""Options without which a method cannot be built."""


@dataclass
class StirConfig:
    rounds: int = 3
    """How often."""
    address: str = ""


class WoodenStir(Method):
    Config = StirConfig

    def __post_init__(self) -> None:
        self.turns = 2 * self.config.rounds


def test_a_method_is_its_options() -> None:
    stir = WoodenStir(rounds=5)
    assert (stir.config, stir.turns, stir.name) == (StirConfig(5), 10, "wooden-stir")
    assert repr(stir) == "WoodenStir(rounds=5, address='')" and eval(repr(stir)).config == stir.config
    assert stir.choice() == {"name": "wooden-stir", "rounds": 5, "address": ""}
    assert WoodenStir(StirConfig(4)).turns == 8
    assert str(inspect.signature(WoodenStir)) == "(*, rounds: int = 3, address: str = '')"
    with pytest.raises(ConfigError, match="^WoodenStir has no option 'round'; did you mean 'rounds'?"):
        WoodenStir(round=5)
    with pytest.raises(TypeError, match="a config or its fields"):
        WoodenStir(StirConfig(), rounds=5)


def test_no_password_is_shown() -> None:
    assert repr(WoodenStir(address="https://me:secret@host/v1")) == "WoodenStir(rounds=3, address='https://host/v1')"


def test_a_subclass_has_a_name_of_its_own() -> None:
    class TVaccine(ph.Vaccine):
        pass

    assert (TVaccine.name, ph.TVaccine.name, TVaccine(rho=3).config.rho) == ("tvaccine", "t-vaccine", 3)


@pytest.mark.parametrize(("registry", "name"), NAMED, ids=lambda value: getattr(value, "kind", value))
def test_every_method_is_built_from_keywords_and_shows_them(registry: Registry, name: str) -> None:
    kind = registry.get(name)
    assert issubclass(kind, Method) and kind.name == name and kind.__doc__
    assert getattr(ph, kind.__name__) is kind and kind.__name__ in dir(ph)
    options = inspect.signature(kind.Config).parameters.values()
    by_name = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
    assert [*inspect.signature(kind).parameters.values()] == by_name
    built = kind(**GIVEN.get(name, {}))
    assert repr(built).startswith(f"{kind.__name__}(") and registry.build_from(built.choice()).config == built.config


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="rho must not be negative"):
        ph.Vaccine(rho=-1)
    with pytest.raises(AttributeError, match="no attribute 'Vacine'"):
        _ = ph.Vacine


def test_methods_wait_until_they_are_asked_for() -> None:
    code = "import sys, pharmacist as ph; 'Vaccine' in dir(ph); before = 'torch' in sys.modules; ph.Vaccine\n"
    code += "print(before, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_options_are_given_by_name_as_help_shows() -> None:
    assert {option.kind for option in inspect.signature(ph.Vaccine).parameters.values()} == {Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="Vaccine: options are given by name"):
        ph.Vaccine(2)
