"""Miners against loops in float64: the pairs and triplets they take, and what losses make of them."""

import functools
import math
from collections import Counter

import naive
import pytest
import torch
from torch import Tensor

from embedlab.losses import (
    AngularMiner,
    BatchHardMiner,
    CircleLoss,
    ContrastiveLoss,
    DCLLoss,
    DistanceWeightedMiner,
    EasyPositiveMiner,
    FocalContrastiveLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginLoss,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    NTXentLoss,
    SemiHardMiner,
    SoftNearestNeighborLoss,
    SupConLoss,
    TripletLoss,
    _tiles,
    miners,
)

# a new miner is one row: name for `mining=`, miner, oracle of triplets, or of (positive pairs, negative pairs)
SELECTING = {
    "batch-hard": (BatchHardMiner(), naive.mine_batch_hard),
    "easy-positive": (EasyPositiveMiner(), naive.mine_easy_positive),
}
TRIPLETS = {
    "semi-hard": (SemiHardMiner(), functools.partial(naive.mine_semi_hard, margin=0.2)),
    "semi-hard, wide": (SemiHardMiner(margin=0.6), functools.partial(naive.mine_semi_hard, margin=0.6)),
    "angular": (AngularMiner(), naive.mine_angular),
    "angular, 40 degrees": (AngularMiner(40.0), functools.partial(naive.mine_angular, angle_degrees=40.0)),
}
PAIRS = {
    "multi-similarity": (MultiSimilarityMiner(), naive.mine_multi_similarity),
    "multi-similarity, strict": (
        MultiSimilarityMiner(epsilon=-0.3),
        functools.partial(naive.mine_multi_similarity, epsilon=-0.3),
    ),
}
MINERS = SELECTING | TRIPLETS | PAIRS
LABELS = {
    "mixed": [2, 0, 1, 1, 0, 3, 2, 0, 4, 1],
    "two classes": [0, 1, 0, 1, 1, 0, 0, 0, 1, 1],
    "one class": [3] * 10,
    "nobody has a mate": list(range(10)),
}
REFERENCE_LABELS = [0, 1, 1, 2, 2, 7, 0]
every_miner = pytest.mark.parametrize("name", MINERS)
every_batch = pytest.mark.parametrize(
    ("labels", "on"),
    [(labels, on) for labels in LABELS.values() for on in ("batch", "reference")],
    ids=[f"{name}-{on}" for name in LABELS for on in ("batch", "reference")],
)


@pytest.fixture(params=[(2**20, 1), (20, 2)], ids=["one tile", "many tiles on two threads"])
def engine(request, monkeypatch) -> None:
    """How the work is cut into tiles, and how many threads share them."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(_tiles, "CPU_TILE", request.param[0])
    monkeypatch.setattr(_tiles, "WORTH_THREADS", 0)
    torch.set_num_threads(request.param[1])
    yield
    torch.set_num_threads(threads)


def embeddings(rows: int, *, seed: int = 0) -> Tensor:
    """Around one point, so that every miner has something to take and something to leave."""
    noise = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise + 0.6).requires_grad_()


def batch(labels: list[int], on: str) -> tuple[Tensor, ...]:
    """Embeddings, labels, and a reference with its labels, as the oracles take them."""
    alone = embeddings(len(labels)), torch.tensor(labels)
    return alone if on == "batch" else (*alone, embeddings(7, seed=1), torch.tensor(REFERENCE_LABELS))


def named(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(["reference", "reference_labels"], inputs[2:], strict=False))


def pairs_of(name: str, inputs: tuple[Tensor, ...]) -> tuple[Counter, Counter]:
    """By the oracle: how often each positive and each negative pair is taken."""
    chosen = MINERS[name][1](*inputs)
    if name in PAIRS:
        return Counter(chosen[0]), Counter(chosen[1])
    return Counter((a, p) for a, p, _ in chosen), Counter((a, n) for a, _, n in chosen)


def triplets_of(name: str, inputs: tuple[Tensor, ...]) -> set[tuple[int, int, int]]:
    chosen = MINERS[name][1](*inputs)
    return {(a, p, n) for a, p in chosen[0] for b, n in chosen[1] if a == b} if name in PAIRS else chosen


def asked(miner, inputs: tuple[Tensor, ...]) -> tuple[Counter, Counter]:
    """What `miner.pairs` says tile by tile, with rows and columns as they came."""
    z, y, *reference = inputs
    unit = torch.nn.functional.normalize
    plan = _tiles.Plan(y, reference[1] if reference else None)
    anchors = unit(z.detach())[plan.order]
    candidates = unit(reference[0].detach())[plan.candidate_order] if reference else anchors
    positives, negatives = Counter(), Counter()
    for first in plan.cut(anchors):
        tile = plan.tile(first, anchors, candidates, plan.buffer(anchors))
        own, others = miner.pairs(tile)
        own = (own * tile.positive).to(torch.float64)
        others = (others * (tile.similarity > -math.inf)).to(torch.float64)
        every = torch.arange(len(candidates)).expand_as(others)
        for counter, weights, columns in ((positives, own, tile.columns), (negatives, others, every)):
            for row, column in weights.nonzero().tolist():
                pair = (tile.row[row].item(), plan.candidate_order[columns[row, column]].item())
                counter[pair] = round(weights[row, column].item())
    return positives, negatives


def same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...], *more: Tensor) -> None:
    """Value and gradients."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves = [*inputs[::2], *more]
    found, exact = (
        torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) for value in (got, want)
    )
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)


def test_every_exported_miner_stands_in_a_table() -> None:
    from embedlab import losses

    kinds = {kind for kind in vars(losses).values() if isinstance(kind, type) and issubclass(kind, miners.Miner)}
    assert kinds == {type(miner) for miner, _ in MINERS.values()} | {DistanceWeightedMiner}
    assert set(miners._NAMES) <= set(MINERS) | {"distance-weighted"}


@every_miner
@every_batch
@pytest.mark.parametrize("tile", [2**20, 20, 1], ids=["one tile", "many tiles", "a tile per row"])
def test_the_pairs_of_a_tile_are_those_of_the_paper(monkeypatch, tile, name, labels, on) -> None:
    monkeypatch.setattr(_tiles, "CPU_TILE", tile)
    inputs = batch(labels, on)
    assert asked(MINERS[name][0], inputs) == pairs_of(name, inputs)


@every_miner
def test_the_batches_of_these_tests_leave_a_choice(name) -> None:
    """The control: neither all pairs nor none."""
    inputs = batch(LABELS["mixed"], "batch")
    every = naive._all_triplets(inputs[1], None)
    assert 0 < len(triplets_of(name, inputs)) < len(every)


@every_miner
@every_batch
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
def test_triplet_loss_takes_the_triplets_of_the_miner(engine, monkeypatch, name, labels, on, soft) -> None:
    inputs = batch(labels, on)
    triplets = triplets_of(name, inputs)
    monkeypatch.setattr(naive, "_all_triplets", lambda *_: triplets)
    want = naive.triplet(*inputs, margin=0.25, soft=soft)
    same(TripletLoss(margin=0.25, mining=MINERS[name][0], soft=soft)(*inputs[:2], **named(inputs)), want, inputs)


@every_miner
@every_batch
@pytest.mark.parametrize("num_classes", [None, 10])
def test_margin_loss_takes_the_triplets_of_the_miner(engine, monkeypatch, name, labels, on, num_classes) -> None:
    inputs = batch(labels, on)
    triplets = triplets_of(name, inputs)
    loss = MarginLoss(margin=0.4, nu=0.3, num_classes=num_classes, beta=0.9, mining=MINERS[name][0]).double()
    monkeypatch.setattr(naive, "_all_triplets", lambda *_: triplets)
    want = naive.margin_loss(*inputs, beta=loss.beta, margin=0.4, nu=0.3)
    same(loss(*inputs[:2], **named(inputs)), want, inputs, loss.beta)


@every_miner
@every_batch
def test_contrastive_loss_counts_a_pair_as_often_as_it_was_taken(engine, name, labels, on) -> None:
    inputs = batch(labels, on)
    positives, negatives = pairs_of(name, inputs)
    d = naive._distances(inputs[0], inputs[2] if on == "reference" else None)
    pull = [d[a][p] - 0.1 for a, p in positives.elements() if d[a][p] > 0.1]
    push = [1.2 - d[a][n] for a, n in negatives.elements() if d[a][n] < 1.2]
    want = naive._mean(pull, inputs[0]) + naive._mean(push, inputs[0])
    loss = ContrastiveLoss(positive_margin=0.1, negative_margin=1.2, mining=MINERS[name][0])
    same(loss(*inputs[:2], **named(inputs)), want, inputs)


@every_miner
@every_batch
def test_supervised_contrastive_loss_takes_pairs_or_leaves_them(engine, name, labels, on) -> None:
    """The softmax is over the pairs that were taken; the mean over positives counts them as often as they were."""
    inputs = batch(labels, on)
    positives, negatives = pairs_of(name, inputs)
    c, anchors = naive._cosines(inputs[0], inputs[2] if on == "reference" else None), []
    for i in range(len(labels)):
        mates = [p for a, p in positives.elements() if a == i]
        if mates:
            others = sorted(set(mates)) + [n for a, n in sorted(negatives) if a == i]
            total = naive._log_sum_exp([c[i, j] / 0.2 for j in others])
            anchors.append(sum(total - c[i, p] / 0.2 for p in mates) / len(mates))
    loss = SupConLoss(0.2, mining=MINERS[name][0])
    same(loss(*inputs[:2], **named(inputs)), naive._mean(anchors, inputs[0]), inputs)


# the oracles see the mined partners in place of all; each pair is taken once by these miners
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (NTXentLoss, naive.nt_xent),
        (InfoNCELoss, naive.info_nce),
        (DCLLoss, naive.dcl),
        (MultiSimilarityLoss, naive.multi_similarity),
        (CircleLoss, naive.circle),
        (LiftedStructureLoss, naive.lifted_structure),
        (SoftNearestNeighborLoss, naive.soft_nearest_neighbor),
        (FocalContrastiveLoss, naive.focal_contrastive),
    ],
)
@pytest.mark.parametrize("name", SELECTING | PAIRS)
@every_batch
def test_other_losses_see_the_mined_pairs_alone(monkeypatch, loss, oracle, name, labels, on) -> None:
    if loss is InfoNCELoss and on == "batch":
        return
    monkeypatch.setattr(_tiles, "CPU_TILE", 20)
    inputs = batch(labels, on)
    positives, negatives = pairs_of(name, inputs)

    def partners(i, y, reference_labels):
        return [p for a, p in sorted(positives) if a == i], [n for a, n in sorted(negatives) if a == i]

    monkeypatch.setattr(naive, "_partners", partners)
    same(loss(mining=MINERS[name][0])(*inputs[:2], **named(inputs)), oracle(*inputs), inputs)


@pytest.mark.parametrize("name", miners._NAMES)
def test_a_name_stands_for_the_miner(name) -> None:
    inputs = batch(LABELS["mixed"], "batch")
    by_name, by_hand = (ContrastiveLoss(mining=mining) for mining in (name, miners._NAMES[name]()))
    assert type(by_name.miner) is type(by_hand.miner)
    assert by_name(*inputs) == by_hand(*inputs)


def test_all_takes_every_pair() -> None:
    assert ContrastiveLoss(mining="all").miner is None


def test_semi_hard_by_name_goes_by_the_margin_of_the_triplet_loss() -> None:
    assert TripletLoss(margin=0.7, mining="semi-hard").miner.margin == 0.7
    inputs = batch(LABELS["mixed"], "batch")
    same(
        TripletLoss(margin=0.7, mining="semi-hard")(*inputs),
        naive.triplet(*inputs, margin=0.7, mining="semi-hard"),
        inputs,
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SemiHardMiner(margin=0), "SemiHardMiner needs margin > 0, got 0"),
        (lambda: AngularMiner(90), r"AngularMiner needs margin_degrees in \(0, 90\), got 90"),
        (
            lambda: DistanceWeightedMiner(cutoff=0),
            "DistanceWeightedMiner needs 0 < cutoff < nonzero_loss_cutoff <= 2 .*got 0",
        ),
        (lambda: DistanceWeightedMiner(cutoff=1.5), "needs 0 < cutoff < nonzero_loss_cutoff <= 2 .*got 1.5 and 1.4"),
        (lambda: SupConLoss(mining="hardest"), "SupConLoss knows mining 'all', 'batch-hard', .*got 'hardest'"),
        (lambda: MarginLoss(mining=torch.nn.Identity()), "MarginLoss knows mining .*got Identity.*MetricLearning"),
    ],
)
def test_wrong_settings_are_explained(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("loss", [ContrastiveLoss, SupConLoss, TripletLoss, MarginLoss])
@pytest.mark.parametrize("name", miners._NAMES)
@pytest.mark.parametrize(
    "z",
    [torch.zeros(4, 3), torch.ones(4, 3), torch.full((4, 3), 1e-30), torch.ones(1, 3), torch.ones(0, 3)],
    ids=["zero", "coincide", "tiny", "one sample", "no sample"],
)
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]])
def test_degenerate_batches_stay_finite(loss, name, z, labels) -> None:
    z = z.clone().requires_grad_()
    value = loss(mining=name)(z, torch.tensor(labels)[: len(z)])
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


# ---- distance-weighted: a draw --------------------------------------------------------------------------------------

CROWD = [0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 5]


def crowd(on: str = "batch") -> tuple[Tensor, ...]:
    return batch(CROWD, on)


@pytest.mark.parametrize("on", ["batch", "reference"])
@pytest.mark.parametrize("settings", [{}, {"cutoff": 0.9, "nonzero_loss_cutoff": 1.1}], ids=["default", "narrow"])
def test_draws_follow_the_inverse_density_of_distances(on, settings) -> None:
    miner, inputs, steps = DistanceWeightedMiner(**settings), crowd(on), 1500
    want = naive.distance_weights(*inputs, **settings)
    counts = torch.zeros_like(want)
    drawing = torch.zeros(len(CROWD), dtype=torch.float64)  # pairs that drew a negative
    for _ in range(steps):
        positives, negatives = asked(miner, inputs)
        for (a, n), times in negatives.items():
            counts[a, n] += times
        for (a, _), times in positives.items():
            assert times == 1
            drawing[a] += 1
        miner.step += 1
    mates = torch.tensor(
        [len(naive._partners(i, inputs[1], inputs[3] if on == "reference" else None)[0]) for i in range(len(CROWD))]
    )
    assert torch.equal(drawing, (steps * mates * (want.sum(1) > 0)).double())
    assert torch.equal(counts.sum(1), drawing)
    assert not counts[want == 0].any(), "drawn although too far, or no negative"
    chance = drawing[:, None] * want  # expected counts; a deviation of 5 standard deviations has odds of 1 in a million
    assert ((counts - chance).abs() <= 5 * (chance * (1 - want)).sqrt() + 1e-9).all()
    assert (want[drawing > 0] > 0.02).sum() > 10, "the control: there is something to tell apart"


@pytest.mark.parametrize(
    ("anchors", "mates"), [(2, 1), (1, 2)], ids=["two anchors, one positive", "one anchor, two positives"]
)
def test_each_pair_draws_for_itself(anchors, mates) -> None:
    """Equal anchors, or equal positives, agree as often as chance has it."""
    miner, steps, strangers = DistanceWeightedMiner(), 1000, 5
    z, positive = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.1, 0.0]])
    angles = torch.arange(strangers) * 2 * math.pi / strangers
    negatives = torch.stack([torch.ones(strangers), angles.cos(), angles.sin()], dim=1)  # all at one distance
    reference = torch.cat([positive.expand(mates, 3), negatives]).double()
    labels = torch.tensor([0] * mates + [1] * strangers)
    agreed = 0
    for _ in range(steps):
        drawn = Counter(
            n
            for (_, n), times in asked(miner, (z.expand(anchors, 3).double(), torch.zeros(anchors), reference, labels))[
                1
            ].items()
            for _ in range(times)
        )
        assert sum(drawn.values()) == 2
        agreed += len(drawn) == 1
        miner.step += 1
    assert agreed / steps == pytest.approx(1 / strangers, abs=0.05)


def test_a_draw_is_a_function_of_seed_step_and_rows() -> None:
    inputs = crowd()
    first, again, other = (DistanceWeightedMiner(seed=seed) for seed in (3, 3, 4))
    assert asked(first, inputs) == asked(first, inputs) == asked(again, inputs)
    assert asked(other, inputs) != asked(first, inputs)
    before = asked(again, inputs)
    again.step += 1
    assert asked(again, inputs) != before
    first.load_state_dict(again.state_dict())
    assert asked(first, inputs) == asked(again, inputs)


@pytest.mark.parametrize("tile", [2**20, 40])
def test_a_draw_does_not_depend_on_the_tiles(monkeypatch, tile) -> None:
    inputs, miner = crowd(), DistanceWeightedMiner()
    whole = asked(miner, inputs)
    monkeypatch.setattr(_tiles, "CPU_TILE", tile)
    assert asked(miner, inputs) == whole
    assert asked(miner, (inputs[0].detach(), *inputs[1:])) == whole


@pytest.mark.parametrize("loss", [TripletLoss, MarginLoss, ContrastiveLoss])
def test_the_step_advances_in_training_alone_and_is_state(loss) -> None:
    inputs, loss = crowd(), loss(mining="distance-weighted")
    assert loss.miner.step == 0
    values = [loss(*inputs).item() for _ in range(3)]
    assert loss.miner.step == 3
    assert len(set(values)) > 1
    assert loss.state_dict()["miner.step"] == 3
    loss.eval()
    assert loss(*inputs) == loss(*inputs)
    assert loss.miner.step == 3
    resumed = type(loss)(mining="distance-weighted")
    resumed.load_state_dict(loss.state_dict())
    assert resumed(*inputs).item() == loss.train()(*inputs).item()


@pytest.mark.parametrize("on", ["batch", "reference"])
def test_losses_take_the_drawn_triplets(engine, monkeypatch, on) -> None:
    """Every positive pair has one drawn negative, so the triplets follow from pairs drawn one positive at a time."""
    inputs = crowd(on)
    miner = DistanceWeightedMiner(nonzero_loss_cutoff=1.9)
    triplets = set()
    z, y, *reference = inputs
    plan = _tiles.Plan(y, reference[1] if reference else None)
    anchors = torch.nn.functional.normalize(z.detach())[plan.order]
    candidates = torch.nn.functional.normalize(reference[0].detach())[plan.candidate_order] if reference else anchors
    plan.step = len(y)  # all in one tile
    tile = plan.tile(0, anchors, candidates, plan.buffer(anchors))
    for column in range(tile.own.shape[1]):
        kept = miner.keep(tile, torch.full((len(y), 1), column)) & tile.positive[:, column, None]
        for row, n in kept.nonzero().tolist():
            numbers = tile.row[row], plan.candidate_order[tile.columns[row, column]], plan.candidate_order[n]
            triplets.add(tuple(int(number) for number in numbers))
    assert len(triplets) > 10
    monkeypatch.setattr(naive, "_all_triplets", lambda *_: triplets)
    losses = TripletLoss(margin=0.5, mining=miner).eval(), MarginLoss(margin=0.4, mining=miner).double().eval()
    same(losses[0](*inputs[:2], **named(inputs)), naive.triplet(*inputs, margin=0.5), inputs)
    want = naive.margin_loss(*inputs, beta=losses[1].beta, margin=0.4)
    same(losses[1](*inputs[:2], **named(inputs)), want, inputs, losses[1].beta)


@pytest.mark.parametrize("loss", [TripletLoss, MarginLoss, ContrastiveLoss, SupConLoss])
def test_nothing_to_draw_is_nothing_to_learn(loss) -> None:
    """Classes at opposite points: every negative is beyond the cutoff."""
    z = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    value = loss(mining="distance-weighted")(z, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value == 0
    assert not z.grad.any()
