"""The lock names every package that is asked for, in a version that is allowed, with its SHA-256."""

import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def asked() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(each) for each in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    lines = (ROOT / "tests" / "requirements.lock").read_text(encoding="utf-8").splitlines()[1:]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found)
    return {canonicalize_name(each[1]): each[2] for each in found if each}


def test_everything_that_is_asked_for_is_locked_in_an_allowed_version(
    asked: list[Requirement], locked: dict[str, str]
) -> None:
    for each in asked:
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), each


def test_what_those_need_is_locked_too(locked: dict[str, str]) -> None:
    some = ("transformers", "datasets", "pydantic", "pytest")
    if any(version(name) != locked[name] for name in some):
        pytest.skip("other releases than the locked ones are installed here")
    for name in some:
        needs = [Requirement(each) for each in requires(name) or () if "extra ==" not in each]
        needed = [each.name for each in needs if each.marker is None or each.marker.evaluate()]
        assert {canonicalize_name(each) for each in needed} <= locked.keys()


def test_the_oldest_releases_are_the_floors_of_pyproject(asked: list[Requirement]) -> None:
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines[2:])}
    floors = {canonicalize_name(each.name): each.specifier for each in asked if canonicalize_name(each.name) in oldest}
    assert len(floors) == len(oldest) >= 15
    for name, release in oldest.items():
        floor = next(each.version for each in floors[name] if each.operator == ">=")
        assert release.removesuffix(".0").removesuffix(".0") == floor.removesuffix(".0").removesuffix(".0"), name
