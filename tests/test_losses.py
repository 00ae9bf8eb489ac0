"""Losses over pairs and rankings against loops in float64; proxies are in test_proxies.py, miners in test_miners.py."""

import functools
import threading
import time
import warnings

import naive
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from embedlab import losses
from embedlab.losses import (
    AdaFaceLoss,
    AngularLoss,
    ArcFaceLoss,
    BinaryFocalLoss,
    CenterLoss,
    CircleLoss,
    ContrastiveLoss,
    CosFaceLoss,
    CrossBatchMemory,
    DCLLoss,
    FastAPLoss,
    FocalContrastiveLoss,
    FocalLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginLoss,
    MatryoshkaLoss,
    MultiSimilarityLoss,
    NormSoftmaxLoss,
    NPairLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SmoothAPLoss,
    SoftNearestNeighborLoss,
    SoftTripleLoss,
    SumLoss,
    SupConLoss,
    ThresholdConsistentMarginLoss,
    TripletLoss,
    _tiles,
)

# a new pair loss is one row: loss, oracle, the oracle's arguments
PAIR_LOSSES = [
    (SupConLoss(0.1), naive.supcon, {"temperature": 0.1}),
    (SupConLoss(0.5), naive.supcon, {"temperature": 0.5}),
    (NTXentLoss(), naive.nt_xent, {}),
    (NTXentLoss(0.2), naive.nt_xent, {"temperature": 0.2}),
    (InfoNCELoss(), naive.info_nce, {}),
    (DCLLoss(), naive.dcl, {}),
    (DCLLoss(0.5), naive.dcl, {"temperature": 0.5}),
    (MultiSimilarityLoss(), naive.multi_similarity, {}),
    (
        MultiSimilarityLoss(alpha=1.0, beta=10.0, base=0.2),
        naive.multi_similarity,
        {"alpha": 1.0, "beta": 10.0, "base": 0.2},
    ),
    (CircleLoss(), naive.circle, {}),
    (CircleLoss(margin=0.25, scale=4.0), naive.circle, {"margin": 0.25, "scale": 4.0}),
    (NPairLoss(), naive.n_pair, {}),
    (LiftedStructureLoss(), naive.lifted_structure, {}),
    (
        LiftedStructureLoss(positive_margin=1.5, negative_margin=0.5),
        naive.lifted_structure,
        {"positive_margin": 1.5, "negative_margin": 0.5},
    ),
    (MarginLoss(beta=1.25), naive.margin_loss, {"beta": torch.tensor([1.25])}),
    (
        MarginLoss(beta=1.25, margin=0.5, nu=0.3),
        naive.margin_loss,
        {"beta": torch.tensor([1.25]), "margin": 0.5, "nu": 0.3},
    ),
    (AngularLoss(), naive.angular, {}),
    (AngularLoss(margin_degrees=55.0), naive.angular, {"margin_degrees": 55.0}),
    (FastAPLoss(), naive.fast_ap, {}),
    (FastAPLoss(bins=3), naive.fast_ap, {"bins": 3}),
    (SmoothAPLoss(), naive.smooth_ap, {}),
    (SmoothAPLoss(0.3), naive.smooth_ap, {"temperature": 0.3}),
    (SoftNearestNeighborLoss(), naive.soft_nearest_neighbor, {}),
    (SoftNearestNeighborLoss(0.2), naive.soft_nearest_neighbor, {"temperature": 0.2}),
    (FocalContrastiveLoss(), naive.focal_contrastive, {}),
    (
        FocalContrastiveLoss(gamma=0.5, margin=0.2, scale=3.0),
        naive.focal_contrastive,
        {"gamma": 0.5, "margin": 0.2, "scale": 3.0},
    ),
    (ThresholdConsistentMarginLoss(), naive.threshold_consistent_margin, {}),
    (
        ThresholdConsistentMarginLoss(loss=SupConLoss(0.1), weight=0.5, positive_margin=0.6, negative_margin=-0.1),
        naive.threshold_consistent_margin,
        {"loss": naive.supcon, "weight": 0.5, "positive_margin": 0.6, "negative_margin": -0.1},
    ),
    (ContrastiveLoss(), naive.contrastive, {}),
    (
        ContrastiveLoss(positive_margin=0.3, negative_margin=1.4),
        naive.contrastive,
        {"positive_margin": 0.3, "negative_margin": 1.4},
    ),
    (TripletLoss(margin=0.3), naive.triplet, {"margin": 0.3}),
    (TripletLoss(margin=0.3, mining="batch-hard"), naive.triplet, {"margin": 0.3, "mining": "batch-hard"}),
    (TripletLoss(margin=0.1, soft=True), naive.triplet, {"margin": 0.1, "soft": True}),
]
# what a loss picks partners from: the batch, or a reference
CASES = [
    (number, on)
    for number, (loss, _, _) in enumerate(PAIR_LOSSES)
    for on in ("batch", "reference")
    if not isinstance(loss, InfoNCELoss if on == "batch" else NPairLoss)
]
every_case = pytest.mark.parametrize(
    ("number", "on"), CASES, ids=[f"{type(PAIR_LOSSES[number][0]).__name__}-{number}-{on}" for number, on in CASES]
)
LABELS = {
    "two classes": [0, 0, 0, 1, 1, 1, 0, 1, 0, 1],
    "one class": [0] * 10,
    "lonely anchors": [0, 0, 1, 2, 3, 4, 5, 5, 9, 8],
    "gaps": [7, 7, 3, 3, 900, 900, 7, -4, -4, 900],
    "nobody has a mate": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "uneven classes": [1, 0, 1, 2, 1, 1, 1, 2, 1, 1],
}
MIXED = (2, 0, 1, 1, 0, 3, 2, 0, 4, 1)  # unsorted, classes of several sizes, lonely anchors
REFERENCE_LABELS = (0, 0, 1, 2, 7, 5, 1, 900)
# numbers in a tile, threads
ENGINES = {"one tile": (2**20, 1), "many tiles": (20, 1), "many tiles on two threads": (20, 2)}


def embeddings(rows: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found


def arguments_of(number: int) -> dict:
    return PAIR_LOSSES[number][2]


class Batch:
    """Embeddings and, if asked for, a reference; leaves of a graph."""

    def __init__(self, labels=MIXED, on="batch", *, dtype=torch.float64) -> None:
        self.labels = torch.tensor(labels)
        self.z = embeddings(len(labels)).to(dtype).requires_grad_()
        self.leaves, self.reference = [self.z], {}
        if on == "reference":
            reference = embeddings(len(REFERENCE_LABELS), seed=1).to(dtype).requires_grad_()
            self.leaves.append(reference)
            self.reference = {"reference": reference, "reference_labels": torch.tensor(REFERENCE_LABELS)}

    def loss(self, number: int) -> Tensor:
        return PAIR_LOSSES[number][0](self.z, self.labels, **self.reference)

    def oracle(self, number: int) -> Tensor:
        _, oracle, arguments = PAIR_LOSSES[number]
        leaves = [leaf.double() for leaf in self.leaves]
        reference = [] if not self.reference else [leaves[1], self.reference["reference_labels"]]
        return oracle(leaves[0], self.labels, *reference, **arguments)

    def gradients(self, value: Tensor) -> list[Tensor]:
        """Zero where the value has no graph to a leaf: the oracles leave it out where nothing depends on it."""
        return list(torch.autograd.grad(value, self.leaves, materialize_grads=True, allow_unused=True))


@functools.cache
def wanted(number: int, labels: tuple[int, ...], on: str) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients by the oracle; they are the slow part, so each batch is asked once."""
    batch = Batch(labels, on)
    value = batch.oracle(number)
    return value.detach(), batch.gradients(value)


@pytest.fixture
def threads():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def engine(request, monkeypatch, threads) -> None:
    """How the work is cut into tiles, and how many threads share them."""
    monkeypatch.setattr(_tiles, "CPU_TILE", request.param[0])
    monkeypatch.setattr(_tiles, "WORTH_THREADS", 0)
    threads(request.param[1])


@pytest.fixture
def many_tiles(monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "CPU_TILE", 20)


def exported(*files: str) -> set[str]:
    """Public modules of embedlab.losses that come from these files, () for all."""
    classes = {
        name: kind for name, kind in vars(losses).items() if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    return {name for name, kind in classes.items() if not files or kind.__module__.rpartition(".")[2] in files}


def test_every_exported_pair_loss_stands_in_the_table() -> None:
    assert exported("pairs", "ranking") == {type(loss).__name__ for loss, _, _ in PAIR_LOSSES}


def test_every_exported_class_comes_from_a_file_with_a_table() -> None:
    wrapped = exported("memory", "matryoshka", "sum", "focal")
    assert wrapped == {"CrossBatchMemory", "MatryoshkaLoss", "SumLoss", "FocalLoss", "BinaryFocalLoss"}
    tables = exported("pairs", "ranking", "proxies", "miners", "selfsupervised")
    assert exported() == tables | wrapped


@every_case
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_value_and_gradient_equal_the_paper(engine, number, on, labels) -> None:
    batch = Batch(labels, on)
    got, (want, gradients) = batch.loss(number), wanted(number, tuple(labels), on)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch.gradients(got), gradients, rtol=1e-7, atol=1e-8)


@every_case
def test_float32_is_close_to_float64(number, on) -> None:
    batch, (want, gradients) = Batch(MIXED, on, dtype=torch.float32), wanted(number, MIXED, on)
    got = batch.loss(number)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    found = [g.double() for g in batch.gradients(got)]
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(number, on, dtype) -> None:
    batch = Batch(MIXED, on, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        value = batch.loss(number)
    assert value.dtype == torch.float32
    want = batch.oracle(number)  # of the rounded embeddings
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
    step = torch.finfo(dtype).eps
    for got, exact in zip(batch.gradients(value), batch.gradients(want), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, exact, rtol=2 * step, atol=step * exact.abs().max().double().item() / 8)


@every_case
@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(4, 3),
        torch.ones(4, 3),
        torch.full((4, 3), 1e-30),
        torch.full((4, 3), 1e30),
        torch.eye(4)[:, :3] - torch.eye(4)[[1, 0, 3, 2], :3],
        torch.ones(1, 3),
        torch.ones(0, 3),
    ],
    ids=["zero", "coincide", "tiny", "huge", "opposite", "one sample", "no sample"],
)
@pytest.mark.parametrize("mates", [True, False], ids=["pairs", "one class"])
def test_degenerate_batches_stay_finite(many_tiles, number, on, z, mates) -> None:
    z, y = z.clone().requires_grad_(), torch.tensor([0, 0, 1, 1] if mates else [0, 0, 0, 0])[: len(z)]
    other = z.detach().clone().requires_grad_()
    value = PAIR_LOSSES[number][0](z, y, **({} if on == "batch" else {"reference": other, "reference_labels": y}))
    value.backward()
    assert torch.isfinite(value)
    assert value.shape == ()
    for leaf in [z] if on == "batch" else [z, other]:
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("number", [number for number, on in CASES if on == "reference"])
def test_a_reference_without_rows_gives_zero(many_tiles, number) -> None:
    loss, z, nothing = PAIR_LOSSES[number][0], embeddings(4).requires_grad_(), embeddings(0).requires_grad_()
    value = loss(z, torch.tensor([0, 0, 1, 1]), reference=nothing, reference_labels=torch.zeros(0, dtype=torch.long))
    value.backward()
    penalty = loss.nu * loss.beta.item() if isinstance(loss, MarginLoss) else 0.0
    assert value.item() == pytest.approx(penalty)
    assert not z.grad.any()
    assert nothing.grad.shape == (0, 5)


@every_case
@pytest.mark.parametrize("scale", [1.0, 0.02], ids=["spread out", "nearly alike"])
def test_low_temperature_is_stable_and_right(number, on, scale) -> None:
    loss, oracle, arguments = PAIR_LOSSES[number]
    if "temperature" not in arguments:
        return
    batch = Batch(MIXED, on)
    tail = [batch.reference["reference_labels"]] if batch.reference else []
    z, *reference = (leaf * scale + (scale < 1) for leaf in batch.leaves)  # cosines of all signs, or all near 1
    want = oracle(z, batch.labels, *reference, *tail, temperature=0.01)
    z, *reference = ((leaf * scale + (scale < 1)).float() for leaf in batch.leaves)
    got = type(loss)(0.01)(z, batch.labels, **dict(zip(batch.reference, [*reference, *tail], strict=True)))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    for mine, exact in zip(batch.gradients(got), batch.gradients(want), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@every_case
def test_gradcheck(many_tiles, number, on) -> None:
    if isinstance(PAIR_LOSSES[number][0], CircleLoss):
        return  # its weights have no gradient, on purpose; the oracle knows
    batch = Batch((0, 0, 1, 1, 2, 0), on)

    def loss(*leaves: Tensor) -> Tensor:
        tail = {} if on == "batch" else {"reference": leaves[1], "reference_labels": torch.tensor(REFERENCE_LABELS)}
        return PAIR_LOSSES[number][0](leaves[0], batch.labels, **tail)

    assert torch.autograd.gradcheck(loss, batch.leaves)


@every_case
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64])
def test_labels_of_any_kind(number, on, dtype) -> None:
    loss, batch = PAIR_LOSSES[number][0], Batch((0, 1, 1, 0, 1, 0, 1, 0), on)
    tail = {} if on == "batch" else {"reference": batch.leaves[1], "reference_labels": batch.labels}
    other = tail | ({} if on == "batch" else {"reference_labels": batch.labels.to(dtype)})
    got, want = loss(batch.z, batch.labels.to(dtype), **other), loss(batch.z, batch.labels, **tail)
    assert want != 0
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(batch.gradients(got), batch.gradients(want), rtol=0, atol=0)


@every_case
def test_embeddings_need_not_be_contiguous(number, on) -> None:
    loss, batch = PAIR_LOSSES[number][0], Batch(MIXED, on)
    strided = [torch.stack([leaf.T, leaf.T], dim=2)[:, :, 0].T for leaf in batch.leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    tail = {} if on == "batch" else {"reference": strided[1], "reference_labels": torch.tensor(REFERENCE_LABELS)}
    got, (want, gradients) = loss(strided[0], batch.labels, **tail), wanted(number, MIXED, on)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch.gradients(got), gradients, rtol=1e-7, atol=1e-8)


@every_case
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_the_value_is_the_same(many_tiles, number, on, without) -> None:
    with without():
        value = Batch(MIXED, on).loss(number)
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), wanted(number, MIXED, on)[0], rtol=1e-9, atol=1e-9)


@every_case
def test_a_loss_used_twice_gives_twice_the_gradient(many_tiles, number, on) -> None:
    batch = Batch(MIXED, on)
    value = batch.loss(number)
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in batch.leaves]
    value.backward()
    torch.testing.assert_close([leaf.grad for leaf in batch.leaves], [2 * g for g in once], rtol=0, atol=0)
    torch.testing.assert_close(batch.gradients(3 * batch.loss(number)), [3 * g for g in once])


@every_case
def test_gradient_only_where_it_is_asked_for(many_tiles, number, on) -> None:
    _, gradients = wanted(number, MIXED, on)
    for which in range(len(gradients)):
        batch = Batch(MIXED, on)
        for other, leaf in enumerate(batch.leaves):
            leaf.requires_grad_(other == which)
        batch.loss(number).backward()
        found = batch.leaves[which].grad
        torch.testing.assert_close(found, gradients[which], rtol=1e-7, atol=1e-8)
        assert all(leaf.grad is None for other, leaf in enumerate(batch.leaves) if other != which)


@every_case
def test_two_threads_give_the_same_bits_twice(monkeypatch, threads, number, on) -> None:
    monkeypatch.setattr(_tiles, "CPU_TILE", 20)
    monkeypatch.setattr(_tiles, "WORTH_THREADS", 0)
    threads(2)
    runs = []
    for _ in range(2):
        batch = Batch(MIXED, on, dtype=torch.float32)
        value = batch.loss(number)
        runs.append([value.detach(), *batch.gradients(value)])
    assert torch.get_num_threads() == 2
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("loss", [SupConLoss(), TripletLoss(mining="batch-hard")], ids=["pairs", "triplets"])
@pytest.mark.parametrize(
    ("worth", "wanted_threads"), [(0, 2), (_tiles.WORTH_THREADS, 1)], ids=["threads", "too little"]
)
def test_threads_take_the_tiles_when_there_are_enough(monkeypatch, threads, loss, worth, wanted_threads) -> None:
    seen, inside, original = set(), set(), _tiles.Plan.tile

    def tile(*arguments):
        seen.add(threading.get_ident())
        inside.add(torch.get_num_threads())
        time.sleep(0.02)  # so that no thread is through before the other starts
        return original(*arguments)

    monkeypatch.setattr(_tiles.Plan, "tile", tile)
    monkeypatch.setattr(_tiles, "CPU_TILE", 20)
    monkeypatch.setattr(_tiles, "WORTH_THREADS", worth)
    threads(2)
    batch = Batch()
    loss(batch.z, batch.labels).backward()
    assert len(seen) == wanted_threads
    assert inside == {2 // wanted_threads}, "together as many as were allowed"
    assert (threading.get_ident() in seen) == (wanted_threads == 1)


@pytest.mark.parametrize(
    "loss", [SupConLoss(), TripletLoss(margin=0.3), SmoothAPLoss(0.3)], ids=["pairs", "triplets", "ranking"]
)
def test_compiled_or_not_is_the_same(loss) -> None:
    batch = Batch()
    with warnings.catch_warnings():
        # torch's own compiler looks at .grad of tensors that have none
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        got = torch.compile(loss, backend="eager")(batch.z, batch.labels)
    want = loss(batch.z, batch.labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(batch.gradients(got), batch.gradients(want))


@every_case
def test_arguments_that_do_not_fit_are_explained(number, on) -> None:
    loss = PAIR_LOSSES[number][0]
    with pytest.raises(ValueError, match=r"takes embeddings \(B, D\) and labels \(B,\), got \(4, 5\) and \(3,\)"):
        loss(embeddings(4), torch.zeros(3))
    with pytest.raises(ValueError, match="reference and reference_labels together"):
        loss(embeddings(4), torch.zeros(4), reference=embeddings(4))
    with pytest.raises(ValueError, match="reference and reference_labels together"):
        loss(embeddings(4), torch.zeros(4), reference_labels=torch.zeros(4))
    with pytest.raises(ValueError, match=r"reference \(4, 2\) with 4 labels does not fit embeddings \(4, 5\)"):
        loss(embeddings(4), torch.zeros(4), reference=embeddings(4)[:, :2], reference_labels=torch.zeros(4))
    with pytest.raises(ValueError, match=r"reference \(4, 5\) with 3 labels does not fit embeddings \(4, 5\)"):
        loss(embeddings(4), torch.zeros(4), reference=embeddings(4), reference_labels=torch.zeros(3))


def test_a_reference_too_many_or_missing_is_explained() -> None:
    z, y = embeddings(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="NPairLoss cannot use a reference: .*first two rows of each class"):
        NPairLoss()(z, y, reference=z, reference_labels=y)
    with pytest.raises(ValueError, match="InfoNCELoss compares with a reference: give reference=.*use NTXentLoss"):
        InfoNCELoss()(z, y)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SupConLoss(0), "SupConLoss needs temperature > 0, got 0"),
        (lambda: NTXentLoss(-1), "NTXentLoss needs temperature > 0, got -1"),
        (lambda: InfoNCELoss(-1), "InfoNCELoss needs temperature > 0, got -1"),
        (lambda: DCLLoss(0), "DCLLoss needs temperature > 0, got 0"),
        (lambda: SoftNearestNeighborLoss(0), "SoftNearestNeighborLoss needs temperature > 0, got 0"),
        (lambda: SmoothAPLoss(0), "SmoothAPLoss needs temperature > 0, got 0"),
        (lambda: MultiSimilarityLoss(alpha=0), "MultiSimilarityLoss needs alpha > 0, got 0"),
        (lambda: MultiSimilarityLoss(beta=-2), "MultiSimilarityLoss needs beta > 0, got -2"),
        (lambda: CircleLoss(scale=0), "CircleLoss needs scale > 0, got 0"),
        (lambda: CircleLoss(margin=1), r"CircleLoss needs a margin in \(-1, 1\) \(a cosine\), got 1"),
        (lambda: FastAPLoss(bins=0), "FastAPLoss needs bins >= 1, got 0"),
        (lambda: AngularLoss(margin_degrees=90), r"AngularLoss needs margin_degrees in \(0, 90\), got 90"),
        (lambda: FocalContrastiveLoss(gamma=-1), "FocalContrastiveLoss needs gamma >= 0 .*got -1"),
        (lambda: FocalContrastiveLoss(scale=0), "FocalContrastiveLoss needs scale > 0, got 0"),
        (
            lambda: ThresholdConsistentMarginLoss(positive_margin=0.2, negative_margin=0.3),
            "-1 <= negative_margin <= positive_margin <= 1 .*got 0.3 and 0.2",
        ),
        (lambda: MarginLoss(beta=2), "MarginLoss needs margin >= 0 and 0 < beta < 2 .*got 0.2 and 2"),
        (lambda: MarginLoss(margin=-0.1), "MarginLoss needs margin >= 0 and 0 < beta < 2 .*got -0.1 and 1.2"),
        (lambda: TripletLoss(margin=3), r"TripletLoss needs a margin in \[0, 2\] .*got 3"),
        (lambda: TripletLoss(mining="hard"), "TripletLoss knows mining 'all', 'batch-hard', .*got 'hard'"),
        (lambda: ContrastiveLoss(positive_margin=1, negative_margin=1), "0 <= positive_margin < negative_margin <= 2"),
        (lambda: FocalLoss(-1), "FocalLoss needs gamma >= 0 .*got -1"),
        (lambda: BinaryFocalLoss(-1), "BinaryFocalLoss needs gamma >= 0 .*got -1"),
        (lambda: BinaryFocalLoss(alpha=2), r"alpha in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_explained(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# ---- what only some losses have -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("nu", [0.0, 0.3])
@pytest.mark.parametrize("on", ["batch", "reference"])
def test_margin_loss_learns_its_boundary(engine, num_classes, nu, on) -> None:
    batch = Batch(MIXED, on)
    loss = MarginLoss(margin=0.4, nu=nu, num_classes=num_classes).double()
    assert loss.beta.shape == (num_classes or 1,)
    if num_classes:
        loss.beta.data = torch.tensor([1.2, 0.9, 1.4, 1.0, 1.1], dtype=torch.float64)
    got = loss(batch.z, batch.labels, **batch.reference)
    tail = list(batch.reference.values())
    want = naive.margin_loss(batch.z, batch.labels, *tail, beta=loss.beta, margin=0.4, nu=nu)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves = [*batch.leaves, loss.beta]
    found, exact = (torch.autograd.grad(value, leaves) for value in (got, want))
    assert exact[-1].abs().sum() > 1e-3
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)


def test_margin_loss_with_a_fixed_boundary_and_foreign_classes() -> None:
    fixed = MarginLoss(learn_beta=False)
    fixed(embeddings(4).requires_grad_(), torch.tensor([0, 0, 1, 1])).backward()
    assert fixed.beta.grad is None
    with pytest.raises(ValueError, match="MarginLoss was made for the classes 0 to 2, got labels from 0 to 3"):
        MarginLoss(num_classes=3)(embeddings(4), torch.tensor([0, 0, 1, 3]))
    with pytest.raises(ValueError, match="MarginLoss was made for the classes 0 to 2, got labels from -1 to 1"):
        MarginLoss(num_classes=3)(embeddings(4), torch.tensor([0, 0, 1, -1]))
    with pytest.raises(ValueError, match="MarginLoss takes class numbers as labels, got torch.float32"):
        MarginLoss(num_classes=3)(embeddings(4), torch.zeros(4))


def every_triplet(z, y, reference, reference_labels, margin) -> Tensor:
    """All triplets at once, (B, M, M): short, and too big for use."""
    itself = reference is None
    unit = z / z.norm(dim=1, keepdim=True)
    other = unit if itself else reference / reference.norm(dim=1, keepdim=True)
    mates = y[:, None] == (y if itself else reference_labels)
    distances = (unit[:, None] - other).square().sum(2).clamp(min=1e-30).sqrt()  # (B, M)
    violation = (margin + distances[:, :, None] - distances[:, None, :]).relu()
    positive = mates & ~torch.eye(len(y), dtype=torch.bool) if itself else mates
    violation = violation * (positive[:, :, None] & ~mates[:, None, :])
    return violation.sum() / (violation > 0).sum().clamp(min=1)


@pytest.mark.parametrize("tile", [2**20, 200])
@pytest.mark.parametrize("margin", [0.3, 0.0, 2.0])
@pytest.mark.parametrize("on", ["batch", "reference"])
def test_triplets_of_large_classes(monkeypatch, tile, margin, on) -> None:
    """More positives per anchor than the plain loop is used for, and classes that are smaller beside them."""
    monkeypatch.setattr(_tiles, "CPU_TILE", tile)
    y = torch.tensor([0] * 40 + [1] * 36 + [2] * 5 + [3])[
        torch.randperm(82, generator=torch.Generator().manual_seed(2))
    ]
    z, reference, reference_labels = embeddings(82).requires_grad_(), None, None
    if on == "reference":
        reference, reference_labels = embeddings(82, seed=1).requires_grad_(), y.flip(0)
    leaves = [z] if reference is None else [z, reference]
    got = TripletLoss(margin=margin)(z, y, reference=reference, reference_labels=reference_labels)
    want = every_triplet(z, y, reference, reference_labels, margin)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    found, exact = (torch.autograd.grad(value, leaves) for value in (got, want))
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-10)


# ---- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def full_matrix(z: Tensor, y: Tensor) -> Tensor:
    """What the check is there to catch."""
    return (torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(z).T).exp().sum(1).log().mean()


MINED = [
    SupConLoss(mining="multi-similarity"),
    ContrastiveLoss(mining="semi-hard"),
    MarginLoss(mining="distance-weighted"),
    *[TripletLoss(mining=name) for name in ("easy-positive", "semi-hard", "angular", "multi-similarity")],
]
PROXIES = [
    NormSoftmaxLoss,
    ArcFaceLoss,
    CosFaceLoss,
    AdaFaceLoss,
    ProxyNCALoss,
    ProxyAnchorLoss,
    SoftTripleLoss,
    CenterLoss,
]


def largest(loss, rows: int, classes: int) -> int:
    z = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with Largest() as seen:
        loss(z, torch.arange(rows) % classes).backward()
    return seen.elements


@pytest.mark.parametrize(("rows", "classes", "tile"), [(512, 128, 2**13), (128, 2, 2**11)], ids=["small", "large"])
def test_no_operation_makes_a_full_matrix(monkeypatch, rows, classes, tile) -> None:
    """With small classes and with large ones; every tensor on the way fits a tile or grows with the rows."""
    monkeypatch.setattr(_tiles, "CPU_TILE", tile)
    enough = max(tile, rows * 8)
    assert largest(full_matrix, rows, classes) == rows * rows > 7 * enough, "the control: it must be seen"
    pairs = [row[0] for row in PAIR_LOSSES if not isinstance(row[0], InfoNCELoss)]
    for loss in pairs + MINED + [make(classes, 8) for make in PROXIES]:
        proxies = max((p.numel() for p in loss.parameters()), default=0)
        assert largest(loss, rows, classes) <= max(enough, proxies), loss


def test_a_reference_does_not_make_a_full_matrix(monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "CPU_TILE", 2**11)
    z = torch.randn(128, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.arange(128) % 32
    for loss in (InfoNCELoss(), SupConLoss(), TripletLoss(), SmoothAPLoss(), ContrastiveLoss(mining="batch-hard")):
        with Largest() as seen:
            loss(z, y, reference=z * 2, reference_labels=y).backward()
        assert seen.elements <= 2**11, loss


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["batch", "reference"])
def test_matryoshka_is_the_mean_over_prefixes(engine, on) -> None:
    batch = Batch(MIXED, on)
    got = MatryoshkaLoss(SupConLoss(0.2), [2, 3, 5])(batch.z, batch.labels, **batch.reference)
    oracle = functools.partial(naive.supcon, temperature=0.2)
    want = naive.matryoshka(batch.z, batch.labels, *batch.reference.values(), loss=oracle, dims=[2, 3, 5])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch.gradients(got), batch.gradients(want), rtol=1e-7, atol=1e-8)


def test_matryoshka_refuses_prefixes_that_are_none() -> None:
    for dims in ([], [0, 2]):
        with pytest.raises(ValueError, match="MatryoshkaLoss"):
            MatryoshkaLoss(SupConLoss(), dims)
    with pytest.raises(ValueError, match="MatryoshkaLoss.*5"):
        MatryoshkaLoss(SupConLoss(), [2, 8])(embeddings(4), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("on", ["batch", "reference"])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
def test_sum_adds_what_each_loss_gives(engine, on, weights) -> None:
    batch = Batch(MIXED, on)
    got = SumLoss([SupConLoss(0.2), ContrastiveLoss()], weights)(batch.z, batch.labels, **batch.reference)
    parts = [
        oracle(batch.z, batch.labels, *batch.reference.values())
        for oracle in (functools.partial(naive.supcon, temperature=0.2), naive.contrastive)
    ]
    want = sum(weight * part for weight, part in zip(weights or [1.0, 1.0], parts, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch.gradients(got), batch.gradients(want), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("parts", "weights"), [([], None), ([SupConLoss()], [1.0, 1.0]), ([SupConLoss(), SupConLoss()], [1.0, 0.0])]
)
def test_sum_refuses_weights_that_do_not_fit(parts, weights) -> None:
    with pytest.raises(ValueError, match=f"a weight > 0 for each, got {len(parts)} losses and the weights"):
        SumLoss(parts, weights)


def steps(count: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (embeddings(rows, seed=10 + step).requires_grad_(), torch.randint(0, 3, (rows,), generator=generator))
        for step in range(count)
    ]


@pytest.mark.parametrize("capacity", [3, 6, 10, 100], ids=["less than a batch", "a batch", "wraps", "never full"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_memory_adds_the_loss_against_former_batches(engine, capacity, weight) -> None:
    loss = CrossBatchMemory(SupConLoss(0.2), 5, capacity=capacity, weight=weight).double()
    batches = steps(5, 6)
    values = [loss(*batch) for batch in batches]
    oracle = functools.partial(naive.supcon, temperature=0.2)
    wanted_values = naive.cross_batch_memory(batches, loss=oracle, capacity=capacity, weight=weight)
    for (z, _), got, want in zip(batches, values, wanted_values, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(got, z), gradient(want, z), rtol=1e-6, atol=1e-6)


def test_memory_resumes_where_it_was() -> None:
    batches = steps(4, 4)
    straight, first, second = (CrossBatchMemory(SupConLoss(), 5, capacity=6) for _ in range(3))
    values = [straight(z.float(), y) for z, y in batches]
    for z, y in batches[:2]:
        first(z.float(), y)
    second.load_state_dict(first.state_dict())
    assert [second(z.float(), y).item() for z, y in batches[2:]] == [value.item() for value in values[2:]]


def test_memory_waits_for_its_start() -> None:
    batches = steps(3, 4)
    alone, waiting = SupConLoss(), CrossBatchMemory(SupConLoss(), 5, capacity=6, start=2)
    same = [torch.equal(alone(z.float(), y), waiting(z.float(), y)) for z, y in batches]
    assert same == [True, True, False]


def test_memory_refuses_what_it_cannot_use() -> None:
    z, y = embeddings(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="CrossBatchMemory cannot use a reference: its memory is one"):
        CrossBatchMemory(SupConLoss(), 5, capacity=6)(z, y, reference=z, reference_labels=y)
    with pytest.raises(ValueError, match="CrossBatchMemory was made for embeddings of 3 numbers, got 5"):
        CrossBatchMemory(SupConLoss(), 3, capacity=6)(z, y)
    with pytest.raises(ValueError, match="CrossBatchMemory needs capacity > 0, got 0"):
        CrossBatchMemory(SupConLoss(), 3, capacity=0)


def test_memory_is_not_filled_while_validating() -> None:
    loss = CrossBatchMemory(SupConLoss(), 5, capacity=6)
    (z, y), (other, labels) = steps(2, 4)
    loss(z.float(), y)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss.eval()(other.float(), labels)
    for name, buffer in loss.named_buffers():
        assert torch.equal(buffer, before[name]), name


# ---- focal losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
def test_focal_equals_the_paper(gamma, weights) -> None:
    logits = embeddings(6)[:, :3].clone().requires_grad_()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    got = FocalLoss(gamma, class_weights=weights)(logits, targets)
    want = naive.focal(logits, targets, gamma=gamma, weights=weights)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)  # class weights are kept in float32
    torch.testing.assert_close(gradient(got, logits), gradient(want, logits), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal_equals_the_paper(gamma, alpha) -> None:
    logits = embeddings(4).clone().requires_grad_()
    targets = (embeddings(4, seed=1) > 0).double()
    got, want = (
        BinaryFocalLoss(gamma, alpha=alpha)(logits, targets),
        naive.binary_focal(logits, targets, gamma=gamma, alpha=alpha),
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, logits), gradient(want, logits))


def test_focal_of_images_and_of_certain_answers() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    flat = FocalLoss()(logits.permute(0, 2, 3, 1).reshape(-1, 3), targets.flatten())
    torch.testing.assert_close(FocalLoss()(logits, targets), flat)
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    for loss in (FocalLoss(0.5), FocalLoss(2.0)):
        assert torch.isfinite(gradient(loss(certain, torch.tensor([0])), certain)).all()
    with pytest.raises(ValueError, match="for one logit per target use BinaryFocalLoss"):
        FocalLoss()(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="for class numbers use FocalLoss"):
        BinaryFocalLoss()(torch.zeros(3, 2), torch.zeros(3))


@every_case
def test_a_broken_embedding_is_not_hidden(number, on) -> None:
    z, y = embeddings(10), torch.tensor(LABELS["two classes"])
    z[3, 1] = float("nan")
    loss = PAIR_LOSSES[number][0]
    assert torch.isnan(
        loss(z, y) if on == "batch" else loss(z, y, reference=embeddings(10, seed=1), reference_labels=y)
    )


@pytest.mark.parametrize("mining", ["batch-hard", "semi-hard", "easy-positive", "distance-weighted", "angular"])
@pytest.mark.parametrize("kind", [TripletLoss, ContrastiveLoss, SupConLoss, MarginLoss])
def test_a_miner_does_not_hide_a_broken_embedding(kind, mining) -> None:
    z, y = embeddings(10), torch.tensor(LABELS["two classes"])
    z[3, 1] = float("nan")
    assert torch.isnan(kind(mining=mining)(z, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_row_has_a_small_gradient(dtype) -> None:
    z = embeddings(8).to(dtype)
    z[0] = 0
    z.requires_grad_()
    assert gradient(SupConLoss()(z, torch.arange(8) // 2), z).abs().max() < 100


def test_binary_focal_is_smooth_below_gamma_one() -> None:
    logits = torch.tensor([200.0, 1.0], requires_grad=True)
    assert torch.isfinite(gradient(BinaryFocalLoss(0.5)(logits, torch.ones(2)), logits)).all()


def test_pairs_of_few_classes_need_no_list_of_tiles() -> None:
    plan = _tiles.Plan(torch.arange(20_000) % 2, None, by_pair=True)
    assert len(plan.cut(torch.zeros(20_000, 4))) > 10**6
    assert isinstance(plan.cut(torch.zeros(20_000, 4)), range)


def test_memory_looks_through_wrappers() -> None:
    for wrapped in (MatryoshkaLoss(ArcFaceLoss(4, 8), [4]), ThresholdConsistentMarginLoss(loss=ArcFaceLoss(4, 8))):
        with pytest.raises(ValueError, match="cannot go around ArcFaceLoss"):
            CrossBatchMemory(wrapped, 8, capacity=4)
