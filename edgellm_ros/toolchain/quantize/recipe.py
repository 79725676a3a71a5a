"""What a quantisation recipe says, which combinations exist, and where the shipped YAML files are."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.errors import ToolchainError
from edgellm_ros.fields import check_settings, from_mapping, setting

# weights, activations: the algorithms that ModelOpt has for them and its checkpoint format can hold
METHODS: dict[tuple[str, str], tuple[str, ...]] = {
    ("fp8", "fp8"): ("max",),
    ("int4", "none"): ("awq",),
    ("int4", "fp8"): ("awq",),
    ("int8", "int8"): ("smoothquant",),
    ("nvfp4", "nvfp4"): ("max",),
    ("nvfp4", "none"): ("max",),
}
GROUP_SIZES = (128, 64, 32, 16)
NVFP4_GROUP = 16  # fixed by the format
_SHARE = Path("share", "edgellm_ros", "config", "recipes")  # where pip and colcon install config/recipes


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. Raises ToolchainError for a value or a combination that does not exist."""

    weights: str = setting("int4", "Number format of the linear layers.", choices=("fp8", "int4", "int8", "nvfp4"))
    activations: str = setting(
        "none", "Number format of what the linear layers read.", choices=("none", "fp8", "int8", "nvfp4")
    )
    method: str = setting(
        "awq",
        "max: scales from the largest values; awq: first scale the input features that matter most; smoothquant: move "
        "outliers from activations to weights.",
        choices=("max", "awq", "smoothquant"),
    )
    group_size: int = setting(
        0,
        "Input features that share an int4 scale, at most: the largest of 128, 64, 32, 16 that divides every layer.",
        minimum=0,
        maximum=128,
    )
    lm_head: str = setting(
        "none",
        "Number format of the head's weights: fp8, int4 or nvfp4; none leaves them.",
        choices=("none", "fp8", "int4", "nvfp4"),
    )
    kv_cache: str = setting(
        "none", "Number format that the KV cache is calibrated for: fp8 or none.", choices=("none", "fp8")
    )
    samples: int = setting(32, "Sequences of calibration text.", minimum=1, maximum=65536)
    sequence_length: int = setting(256, "Tokens in each of them.", minimum=16, maximum=32768, unit="tokens")
    exclude: tuple[str, ...] = setting((), "Modules that stay as they are, such as '*layers.0.*' or '*down_proj*'.")

    def __post_init__(self) -> None:
        check_settings(self, ToolchainError)
        known = METHODS.get((self.weights, self.activations))
        if known is None:
            table = ", ".join(f"{w} with {a}" for w, a in METHODS)
            raise ToolchainError(
                f"weights {self.weights} with activations {self.activations} do not exist; allowed are {table}"
            )
        if self.method not in known:
            raise ToolchainError(
                f"method is {self.method!r}; weights {self.weights} with activations {self.activations} are made "
                f"with {' or '.join(known)}"
            )
        if (self.weights == "int4") != (self.group_size != 0):
            raise ToolchainError(
                f"group_size is {self.group_size} with weights {self.weights}; it is for int4, which needs it"
            )
        if self.group_size and self.group_size not in GROUP_SIZES:
            raise ToolchainError(f"group_size is {self.group_size}; allowed are {', '.join(map(str, GROUP_SIZES))}")

    @property
    def takes_calibration(self) -> bool:
        """Whether anything depends on the calibration text; weight-only scales by the largest values do not."""
        head_activations = self.lm_head == "fp8"
        return self.activations != "none" or self.method != "max" or self.kv_cache != "none" or head_activations


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
    if isinstance(values.get("exclude"), list):
        values["exclude"] = tuple(map(str, values["exclude"]))
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
