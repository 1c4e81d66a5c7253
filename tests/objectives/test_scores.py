"""Scores are computed from sums over batches of any size; masked tokens do not count, and each score has a direction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from torch import Tensor, nn

from fa_bench.data.splits import ArraySplit
from fa_bench.errors import OptionError
from fa_bench.metrics.evaluation import add, evaluate, with_scores
from fa_bench.objectives.base import Objective
from fa_bench.objectives.cross_entropy import CrossEntropy
from fa_bench.objectives.mse import MSE
from fa_bench.objectives.scores import ACCURACY, RMSE, Score, as_records, final_keys, scores_of
from fa_bench.objectives.sigmoid_ce import SigmoidCE
from fa_bench.objectives.token_cross_entropy import PERPLEXITY, TokenCrossEntropy


def scored(objective: Objective, outputs: Tensor, target: Tensor, batches: list[int], **more: float) -> dict[str, float]:
    """Compute the scores from sums over batches of these sizes."""
    sums: dict[str, Tensor] = {}
    loss, count = 0.0, 0
    for part, of_part in zip(outputs.split(batches), target.split(batches), strict=True):
        add(sums, objective.sums(part, of_part))
        loss += objective.loss(part, of_part, reduction="sum").item()
        count += int(objective.counted(of_part))
    return objective.scored({name: value.tolist() for name, value in sums.items()}, loss / count, count, **more)


def tokens() -> tuple[Tensor, Tensor]:
    """Logits (6, 5, 7) and targets (6, 5); the last two rows are nearly all masked."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(7, (6, 5), generator=generator)
    target[4:, 1:] = -100
    target[0, 3] = -100
    return torch.randn(6, 5, 7, generator=generator), target


@pytest.mark.parametrize("batches", [[6], [4, 2], [1, 2, 3]])
def test_token_scores_ignore_masked_tokens_and_batch_size(batches: list[int]) -> None:
    logits, target = tokens()
    counted = target != -100
    nats = F.cross_entropy(logits[counted], target[counted]).item()
    values = scored(TokenCrossEntropy(), logits, target, batches, characters=2.5)
    assert values == pytest.approx(
        {
            "perplexity": math.exp(nats),
            "bits_per_token": nats / math.log(2),
            "bits_per_character": nats / math.log(2) / 2.5,
            "accuracy": (logits.argmax(-1) == target)[counted].float().mean().item(),
        },
        rel=1e-5,
    )


def test_evaluation_loss_matches_objective_weighting() -> None:
    """Masked tokens do not count, and a row of numbers counts once."""
    tokens = torch.tensor([[0, 2, -100], [1, -100, -100], [2, 1, 0]])
    numbers = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for objective, inputs, target in (
        (TokenCrossEntropy(), F.one_hot(tokens.clamp(0), 3).float(), tokens),
        (MSE(), numbers, -numbers),
    ):
        found = evaluate(nn.Identity(), objective, ArraySplit(inputs, target, torch.device("cpu")), batch_size=2)
        assert found["loss"] == pytest.approx(objective.loss(inputs, target).item(), rel=1e-6)


def test_token_loss_is_mean_over_unmasked_tokens() -> None:
    logits, target = tokens()
    objective, counted = TokenCrossEntropy(), target != -100
    mean = F.cross_entropy(logits[counted], target[counted])
    torch.testing.assert_close(objective.loss(logits, target), mean)
    torch.testing.assert_close(objective.loss(logits, target, reduction="sum"), mean * counted.sum())
    of_samples = objective.loss(logits, target, reduction="none")
    assert of_samples.shape == (6,)
    torch.testing.assert_close(of_samples.mean(), mean)
    assert "bits_per_character" not in scored(objective, logits, target, [6])
    torch.testing.assert_close(objective.loss(logits[:, 0], target[:, 0]), F.cross_entropy(logits[:, 0], target[:, 0]))


def test_ignore_index_masks_tokens() -> None:
    logits, target = tokens()
    logits[..., 0] = 9.0  # the model predicts the padding class
    padded = TokenCrossEntropy(ignore_index=0)
    padding = target.clamp(min=0).masked_fill(target == -100, 0)
    counted = padding != 0
    torch.testing.assert_close(padded.loss(logits, padding), F.cross_entropy(logits[counted], padding[counted]))
    assert scored(padded, logits, padding, [6])["accuracy"] == 0
    assert padded.loss(logits, torch.zeros(6, 5, dtype=torch.long)).item() == 0


def test_perplexity_overflow_is_infinite() -> None:
    assert TokenCrossEntropy().scored({"correct": 0}, 1e4, 3)["perplexity"] == math.inf


@pytest.mark.parametrize("batches", [[30], [16, 14], [1, 29]])
def test_r2_matches_sklearn_for_any_batches(batches: list[int]) -> None:
    """R² is computed over all outputs together, as by scikit-learn with multioutput="variance_weighted". In float32, the offset
    of the targets, which is 1000, would cause cancellation."""
    generator = torch.Generator().manual_seed(1)
    target = 1000 + torch.randn(30, 2, generator=generator) * torch.tensor([1.0, 4.0])
    outputs = target + 0.5 * torch.randn(30, 2, generator=generator)
    values = scored(MSE(), outputs, target, batches)
    assert values["r2"] == pytest.approx(r2_score(target, outputs, multioutput="variance_weighted"), abs=1e-6)
    assert values["rmse"] == pytest.approx(np.sqrt(((outputs - target).double() ** 2).mean().item()))


def test_r2_is_zero_for_mean_and_omitted_for_constant_targets() -> None:
    target = torch.arange(4.0)[:, None]
    assert scored(MSE(), torch.full((4, 1), 1.5), target, [4])["r2"] == pytest.approx(0)
    for count in range(2, 40):  # the sum of squares around their mean may be rounded up or down
        assert scored(MSE(), torch.zeros(count, 1), torch.full((count, 1), 1000.1), [count - 1, 1]).keys() == {"rmse"}


def test_sigmoid_prediction_is_probability() -> None:
    target = torch.tensor([[0.25], [0.75]])
    assert scored(SigmoidCE(), torch.logit(target), target, [2]) == pytest.approx({"r2": 1, "rmse": 0}, abs=1e-6)


def test_scores_of_numpy_become_plain_numbers() -> None:
    """Checkpoints can contain only plain numbers."""

    class OfPlugin(CrossEntropy):
        def scored(self, *arguments: Any, **more: Any) -> dict[str, float]:
            return {"accuracy": np.float64(0.5), "hits": np.int64(3)}  # type: ignore[dict-item]

    split = ArraySplit(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.device("cpu"))
    values = with_scores(1.0, OfPlugin(), {}, 2, split)
    assert values == {"loss": 1.0, "accuracy": 0.5, "hits": 3}
    assert [type(value) for value in values.values()] == [float, float, int]


def test_classes_are_scored_by_their_accuracy() -> None:
    logits, target = torch.eye(4), torch.tensor([0, 1, 2, 0])
    for objective in (CrossEntropy(), MSE(), SigmoidCE()):
        assert scored(objective, logits, target, [3, 1]) == {"accuracy": 0.75}


def test_score_direction_and_record_round_trip() -> None:
    assert ACCURACY.merit(0.9) > ACCURACY.merit(0.8) and PERPLEXITY.merit(3) > PERPLEXITY.merit(4)
    assert (ACCURACY.text(0.9), RMSE.text(2), ACCURACY.direction, RMSE.direction) == ("90.00%", "2", "maximize", "minimize")
    assert PERPLEXITY.is_better(5, math.inf) and not PERPLEXITY.is_better(math.inf, 5)
    assert not PERPLEXITY.is_better(math.inf, math.inf)
    mine = (Score("f1", "F1", "%"), RMSE)
    assert scores_of({"scores": as_records(mine)}) == mine and scores_of({}) == scores_of(None) == (ACCURACY,)
    assert final_keys(mine)[:4] == ["test_f1", "test_f1_at_best_val", "val_f1", "train_f1"] and "val_rmse" in final_keys(mine)


def test_only_bits_per_character_requires_characters() -> None:
    kinds = TokenCrossEntropy.targets
    for name in ("perplexity", "bits_per_token", "bits_per_character", "accuracy"):
        objective = TokenCrossEntropy(score=name)
        assert all(objective.scores[kind][0].name == name and len(objective.scores[kind]) == 4 for kind in kinds)
        objective.check_data(1.0)
    for name in ("perplexity", "bits_per_token", "accuracy"):
        TokenCrossEntropy(score=name).check_data(None)
    with pytest.raises(OptionError, match="have no characters; use bits_per_token"):
        TokenCrossEntropy(score="bits_per_character").check_data(None)
    assert TokenCrossEntropy().scores == TokenCrossEntropy.scores
