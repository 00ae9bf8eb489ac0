"""Two gloo processes train as one process does at the same global batch."""

import ddp_worker_training as worker
import pytest
import torch
import torch.multiprocessing

from embedlab import methods

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("training")
    torch.multiprocessing.spawn(worker.run, (str(folder / "store"), str(folder / "results")), nprocs=worker.WORLD)
    return [torch.load(folder / f"results-{rank}", weights_only=False) for rank in range(worker.WORLD)]


@pytest.mark.parametrize("layer", worker.LAYERS)
@pytest.mark.parametrize("shards", worker.SHARDS)
def test_sync_batch_norm_is_batch_norm_of_the_union(ranks, shards, layer) -> None:
    x, weight = worker.rows(layer, sum(worker.SHARDS[shards]))
    wanted = worker.normalize(worker.layer(layer, x.dtype), x, weight)
    parts = [rank[shards, layer] for rank in ranks]
    for name, value in wanted.items():
        if name in ("output", "input"):
            found = torch.cat([part[name] for part in parts])
        elif name.startswith("gradient"):
            found = sum(part[name] for part in parts)
        else:
            found = parts[0][name]
            assert torch.equal(found, parts[1][name])
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_sync_batch_norm_keeps_its_digits_far_from_zero(ranks) -> None:
    """Mean 10,000 and deviation 1 in float32: a difference of squares would have no digit left."""
    x, weight = worker.rows("2d", 8, mean=1e4)
    wanted = worker.normalize(worker.layer("2d", torch.float64), x.float().double(), weight)
    found = torch.cat([rank["far from zero"]["output"] for rank in ranks]).double()
    torch.testing.assert_close(found, wanted["output"], rtol=0, atol=5e-3)
    variance = ranks[0]["far from zero"]["running_var"].double()
    torch.testing.assert_close(variance, wanted["running_var"], rtol=1e-3, atol=0)


def test_sync_batch_norm_in_half_precision_keeps_type_and_layout(ranks) -> None:
    x, weight = worker.rows("2d", 8)
    wanted = worker.normalize(worker.layer("2d", torch.float64), x, weight)
    for name in ("output", "input"):
        found = torch.cat([rank["bfloat16"][name] for rank in ranks])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted[name], rtol=0.05, atol=0.05)
    assert ranks[0]["bfloat16"]["output"].is_contiguous(memory_format=torch.channels_last)
    assert ranks[0]["bfloat16"]["running_mean"].dtype == torch.float32


def test_chunks_with_synchronised_statistics_wait_for_one_another(ranks) -> None:
    """Every chunk's statistics are of that chunk on all ranks, though one rank has three chunks and the other one."""
    network, images = worker.chunked_network(), worker.chunked_images()
    first, second = images.split(worker.CHUNKED_ROWS)
    unions = [torch.cat([first[:2], second]), first[2:4], first[4:]]
    embeddings = [network(union) for union in unions[:2]]
    # one image alone is too few for PyTorch's BatchNorm1d, so its part by hand: variance 0
    convolution, linear, norm, last = network
    hidden = linear(convolution(unions[2]))
    norm.num_batches_tracked.add_(1)
    norm.running_mean = norm.running_mean.lerp(hidden[0].detach(), 0.1)  # in place the graph would notice
    norm.running_var = norm.running_var.lerp(torch.zeros(5).double(), 0.1)
    embeddings.append(last((hidden - hidden) * norm.weight + norm.bias))
    torch.cat(embeddings).square().sum().backward()
    wanted = worker.flat(network)
    found = [rank["chunks"] for rank in ranks]
    torch.testing.assert_close(found[0]["gradient"] + found[1]["gradient"], wanted["gradient"], rtol=1e-9, atol=1e-10)
    for rank in found:
        torch.testing.assert_close(rank["buffers"], wanted["buffers"], rtol=1e-11, atol=1e-12)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """For each tensor of the state the difference as a share of its norm."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3))
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("row", [row for row in worker.METHODS if row != worker.ALONE])
def test_two_processes_end_where_one_does(ranks, row, tmp_path) -> None:
    """After three steps of SGD: weights, running statistics, momentum networks, queues."""
    name = worker.METHODS[row].name
    assert hasattr(methods, name), f"embedlab.methods has no {name}: not written yet, or not exported"
    wanted = worker.train(row, str(tmp_path))
    start = worker.method(row).state_dict()
    assert max(distance(start, wanted).values()) > 1e-3, "nothing was learned"
    for rank in ranks:
        far = {key: value for key, value in distance(rank["method", row], wanted).items() if value > 1e-6}
        assert not far, f"{name} on two processes: {far}"


def test_without_synchronisation_they_end_elsewhere(ranks, tmp_path) -> None:
    """The control: the comparison above sees each rank's own batch statistics."""
    found = distance(ranks[0]["method", worker.ALONE], worker.train(worker.ALONE, str(tmp_path)))
    assert max(found.values()) > 1e-3
