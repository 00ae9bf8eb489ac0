import naive
import pytest
import torch
from torch import nn

from embedlab import losses
from embedlab.losses import BinaryFocalLoss, ContrastiveLoss, FocalLoss, NTXentLoss, SupConLoss, TripletLoss

# a new pair loss is one row: loss, oracle, the oracle's arguments
PAIR_LOSSES = [
    (SupConLoss(0.1), naive.supcon, {"temperature": 0.1}),
    (SupConLoss(0.5), naive.supcon, {"temperature": 0.5}),
    (NTXentLoss(0.2), naive.nt_xent, {"temperature": 0.2}),
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
ids = [f"{type(row[0]).__name__}-{number}" for number, row in enumerate(PAIR_LOSSES)]
pair_losses = pytest.mark.parametrize(("loss", "oracle", "arguments"), PAIR_LOSSES, ids=ids)
LABELS = {
    "two classes": [0, 0, 0, 1, 1, 1],
    "one class": [0, 0, 0, 0, 0, 0],
    "lonely anchors": [0, 0, 1, 2, 3, 4],
    "gaps": [7, 7, 3, 3, 900, 900],
    "nobody has a mate": [0, 1, 2, 3, 4, 5],
}


def embeddings(rows: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found


def test_every_exported_pair_loss_stands_in_the_table() -> None:
    exported = {name for name, kind in vars(losses).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    tested = {type(row[0]).__name__ for row in PAIR_LOSSES} | {"FocalLoss", "BinaryFocalLoss"}
    assert exported == tested


@pair_losses
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_value_and_gradient_equal_the_paper(loss, oracle, arguments, labels) -> None:
    z, y = embeddings(6).requires_grad_(), torch.tensor(labels)
    got, want = loss(z, y), oracle(z, y, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(got, z), gradient(want, z), rtol=1e-7, atol=1e-8)


@pair_losses
def test_reference_replaces_the_batch(loss, oracle, arguments) -> None:
    z, y = embeddings(4).requires_grad_(), torch.tensor([0, 1, 1, 2])
    reference, reference_labels = embeddings(7, seed=1).requires_grad_(), torch.tensor([0, 0, 1, 2, 2, 5, 1])
    got = loss(z, y, reference=reference, reference_labels=reference_labels)
    want = oracle(z, y, reference, reference_labels, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(got, reference), gradient(want, reference), rtol=1e-7, atol=1e-8)


@pair_losses
def test_float32_is_close_to_float64(loss, oracle, arguments) -> None:
    z, y = embeddings(6), torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(loss(z.float(), y).double(), oracle(z, y, **arguments), rtol=1e-5, atol=1e-6)


@pair_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(loss, oracle, arguments, dtype) -> None:
    z, y = embeddings(6).to(dtype), torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), oracle(z.double(), y, **arguments), rtol=1e-5, atol=1e-5)


@pair_losses
@pytest.mark.parametrize(
    "z",
    [torch.zeros(4, 3), torch.ones(4, 3), torch.full((4, 3), 1e-30), torch.ones(1, 3)],
    ids=["zero", "coincide", "tiny", "one sample"],
)
def test_degenerate_batches_stay_finite(loss, oracle, arguments, z) -> None:
    z = z.clone().requires_grad_()
    value = loss(z, torch.tensor([0, 0, 1, 1])[: len(z)])
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", [SupConLoss(0.01), NTXentLoss(0.01)])
def test_low_temperature_is_stable(loss) -> None:
    z = embeddings(8).float().requires_grad_()
    value = loss(z, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, z)).all()


@pair_losses
def test_gradcheck(loss, oracle, arguments) -> None:
    y = torch.tensor([0, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda z: loss(z, y), embeddings(5).requires_grad_())


@pair_losses
def test_arguments_that_do_not_fit_are_explained(loss, oracle, arguments) -> None:
    with pytest.raises(ValueError, match=r"takes embeddings \(B, D\) and labels \(B,\), got \(4, 5\) and \(3,\)"):
        loss(embeddings(4), torch.zeros(3))
    with pytest.raises(ValueError, match="reference and reference_labels together"):
        loss(embeddings(4), torch.zeros(4), reference=embeddings(4))
    with pytest.raises(ValueError, match=r"reference \(4, 2\) with 4 labels does not fit embeddings \(4, 5\)"):
        loss(embeddings(4), torch.zeros(4), reference=embeddings(4)[:, :2], reference_labels=torch.zeros(4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SupConLoss(0), "SupConLoss needs temperature > 0, got 0"),
        (lambda: NTXentLoss(-1), "NTXentLoss needs temperature > 0, got -1"),
        (lambda: TripletLoss(margin=3), "margin in \\[0, 2\\]"),
        (lambda: TripletLoss(mining="hard"), "knows mining 'all' and 'batch-hard', got 'hard'"),
        (lambda: ContrastiveLoss(positive_margin=1, negative_margin=1), "0 <= positive_margin < negative_margin <= 2"),
        (lambda: FocalLoss(-1), "gamma >= 0"),
        (lambda: BinaryFocalLoss(alpha=2), "alpha in \\[0, 1\\]"),
    ],
)
def test_wrong_settings_are_explained(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


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
