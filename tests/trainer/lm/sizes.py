"""A model and a task small enough for tests."""

from functools import cache

from equipoise_trainer.lm.presets import Preset
from equipoise_trainer.lm.recipes import RecipeConfig, TextTask, load

TINY = Preset(
    name="tiny",
    width=16,
    layers=1,
    heads=2,
    length=8,
    vocabulary=300,
    batch_size=8,
    steps=12,
    learning_rates=(1e-3, 1e-2),
)


@cache
def tiny_task(recipe: str = "three-sources", *, seed: int = 0) -> TextTask:
    return load(RecipeConfig(recipe=recipe, preset=TINY, seed=seed))
