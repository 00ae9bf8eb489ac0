"""Several gloo processes with different, uneven data give the gradient of one process on the union."""

import functools

import ddp_worker
import pytest
import torch
import torch.multiprocessing
from ddp_worker import LOSSES, SHARDS, TILES, Found
from torch import nn

from embedlab import losses

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[tuple[str, ...], list[Found]]:
    """What each rank has found."""
    results = {}
    for world in (2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        arguments = (world, str(folder / "store"), str(folder / "results"))
        torch.multiprocessing.spawn(ddp_worker.run, arguments, nprocs=world)
        ranks = [torch.load(folder / f"results-{rank}", weights_only=False) for rank in range(world)]
        results |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return results


@functools.cache
def union(loss: str, dtype: torch.dtype) -> Found:
    return ddp_worker.train(loss, dtype, TILES["one tile"], slice(None))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_every_exported_loss_and_miner_stands_in_the_table() -> None:
    """Losses without labels have a table of their own."""
    used = {type(module) for row in LOSSES.values() for module in row.make().modules()}
    kinds = {kind for kind in vars(losses).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert {kind for kind in kinds if not kind.__module__.endswith(".selfsupervised")} <= used


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shards", SHARDS)
def test_parameter_gradients_equal_one_process_on_the_union(found, shards, loss, tile, dtype, tolerance) -> None:
    ranks, one = found[shards, loss, str(dtype), tile], union(loss, dtype)
    for part, wanted in one.gradients.items():
        assert wanted.norm() > 1e-3, "the test would pass on a zero gradient"
        for rank in ranks:
            assert distance(rank.gradients[part], wanted) < tolerance
    for rank in ranks:
        assert rank.values == pytest.approx(one.values, rel=tolerance)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("loss", [name for name in LOSSES if list(LOSSES[name].make().buffers())])
@pytest.mark.parametrize("shards", SHARDS)
def test_what_a_loss_remembers_is_the_same_on_every_rank(found, shards, loss, tile) -> None:
    ranks, one = found[shards, loss, "torch.float64", tile], union(loss, torch.float64)
    assert one.buffers
    for name, wanted in one.buffers.items():
        for rank in ranks:
            torch.testing.assert_close(rank.buffers[name], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shards", SHARDS)
def test_tiles_are_divided_among_the_ranks(found, shards, loss) -> None:
    """Together the ranks do what one process does; where there is one tile, each does it all."""
    whole = ddp_worker.train(loss, torch.float64, TILES["divided"], slice(None)).tiles
    tiles = [rank.tiles for rank in found[shards, loss, "torch.float64", "divided"]]
    assert sum(tiles) == whole
    assert max(tiles) - min(tiles) <= whole / 3
    alone = union(loss, torch.float64).tiles
    assert [rank.tiles for rank in found[shards, loss, "torch.float64", "one tile"]] == [alone] * len(tiles)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gathering_each_rank_has_the_loss_of_its_own_rows(found, loss) -> None:
    first, second = SHARDS["2 ranks"]
    for rank, rows in zip(found[loss, "alone"], (slice(0, first), slice(first, first + second)), strict=True):
        local = ddp_worker.train(loss, torch.float64, TILES["divided"], rows, gather=False)
        assert rank.values == pytest.approx(local.values, rel=1e-9)
        assert rank.tiles == local.tiles, "nothing is divided"


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gathering_the_gradient_is_another_one(found, loss) -> None:
    """The control: per-rank losses, which is what a user gets elsewhere, must not pass the comparison above."""
    assert (
        distance(found[loss, "alone"][0].gradients["network"], union(loss, torch.float64).gradients["network"]) > 0.01
    )
