from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise_trainer.lm import recipes
from equipoise_trainer.lm.corpus import paragraphs
from equipoise_trainer.lm.presets import PRESETS
from equipoise_trainer.lm.recipes import RECIPES, SOURCES, RecipeConfig, TextTask, load, replace_tokens
from equipoise_trainer.lm.vocabulary import END, Vocabulary
from equipoise_trainer.perturbation import PADDING, perturb
from tests.trainer.lm.sizes import TINY, tiny_task


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_sets_have_their_sizes_on_the_default_corpus(preset: recipes.Preset) -> None:
    task = load(RecipeConfig(recipe="clean", preset=preset, seed=1))
    assert [rows.shape for rows in (task.target, task.guard, task.test)] == [
        (size, preset.length) for size in (64, 32, 640)
    ]
    assert len(task.train) > 500
    assert int(task.train.max()) < preset.vocabulary


def test_no_paragraph_is_in_two_sets() -> None:
    """Text of a set, up to the cut ends, is found again in the paragraphs; no paragraph in two sets."""
    pieces = paragraphs()
    order = np.random.default_rng(np.random.SeedSequence(5).spawn(3)[0]).permutation(len(pieces))
    shuffled = [pieces[index] for index in order]
    most = round(len(shuffled) * (1 - recipes.VOCABULARY_SHARE))
    vocabulary = Vocabulary(shuffled[most:], size=TINY.vocabulary)
    task = tiny_task("clean", seed=5)
    seen: list[set[str]] = []
    for rows in (task.test, task.target, task.guard, task.train):
        text = vocabulary.decode(rows.ravel()).split(END)[1:-1]  # the first and the last may be cut
        found = {piece.strip() for piece in text}
        assert found <= set(pieces)
        seen.append(found)
    assert sum(len(found) for found in seen) == len(set.union(*seen)) > len(pieces) - 12  # 8 are cut


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_configurations_give_equal_tasks_and_seeds_differ(recipe: str) -> None:
    def arrays(task: TextTask) -> list[np.ndarray]:
        return [task.train, task.sources, task.target, task.guard, task.test]

    first, again, other = (load(RecipeConfig(recipe=recipe, preset=TINY, seed=seed)) for seed in (1, 1, 2))
    for one, two in zip(arrays(first), arrays(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.test, other.test)


def test_every_recipe_has_the_same_target_guard_and_test() -> None:
    clean, *others = (tiny_task(recipe) for recipe in RECIPES)
    for other in others:
        for name in ("target", "guard", "test"):
            np.testing.assert_array_equal(getattr(clean, name), getattr(other, name))


def test_sources_are_thirds_and_noise_is_where_it_is_said_to_be() -> None:
    clean, mixed = tiny_task("clean"), tiny_task("three-sources")
    counts = np.bincount(mixed.sources)
    assert counts.max() - counts.min() <= 1
    half = len(clean.train) // 2
    np.testing.assert_array_equal(mixed.train[mixed.sources == SOURCES.index("target")], clean.train[:half])
    changed = mixed.train[mixed.noisy] != clean.train[half:]
    # A random token is the old one once in a vocabulary.
    assert changed.mean() == pytest.approx(recipes.REPLACED * (1 - 1 / TINY.vocabulary), abs=0.01)


def test_half_of_the_perturbed_recipe_is_perturbed() -> None:
    clean, task = tiny_task("clean"), tiny_task("perturbed")
    assert task.noisy.mean() == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_array_equal(task.train[~task.noisy], clean.train[: len(clean.train) // 2])
    assert (task.train[task.noisy] != clean.train[len(clean.train) // 2 :]).any(1).mean() > 0.99


def test_perturbed_sequences_keep_their_length_and_padding_is_at_the_end() -> None:
    generator = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        noisy = perturb(np.arange(100, 132), vocabulary=50, generator=generator)
        assert noisy.shape == (32,)
        padded = noisy == PADDING
        assert not padded[: 32 - padded.sum()].any()
        kept = noisy[~padded]
        assert len(kept) >= 2
        kinds |= {"replaced"} if (kept < 50).any() else set()
        kinds |= {"repeated"} if (kept[1:] == kept[:-1]).any() else set()
        kinds |= {"deleted"} if padded.any() else set()
        # What was neither replaced nor repeated is in order.
        assert (np.diff(kept[kept >= 100]) >= 0).all()
    assert kinds == {"replaced", "repeated", "deleted"}


def test_replacing_leaves_the_input_alone() -> None:
    tokens = np.arange(20)
    replace_tokens(tokens, vocabulary=50, generator=np.random.default_rng(0))
    np.testing.assert_array_equal(tokens, np.arange(20))


def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "few"
    file.write_text("\n\n".join(f"paragraph number {n} of a few that say little" for n in range(300)))
    with pytest.raises(ValueError, match="less than the 736 sequences of 8 tokens that test, A and B need"):
        load(RecipeConfig(recipe="clean", preset=TINY, seed=0, corpus=file))


def test_a_vocabulary_larger_than_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary: 5000, but the corpus holds"):
        Vocabulary(["a few words"], size=5000)


def test_any_text_can_be_written_and_read_again() -> None:
    vocabulary = Vocabulary(["a few words about words"], size=260)
    text = " words, ünseen ones — 数 — too"
    (tokens,) = vocabulary.encode([text.strip()])
    assert vocabulary.decode(tokens) == text + END


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"recipe": "other"}, "recipe: 'other', must be one of clean"), ({"seed": -1}, "seed: -1, must be at least 0")],
)
def test_errors_name_field_value_and_rule(changes: dict[str, object], message: str) -> None:
    config = RecipeConfig(recipe="clean", preset=TINY, seed=0)
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)  # type: ignore[arg-type]
