"""Several gloo processes with different, uneven data give the gradient of one process on the union."""

import ddp_worker
import pytest
import torch
import torch.multiprocessing

pytestmark = pytest.mark.ddp
ROWS = {name: sum(shards) for name, shards in ddp_worker.SHARDS.items()}


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict:
    results = {}
    for world in (2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        arguments = (world, str(folder / "store"), str(folder / "results"))
        torch.multiprocessing.spawn(ddp_worker.run, arguments, nprocs=world)
        results |= torch.load(folder / "results")
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("loss", ddp_worker.LOSSES)
@pytest.mark.parametrize("shards", ddp_worker.SHARDS)
def test_parameter_gradients_equal_one_process_on_the_union(found, shards, loss, dtype, tolerance) -> None:
    values, gradient = found[shards, loss, str(dtype)]
    value, union = ddp_worker.on_one_process(ddp_worker.LOSSES[loss](), ROWS[shards], dtype)
    assert union.norm() > 1e-3, "the test would pass on a zero gradient"
    assert (gradient - union).norm() / union.norm() < tolerance
    assert values == pytest.approx([value] * len(values), rel=tolerance)


def test_without_gathering_the_gradient_is_another_one(found) -> None:
    """The control: per-rank losses, which is what a user gets elsewhere, must not pass the comparison above."""
    shards = ddp_worker.SHARDS["2 ranks"]
    images, labels = ddp_worker.data(sum(shards), torch.float64)
    parts = []
    for part in (slice(0, shards[0]), slice(shards[0], None)):
        net = ddp_worker.network(torch.float64)
        ddp_worker.LOSSES["SupConLoss"]()(net(images[part]), labels[part]).backward()
        parts.append(ddp_worker.gradient(net))
    gathered = found["2 ranks", "SupConLoss", "torch.float64"][1]
    assert (torch.stack(parts).mean(0) - gathered).norm() / gathered.norm() > 0.01
