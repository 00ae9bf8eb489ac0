"""The oracles of naive.py beside outside implementations: nothing here touches embedlab.

Each comparison is of the value and of the gradients of everything that can learn, in float64. Where the outside
implementation differs from the definition, its input is adapted and a comment says how. Without the outside package
its tests skip and name the line that installs it.
"""

import importlib

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import nn

CLASSES, DIM = 4, 5
MATES = [2, 0, 1, 1, 0, 3, 2, 0, 3, 1]  # every row has a class-mate, class sizes differ
LONELY = [2, 0, 1, 1, 0, 3, 0, 0, 1, 1]  # rows 0 and 5 have none


@pytest.fixture(scope="module")
def metric_learning():
    package = pytest.importorskip("pytorch_metric_learning", reason="no check: pip install pytorch-metric-learning")
    for part in ("losses", "miners"):
        importlib.import_module(f"pytorch_metric_learning.{part}")
    return package


@pytest.fixture(scope="module")
def lightly():
    pytest.importorskip("lightly", reason="no check: pip install lightly")
    from lightly import loss

    return loss


def rows(count: int, dim: int = DIM, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)).requires_grad_()


def gathered(seed: int = 0) -> torch.Tensor:
    """Rows around their class (`MATES`), close enough that mining and hinges have both kinds of cases."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(MATES), DIM, generator=generator, dtype=torch.float64)
    return (middles[torch.tensor(MATES)] + 0.7 * noise).requires_grad_()


def same(ours, theirs, *inputs, rtol: float = 1e-9) -> None:
    """Value and gradients; not vacuous: the value is no zero."""
    theirs = theirs.squeeze()
    assert ours.item() != 0
    torch.testing.assert_close(ours, theirs.double(), rtol=rtol, atol=rtol)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=100 * rtol, atol=10 * rtol)


# ---- pairs and triplets beside pytorch-metric-learning --------------------------------------------------------------

# oracle, its arguments, the other's class, its arguments, and whether the two agree on rows without a class-mate
PAIRS = [
    (naive.supcon, {"temperature": 0.2}, "SupConLoss", {"temperature": 0.2}, True),
    (naive.supcon, {}, "SupConLoss", {}, True),
    (naive.nt_xent, {"temperature": 0.2}, "NTXentLoss", {"temperature": 0.2}, True),
    (naive.nt_xent, {}, "NTXentLoss", {}, True),
    (naive.contrastive, {}, "ContrastiveLoss", {}, True),
    (
        naive.contrastive,
        {"positive_margin": 0.4, "negative_margin": 1.3},
        "ContrastiveLoss",
        {"pos_margin": 0.4, "neg_margin": 1.3},
        True,
    ),
    (naive.triplet, {}, "TripletMarginLoss", {}, True),
    (naive.triplet, {"margin": 0.3}, "TripletMarginLoss", {"margin": 0.3}, True),
    (naive.triplet, {"margin": 0.1, "soft": True}, "TripletMarginLoss", {"margin": 0.1, "smooth_loss": True}, True),
    (naive.multi_similarity, {}, "MultiSimilarityLoss", {}, True),
    (
        naive.multi_similarity,
        {"alpha": 3.0, "beta": 10.0, "base": 0.3},
        "MultiSimilarityLoss",
        {"alpha": 3.0, "beta": 10.0, "base": 0.3},
        True,
    ),
    (naive.circle, {}, "CircleLoss", {}, True),
    (naive.circle, {"margin": 0.25, "scale": 20.0}, "CircleLoss", {"m": 0.25, "gamma": 20.0}, True),
    # theirs counts an anchor without positives (or negatives) with the other half of its loss, ours leaves it out
    (naive.lifted_structure, {}, "GeneralizedLiftedStructureLoss", {}, False),
    (
        naive.lifted_structure,
        {"positive_margin": 0.2, "negative_margin": 0.6},
        "GeneralizedLiftedStructureLoss",
        {"pos_margin": 0.2, "neg_margin": 0.6},
        False,
    ),
    (naive.soft_nearest_neighbor, {}, "NCALoss", {}, True),
    (naive.soft_nearest_neighbor, {"temperature": 0.25}, "NCALoss", {"softmax_scale": 4.0}, True),
    (naive.threshold_consistent_margin, {}, "ThresholdConsistentMarginLoss", {}, True),
    (
        naive.threshold_consistent_margin,
        {"positive_margin": 0.6, "negative_margin": -0.1},
        "ThresholdConsistentMarginLoss",
        {"margin_plus": 0.6, "margin_minus": -0.1},
        True,
    ),
    (naive.n_pair, {}, "NPairsLoss", {}, True),
    (naive.fast_ap, {}, "FastAPLoss", {}, True),
    (naive.fast_ap, {"bins": 4}, "FastAPLoss", {"num_bins": 4}, True),
]
ids = [f"{row[2]}-{number}" for number, row in enumerate(PAIRS)]
WITHOUT_REFERENCE = {"NPairsLoss", "FastAPLoss", "ThresholdConsistentMarginLoss"}  # the last takes it and ignores it


@pytest.mark.parametrize(("oracle", "arguments", "name", "options", "lonely"), PAIRS, ids=ids)
@pytest.mark.parametrize("seed", [0, 1])
def test_pair_losses(metric_learning, oracle, arguments, name, options, lonely, seed) -> None:
    theirs, z = getattr(metric_learning.losses, name)(**options), gathered(seed)
    for labels in (MATES, LONELY) if lonely else (MATES,):
        y = torch.tensor(labels)
        same(oracle(z, y, **arguments), theirs(z, y), z)


with_reference = [row for row in PAIRS if row[2] not in WITHOUT_REFERENCE]


@pytest.mark.parametrize(
    ("oracle", "arguments", "name", "options", "lonely"), with_reference, ids=[row[2] for row in with_reference]
)
def test_pair_losses_against_a_reference(metric_learning, oracle, arguments, name, options, lonely) -> None:
    theirs, z, r = getattr(metric_learning.losses, name)(**options), rows(6), gathered(1)
    y, other = torch.tensor([0, 0, 1, 2, 3, 1]), torch.tensor(MATES)
    same(oracle(z, y, r, other, **arguments), theirs(z, y, ref_emb=r, ref_labels=other), z, r)


def test_info_nce_is_nt_xent_against_a_reference(metric_learning) -> None:
    z, r = rows(4), rows(7, seed=1)
    y, other = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3, 4, 5, 6])
    theirs = metric_learning.losses.NTXentLoss(0.07)
    same(naive.info_nce(z, y, r, other), theirs(z, y, ref_emb=r, ref_labels=other), z, r)
    with pytest.raises(ValueError, match="needs a reference"):
        naive.info_nce(z, y)


@pytest.mark.parametrize("degrees", [40.0, 25.0])
def test_angular(metric_learning, degrees) -> None:
    theirs, z, y = metric_learning.losses.AngularLoss(alpha=degrees), gathered(), torch.tensor(MATES)
    # theirs normalises anchors and positives but not the negatives
    same(naive.angular(z, y, margin_degrees=degrees), theirs(F.normalize(z), y), z)
    same(
        naive.angular(z, torch.tensor(LONELY)),
        metric_learning.losses.AngularLoss()(F.normalize(z), torch.tensor(LONELY)),
        z,
    )
    q, other = rows(6, seed=2), torch.tensor([0, 0, 1, 2, 3, 1])
    want = theirs(q, other, ref_emb=F.normalize(z), ref_labels=y)
    same(naive.angular(q, other, z, y, margin_degrees=degrees), want, q, z)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_smooth_ap(metric_learning, temperature) -> None:
    theirs, z = metric_learning.losses.SmoothAPLoss(temperature), gathered()[:9]
    z = z.detach().requires_grad_()
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])  # theirs wants blocks of one size
    # theirs sums in float32
    same(naive.smooth_ap(z, y, temperature=temperature), theirs(z, y), z, rtol=1e-6)


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["one border", "a border per class"])
@pytest.mark.parametrize("against", [False, True], ids=["batch", "reference"])
def test_margin_loss(metric_learning, classes, against) -> None:
    theirs = metric_learning.losses.MarginLoss(margin=0.3, nu=0.2, learn_beta=True, num_classes=classes)
    beta = torch.linspace(0.9, 1.3, classes or 1, dtype=torch.float64)
    theirs.beta = nn.Parameter(beta)  # theirs is float32
    z, y, r, other = gathered(), torch.tensor(MATES), rows(6), torch.tensor([0, 0, 1, 2, 3, 1])
    got = naive.margin_loss(z, y, *((r, other) if against else ()), beta=theirs.beta, margin=0.3, nu=0.2)
    want = theirs(z, y, ref_emb=r, ref_labels=other) if against else theirs(z, y)
    same(got, want, z, theirs.beta, *([r] if against else []))


def test_threshold_consistent_margin_adds_to_another_loss(metric_learning) -> None:
    z, y = gathered(), torch.tensor(MATES)
    got = naive.threshold_consistent_margin(z, y, loss=naive.contrastive, weight=0.3)
    losses = metric_learning.losses
    same(got, losses.ContrastiveLoss()(z, y) + 0.3 * losses.ThresholdConsistentMarginLoss()(z, y), z)


def test_focal_contrastive_is_the_focal_loss_of_all_pairs() -> None:
    from torchvision.ops import sigmoid_focal_loss

    z, y = gathered(), torch.tensor(MATES)
    logits, alike = 10 * (F.cosine_similarity(z[:, None], z[None], dim=2) - 0.5), y[:, None] == y[None]
    each = sigmoid_focal_loss(logits, alike.double(), alpha=-1, gamma=2)
    positive = alike & ~torch.eye(len(y), dtype=torch.bool)
    same(naive.focal_contrastive(z, y), each[positive].mean() + each[~alike].mean(), z)


def test_matryoshka_is_the_mean_over_prefixes(metric_learning) -> None:
    z, y, theirs = gathered(), torch.tensor(MATES), metric_learning.losses.CircleLoss()
    got = naive.matryoshka(z, y, loss=naive.circle, dims=(2, 3, DIM))
    same(got, (theirs(z[:, :2], y) + theirs(z[:, :3], y) + theirs(z, y)) / 3, z)


def test_cross_batch_memory_is_the_batch_plus_the_bank_before_it(metric_learning) -> None:
    # theirs puts the batch into the memory first and has one term over both; so only its losses are used here
    theirs, y = metric_learning.losses.ContrastiveLoss(), torch.tensor([0, 0, 1, 1])
    batches = [(rows(4, seed=seed), y) for seed in range(3)]
    values = naive.cross_batch_memory(batches, loss=naive.contrastive, capacity=5, weight=0.5)
    bank, labels = torch.empty(0, DIM, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    for (z, _), value in zip(batches, values, strict=True):
        want = theirs(z, y) + (0.5 * theirs(z, y, ref_emb=bank, ref_labels=labels) if len(bank) else 0)
        same(value, want, z)
        bank, labels = torch.cat([bank, z.detach()])[-5:], torch.cat([labels, y])[-5:]


# ---- miners beside pytorch-metric-learning --------------------------------------------------------------------------


def chosen(indices) -> set:
    return set(zip(*(index.tolist() for index in indices), strict=True))


references = pytest.mark.parametrize("against", [False, True], ids=["batch", "reference"])
label_sets = pytest.mark.parametrize("labels", [MATES, LONELY], ids=["mates", "lonely rows"])


@references
@label_sets
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_miners(metric_learning, against, labels, seed) -> None:
    miners, z, y = metric_learning.miners, gathered(seed), torch.tensor(labels)
    batch = (z, y, rows(8, seed=9), torch.tensor([0, 1, 2, 0, 1, 5, 0, 1])) if against else (z, y)
    hard, semi = miners.BatchHardMiner(), miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard")
    assert naive.mine_batch_hard(*batch) == chosen(hard(*batch)) != set()
    assert naive.mine_semi_hard(*batch, margin=0.3) == chosen(semi(*batch)) != set()
    a, p, b, n = miners.BatchEasyHardMiner()(*batch)
    assert torch.equal(a, b)
    assert naive.mine_easy_positive(*batch) == chosen((a, p, n)) != set()
    a, p, b, n = miners.MultiSimilarityMiner()(*batch)
    assert naive.mine_multi_similarity(*batch) == (chosen((a, p)), chosen((b, n))) != (set(), set())
    unit = (F.normalize(batch[0]), y, *((F.normalize(batch[2]), batch[3]) if against else ()))
    assert naive.mine_angular(*batch) == chosen(miners.AngularMiner()(*unit)) != set()  # theirs takes rows as they are


@references
@pytest.mark.parametrize(
    ("mining", "name", "options"),
    [
        ("batch-hard", "BatchHardMiner", {}),
        ("semi-hard", "TripletMarginMiner", {"margin": 0.4, "type_of_triplets": "semihard"}),
        ("easy-positive", "BatchEasyHardMiner", {}),
        ("multi-similarity", "MultiSimilarityMiner", {}),
    ],
)
def test_mined_triplets(metric_learning, against, mining, name, options) -> None:
    theirs, miner = (
        metric_learning.losses.TripletMarginLoss(0.4),
        getattr(metric_learning.miners, name)(**options),
    )
    z, y, r, other = gathered(), torch.tensor(MATES), rows(8, seed=9), torch.tensor([0, 1, 2, 0, 1, 5, 0, 1])
    extra = (r, other) if against else ()
    want = theirs(z, y, miner(z, y, *extra), *extra)
    same(naive.triplet(z, y, *extra, margin=0.4, mining=mining), want, z, *extra[:1])


@references
@label_sets
def test_distance_weights(metric_learning, monkeypatch, against, labels) -> None:
    from pytorch_metric_learning.utils import loss_and_miner_utils

    seen, original = [], loss_and_miner_utils.get_random_triplet_indices

    def spy(*arguments, weights, **rest):
        seen.append(weights)
        return original(*arguments, weights=weights, **rest)

    monkeypatch.setattr(loss_and_miner_utils, "get_random_triplet_indices", spy)
    z, y = gathered(), torch.tensor(labels)
    batch = (z, y, rows(8, seed=9), torch.tensor([0, 1, 2, 0, 1, 5, 0, 1])) if against else (z, y)
    metric_learning.miners.DistanceWeightedMiner()(*batch)
    got = naive.distance_weights(*batch)
    torch.testing.assert_close(got, seen[0].nan_to_num(0), rtol=1e-9, atol=1e-12)  # theirs: 0 / 0 where none is left
    assert got.max() > got[got > 0].min() > 0


# ---- proxies --------------------------------------------------------------------------------------------------------


def beside_proxies(
    theirs, attribute: str, oracle, *, per_class: int = 1, transposed: bool = True, rtol=1e-9, **arguments
):
    """The other loss with our proxies, on labels that leave one class out."""
    proxies, z, y = rows(CLASSES * per_class, seed=3), gathered(), torch.tensor(MATES).clamp(max=2)
    setattr(theirs, attribute, nn.Parameter((proxies.T if transposed else proxies).detach().clone()))
    weight = getattr(theirs, attribute)
    got, want = oracle(z, y, proxies, **arguments), theirs(z, y).squeeze()
    same(got, want, z, rtol=rtol)
    (mine,), (other,) = (
        torch.autograd.grad(oracle(z, y, proxies, **arguments), [proxies]),
        torch.autograd.grad(theirs(z, y), [weight]),
    )
    torch.testing.assert_close(mine, other.T if transposed else other, rtol=100 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_norm_softmax(metric_learning, temperature) -> None:
    theirs = metric_learning.losses.NormalizedSoftmaxLoss(CLASSES, DIM, temperature=temperature)
    beside_proxies(theirs, "W", naive.norm_softmax, temperature=temperature)


@pytest.mark.parametrize(("degrees", "scale"), [(28.6, 64.0), (80.0, 4.0)], ids=["default", "beyond pi - m"])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_arcface(metric_learning, degrees, scale, sub_centers) -> None:
    theirs = metric_learning.losses.SubCenterArcFaceLoss(
        num_classes=CLASSES, embedding_size=DIM, margin=degrees, scale=scale, sub_centers=sub_centers
    )
    beside_proxies(
        theirs,
        "W",
        naive.arcface,
        per_class=sub_centers,
        margin_degrees=degrees,
        scale=scale,
        sub_centers=sub_centers,
    )


def test_arcface_leaves_out_anchors_far_from_their_class(metric_learning) -> None:
    theirs = metric_learning.losses.ArcFaceLoss(CLASSES, DIM)
    proxies, z, y = rows(CLASSES, seed=3), gathered(), torch.tensor(MATES)
    theirs.W = nn.Parameter(proxies.T.detach().clone())
    near = F.cosine_similarity(z, proxies[y]).acos().rad2deg() <= 75
    assert 0 < near.sum() < len(y)
    same(naive.arcface(z, y, proxies, noise_degrees=75.0), theirs(z[near], y[near]), z)
    same(naive.arcface(z, y, proxies, noise_degrees=75.0, noise_after=2, calls=1), theirs(z, y), z)
    assert naive.arcface(z, y, proxies, noise_degrees=1.0).item() == 0


def test_cosface(metric_learning) -> None:
    beside_proxies(metric_learning.losses.CosFaceLoss(CLASSES, DIM), "W", naive.cosface)
    theirs = metric_learning.losses.CosFaceLoss(CLASSES, DIM, margin=0.1, scale=3.0)
    beside_proxies(theirs, "W", naive.cosface, margin=0.1, scale=3.0)


def test_adaface_has_cosface_and_arcface_as_special_cases(metric_learning) -> None:
    losses, (m, degrees) = metric_learning.losses, (0.3, 0.3 * 180 / torch.pi)
    # norms at the mean: k = 0, an additive margin; norms far below: k = -1, an angular margin
    theirs = losses.CosFaceLoss(CLASSES, DIM, margin=m, scale=8.0)
    beside_proxies(theirs, "W", naive.adaface, mean=20.0, std=1e9, margin=m, scale=8.0, rtol=1e-7)
    theirs = losses.ArcFaceLoss(CLASSES, DIM, margin=degrees, scale=8.0)
    beside_proxies(theirs, "W", naive.adaface, mean=20.0, std=1e-6, margin=m, scale=8.0, concentration=1.0)


def test_adaface_by_matrices() -> None:
    z, proxies, y = rows(9, seed=4, scale=3.0), rows(CLASSES, seed=3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 0])
    mean, std = 5.0, 4.0
    k = (0.333 * (z.detach().norm(dim=1) - mean) / (std + 1e-3)).clamp(-1, 1)
    cosine, own = F.normalize(z) @ F.normalize(proxies).T, F.one_hot(y, CLASSES).bool()
    turned = (cosine.acos() - own * 0.4 * k[:, None]).clamp(1e-3, torch.pi - 1e-3).cos()
    want = F.cross_entropy(64 * (turned - own * (0.4 + 0.4 * k[:, None])), y)
    same(naive.adaface(z, y, proxies, mean=mean, std=std), want, z, proxies)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_weights_of_softmax_losses(gamma) -> None:
    z, proxies, y = rows(8), rows(CLASSES, seed=3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])
    cosine, own = F.normalize(z) @ F.normalize(proxies).T, F.one_hot(y, CLASSES).bool()
    m = torch.pi / 9  # 20 degrees; no angle comes near pi - m
    turned = torch.where(own, (cosine.acos() + m).cos(), cosine)
    for got, logits in [
        (naive.norm_softmax(z, y, proxies, temperature=0.5, gamma=gamma), cosine / 0.5),
        (naive.cosface(z, y, proxies, margin=0.1, scale=4.0, gamma=gamma), 4 * (cosine - 0.1 * own.double())),
        (naive.arcface(z, y, proxies, margin_degrees=20.0, scale=4.0, gamma=gamma), 4 * turned),
        (
            naive.adaface(z, y, proxies, mean=1e6, std=1e-6, margin=m, scale=4.0, concentration=1.0, gamma=gamma),
            4 * turned,
        ),
    ]:
        entropy = F.cross_entropy(logits, y, reduction="none")
        same(got, ((1 - (-entropy).exp()) ** gamma * entropy).mean(), z, proxies)


def test_proxy_nca(metric_learning) -> None:
    beside_proxies(
        metric_learning.losses.ProxyNCALoss(CLASSES, DIM, softmax_scale=9),
        "proxies",
        naive.proxy_nca,
        transposed=False,
    )


@pytest.mark.parametrize(("margin", "scale"), [(0.1, 32.0), (0.3, 5.0)])
def test_proxy_anchor(metric_learning, margin, scale) -> None:
    theirs = metric_learning.losses.ProxyAnchorLoss(CLASSES, DIM, margin=margin, alpha=scale)
    beside_proxies(theirs, "proxies", naive.proxy_anchor, transposed=False, margin=margin, scale=scale)


@pytest.mark.parametrize("centers", [1, 3])
def test_soft_triple(metric_learning, centers) -> None:
    options = {"margin": 0.05, "gamma": 0.2}
    theirs = metric_learning.losses.SoftTripleLoss(CLASSES, DIM, centers_per_class=centers, la=10, **options)
    beside_proxies(theirs, "fc", naive.soft_triple, per_class=centers, centers=centers, scale=10.0, **options)


def test_regularization_of_soft_triple() -> None:
    z, y, w = rows(6), torch.tensor([0, 1, 0, 1, 0, 0]), rows(6, seed=3)
    got = naive.soft_triple(z, y, w, centers=3, regularization=0.2) - naive.soft_triple(z, y, w, centers=3)
    apart = sum(F.pdist(F.normalize(w)[3 * c : 3 * c + 3]).sum() for c in range(2))
    same(got, 0.2 * apart / (2 * 3 * 2), w)


def test_center() -> None:
    z, c, y = rows(6), rows(CLASSES, seed=3), torch.tensor([0, 1, 0, 3, 0, 1])
    same(naive.center(z, y, c), F.mse_loss(F.normalize(z), c[y]) * DIM / 2, z, c)


# ---- without labels, beside lightly ---------------------------------------------------------------------------------


def test_two_view_losses(lightly) -> None:
    first, second = rows(6), rows(6, seed=1)
    both, y = torch.cat([first, second]), torch.arange(6).repeat(2)  # the views of one image share a label
    same(naive.dcl(both, y), lightly.DCLLoss()(first, second), first, second)
    same(naive.dcl(both, y, temperature=0.5), lightly.DCLLoss(0.5)(first, second), first, second)
    theirs = lightly.NTXentLoss(temperature=0.07)  # its default is 0.5
    same(naive.nt_xent(both, y), theirs(first, second), first, second)
    same(naive.supcon(both, y, temperature=0.3), lightly.NTXentLoss(0.3)(first, second), first, second)


def test_barlow_twins(lightly) -> None:
    first, second = rows(7), rows(7, seed=1)
    same(naive.barlow_twins(first, second), lightly.BarlowTwinsLoss()(first, second), first, second)
    theirs = lightly.BarlowTwinsLoss(lambda_param=0.1)
    same(naive.barlow_twins(first, second, off_diagonal=0.1), theirs(first, second), first, second)


def test_vicreg(lightly) -> None:
    first, second = rows(7, scale=0.8), rows(7, seed=1)
    same(naive.vicreg(first, second), lightly.VICRegLoss()(first, second), first, second)
    got = naive.vicreg(first, second, invariance=3.0, variance=5.0, covariance=7.0)
    same(got, lightly.VICRegLoss(lambda_param=3, mu_param=5, nu_param=7)(first, second), first, second)


def test_vicreg_beside_metric_learning(metric_learning) -> None:
    first, second = rows(7, scale=0.8), rows(7, seed=1)
    theirs = metric_learning.losses.VICRegLoss(3, 5, 7)
    got = naive.vicreg(first, second, invariance=3.0, variance=5.0, covariance=7.0)
    same(got, theirs(first, ref_emb=second), first, second)


def test_negative_cosine(lightly) -> None:
    first, second = rows(7), rows(7, seed=1)
    same(naive.negative_cosine(first, second), lightly.NegativeCosineSimilarity()(first, second), first, second)


@pytest.mark.parametrize("queue", [False, True], ids=["batch", "queue"])
@pytest.mark.parametrize("small", [0, 2], ids=["full crops", "and small ones"])
def test_swav(lightly, queue, small) -> None:
    scores = [rows(5, 3, seed=seed, scale=0.3) for seed in range(2 + small)]
    queues = [rows(4, 3, seed=seed, scale=0.3).detach() for seed in (7, 8)] if queue else None
    same(naive.swav(scores, queues), lightly.SwaVLoss()(scores[:2], scores[2:], queues), *scores)
    theirs = lightly.SwaVLoss(temperature=0.3, sinkhorn_iterations=5, sinkhorn_epsilon=0.2)
    got = naive.swav(scores, queues, temperature=0.3, epsilon=0.2, iterations=5)
    same(got, theirs(scores[:2], scores[2:], queues), *scores)


@pytest.mark.parametrize("views", [2, 4])
def test_dino(lightly, views) -> None:
    theirs = lightly.DINOLoss(output_dim=6, teacher_temp=0.07, warmup_teacher_temp_epochs=1)
    center = rows(1, 6, seed=5).detach()
    theirs.center = center.reshape(1, 1, 6).clone()
    teacher = [rows(4, 6, seed=seed).detach() for seed in range(2)]
    student = [rows(4, 6, seed=10 + seed) for seed in range(views)]
    want = theirs(teacher, student)
    same(
        naive.dino(teacher, student, center=center, teacher_temperature=0.07), want, *student, rtol=1e-6
    )  # float32 temperature
    torch.testing.assert_close(naive.dino_center(center.flatten(), teacher), theirs.center.flatten())


def test_koleo(lightly) -> None:
    z = rows(8)
    same(naive.koleo(z), lightly.KoLeoLoss()(z), z, rtol=1e-6)  # theirs adds 1e-8 to every coordinate of a difference


# ---- nothing to sum over --------------------------------------------------------------------------------------------

ALONE = {
    "supcon": {},
    "nt_xent": {},
    "dcl": {},
    "contrastive": {"negative_margin": 0.0},
    "triplet": {},
    "circle": {},
    "n_pair": {},
    "lifted_structure": {},
    "margin_loss": {"beta": torch.ones(1)},
    "angular": {},
    "fast_ap": {},
    "soft_nearest_neighbor": {},
    "focal_contrastive": None,
    "threshold_consistent_margin": {"negative_margin": 1.0},
    "multi_similarity": None,
    "smooth_ap": None,
}


@pytest.mark.parametrize("name", ALONE)
def test_empty_sets_give_zero_with_a_graph(name) -> None:
    oracle, arguments = getattr(naive, name), ALONE[name]
    z = rows(4)
    if arguments is not None:  # nobody has a mate
        value = oracle(z, torch.arange(4), **arguments)
        assert value.item() == 0
        assert torch.equal(torch.autograd.grad(value, z)[0], torch.zeros_like(z))
    value = oracle(z[:1], torch.arange(1), **(arguments or {}))
    assert value.item() == 0
    assert torch.autograd.grad(value, z)[0].isfinite().all()


def test_zero_rows_stay_zero() -> None:
    z = torch.zeros(3, DIM, dtype=torch.float64)
    assert naive.contrastive(z, torch.tensor([0, 0, 1])).item() == 1  # distance 0 to everybody
