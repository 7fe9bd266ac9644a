"""The recipes' modules, which are no package."""

import importlib
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(name):
    for folder in (RECIPES, RECIPES.parent / "benchmarks"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)
