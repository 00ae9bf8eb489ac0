"""Class proxies shared out among ranks: the same gradients, and checkpoints that fit any number of ranks."""

import socket
import warnings

import ddp_worker_shards as worker
import pytest
import torch
import torch.multiprocessing

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    results = {}
    for world in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (folder / "port").write_text(str(free.getsockname()[1]))
        arguments = (world, str(folder / "store"), str(folder / "results"), str(folder))
        torch.multiprocessing.spawn(worker.run, arguments, nprocs=world)
        results[world] = torch.load(folder / "results")
        results["folder", world] = folder
    return results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loss", worker.LOSSES)
def test_gradients_equal_one_process_on_the_union(found, loss, world) -> None:
    one, many = found[1][loss], found[world][loss]
    assert many["held"] < one["held"]
    assert many["value"] == pytest.approx(one["value"], rel=1e-9)
    for part in ("network", "proxies"):
        assert one[part].norm() > 1e-3
        assert (many[part] - one[part]).norm() / one[part].norm() < 1e-9, part


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loss", worker.LOSSES)
def test_the_state_holds_all_classes(found, loss, world) -> None:
    state = found[world][loss]["state"]
    torch.testing.assert_close(state["proxies"], worker.make(loss)[1].state_dict()["proxies"])
    _, alone = worker.make(loss)
    alone.load_state_dict(state)


def test_a_checkpoint_of_two_ranks_goes_on_as_one(found) -> None:
    """Classes and optimizer of all ranks are in it: the second epoch on one process ends where two epochs on one do."""
    folder = found["folder", 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a run without validation and on other devices than before
        straight = worker.fit(str(folder))
        one, two = (torch.load(folder / f"{name}.ckpt") for name in ("one", "two"))
        resumed = worker.fit(str(folder), resume=str(folder / "two.ckpt"))
    assert two["state_dict"]["loss.proxies"].shape == (worker.CLASSES, worker.DIM)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_without_rows_and_graph_takes_part(found, world) -> None:
    one, many = found[1]["edges"], found[world]["edges"]
    for alone, shared in zip(one["gradients"], many["gradients"], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-9, atol=1e-12)
    assert many["wrapped"] == pytest.approx(one["wrapped"], rel=1e-9)
    assert many["seen"] == one["seen"] == 11
