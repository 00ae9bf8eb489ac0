"""Losses over proxies against loops in float64: values, gradients of embeddings and proxies, state, errors."""

import functools
import math
import warnings

import naive
import pytest
import torch
from torch import Tensor, nn

from embedlab import losses
from embedlab.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CenterLoss,
    CosFaceLoss,
    MatryoshkaLoss,
    NormSoftmaxLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SoftTripleLoss,
    _tiles,
)

CLASSES, DIM = 4, 5


def adaface(z, y, proxies, *, mean=20.0, std=100.0, momentum=0.99, **settings) -> Tensor:
    """The statistics as they are after a first batch in training, in plain numbers; one row has no deviation."""
    z = z * math.sqrt(DIM / z.shape[1])  # a prefix counts as if it were as long as the whole
    norms = [min(max(row.double().norm().item(), 1e-3), 100.0) for row in z]
    if len(norms) > 1:
        average = sum(norms) / len(norms)
        deviation = math.sqrt(sum((norm - average) ** 2 for norm in norms) / (len(norms) - 1))
        mean, std = momentum * mean + (1 - momentum) * average, momentum * std + (1 - momentum) * deviation
    return naive.adaface(z, y, proxies, mean=mean, std=std, **settings)


# a new proxy loss is one row: class, its settings, oracle, the oracle's arguments where they differ
PROXY_LOSSES = [
    (NormSoftmaxLoss, {}, naive.norm_softmax, {}),
    (NormSoftmaxLoss, {"temperature": 0.3}, naive.norm_softmax, {}),
    (NormSoftmaxLoss, {"temperature": 0.3, "gamma": 2.0}, naive.norm_softmax, {}),
    (ArcFaceLoss, {}, naive.arcface, {}),
    (ArcFaceLoss, {"margin_degrees": 80.0, "scale": 5.0}, naive.arcface, {}),
    (ArcFaceLoss, {"margin_degrees": 20.0, "scale": 8.0, "gamma": 0.5}, naive.arcface, {}),
    (ArcFaceLoss, {"scale": 8.0, "sub_centers": 3}, naive.arcface, {}),
    (ArcFaceLoss, {"scale": 8.0, "sub_centers": 2}, naive.arcface, {}),
    (ArcFaceLoss, {"scale": 8.0, "sub_centers": 2, "noise_degrees": 85.0}, naive.arcface, {}),
    (CosFaceLoss, {}, naive.cosface, {}),
    (CosFaceLoss, {"margin": 0.1, "scale": 6.0, "gamma": 1.5}, naive.cosface, {}),
    (AdaFaceLoss, {}, adaface, {}),
    (AdaFaceLoss, {"scale": 8.0, "concentration": 0.9, "momentum": 0.2, "gamma": 1.0}, adaface, {}),
    (AdaFaceLoss, {"scale": 4.0, "margin": 0.9, "concentration": 30.0, "momentum": 0.0}, adaface, {}),
    (ProxyNCALoss, {}, naive.proxy_nca, {}),
    (ProxyNCALoss, {"temperature": 0.7}, naive.proxy_nca, {}),
    (ProxyAnchorLoss, {}, naive.proxy_anchor, {}),
    (ProxyAnchorLoss, {"margin": 0.3, "scale": 4.0}, naive.proxy_anchor, {}),
    (SoftTripleLoss, {}, naive.soft_triple, {}),
    (SoftTripleLoss, {"centers": 1, "regularization": 0.2}, naive.soft_triple, {}),
    (
        SoftTripleLoss,
        {"centers": 3, "margin": 0.2, "scale": 5.0, "gamma": 0.3, "regularization": 0.2},
        naive.soft_triple,
        {},
    ),
    (CenterLoss, {}, naive.center, {}),
]
every_loss = pytest.mark.parametrize(
    "number", range(len(PROXY_LOSSES)), ids=[f"{row[0].__name__}-{number}" for number, row in enumerate(PROXY_LOSSES)]
)
LABELS = {
    "all classes": (2, 0, 1, 1, 0, 3, 2, 0, 3, 1),
    "some classes": (2, 2, 0, 2, 0, 2, 2, 2, 2, 2),
    "one class": (1,) * 10,
    "last class": (3,) * 10,
    "one image": (2,),
}
ALL = LABELS["all classes"]


def proxies_of(loss: nn.Module) -> nn.Parameter:
    return loss.centers if isinstance(loss, CenterLoss) else loss.proxies


def make(number: int, dtype=torch.float64) -> nn.Module:
    kind, settings, _, _ = PROXY_LOSSES[number]
    loss = kind(CLASSES, DIM, **settings)
    nn.init.normal_(proxies_of(loss), generator=torch.Generator().manual_seed(7))
    return loss.to(dtype)


def embeddings(rows: int, *, seed: int = 0, dim: int = DIM) -> Tensor:
    """Rows of lengths from 0.3 to 30: quality, for those that go by it."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return z * 10 ** (2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 1)


def oracle(number: int, z: Tensor, y: Tensor, proxies: Tensor) -> Tensor:
    _, settings, function, more = PROXY_LOSSES[number]
    return function(z.double(), y, proxies.double(), **settings | more)


@functools.cache
def wanted(number: int, labels: tuple[int, ...], dim: int = DIM) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of embeddings and proxies by the oracle; each batch is asked once."""
    z, proxies = embeddings(len(labels))[:, :dim].clone().requires_grad_(), proxies_of(make(number))
    value = oracle(number, z, torch.tensor(labels), proxies[:, :dim])
    return value.detach(), gradients(value, z, proxies)


def gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True))


@pytest.fixture(params=[(2**20, 1), (8, 1), (8, 2)], ids=["one tile", "many tiles", "many tiles on two threads"])
def engine(request, monkeypatch) -> None:
    """How the work is cut into tiles, and how many threads share them."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(_tiles, "CPU_TILE", request.param[0])
    monkeypatch.setattr(_tiles, "WORTH_THREADS", 0)
    torch.set_num_threads(request.param[1])
    yield
    torch.set_num_threads(threads)


def test_every_exported_proxy_loss_stands_in_the_table() -> None:
    kinds = {kind for kind in vars(losses).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert {kind for kind in kinds if kind.__module__.endswith(".proxies")} == {row[0] for row in PROXY_LOSSES}


@every_loss
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_value_and_gradients_equal_the_paper(engine, number, labels) -> None:
    loss, z = make(number), embeddings(len(labels)).requires_grad_()
    got, (want, exact) = loss(z, torch.tensor(labels)), wanted(number, labels)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(got, z, proxies_of(loss)), exact, rtol=1e-7, atol=1e-8)


@every_loss
@pytest.mark.parametrize("dim", [2, 3])
def test_a_prefix_of_the_embedding_meets_the_prefix_of_the_proxies(engine, number, dim) -> None:
    loss, z = make(number), embeddings(len(ALL))[:, :dim].clone().requires_grad_()
    got, (want, exact) = loss(z, torch.tensor(ALL)), wanted(number, ALL, dim)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(got, z, proxies_of(loss)), exact, rtol=1e-7, atol=1e-8)


@every_loss
def test_float32_is_close_to_float64(number) -> None:
    loss, z, (want, exact) = make(number, torch.float32), embeddings(len(ALL)).float(), wanted(number, ALL)
    got = loss(z.requires_grad_(), torch.tensor(ALL))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    found = [g.double() for g in gradients(got, z, proxies_of(loss))]
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "half"])
def test_half_precision_computes_in_float32(number, dtype, weights) -> None:
    """Under autocast parameters stay float32; with a module cast to half they are rounded, too."""
    loss = make(number, torch.float32)
    proxies = proxies_of(loss)
    if weights == "half":
        proxies.data = proxies.data.to(dtype)
    z = embeddings(len(ALL)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got = loss(z, torch.tensor(ALL))
    assert got.dtype == torch.float32
    leaf = proxies.detach().double().requires_grad_()
    want = oracle(number, z, torch.tensor(ALL), leaf)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5)
    step = torch.finfo(dtype).eps
    for mine, exact in zip(gradients(got, z, proxies), gradients(want, z, leaf), strict=True):
        atol = step * exact.abs().max().double().item() / 4
        torch.testing.assert_close(mine.double(), exact.double(), rtol=2 * step, atol=atol)


@every_loss
@pytest.mark.parametrize(
    "z",
    [torch.zeros(4, DIM), torch.ones(4, DIM), torch.full((4, DIM), 1e-30), torch.ones(1, DIM), torch.ones(0, DIM)],
    ids=["zero", "coincide", "tiny", "one sample", "no sample"],
)
@pytest.mark.parametrize("weights", ["random", "zero", "on top", "opposite"])
def test_degenerate_batches_stay_finite(number, z, weights) -> None:
    loss, z = make(number, torch.float32), z.clone().requires_grad_()
    with torch.no_grad():
        if weights != "random":
            proxies_of(loss).fill_({"zero": 0.0, "on top": 2.0, "opposite": -3.0}[weights])
    for _ in range(2):  # the second call sees the state that the first has left
        value = loss(z, torch.tensor([0, 0, 3, 3])[: len(z)])
        value.backward()
        assert torch.isfinite(value)
        assert value.shape == ()
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(proxies_of(loss).grad).all()
    assert all(torch.isfinite(buffer).all() for buffer in loss.buffers())


@every_loss
def test_gradcheck(monkeypatch, number) -> None:
    monkeypatch.setattr(_tiles, "CPU_TILE", 8)
    loss, y = make(number).eval(), torch.tensor([0, 2, 2, 1])
    name = next(name for name, _ in loss.named_parameters())

    def value(z: Tensor, proxies: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {name: proxies}, (z, y))

    z, proxies = embeddings(4).requires_grad_(), proxies_of(loss).detach()
    if isinstance(loss, AdaFaceLoss):  # the length of an embedding sets its margin, without a gradient, on purpose
        z = z.detach()
    assert torch.autograd.gradcheck(value, (z, proxies.requires_grad_()), atol=1e-4, rtol=1e-4)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_numbers_of_any_kind(number, dtype) -> None:
    z, y = embeddings(len(ALL)), torch.tensor(ALL)
    torch.testing.assert_close(make(number)(z, y.to(dtype)), make(number)(z, y), rtol=0, atol=0)


@every_loss
def test_embeddings_need_not_be_contiguous(number) -> None:
    z = embeddings(len(ALL))
    strided = z.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(make(number)(strided, torch.tensor(ALL)), wanted(number, ALL)[0], rtol=1e-9, atol=1e-9)


@every_loss
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_the_value_is_the_same(number, without) -> None:
    loss = make(number)
    with without():
        value = loss(embeddings(len(ALL)), torch.tensor(ALL))
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), wanted(number, ALL)[0], rtol=1e-9, atol=1e-9)


@every_loss
def test_a_loss_used_twice_gives_twice_the_gradient(engine, number) -> None:
    loss, z = make(number), embeddings(len(ALL)).requires_grad_()
    leaves = [z, proxies_of(loss)]
    value = loss(z, torch.tensor(ALL))
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * g for g in once], rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("frozen", ["embeddings", "proxies"])
def test_gradient_only_where_it_is_asked_for(engine, number, frozen) -> None:
    loss, z, (_, exact) = make(number), embeddings(len(ALL)), wanted(number, ALL)
    proxies_of(loss).requires_grad_(frozen == "embeddings")
    z.requires_grad_(frozen == "proxies")
    loss(z, torch.tensor(ALL)).backward()
    found, want = (proxies_of(loss).grad, exact[1]) if frozen == "embeddings" else (z.grad, exact[0])
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-8)
    assert (z if frozen == "embeddings" else proxies_of(loss)).grad is None


@every_loss
def test_two_threads_give_the_same_bits_twice(monkeypatch, number) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(_tiles, "CPU_TILE", 8)
    monkeypatch.setattr(_tiles, "WORTH_THREADS", 0)
    runs = []
    try:
        torch.set_num_threads(2)
        for _ in range(2):
            loss, z = make(number, torch.float32), embeddings(len(ALL)).float().requires_grad_()
            value = loss(z, torch.tensor(ALL))
            runs.append([value.detach(), *gradients(value, z, proxies_of(loss))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("number", [4, 17], ids=["softmax", "proxies as anchors"])
def test_compiled_or_not_is_the_same(number) -> None:
    plain, compiled = make(number), make(number)
    leaves = [embeddings(len(ALL)).requires_grad_() for _ in range(2)]
    want = plain(leaves[0], torch.tensor(ALL))
    with warnings.catch_warnings():
        # torch's own compiler looks at .grad of tensors that have none
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        got = torch.compile(compiled, backend="eager")(leaves[1], torch.tensor(ALL))
    torch.testing.assert_close(got, want)
    found, exact = gradients(got, leaves[1], compiled.proxies), gradients(want, leaves[0], plain.proxies)
    torch.testing.assert_close(found, exact)


# ---- state ----------------------------------------------------------------------------------------------------------


@every_loss
def test_a_resumed_loss_equals_an_unbroken_one(number) -> None:
    y = torch.tensor(ALL)
    straight, first, second = make(number), make(number), make(number)
    values = [straight(embeddings(len(ALL), seed=seed), y).item() for seed in range(4)]
    for seed in range(2):
        first(embeddings(len(ALL), seed=seed), y)
    nn.init.zeros_(proxies_of(second))
    second.load_state_dict(first.state_dict())
    assert [second(embeddings(len(ALL), seed=seed), y).item() for seed in (2, 3)] == values[2:]


@every_loss
def test_evaluation_leaves_the_state_alone(number) -> None:
    loss, y = make(number), torch.tensor(ALL)
    loss(embeddings(len(ALL)), y)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss.eval()
    values = [loss(embeddings(len(ALL), seed=1), y) for _ in range(2)]
    assert values[0] == values[1]
    for name, buffer in loss.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_adaface_follows_the_norms_of_training_batches() -> None:
    loss, mean, std = AdaFaceLoss(CLASSES, DIM, momentum=0.9).double(), 20.0, 100.0
    for seed in range(3):
        z = embeddings(len(ALL), seed=seed)
        norms = z.norm(dim=1).clamp(1e-3, 100)
        mean, std = 0.9 * mean + 0.1 * norms.mean().item(), 0.9 * std + 0.1 * norms.std().item()
        loss(z, torch.tensor(ALL))
        assert loss.mean.item() == pytest.approx(mean, rel=1e-12)
        assert loss.std.item() == pytest.approx(std, rel=1e-12)
    value = loss.eval()(z, torch.tensor(ALL))
    want = naive.adaface(z, torch.tensor(ALL), loss.proxies, mean=mean, std=std)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)


def test_adaface_clamps_lengths() -> None:
    z, y = embeddings(len(ALL)), torch.tensor(ALL)
    z = z / z.norm(dim=1, keepdim=True)
    z[0], z[1] = z[0] * 1e5, z[1] * 1e-6
    loss = AdaFaceLoss(CLASSES, DIM, scale=4.0, momentum=0.0).double()
    got = loss(z, y)
    assert loss.mean.item() == pytest.approx((100 + 1e-3 + 8) / 10)
    torch.testing.assert_close(got, adaface(z, y, loss.proxies, scale=4.0, momentum=0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise_after", [0, 2])
def test_arcface_leaves_out_what_is_far_from_its_class(engine, noise_after) -> None:
    y = torch.tensor(ALL)
    settings = {"scale": 8.0, "sub_centers": 2, "noise_degrees": 85.0, "noise_after": noise_after}
    loss = ArcFaceLoss(CLASSES, DIM, **settings).double()
    nn.init.normal_(loss.proxies, generator=torch.Generator().manual_seed(7))
    everyone = naive.arcface(embeddings(len(ALL)), y, loss.proxies, scale=8.0, sub_centers=2)
    for calls in range(4):
        z = embeddings(len(ALL)).requires_grad_()
        got, want = loss(z, y), naive.arcface(z, y, loss.proxies, **settings, calls=calls)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        leaves = z, loss.proxies
        torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves), rtol=1e-7, atol=1e-8)
        assert (got.item() == pytest.approx(everyone.item())) == (calls < noise_after)
    torch.testing.assert_close(loss.eval()(z, y), everyone, rtol=1e-9, atol=1e-9)


def test_arcface_with_nothing_left_is_zero() -> None:
    loss = ArcFaceLoss(2, 2, noise_degrees=10.0)
    loss.proxies.data = torch.eye(2)
    z = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    value = loss(z, torch.tensor([0, 1]))
    value.backward()
    assert value == 0
    assert not z.grad.any()


def test_arcface_takes_the_nearest_sub_center_even_if_all_are_far() -> None:
    loss = ArcFaceLoss(2, 2, margin_degrees=0.0, scale=1.0, sub_centers=2)
    loss.proxies.data = torch.tensor([[-1.0, 0.0], [-3.0, 4.0], [0.0, 1.0], [1.0, 1.0]])
    value = loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item()
    assert value == pytest.approx(math.log1p(math.exp(math.sqrt(0.5) + 0.6)))  # nearest: -0.6 and the root of 1/2


def test_proxies_per_class() -> None:
    assert ArcFaceLoss(3, 7, sub_centers=4).proxies.shape == (12, 7)
    assert SoftTripleLoss(3, 7).proxies.shape == (30, 7)
    assert SoftTripleLoss(3, 7, centers=2).proxies.shape == (6, 7)
    assert CenterLoss(3, 7).centers.shape == (3, 7)


@pytest.mark.parametrize(
    ("kind", "function", "settings"),
    [
        (NormSoftmaxLoss, naive.norm_softmax, {}),
        (ArcFaceLoss, naive.arcface, {"scale": 8.0, "sub_centers": 3}),
        (CosFaceLoss, naive.cosface, {"scale": 8.0}),
    ],
)
def test_a_sample_of_the_classes(engine, kind, function, settings) -> None:
    """A step is the loss with the drawn classes alone; the batch's own are among them, evaluation takes all."""
    classes, per_class = 40, settings.get("sub_centers", 1)
    loss = kind(classes, DIM, **settings, sample=0.3).double()
    z, y = embeddings(3).requires_grad_(), torch.tensor([5, 39, 5])
    drawn = []
    for _ in range(60):
        proxies = loss.proxies.detach().clone().requires_grad_()
        loss.zero_grad()
        value = loss(z, y)
        found = gradients(value, z, loss.proxies)
        touched = found[1].view(classes, per_class, DIM).abs().sum((1, 2)) > 0
        numbers = touched.nonzero().flatten().tolist()
        assert {5, 39} <= set(numbers)
        rows = [number * per_class + k for number in numbers for k in range(per_class)]
        want = function(z, torch.tensor([numbers.index(label) for label in y.tolist()]), proxies[rows], **settings)
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, gradients(want, z, proxies), rtol=1e-7, atol=1e-8)
        drawn.append(touched)
    share = torch.stack(drawn).double().mean(0)
    others = torch.tensor([number for number in range(classes) if number not in (5, 39)])
    assert share[others].mean().item() == pytest.approx(0.3, abs=0.03)
    assert (share[others] < 0.6).all()
    assert (share[others] > 0.05).all()
    whole = function(z, y, loss.proxies, **settings)
    torch.testing.assert_close(loss.eval()(z, y), whole, rtol=1e-9, atol=1e-9)


def test_matryoshka_of_a_proxy_loss(engine) -> None:
    loss, y = CosFaceLoss(CLASSES, DIM, scale=8.0).double(), torch.tensor(ALL)
    z = embeddings(len(ALL)).requires_grad_()

    def prefix(x, labels, reference, reference_labels):
        return naive.cosface(x, labels, loss.proxies[:, : x.shape[1]], scale=8.0)

    got, want = MatryoshkaLoss(loss, [2, 3, 5])(z, y), naive.matryoshka(z, y, loss=prefix, dims=[2, 3, 5])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves = z, loss.proxies
    torch.testing.assert_close(gradients(got, *leaves), gradients(want, *leaves), rtol=1e-7, atol=1e-8)


# ---- errors ---------------------------------------------------------------------------------------------------------


@every_loss
def test_arguments_that_do_not_fit_are_explained(number) -> None:
    loss, z = make(number), embeddings(3)
    name = type(loss).__name__
    with pytest.raises(
        ValueError, match=rf"{name} takes embeddings \(B, D\) and labels \(B,\), got \(3, 5\) and \(2,\)"
    ):
        loss(z, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"{name} was made for the classes 0 to 3, got labels from 0 to 4; number"):
        loss(z, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match=f"{name} was made for the classes 0 to 3, got labels from -1 to 1; number"):
        loss(z, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=f"{name} takes class numbers as labels, got torch.float32; convert by .long"):
        loss(z, torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=f"{name} cannot use a reference: its (proxies|centres) are what"):
        loss(z, torch.tensor([0, 1, 1]), reference=z, reference_labels=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=f"{name} was made for embeddings of 5 numbers, got 6"):
        loss(embeddings(3, dim=6), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("kind", sorted({row[0] for row in PROXY_LOSSES}, key=lambda kind: kind.__name__))
def test_a_size_of_nothing_is_explained(kind) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} needs num_classes > 0, got 0"):
        kind(0, 5)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs dim > 0, got -1"):
        kind(3, -1)


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda: NormSoftmaxLoss(3, 4, temperature=0), "NormSoftmaxLoss needs temperature > 0, got 0"),
        (lambda: NormSoftmaxLoss(3, 4, gamma=-1), "NormSoftmaxLoss needs gamma >= 0 .*got -1"),
        (lambda: ProxyNCALoss(3, 4, temperature=-1), "ProxyNCALoss needs temperature > 0, got -1"),
        (
            lambda: ArcFaceLoss(3, 4, margin_degrees=90),
            r"ArcFaceLoss needs margin_degrees in \[0, 90\), got 90.*radians",
        ),
        (lambda: ArcFaceLoss(3, 4, scale=0), "ArcFaceLoss needs scale > 0, got 0"),
        (lambda: ArcFaceLoss(3, 4, noise_degrees=200), r"noise_degrees in \(0, 180\] or None, got 200"),
        (lambda: ArcFaceLoss(3, 4, sub_centers=0), "ArcFaceLoss needs .* > 0, got 0"),
        (lambda: CosFaceLoss(3, 4, margin=2), r"CosFaceLoss needs a margin in \[0, 2\) .*got 2"),
        (lambda: CosFaceLoss(3, 4, sample=0), r"CosFaceLoss needs a sample in \(0, 1\] .*got 0"),
        (lambda: AdaFaceLoss(3, 4, momentum=1), r"AdaFaceLoss needs momentum in \[0, 1\), got 1"),
        (lambda: ProxyAnchorLoss(3, 4, scale=0), "ProxyAnchorLoss needs scale > 0, got 0"),
        (lambda: SoftTripleLoss(3, 4, gamma=0), r"SoftTripleLoss needs gamma > 0 \(a temperature\), got 0"),
        (lambda: SoftTripleLoss(3, 4, centers=0), "SoftTripleLoss needs .* > 0, got 0"),
    ],
)
def test_wrong_settings_are_explained(make_it, text) -> None:
    with pytest.raises(ValueError, match=text):
        make_it()


@pytest.mark.parametrize(("kind", "settings"), [row[:2] for row in PROXY_LOSSES])
def test_a_broken_embedding_is_not_hidden(kind, settings) -> None:
    z = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    z[3, 1] = float("nan")
    assert torch.isnan(kind(CLASSES, DIM, **settings)(z, torch.tensor([0, 0, 1, 1, 2, 3])))


@pytest.mark.parametrize(
    "kind", sorted({row[0] for row in PROXY_LOSSES} - {CenterLoss}, key=lambda kind: kind.__name__)
)
def test_the_number_of_classes_can_come_later(kind) -> None:
    torch.manual_seed(0)
    known = kind(7, 4)
    late = kind(None, 4)
    assert not list(late.parameters())
    embeddings, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 6, 6])
    with pytest.raises(ValueError, match=f"{kind.__name__} was made without num_classes: call its build"):
        late(embeddings, labels)
    torch.manual_seed(0)
    late.build(7)
    assert torch.equal(late.proxies, known.proxies)
    assert torch.equal(late(embeddings, labels), known(embeddings, labels))
