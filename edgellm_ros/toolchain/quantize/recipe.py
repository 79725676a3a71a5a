"""Where the recipes are, and how one is read from a YAML file and written to it; what it says is config.Recipe."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from edgellm_ros.config import Recipe
from edgellm_ros.errors import ToolchainError
from edgellm_ros.fields import from_mapping

_SHARE = Path("share", "edgellm_ros", "config", "recipes")  # where pip and colcon install config/recipes


def load_recipe(source: str | Path, **overrides: Any) -> Recipe:
    """The shipped recipe of that name, or the YAML file at that path, with some fields replaced.

    Raises ToolchainError for a name that is not shipped, an unknown key, and a value that does not exist.
    """
    import yaml

    path = _find(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolchainError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ToolchainError(f"recipe {path} holds no keys; copy one of {', '.join(recipe_names())} and change it")
    exclude = values.get("exclude", [])
    if not isinstance(exclude, list):
        raise ToolchainError(f"recipe {path}: exclude is {exclude!r}; it must be a list, such as ['*layers.0.*']")
    values["exclude"] = tuple(map(str, exclude))
    try:
        recipe: Recipe = from_mapping(Recipe, values, ToolchainError)
    except ToolchainError as error:
        raise ToolchainError(f"recipe {path}: {error}") from error
    return dataclasses.replace(recipe, **overrides)


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in recipe_directory().glob("*.yaml"))


def recipe_directory() -> Path:
    """config/recipes of the source tree, or where it was installed; raises ToolchainError when it is nowhere."""
    home = Path(__file__).resolve()
    source = home.parents[3] / "config" / "recipes"
    places = [source, *(parent / _SHARE for parent in home.parents), Path(sys.prefix) / _SHARE]
    for place in places:
        if place.is_dir():
            return place
    raise ToolchainError(f"the shipped recipes are not at {source}, nor installed; give a recipe's path")


def dump_recipe(recipe: Recipe) -> str:
    """The YAML text that load_recipe reads again."""
    import yaml

    values = dataclasses.asdict(recipe)
    text: str = yaml.safe_dump({**values, "exclude": list(recipe.exclude)}, sort_keys=False)
    return text


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ToolchainError(f"recipe {path} does not exist; shipped are {', '.join(recipe_names())}")
        return path
    shipped = recipe_directory() / f"{source}.yaml"
    if path.name != str(source) or not shipped.is_file():
        raise ToolchainError(
            f"recipe is {str(source)!r}; allowed are {', '.join(recipe_names())}, or the path of a .yaml file"
        )
    return shipped
