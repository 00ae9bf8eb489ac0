"""Every method without labels: first steps by hand, averages, queues and centres that move as the papers say."""

import copy
import inspect
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import ddp_worker_methods as worker
import naive
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing
from ddp_worker_methods import METHODS, Tiny, batch, make
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import embedlab.methods
from embedlab._types import Batch
from embedlab.encoders import Encoder, LinearHead, MLPHead
from embedlab.losses import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from embedlab.methods import (
    BYOL,
    DINO,
    NNCLR,
    DINOHead,
    Method,
    MoCoV2,
    MoCoV3,
    SimSiam,
    SwAV,
)
from embedlab.methods._parts import Queue, by_size
from embedlab.methods.ema import cosine_momentum, follow, frozen_copy


@dataclass
class About:
    """What the common tests must know about a method beyond how it is made."""

    state: tuple[str, ...] = ()  # beginnings of the names of running state
    crops: bool = False  # takes more than two views


ABOUT = {
    "SimCLR": About(crops=True),
    "MoCoV2": About(state=("queue.rows", "queue.pointer", "teacher.backbone.", "teacher.head.")),
    "MoCoV3": About(state=("teacher.backbone.", "teacher.head."), crops=True),
    "BYOL": About(state=("teacher.backbone.", "teacher.head."), crops=True),
    "SimSiam": About(),
    "BarlowTwins": About(),
    "VICReg": About(),
    "SwAV": About(state=("prototypes", "queues.0.rows", "queues.1.rows", "queues.0.pointer"), crops=True),
    "DINO": About(state=("loss.center", "loss.steps", "student_backbone.", "student_head.last."), crops=True),
    "NNCLR": About(state=("queue.rows", "queue.pointer")),
}
FOLLOWING = ["MoCoV2", "MoCoV3", "BYOL", "DINO"]


def average_of(method: Method) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the moving average and of the network that it follows."""
    if isinstance(method, DINO):
        average, network = [method.backbone, method.head], [method.student_backbone, method.student_head]
    else:
        average, network = [method.teacher.backbone, method.teacher.head], [method.backbone, method.head]
    return [[p for part in parts for p in part.parameters()] for parts in (average, network)]


def step(method: Method, given: Batch) -> torch.Tensor:
    """A training step outside of a Trainer."""
    method.log = lambda *arguments, **named: None
    return method.train().training_step(given, 0)


def fit(method: Method, batches: list[Batch], **arguments) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(**{**settings, **quiet, **arguments})
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
        trainer.fit(method, loader)
    return trainer


class Watch(pl.Callback):
    """What a run looked like."""

    def __init__(self) -> None:
        self.losses, self.networks, self.averages = [], [], []

    def on_train_batch_end(self, trainer, method, outputs, *arguments) -> None:
        self.losses.append(outputs["loss"].item())
        if isinstance(method, MoCoV2 | MoCoV3 | BYOL | DINO):
            average, network = ([p.detach().clone() for p in part] for part in average_of(method))
            self.averages.append(average)
            self.networks.append(network)


def test_every_exported_method_stands_in_the_tables() -> None:
    exported = {
        name for name, kind in vars(embedlab.methods).items() if inspect.isclass(kind) and issubclass(kind, Method)
    }
    assert exported - {"Method", "MetricLearning"} == set(METHODS) == set(ABOUT)
    page = (Path(__file__).parents[1] / "docs" / "self-supervised.md").read_text()
    recipes = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")}
    for name in METHODS:
        assert f"embedlab.methods.{name}" in page or f"`{name}`" in page, name
        assert {"BarlowTwins": "barlow_twins"}.get(name, name.lower()) in recipes, name


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_decreases(name) -> None:
    # DINO's teacher stands still: the loss against one that moves says nothing on a set as small as this
    own = {"momentum": 1.0, "frozen_epochs": 0} if name == "DINO" else {}
    method = make(name, optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3), warmup=0.0, **own)
    watch = Watch()
    fit(method, [batch(24)] * 60, callbacks=[watch])
    assert all(math.isfinite(loss) for loss in watch.losses)
    settled = 10  # a queue of random rows is easy, until it is filled
    first, last = sum(watch.losses[settled : settled + 5]) / 5, sum(watch.losses[-5:]) / 5
    assert last < first - 0.02 * abs(first), (first, last)


@pytest.mark.parametrize("name", METHODS)
def test_the_backbone_is_what_stays(name) -> None:
    method = make(name).eval()
    assert method.embedding_head is None
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(method(images), method.backbone(images))
    encoder = Encoder(method.backbone, method.embedding_head, image_size=8, mean=[0.0] * 3, std=[1.0] * 3).eval()
    torch.testing.assert_close(encoder(images.sigmoid()), normalize(method(images.sigmoid())))


@pytest.mark.parametrize("name", METHODS)
def test_the_state_holds_all_that_runs(name) -> None:
    """A second object that is given the state goes on like the first, to the bit."""
    method = make(name)
    for number in range(3):
        step(method, batch(6, seed=number)).backward()
    state = copy.deepcopy(method.state_dict())
    for beginning in ABOUT[name].state:
        assert any(key.startswith(beginning) for key in state), beginning
    other = make(name, seed=7)
    other.load_state_dict(state)
    given = batch(6, seed=9)
    assert torch.equal(step(method, given), step(other, given))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_too_few_views_are_refused(name) -> None:
    one = batch(4, views=1)
    with pytest.raises(ValueError, match=f"{name} needs two views per image, got one; set data.init_args.views.count"):
        step(make(name), one)


@pytest.mark.parametrize("name", [name for name in METHODS if not ABOUT[name].crops])
def test_too_many_views_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name} takes two views per image, got 3; .* choose SwAV, DINO, BYOL or"):
        step(make(name), batch(4, views=3))


@pytest.mark.parametrize("name", [name for name in METHODS if ABOUT[name].crops])
def test_crops_of_two_sizes(name) -> None:
    """Small crops reach the loss and its gradient; the two full views must be of one size."""
    given = batch(4, views=5, small=3)
    assert [view.shape[-1] for view in given.views] == [8, 8, 4, 4, 4]
    method = make(name)
    step(method, given).backward()
    with_crops = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    method = make(name)
    step(method, Batch(given.views[:2], None, given.index)).backward()
    without = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    assert any(not torch.allclose(a, b) for a, b in zip(with_crops, without, strict=True))
    if name != "SimCLR":
        with pytest.raises(ValueError, match=f"{name} needs two full views of one size first, .* small crops come aft"):
            step(make(name), Batch((given.views[0], *given.views[2:]), None, given.index))


def test_by_size_makes_one_pass_per_size_and_keeps_the_order() -> None:
    passes = []

    def network(images):
        passes.append(tuple(images.shape))
        return images.mean(dim=(2, 3))

    views = batch(4, views=5, small=3).views
    views = tuple(views[number] for number in (0, 2, 1, 3, 4))
    torch.testing.assert_close(by_size(network, views), torch.cat([view.mean(dim=(2, 3)) for view in views]))
    assert passes == [(8, 3, 8, 8), (12, 3, 4, 4)]


# ---- first steps by hand --------------------------------------------------------------------------------------------


def by_hand(backbone: nn.Module, head: nn.Module, given: Batch) -> tuple[torch.Tensor, ...]:
    """z1, z2 of a network, which stays as it is."""
    return tuple(copy.deepcopy(head)(copy.deepcopy(backbone)(view)).double() for view in given.views)


def hand_networks(method: Method, given: Batch) -> tuple[torch.Tensor, ...]:
    """z1, z2 of `backbone` and `head`."""
    return by_hand(method.backbone, method.head, given)


def apart(name: str, **arguments) -> Method:
    """A method whose average is another network than the one that it follows."""
    method = make(name, **arguments)
    with torch.no_grad():
        for parameter in average_of(method)[0]:
            parameter += 0.1 * torch.randn(parameter.shape)
    return method


def test_mocov2_is_info_nce_against_keys_and_queue() -> None:
    method, given = apart("MoCoV2", temperature=0.2), batch(6)
    queries, keys = hand_networks(method, given)[0], by_hand(method.teacher.backbone, method.teacher.head, given)[1]
    reference = torch.cat([keys, method.queue.rows.double()])
    labels = torch.cat([given.index, torch.full((len(method.queue.rows),), -1)])
    expected = naive.info_nce(queries, given.index, reference, labels, temperature=0.2)
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.queue.rows[:6].double(), normalize(keys, dim=1), rtol=1e-4, atol=1e-5)
    assert int(method.queue.pointer) == 6


def test_mocov3_is_the_sum_of_two_cross_entropies_times_two_tau() -> None:
    method, given, tau = apart("MoCoV3", temperature=0.5), batch(6), 0.5
    keys = by_hand(method.teacher.backbone, method.teacher.head, given)
    queries = [copy.deepcopy(method.predictor)(z.float()).double() for z in hand_networks(method, given)]
    expected = 0.0
    for query, key in ((queries[0], keys[1]), (queries[1], keys[0])):
        logits = normalize(query, dim=1) @ normalize(key, dim=1).T / tau
        expected = expected + cross_entropy(logits, torch.arange(6)) * 2 * tau
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-5, atol=1e-6)


def test_byol_is_two_minus_two_cosines_in_both_directions() -> None:
    method, given = apart("BYOL"), batch(6)
    targets = by_hand(method.teacher.backbone, method.teacher.head, given)
    predictions = [copy.deepcopy(method.predictor)(z.float()).double() for z in hand_networks(method, given)]
    expected = 0.0
    for prediction, target in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        expected = expected + (normalize(prediction, dim=1) - normalize(target, dim=1)).square().sum(dim=1).mean()
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-5, atol=1e-6)


def test_simsiam_is_half_of_both_cosines_and_stops_the_gradient() -> None:
    method, given = make("SimSiam"), batch(6)
    z1, z2 = (method.head(method.backbone(view)) for view in given.views)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    expected = -nn.functional.cosine_similarity(p1, z2.detach()).mean() / 2
    expected = expected - nn.functional.cosine_similarity(p2, z1.detach()).mean() / 2
    loss = step(method, given)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, list(method.backbone.parameters()))
    torch.testing.assert_close(torch.autograd.grad(loss, list(method.backbone.parameters())), wanted)


@pytest.mark.parametrize(("name", "loss"), [("BarlowTwins", BarlowTwinsLoss()), ("VICReg", VICRegLoss())])
def test_barlow_twins_and_vicreg_are_their_losses_on_the_projections(name, loss) -> None:
    method, given = make(name), batch(6)
    first, second = hand_networks(method, given)
    torch.testing.assert_close(step(method, given).double(), loss(first, second), rtol=1e-4, atol=1e-4)


def test_simclr_takes_crops_of_several_sizes() -> None:
    method, given = make("SimCLR"), batch(4, views=3, small=1)
    projections = torch.cat(hand_networks(method, given))
    expected = NTXentLoss(0.1)(projections, given.index.repeat(3))
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-5, atol=1e-5)


def test_swav_swaps_the_codes_of_sinkhorn() -> None:
    method, given = make("SwAV", queue=0), batch(6)
    prototypes = normalize(method.prototypes.detach().double(), dim=1)
    scores = [normalize(z, dim=1) @ prototypes.T for z in hand_networks(method, given)]
    codes = []
    for score in scores:
        code = (score / 0.05).exp()
        for _ in range(3):
            code = code / code.sum(dim=0, keepdim=True)
            code = code / code.sum(dim=1, keepdim=True)
        codes.append(code.detach())
    log_p = [(score / 0.1).log_softmax(dim=1) for score in scores]
    expected = -(codes[0] * log_p[1]).sum(dim=1).mean() / 2 - (codes[1] * log_p[0]).sum(dim=1).mean() / 2
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-4, atol=1e-5)


def test_dino_is_a_cross_entropy_between_student_and_sharpened_teacher() -> None:
    method, given = apart("DINO"), batch(6)
    scores = hand_networks(method, given)  # the average is what `backbone` and `head` name
    teacher = [(score / 0.04).softmax(dim=1) for score in scores]
    student = [(z / 0.1).log_softmax(dim=1) for z in by_hand(method.student_backbone, method.student_head, given)]
    expected = -(teacher[0] * student[1]).sum(dim=1).mean() / 2 - (teacher[1] * student[0]).sum(dim=1).mean() / 2
    torch.testing.assert_close(step(method, given).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        method.loss.center.double(), 0.1 * torch.cat(scores).mean(dim=0, keepdim=True), rtol=1e-3, atol=1e-6
    )


def test_nnclr_lets_neighbours_pick_the_predictions() -> None:
    method, given = make("NNCLR"), batch(6)
    z = hand_networks(method, given)
    rows = method.queue.rows.double().clone()
    predictions = [normalize(copy.deepcopy(method.predictor)(part.float()).double(), dim=1) for part in z]
    expected = 0.0
    for number in range(2):
        neighbours = rows[torch.cdist(normalize(z[number], dim=1), rows).argmin(dim=1)]
        logits = neighbours @ predictions[1 - number].T / 0.1
        expected = expected + cross_entropy(logits, torch.arange(6)) / 2
    loss = step(method, given)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.queue.rows[:6].double(), normalize(z[0], dim=1), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.predictor.parameters() if p.ndim > 1)


# ---- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLLOWING)
def test_no_gradient_reaches_the_average(name) -> None:
    method = make(name)
    before = [p.clone() for p in average_of(method)[0]]
    step(method, batch(6)).backward()
    average, network = average_of(method)
    assert not any(p.requires_grad or p.grad is not None for p in average)
    assert all(torch.equal(a, b) for a, b in zip(average, before, strict=True)), (
        "it moves after the optimizer step only"
    )
    assert any(p.grad is not None for p in network)
    in_optimizer = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not in_optimizer & {id(p) for p in average}
    assert {id(p) for p in network if p.requires_grad} <= in_optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", FOLLOWING)
def test_the_average_follows_once_per_optimizer_step(name, accumulate) -> None:
    method, watch = make(name, momentum=0.8, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)), Watch()
    expected = [p.detach().double().clone() for p in average_of(method)[0]]
    batches = [batch(4, seed=number) for number in range(6)]
    trainer = fit(method, batches, callbacks=[watch], accumulate_grad_batches=accumulate)
    steps = 6 // accumulate
    assert trainer.global_step == steps
    for number in range(steps):
        momentum = 0.8 if name == "MoCoV2" else 1 - 0.2 * (math.cos(math.pi * number / steps) + 1) / 2
        after = (number + 1) * accumulate - 1
        expected = [momentum * a + (1 - momentum) * b for a, b in zip(expected, watch.networks[after], strict=True)]
        for got, wanted in zip(watch.averages[after], expected, strict=True):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    moved = [not torch.equal(a, b) for a, b in zip(watch.averages[0], watch.averages[-1], strict=True)]
    assert any(moved)


def test_follow_averages_parameters_and_leaves_buffers_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = frozen_copy(network)
    network(torch.randn(8, 3))
    with torch.no_grad():
        network[0].weight += 1
    before = copy.deepcopy(average.state_dict())
    follow(average, network, 0.9)
    after = average.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] + 0.1)
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(network.state_dict()["1.running_mean"], before["1.running_mean"])


def test_the_averages_batch_norm_moves_by_its_own_batches() -> None:
    method = BYOL(Tiny(norm=True), MLPHead(8))
    step(method, batch(6))
    assert int(method.teacher.backbone.net[1].num_batches_tracked) == 1


def test_the_momentum_rises_to_one() -> None:
    assert cosine_momentum(0.9, 0, 10) == pytest.approx(0.9)
    assert cosine_momentum(0.9, 10, 10) == cosine_momentum(0.9, 11, 10) == 1
    assert cosine_momentum(0.9, 5, math.inf) == pytest.approx(0.9), "a run without an end stays where it began"


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_momentum_out_of_range_is_refused(name) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs a momentum in \[0, 1\] .* got 1.5; 0.99 to 0.999 are usual"):
        make(name, momentum=1.5)


# ---- queues, prototypes, heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 12])
def test_a_queue_keeps_the_newest_whatever_the_batch(rows) -> None:
    queue, everything = Queue(5, 2), torch.arange(2.0 * rows * 4).view(-1, 2)
    for part in everything.split(rows):
        queue.append(part)
    assert int(queue.pointer) == len(everything)
    assert queue.full == (len(everything) >= 5)
    kept = {tuple(row) for row in queue.rows.tolist()}
    assert {tuple(row) for row in everything[-5:].tolist()} <= kept
    with pytest.raises(ValueError, match="A queue needs at least one row, got 0"):
        Queue(0, 2)


def test_swav_uses_its_queue_when_it_is_full_and_its_epoch_has_come() -> None:
    method = make("SwAV", queue=8, queue_epoch=0)
    step(method, batch(6))
    assert method.queue_scores() is None, "random rows are in it"
    step(method, batch(6, seed=1))
    first, second = method.queue_scores()
    assert first.shape == second.shape == (8, len(method.prototypes))
    assert not torch.equal(first, second)
    late = make("SwAV", queue=8, queue_epoch=1)
    for _ in range(2):
        step(late, batch(6))
    assert late.queue_scores() is None
    assert make("SwAV", queue=0, queue_epoch=0).queue_scores() is None
    with pytest.raises(ValueError, match="SwAV needs prototypes >= 2 and queue >= 0"):
        make("SwAV", queue=-1)


@pytest.mark.parametrize(
    ("name", "part"), [("SwAV", lambda m: m.prototypes), ("DINO", lambda m: m.student_head.last.weight)]
)
def test_prototypes_and_last_layer_wait_an_epoch(name, part) -> None:
    def optimizer(groups):
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    batches = [batch(6, seed=number) for number in range(3)]
    method = make(name, optimizer=optimizer)
    with torch.no_grad():
        part(method).copy_(normalize(part(method), dim=1))
    before = part(method).detach().clone()
    fit(method, batches, max_epochs=1)
    torch.testing.assert_close(part(method).detach(), before, rtol=1e-6, atol=1e-7)
    method = make(name, optimizer=optimizer)
    before = part(method).detach().clone()
    fit(method, batches, max_epochs=2)
    assert not torch.allclose(part(method).detach(), before)


def test_swav_starts_every_step_from_unit_prototypes() -> None:
    method = make("SwAV")
    with torch.no_grad():
        method.prototypes *= 3
    step(method, batch(4))
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(len(method.prototypes)))


def test_dino_head_does_not_depend_on_the_norm_of_its_last_weights() -> None:
    head = DINOHead(5, in_features=4, hidden_features=8, bottleneck=3)
    features = torch.randn(6, 4)
    before = head(features)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.last.weight *= 7
    torch.testing.assert_close(head(features), before)
    with pytest.raises(ValueError, match="DINOHead needs bottleneck >= 1, got 0"):
        DINOHead(5, bottleneck=0)


def test_default_heads_are_the_papers() -> None:
    def shapes(network: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in network.modules() if isinstance(layer, nn.Linear)]

    def norms(network: nn.Module) -> list[tuple[int, bool]]:
        found = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d)]
        return [(layer.num_features, layer.affine) for layer in found]

    assert (shapes(MoCoV2(Tiny(), queue=4).head), norms(MoCoV2(Tiny(), queue=4).head)) == ([(8, 8), (128, 8)], [])
    three = MoCoV3(Tiny())
    assert shapes(three.head) == [(4096, 8), (256, 4096)]
    assert norms(three.head) == [(4096, True), (256, False)]
    assert (shapes(three.predictor), norms(three.predictor)) == ([(4096, 256), (256, 4096)], [(4096, True)])
    byol = BYOL(Tiny())
    assert (shapes(byol.head), shapes(byol.predictor)) == ([(4096, 8), (256, 4096)], [(4096, 256), (256, 4096)])
    siamese = SimSiam(Tiny())
    assert shapes(siamese.head) == [(8, 8), (8, 8), (2048, 8)]
    assert norms(siamese.head) == [(8, True), (8, True), (2048, False)]
    assert shapes(siamese.predictor) == [(512, 2048), (2048, 512)]
    assert shapes(SwAV(Tiny()).head) == [(2048, 8), (128, 2048)]
    assert SwAV(Tiny()).prototypes.shape == (3000, 128)
    neighbours = NNCLR(Tiny(), queue=4)
    assert shapes(neighbours.head) == [(2048, 8), (2048, 2048), (256, 2048)]
    assert norms(neighbours.head) == [(2048, True), (2048, True), (256, True)]
    assert shapes(neighbours.predictor) == [(4096, 256), (256, 4096)]
    assert shapes(DINOHead(in_features=8)) == [(2048, 8), (2048, 2048), (256, 2048), (65536, 256)]


def test_a_predictor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="predictor maps 8 to 4 numbers, the head puts out 8; .* out_features to 8"):
        BYOL(Tiny(), MLPHead(8), predictor=LinearHead(4))


def test_bf16_trains_and_scores_stay_in_float32() -> None:
    for name in METHODS:
        method = make(name)
        fit(method, [batch(6)] * 2, precision="bf16-mixed")
        state = method.state_dict()
        assert all(state[key].dtype == torch.float32 for key in state if "queue" in key and "rows" in key), name


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (2, str(folder / "store"), str(folder / "results"))
    torch.multiprocessing.spawn(worker.run, arguments, nprocs=2)
    return [torch.load(folder / f"results{rank}") for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one_process(name, ranks) -> None:
    """Loss, gradients and running state of two ranks with uneven batches, three steps long."""
    one = worker.steps(name, worker.ROWS, rank=None)
    for rank in ranks:
        found = rank[name]
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-7, atol=1e-9)
        for key, value in one["state"].items():
            torch.testing.assert_close(
                found["state"][key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.ddp
def test_shuffled_keys_come_back_in_the_order_of_the_images(ranks) -> None:
    """Plain batch norm in eval mode: shuffling among ranks must change nothing but who computes what."""
    expected = worker.shuffled_keys(rank=None)
    for rank in ranks:
        torch.testing.assert_close(rank["keys"], expected, rtol=1e-6, atol=1e-8)
        assert rank["computed"] != rank["own"], "the ranks have shared the images out anew"
