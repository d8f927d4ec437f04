"""Which recipe suits a screen's profiles: each is followed on the raw profiles and tested. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import yaml
from pydantic import TypeAdapter, ValidationError

from pipelines.profiles import feature_names
from pipelines.vectors import read_profiles
from screening.profiles import NAMED_RECIPES, Consensus, Mean, Recipe, consensus_profiles, process
from screening.recipe_evaluation import RecipeEvaluationConfig, Score, class_scores, matching, replicate_scores
from screening.similarity import suggest
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen
from storage_schemas.store import write_json
from storage_schemas.tables import RECIPES, write_table

NAMES = {str(recipe().method): recipe for recipe in NAMED_RECIPES}


@dataclass(frozen=True)
class Evaluated:
    """Recipes tested.

    Attributes:
        scores: a row a recipe, test and metric (see :data:`storage_schemas.tables.RECIPES`).
        notes: what each recipe left out or could not do, and what could not be tested.
    """

    scores: pd.DataFrame
    notes: tuple[str, ...]


def parse_recipes(texts: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by name, ``all``, or as YAML mappings such as ``{method: sphered, regularisation: 1}``.

    Raises:
        InputError: for an unknown name, with near ones, or unknown settings.
    """
    found: dict[str, Recipe] = {}
    for text in texts:
        found |= {name: recipe() for name, recipe in NAMES.items()} if text == "all" else {text: parse_recipe(text)}
    return found


def parse_recipe(text: str) -> Recipe:
    """One recipe by its name, or as a YAML mapping.

    Raises:
        InputError: as :func:`parse_recipes`.
    """
    if text in NAMES:
        return NAMES[text]()
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--recipe {text!r}: is not YAML: {error}") from error
    if not isinstance(document, Mapping):
        near = suggest(text, NAMES)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}, all"
        raise InputError(f"--recipe {text!r}: unknown; {hint} Or give a mapping: '{{method: custom, steps: […]}}'")
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_python(document)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InputError(f"--recipe {text!r}: {problems}") from error
    return recipe


def evaluate_recipes(
    screen: Screen,
    recipes: Mapping[str, Recipe],
    config: RecipeEvaluationConfig | None = None,
    consensus: Consensus | None = None,
) -> Evaluated:
    """Test recipes on a screen's raw profiles.

    Args:
        screen: with profiles, imported or run.
        recipes: name -> recipe.
        config: what is looked up where.
        consensus: how wells are summed up to treatments, whose class is told.

    Raises:
        InputError: if a column is not there, or a recipe cannot be followed.
    """
    config = config or RecipeEvaluationConfig()
    wells, raw = read_profiles(screen, processed=False)
    names = feature_names(screen, raw.shape[1])
    keys = ["compound", *(key for key in matching(wells, config.match, "--match") if key != "compound")]
    labelled = config.label in wells and wells[config.label].notna().any()
    if not labelled:
        if config.label != "moa":
            matching(wells, [config.label], "--class", _renamed(screen))
        label_note = f"no compound has a class in {config.label!r}: classes are not tested; name a column with --class"
    rows: list[tuple[str, int, Score]] = []
    notes: list[str] = [] if labelled else [label_note]
    for name, recipe in recipes.items():
        done = process(raw, wells, recipe, names)
        notes += [f"{name}: {note}" for note in done.notes]
        scores = replicate_scores(done.values, wells, config)
        if labelled:
            of_treatment = wells.groupby(keys, sort=True, dropna=False)
            further = [name for name in dict.fromkeys(("role", config.label)) if name not in keys]
            treatments = of_treatment[further].first().reset_index()
            _, profiles = consensus_profiles(done.values, wells[keys], consensus or Mean())
            scores += class_scores(profiles, treatments, config)
        rows += [(name, done.values.shape[1], score) for score in scores]
    table = pd.DataFrame([{"recipe": name, "n_features": n, **score._asdict()} for name, n, score in rows])
    return Evaluated(table, tuple(dict.fromkeys(notes)))


def _renamed(screen: Screen) -> dict[str, str]:
    """What an import has called the columns that it was told the meaning of."""
    manifest = screen.read_manifest()
    columns = manifest.settings.get("columns", {}) if manifest.has_imported_profiles else {}
    return {column: key for key, column in columns.items()}


def wide(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a recipe, a column a test and metric: value with its interval; the last row is chance."""
    table = scores.assign(
        column=scores["test"] + " " + scores["metric"],
        text=[
            "–" if pd.isna(v) else f"{v:.3f}" + ("" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]")
            for v, low, high in zip(scores["value"], scores["low"], scores["high"], strict=True)
        ],
    )
    columns = list(dict.fromkeys(table["column"]))
    shown = table.pivot(index="recipe", columns="column", values="text").loc[
        list(dict.fromkeys(table["recipe"])), columns
    ]
    last = table.groupby("column")["chance"].first()
    shown.loc["(chance)"] = ["–" if pd.isna(last[name]) else f"{last[name]:.3f}" for name in columns]
    return shown.reset_index().rename_axis(columns=None)


def write_scores(url: str, evaluated: Evaluated) -> None:
    """Write the scores as Parquet, or with their notes as JSON, by the name of the file.

    Raises:
        InputError: for another name.
    """
    if url.endswith(".parquet"):
        write_table(url, evaluated.scores, RECIPES)
    elif url.endswith(".json"):
        rows = evaluated.scores.astype(object).where(evaluated.scores.notna(), None).to_dict("records")
        write_json(url, {"scores": rows, "notes": list(evaluated.notes)})
    else:
        raise InputError(f"{url}: expected a name that ends in .parquet or .json")
