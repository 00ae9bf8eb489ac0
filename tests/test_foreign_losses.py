"""Losses and miners of pytorch-metric-learning by their class path."""

import pytest
import torch
from test_cli import RECIPES, SMALL, ask, draw

from embedlab.losses import CrossBatchMemory, SupConLoss, ThresholdConsistentMarginLoss
from embedlab.methods import MetricLearning

losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pip install 'embedlab[bench]'")
miners = pytest.importorskip("pytorch_metric_learning.miners", reason="pip install 'embedlab[bench]'")
PLACE = "--model.init_args"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    "chosen",
    [
        ["loss.class_path=TripletMarginLoss", "miner.class_path=MultiSimilarityMiner"],
        ["loss.class_path=ProxyAnchorLoss", "loss.init_args.num_classes=9", "loss.init_args.embedding_size=128"],
        ["loss.class_path=MarginLoss", "miner.class_path=DistanceWeightedMiner"],
    ],
    ids=["triplet", "proxy anchor", "margin"],
)
def test_a_recipe_names_one_by_its_class_path(chosen, pictures, tmp_path, capsys) -> None:
    arguments = []
    for argument in chosen:
        name, value = argument.split("=")
        package = "losses" if name.startswith("loss") else "miners"
        full = f"pytorch_metric_learning.{package}.{value}" if name.endswith("class_path") else value
        arguments.append(f"{PLACE}.{name}={full}")
    result = ask(
        capsys,
        *["fit", "-c", RECIPES / "triplet.yaml", f"--data.init_args.root={pictures}", "--run", tmp_path / "run"],
        *[*SMALL, "--trainer.max_epochs=1", "--data.init_args.images_per_class=4", *arguments],
    )
    assert result["steps"] > 0
    assert result["metrics"]["train/loss"] > 0


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 6, generator=generator), torch.arange(12) // 3


def test_memory_and_regulariser_go_around_a_foreign_loss() -> None:
    z, y = batch()
    foreign, own = losses.SupConLoss(temperature=0.1), SupConLoss(0.1)
    memories = [CrossBatchMemory(loss, 6, capacity=16) for loss in (foreign, own)]
    for step in range(3):
        values = [memory(z + step, y) for memory in memories]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ThresholdConsistentMarginLoss(loss=foreign)(z, y), ThresholdConsistentMarginLoss(loss=own)(z, y)
    )


def test_a_foreign_miner_with_one_of_our_losses_is_explained() -> None:
    backbone = torch.nn.Linear(6, 6)
    backbone.out_features = 6
    with pytest.raises(ValueError, match=r"SupConLoss chooses its pairs itself: give it mining=\.\.\."):
        MetricLearning(backbone, loss=SupConLoss(), miner=miners.BatchHardMiner())


def test_a_random_foreign_miner_leaves_the_generator_alone() -> None:
    backbone = torch.nn.Linear(6, 6)
    backbone.out_features = 6
    method = MetricLearning(backbone, loss=losses.MarginLoss(), miner=miners.DistanceWeightedMiner())
    z, y = batch()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = method._mined(z, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert method._mined(z, y) == first, "the choice must not depend on a rank's own generator"
