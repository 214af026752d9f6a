"""The paper's transformer and its sequences."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from equipoise_trainer.commands.reproduce import main
from equipoise_trainer.offline.module import Apply
from equipoise_trainer.perturbation import PADDING, perturb
from equipoise_trainer.reproduction.runs import FinishedRun
from equipoise_trainer.reproduction.sequences import Sizes, draw_sequences
from equipoise_trainer.reproduction.texts import TEXT_STUDIES, text_jobs
from equipoise_trainer.reproduction.transformer import PaperTransformer, sequence_losses


def small() -> PaperTransformer:
    torch.manual_seed(0)
    return PaperTransformer(vocabulary=13, length=8, width=8, layers=2, heads=2)


def test_no_token_sees_a_later_one() -> None:
    model, tokens = small(), torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 12
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_a_loss_is_the_mean_over_the_tokens_that_are_there() -> None:
    model = small()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, PADDING, PADDING, PADDING, PADDING, PADDING]])

    def apply(inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = functional_call(model, dict(model.named_parameters()), (inputs,))
        return outputs

    applied: Apply = apply
    found = sequence_losses(applied, tokens).detach()
    for row, count in ((0, 8), (1, 3)):
        logits = model(tokens[row : row + 1, : count - 1])[0].log_softmax(dim=-1).detach()
        expected = -sum(logits[place, tokens[row, place + 1]] for place in range(count - 1)) / (count - 1)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)


def test_sets_share_no_paragraph_and_half_of_the_training_sequences_are_perturbed(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    words = [f"word{number:04d}" for number in range(3000)]
    corpus.write_text(
        "\n\n".join(" ".join(words[start : start + 10]) for start in range(0, 3000, 10)), encoding="utf-8"
    )
    sizes = Sizes(train=40, target=10, test=12, length=16, vocabulary=300)
    drawn = draw_sequences(corpus, sizes, generator=np.random.default_rng(0))
    assert (drawn.train.shape, drawn.target.shape, drawn.test.shape) == ((40, 16), (10, 16), (12, 16))
    assert drawn.perturbed.sum() == 20
    assert (drawn.train[~drawn.perturbed] != PADDING).all()
    again = draw_sequences(corpus, sizes, generator=np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.train, again.train)
    for path, asked, message in (
        (corpus, replace(sizes, train=4000), "corpus: too small"),
        (corpus, replace(sizes, vocabulary=50_000), "vocabulary: 50000, but the corpus holds"),
        (tmp_path / "absent", sizes, "absent, must be a text file or a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_sequences(path, asked, generator=np.random.default_rng(0))


def test_a_data_set_on_disk_gives_the_sequences_of_its_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package is optional")
    words = [f"word{number:04d}" for number in range(3000)]
    texts = [" ".join(words[start : start + 10]) for start in range(0, 3000, 10)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "file").write_text("\n\n".join(texts), encoding="utf-8")
    sizes = Sizes(train=40, target=10, test=12, length=16, vocabulary=300)
    one, other = (
        draw_sequences(tmp_path / name, sizes, generator=np.random.default_rng(0)) for name in ("set", "file")
    )
    np.testing.assert_array_equal(one.train, other.train)
    np.testing.assert_array_equal(one.test, other.test)


def test_perturbing_keeps_the_length_and_leaves_something_to_predict() -> None:
    generator = np.random.default_rng(0)
    tokens = np.arange(16)
    for _ in range(200):
        noisy = perturb(tokens, vocabulary=100, generator=generator)
        assert noisy.shape == tokens.shape
        there = noisy != PADDING
        assert there.sum() >= 2
        assert there[: there.sum()].all()  # padding stands at the end alone
        assert not np.array_equal(noisy, tokens)


def test_presets_have_the_papers_shape() -> None:
    for name in ("gpu", "paper"):
        study = TEXT_STUDIES[name]
        assert (study.width, study.heads, study.layers, study.length, study.vocabulary) == (128, 8, 2, 64, 5000)
    paper = TEXT_STUDIES["paper"]
    assert (paper.train_size, paper.target_size, paper.steps, paper.policy_epochs) == (16384, 512, 4000, 15)
    model = PaperTransformer(vocabulary=5000, length=64, width=128, layers=2, heads=8)
    # "about 1.7 million parameters" (appendix D)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(1.7e6, rel=0.05)


def test_the_command_lowers_the_area_and_makes_its_part_of_the_page(tmp_path: Path) -> None:
    tiny = replace(TEXT_STUDIES["cpu"], train_size=32, target_size=16, test_size=32, steps=6, policy_epochs=1)
    (job,) = text_jobs(tiny, [0], folder=tmp_path / "lm", corpus=None, device=torch.device("cpu"))
    job.run(at="local", address=None, online=False, stop=lambda: False, on_epoch=lambda epoch, seconds: None)
    assert main(["lm", "--output", str(tmp_path)]) == 0  # what is finished is not run again
    run = FinishedRun.load(tmp_path / "lm" / "cpu" / "seed-0")
    assert run.final.area < run.uniform.area
    assert run.uniform.target_loss[0] == pytest.approx(math.log(320), rel=0.1)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h2>Transformer</h2>" in page
    assert "<h2>Scaling law</h2>" in page
    findings = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert findings["lm"]["cpu"][0]["compression"][0] == pytest.approx(math.log(320) / run.uniform.area)


def test_a_preset_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm", "--preset", "tiny", "--output", str(tmp_path)]) == 2
    assert "preset: 'tiny', must be one of cpu, gpu, paper" in capsys.readouterr().err


def test_a_directory_that_is_no_data_set_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["lm", "--corpus", str(tmp_path), "--rows", "local", "--no-online", "--output", str(tmp_path / "out")]
    assert main(wanted) == 1
    assert "is no data set on disk: it has none of dataset_info.json" in capsys.readouterr().err
