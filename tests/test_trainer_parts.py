"""LARS, learning rates by batch size, exact batch normalisation and cached gradients, in one process."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning.cli import OptimizerCallable
from torch import nn

from embedlab import methods
from embedlab._types import Batch
from embedlab.data import ImageData, Source, Views
from embedlab.encoders import MLPHead, ResNet
from embedlab.losses import NTXentLoss, SupConLoss
from embedlab.methods import MetricLearning
from embedlab.methods.base import decay_groups
from embedlab.methods.batch_norm import SyncBatchNorm, synchronize_batch_norm
from embedlab.methods.cached_gradient import cached_gradient
from embedlab.methods.optimizers import LARS
from embedlab.methods.trainer import Compile, ViewSizes

# ------------------------------------------------------------------------------------------------------------- LARS


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def naive_lars(weights, gradients, rates, *, decay, momentum, trust, nesterov):
    """Algorithm 1 of You et al. with SimCLR's norm of gradient plus decay, by loops; one tensor as a list."""
    velocity = [0.0] * len(weights)
    for gradient, rate in zip(gradients, rates, strict=True):
        ratio = 1.0
        if decay:
            gradient = [g + decay * w for g, w in zip(gradient, weights, strict=True)]
            if norm(weights) > 0 and norm(gradient) > 0:
                ratio = trust * norm(weights) / norm(gradient)
        scaled = [rate * ratio * g for g in gradient]
        velocity = [momentum * v + s for v, s in zip(velocity, scaled, strict=True)]
        ahead = [momentum * v + s if nesterov else v for v, s in zip(velocity, scaled, strict=True)]
        weights = [w - a for w, a in zip(weights, ahead, strict=True)]
    return weights


def layers(dtype=torch.float64) -> list[nn.Parameter]:
    """A matrix, a vector, and a matrix of zeros."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, generator=random), torch.randn(4, generator=random), torch.zeros(2, 3)]
    return [nn.Parameter(value.to(dtype)) for value in values]


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"momentum": 0.0}, {"trust": 0.02, "weight_decay": 0.3}])
def test_lars_equals_the_paper(settings) -> None:
    settings = {"momentum": 0.9, "weight_decay": 1e-2, "trust": 1e-3, "nesterov": False, **settings}
    parameters, random = layers(), torch.Generator().manual_seed(1)
    optimizer = LARS(decay_groups(parameters), lr=0.5, **settings)
    rates = [0.5, 0.7, 0.1]
    gradients = [[torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters] for _ in rates]
    start = [p.detach().flatten().tolist() for p in parameters]
    for rate, step in zip(rates, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    rest = {name: settings[name] for name in ("momentum", "trust", "nesterov")}
    for number, parameter in enumerate(parameters):
        decay = settings["weight_decay"] if parameter.ndim > 1 else 0.0
        steps = [step[number].flatten().tolist() for step in gradients]
        wanted = naive_lars(start[number], steps, rates, decay=decay, **rest)
        assert parameter.flatten().tolist() == pytest.approx(wanted, rel=1e-12)
        assert parameter.flatten().tolist() != pytest.approx(start[number], rel=1e-3)


def test_lars_goes_on_from_its_plain_state(tmp_path) -> None:
    def steps(parameters, optimizer, count) -> None:
        for number in range(count):
            for parameter in parameters:
                parameter.grad = (parameter.detach() * (number + 1)).cos()
            optimizer.step()

    one, two = layers(), layers()
    steps(one, LARS(decay_groups(one)), 2)
    first = LARS(decay_groups(two))
    steps(two, first, 1)
    torch.save(first.state_dict(), tmp_path / "state")
    second = LARS(decay_groups(two), lr=9.0)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for parameter in two:
        parameter.grad = (parameter.detach() * 2).cos()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_lars_calls_a_closure() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert LARS([weight]).step(closure).item() == 4
    assert weight.max() < 1


def test_lars_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    found = parser.parse_object(
        {"optimizer": {"class_path": "embedlab.methods.optimizers.LARS", "init_args": {"lr": 0.7, "trust": 0.01}}}
    )
    optimizer = parser.instantiate_classes(found).optimizer(decay_groups(layers()))
    assert isinstance(optimizer, LARS)
    assert [(group["lr"], group["weight_decay"], group["trust"]) for group in optimizer.param_groups] == [
        (0.7, 1e-6, 0.01),
        (0.7, 0.0, 0.01),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "LARS needs lr >= 0, momentum in .* got -1.0, 0.9 and 0.001; SimCLR has 0.3 per 256 images"),
        ({"momentum": 1.0}, "got 0.3, 1.0 and"),
        ({"nesterov": True, "momentum": 0.0}, "looks ahead along the momentum, but momentum is 0"),
        ({"weight_decay": -1.0}, "LARS needs weight_decay >= 0, got .-1.0"),
        ({"weight_decay": 0.0}, "there is none, so that it would be plain SGD: set weight_decay .* torch.optim.SGD"),
    ],
)
def test_lars_refuses(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(layers(), **settings)


# ---------------------------------------------------------------------------------------------------------- training


def net(norm_layer="group", dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return ResNet("resnet8", stem="small", width=0.125, norm=norm_layer).to(dtype)


def batches(count=4, images=8, dtype=torch.float32) -> list[Batch]:
    random = torch.Generator().manual_seed(2)
    made = []
    for number in range(count):
        views = tuple(torch.randn(images, 3, 8, 8, generator=random, dtype=dtype) for _ in range(2))
        index = torch.arange(images) + number * images
        made.append(Batch(views, index % 4, index))
    return made


class Data(pl.LightningDataModule):
    batch_size = 8

    def __init__(self, made) -> None:
        super().__init__()
        self.made = made

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.made, batch_size=None)

    def val_dataloader(self):
        return []


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def train(method, folder, made, **settings) -> Rates:
    rates = Rates()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[rates],
        **settings,
    )
    trainer.fit(method, datamodule=Data(made))
    return rates


@pytest.mark.parametrize(
    ("rule", "accumulate", "wanted"),
    [("none", 1, 0.1), ("linear", 1, 0.1 * 8 / 256), ("linear", 2, 0.1 * 16 / 256), ("sqrt", 2, 0.1 / 4)],
)
def test_learning_rate_follows_the_images_per_step(tmp_path, rule, accumulate, wanted) -> None:
    method = MetricLearning(
        net(), warmup=0.0, scale_rate=rule, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)
    )
    rates = train(method, tmp_path, batches(), accumulate_grad_batches=accumulate)
    assert rates.seen[0] == pytest.approx([wanted, wanted])


def test_unknown_rule_unknown_batch_size_and_empty_chunk_are_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="scale_rate is none, linear or sqrt, got 'cubic'"):
        MetricLearning(net(), scale_rate="cubic")
    with pytest.raises(ValueError, match="chunk is a number of images >= 1, got 0; null embeds the whole batch"):
        MetricLearning(net(), chunk=0)

    monkeypatch.setattr(Data, "batch_size", None)
    with pytest.raises(ValueError, match="scale_rate=linear needs to know the batch size, but neither the data module"):
        train(MetricLearning(net(), scale_rate="linear"), tmp_path, batches(1))


# ------------------------------------------------------------------------------------------------ batch normalisation


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (6, 3, 4, 4))])
def test_in_one_process_sync_batch_norm_is_the_stock_one(kind, shape, momentum) -> None:
    stock, ours = kind(3, momentum=momentum), synchronize_batch_norm(kind(3, momentum=momentum))
    assert isinstance(ours, SyncBatchNorm)
    random = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        outputs = []
        x = torch.randn(shape, generator=random) + 5
        for layer in (stock, ours):
            layer.train(training)
            layer.zero_grad()
            y = layer(x.requires_grad_())
            outputs.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert stock.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True))


def test_synchronizing_keeps_modules_parameters_and_state() -> None:
    network = nn.Sequential(ResNet("resnet8", stem="small", width=0.125), MLPHead(4, in_features=64), nn.LayerNorm(4))
    network[0].net.bn1.weight.requires_grad_(False)
    network[0].net.bn1.eval()
    shared = nn.BatchNorm1d(4)
    network += nn.Sequential(shared, shared)
    modules, state = list(network.modules()), {name: value.clone() for name, value in network.state_dict().items()}
    parameters = list(network.parameters())
    assert synchronize_batch_norm(synchronize_batch_norm(network)) is network
    assert all(a is b for a, b in zip(modules, network.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in network.modules())
    assert isinstance(network[2], nn.LayerNorm)
    assert not network[0].net.bn1.training
    assert not network[0].net.bn1.weight.requires_grad
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    network[0].load_state_dict(ResNet("resnet8", stem="small", width=0.125).state_dict())


def test_batch_norm_of_another_kind_is_refused_and_nothing_changed() -> None:
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    network = nn.Sequential(nn.BatchNorm2d(3), WithActivation(3))
    with pytest.raises(ValueError, match="Cannot synchronise 1: WithActivation is a batch normalisation of its own"):
        synchronize_batch_norm(network)
    assert type(network[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"takes \(B, C\) or \(B, C, ...\), got \(3,\)"):
        SyncBatchNorm(3)(torch.zeros(3))


def test_the_switch_of_a_method(tmp_path) -> None:
    method = MetricLearning(net("batch"), MLPHead(4), sync_batch_norm=True)
    train(method, tmp_path, batches(1))
    kinds = {type(module) for module in method.modules()}
    assert SyncBatchNorm in kinds
    assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}


# --------------------------------------------------------------------------------------------------- cached gradients

IMAGES, CHUNK = 10, 4  # the last chunk is smaller


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)


def loss(embeddings: torch.Tensor) -> torch.Tensor:
    return NTXentLoss(0.2)(embeddings, torch.arange(IMAGES // 2).repeat(2))


def ghost(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The oracle: chunks one by one, all with a graph."""
    return torch.cat([network(part) for part in x.split(CHUNK)])


def cached(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return cached_gradient(network, x, CHUNK)


def gradients(network: nn.Module, embed, dtype=torch.float32, seed=4) -> tuple[torch.Tensor, ...]:
    """Embeddings, gradient, buffers, and the next random number."""
    torch.manual_seed(seed)
    embeddings = embed(network, images(dtype))
    loss(embeddings).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    buffers = torch.cat([torch.zeros(1), *(buffer.double().flatten() for buffer in network.buffers())])
    return embeddings.detach(), gradient, buffers, torch.rand(1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def with_head(norm_layer: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    kind = {"group": "layer", "batch": "batch"}[norm_layer]
    torch.manual_seed(1)
    head = MLPHead(6, in_features=32, norm=kind, dropout=dropout)
    return nn.Sequential(net(norm_layer, dtype), head.to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_of_the_whole_batch_without_batch_statistics(dtype, tolerance) -> None:
    found = gradients(with_head("group", dtype), cached, dtype)
    wanted = gradients(with_head("group", dtype), lambda network, x: network(x), dtype)
    assert wanted[1].norm() > 1e-3
    assert distance(found[1], wanted[1]) < tolerance
    torch.testing.assert_close(found[0], wanted[0], rtol=10 * tolerance, atol=tolerance)


def test_frozen_batch_norm_gives_the_gradient_of_the_whole_batch() -> None:
    found = gradients(with_head("batch", torch.float64).eval(), cached, torch.float64)
    wanted = gradients(with_head("batch", torch.float64).eval(), lambda network, x: network(x), torch.float64)
    assert distance(found[1], wanted[1]) < 1e-9


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["group", "batch"])
def test_equals_ghost_batches_with_the_same_random_numbers(kind, dropout) -> None:
    """Running statistics too, to the bit; and the generator is where one pass leaves it."""
    found = gradients(with_head(kind, torch.float64, dropout), cached, torch.float64)
    wanted = gradients(with_head(kind, torch.float64, dropout), ghost, torch.float64)
    assert distance(found[1], wanted[1]) < 1e-12
    for one, other in zip((found[0], *found[2:]), (wanted[0], *wanted[2:]), strict=True):
        assert torch.equal(one, other)
    if dropout:
        others = gradients(with_head(kind, torch.float64, dropout), cached, torch.float64, seed=5)
        assert distance(others[1], wanted[1]) > 0.01, "the test would pass without dropout"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_random_numbers_of_an_accelerator_are_replayed() -> None:
    results = []
    for embed in (cached, ghost):
        network = with_head("batch", torch.float64, 0.5).cuda()
        torch.manual_seed(4)
        loss(embed(network, images(torch.float64).cuda())).backward()
        results.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        results.append(torch.rand(1, device="cuda"))
    assert distance(results[0], results[2]) < 1e-10
    assert torch.equal(results[1], results[3])


def test_buffers_that_change_what_the_network_does_are_replayed() -> None:
    def spectral() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3 * 8 * 8, 5))
        return nn.Sequential(nn.Flatten(), layer).double()

    found, wanted = (gradients(spectral(), embed, torch.float64) for embed in (cached, ghost))
    assert distance(found[1], wanted[1]) < 1e-12
    assert torch.equal(found[2], wanted[2])


def test_autocast_is_replayed_and_leaves_no_weights_without_a_graph() -> None:
    results = []
    for embed in (cached, ghost):
        network = with_head("group")
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = embed(network, images())
            again = network(images()[:2])
            assert again.requires_grad
            value = loss(embeddings) + again.float().square().mean()
        value.backward()  # outside of autocast, as Lightning has it
        results.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert embeddings.dtype == torch.bfloat16
    assert distance(*results) < 1e-2
    inside = with_head("group")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(cached(inside, images())) + inside(images()[:2]).float().square().mean()
        value.backward()
    assert distance(torch.cat([p.grad.flatten() for p in inside.parameters()]), results[0]) < 1e-2


def test_images_learn_too_frozen_and_unused_parameters_do_not() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused = (nn.Linear(4, 3) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    torch.manual_seed(0)
    part, x = Part().double(), torch.randn(7, 4, dtype=torch.float64)
    wanted = torch.autograd.grad(part(x.requires_grad_()).square().sum(), [x, *part.used.parameters()])
    cached_gradient(part, x, 3).square().sum().backward()
    for one, other in zip([x.grad, *(p.grad for p in part.used.parameters())], wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert part.frozen.weight.grad is None
    assert part.unused.weight.grad is None


def test_two_uses_of_one_network_in_a_step() -> None:
    """A plain pass that waits for its backward pass does not mind that buffers are put back and forth."""
    results = []
    for embed in (cached, ghost):
        network = with_head("batch", torch.float64)
        x = images(torch.float64)
        (loss(network(x)) + loss(embed(network, x)) + loss(embed(network, 2 * x))).backward()
        results.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert distance(*results) < 1e-12


def test_never_more_images_than_a_chunk_at_a_time() -> None:
    network, sizes = with_head("group"), []
    network.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    embeddings = cached(network, images())
    assert sizes == [4, 4, 2]
    loss(embeddings).backward()
    assert sizes == [4, 4, 2] * 2
    with torch.no_grad():
        assert not cached(network, images()).requires_grad
    with pytest.raises(ValueError, match="A chunk has at least one image, got chunk=0"):
        cached_gradient(network, images(), 0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["MetricLearning", "SimCLR"])
def test_a_run_in_chunks_ends_where_the_run_without_does(tmp_path, name, accumulate) -> None:
    ends, sizes = [], []
    for chunk in (None, 3):
        torch.manual_seed(1)
        settings = {"loss": SupConLoss()} if name == "MetricLearning" else {}
        method = getattr(methods, name)(
            net(dtype=torch.float64),
            MLPHead(6, norm="layer").double(),
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9),
            chunk=chunk,
            **settings,
        ).double()
        method.backbone.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
        train(method, tmp_path, batches(dtype=torch.float64), accumulate_grad_batches=accumulate)
        ends.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    assert max(sizes) == 16
    assert sizes[-1] == 1, "16 images in chunks of 3"
    assert distance(*ends) < 1e-9


# ------------------------------------------------------------------------------------------- compiling, growing views


def pixels(count: int = 12) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    source = Source.from_arrays(images, [str(number) for number in range(count)])
    return ImageData(source, image_size=16, split="none", batch_size=6, views=Views(count=2))


def short_run(*callbacks: pl.Callback, epochs: int = 3) -> methods.SimCLR:
    torch.manual_seed(0)
    backbone = ResNet("resnet10", stem="small", width=0.125)
    method = methods.SimCLR(backbone, MLPHead(8), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks],
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(method, datamodule=pixels())
    return method


class Sides(pl.Callback):
    """Remembers the side of the views of every epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, set[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.setdefault(trainer.current_epoch, set()).update(view.shape[-1] for view in batch.views)


def test_views_grow_with_the_epochs_and_end_at_the_image_size() -> None:
    sides = Sides()
    short_run(ViewSizes({1: 8, 2: 12}), sides, epochs=4)
    assert sides.seen == {0: {16}, 1: {8}, 2: {12}, 3: {12}}


@pytest.mark.parametrize("sizes", [{}, {-1: 8}, {0: 0}], ids=str)
def test_sizes_of_views_must_be_epochs_and_pixels(sizes) -> None:
    with pytest.raises(ValueError, match=r"ViewSizes takes epoch: pixels, such as \{0: 24, 120: 32\}"):
        ViewSizes(sizes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.15's tracer
def test_a_compiled_run_learns_the_same_under_the_same_names(monkeypatch) -> None:
    compiled = []
    original = nn.Module.compile

    def eager(self, *, mode) -> None:
        compiled.append(type(self).__name__)
        original(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    plain, fast = short_run(), short_run(Compile(cpu=True))
    assert compiled == ["ResNet", "MLPHead"]
    assert fast.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value)


def test_a_cpu_is_not_kept_waiting_by_the_compiler(monkeypatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    short_run(Compile(), epochs=1)
