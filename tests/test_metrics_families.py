"""Curves, open set, classification, segmentation, clustering: each against scikit-learn, torchmetrics or loops."""

import math
import tracemalloc

import naive
import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional
import torchmetrics.functional.classification
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans

from embedlab import metrics

RANDOM = np.random.default_rng(7)
SAME = RANDOM.random(240) < 0.4
SMOOTH = RANDOM.standard_normal(240) + SAME
SCORES = {"continuous": SMOOTH, "ties": np.round(SMOOTH * 2)}


def test_retrieval_report_equals_pytorch_metric_learning():
    random = np.random.default_rng(0)
    labels = random.integers(0, 12, 300)
    vectors = random.standard_normal((12, 8))[labels] + random.standard_normal((300, 8))
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).float())
    names = {
        "precision_at_1": "recall_at_1",
        "r_precision": "r_precision",
        "mean_average_precision_at_r": "map_at_r",
    }
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count")
    want = calculator.get_accuracy(unit, torch.from_numpy(labels))
    got = metrics.retrieval_report(unit, labels).values
    for theirs, ours in names.items():
        assert got[ours] == pytest.approx(want[theirs], abs=1e-6)


@pytest.mark.parametrize("sides", ["leave-one-out", "reference"])
def test_retrieval_equals_torchmetrics(sides):
    """Query by query; both sides see float64 cosines of vectors without ties."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 6, 60)
    vectors = random.standard_normal((6, 8))[labels] + random.standard_normal((60, 8))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    if sides == "reference":
        given = (vectors[:20], labels[:20], vectors[20:], labels[20:])
        scores, match = unit[:20] @ unit[20:].T, labels[:20, None] == labels[20:]
    else:
        given = (vectors, labels)
        apart = ~np.eye(60, dtype=bool)
        scores, match = ((unit @ unit.T)[apart].reshape(60, 59), (labels[:, None] == labels)[apart].reshape(60, 59))
    scores = scores + 2  # torchmetrics takes scores that are not above 0 for misses
    theirs = torchmetrics.functional.retrieval
    pairs = [
        (theirs.retrieval_hit_rate, metrics.recall_at_k, {"top_k": 3}, {"k": 3}),
        (theirs.retrieval_precision, metrics.precision_at_k, {"top_k": 4}, {"k": 4}),
        (theirs.retrieval_r_precision, metrics.r_precision, {}, {}),
        (theirs.retrieval_average_precision, metrics.mean_average_precision, {}, {}),
        (theirs.retrieval_reciprocal_rank, metrics.mean_reciprocal_rank, {}, {}),
        (theirs.retrieval_normalized_dcg, metrics.ndcg_at_k, {"top_k": 5}, {"k": 5}),
    ]
    for their, our, their_options, our_options in pairs:
        rows = zip(torch.from_numpy(scores).float(), torch.from_numpy(match), strict=True)
        want = np.mean([their(score, truth, **their_options).item() for score, truth in rows])
        assert our(*given, **our_options) == pytest.approx(want, abs=1e-6), our.__name__
    curve = [
        np.mean(
            [
                theirs.retrieval_hit_rate(score, truth, top_k=rank).item()
                for score, truth in zip(torch.from_numpy(scores).float(), torch.from_numpy(match), strict=True)
            ]
        )
        for rank in range(1, 7)
    ]
    np.testing.assert_allclose(metrics.cmc(*given, k=6), curve, atol=1e-6)


@pytest.mark.parametrize("empty", ["skip", "zero"])
def test_cmc_of_a_reference_leaves_out_groups(empty):
    random = np.random.default_rng(4)
    vectors, labels, groups = random.standard_normal((50, 5)), random.integers(0, 6, 50), random.integers(0, 4, 50)
    sides = [slice(0, 20), slice(20, 50)]
    labels[0] = 9  # has no match
    rankings = naive.naive_rankings(*(vectors[side] for side in sides), *(groups[side] for side in sides))
    hits = naive.naive_hits(rankings, *(labels[side] for side in sides))
    counted = [one for one in hits if any(one) or empty == "zero"]
    want = [np.mean([naive.naive_recall_at_k(one, rank) for one in counted]) for rank in range(1, 9)]
    given = [part for side in sides for part in (vectors[side], labels[side])]
    pair = tuple(groups[side] for side in sides)
    np.testing.assert_allclose(metrics.cmc(*given, k=8, empty=empty, groups=pair), want, atol=1e-12)
    with pytest.raises(ValueError, match="1 of 20 queries have no match to find"):
        metrics.cmc(*given, k=8, empty="error", groups=pair)


def test_several_labels_are_decisions_of_their_own():
    random = np.random.default_rng(5)
    target, probability = random.random((80, 5)) < 0.3, random.random((80, 5))
    prediction = probability > 0.6
    matrix = metrics.multilabel_confusion_matrix(prediction, torch.from_numpy(target))
    assert matrix.tolist() == sklearn.metrics.multilabel_confusion_matrix(target, prediction).tolist()
    want = torchmetrics.functional.classification.binary_calibration_error(
        torch.from_numpy(probability.ravel()), torch.from_numpy(target.ravel()).long(), n_bins=10
    )
    got = metrics.calibration_error(probability.ravel(), target.ravel().astype(int), bins=10)
    assert got == pytest.approx(want.item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"prediction of shape \(80, 4\) for a target of \(80, 5\)"):
        metrics.multilabel_confusion_matrix(prediction[:, :4], target)


def test_f1_is_dice_of_pixels():
    random = np.random.default_rng(6)
    target, prediction = random.integers(0, 2, (2, 400))
    report = metrics.classification_report(prediction, target)
    assert report["f1"] == pytest.approx(metrics.dice(prediction, target, classes=2, per_class=True)[1])


@pytest.mark.parametrize("kind", SCORES)
def test_curves_equal_scikit_learn(kind):
    scores = SCORES[kind]
    far, tar, threshold = metrics.roc_curve(scores, SAME)
    want = sklearn.metrics.roc_curve(SAME, scores, drop_intermediate=False)
    for ours, theirs in zip((far, tar, threshold), want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    far, frr, _ = metrics.det_curve(torch.from_numpy(scores), SAME)
    np.testing.assert_allclose(far, want[0], atol=1e-12)
    np.testing.assert_allclose(frr, 1 - want[1], atol=1e-12)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("given", ["count", "array"])
def test_best_accuracy_equals_the_loops(kind, given):
    scores = SCORES[kind]
    folds = np.empty(240, dtype=int)
    for truth in (True, False):
        members = np.flatnonzero(truth == SAME)
        for place, member in enumerate(members):
            folds[member] = place * 5 // len(members)
    found = []
    for fold in range(5):
        train = [(s, y) for s, y, f in zip(scores, SAME, folds, strict=True) if f != fold]
        best, most = math.inf, sum(not y for _, y in train)
        values = sorted({s for s, _ in train}, reverse=True)
        for place, value in enumerate(values):
            right = sum((s >= value) == y for s, y in train)
            if right > most:
                best, most = (value + values[min(place + 1, len(values) - 1)]) / 2, right
        held = [(s, y) for s, y, f in zip(scores, SAME, folds, strict=True) if f == fold]
        found.append(sum((s >= best) == y for s, y in held) / len(held))
    mean, error = metrics.best_accuracy(scores, SAME, folds=5 if given == "count" else folds)
    assert mean == pytest.approx(np.mean(found))
    assert error == pytest.approx(np.std(found, ddof=1) / math.sqrt(5))
    assert error > 0


def test_given_folds_may_hold_one_kind_only():
    # the other two folds each choose 0.45; the last fold has no impostor
    scores, same, folds = [0.9, 0.2, 0.6, 0.3, 0.7], [1, 0, 1, 0, 1], [0, 0, 1, 1, 2]
    assert metrics.best_accuracy(scores, same, folds=folds)[0] == pytest.approx(1)


@pytest.mark.parametrize("kind", SCORES)
def test_open_set_figures_equal_the_loops(kind):
    scores, known = SCORES[kind], SAME
    correct = np.random.default_rng(1).random(240) < 0.7
    fpir, fnir, threshold = metrics.open_set_curve(scores, correct, known)
    assert threshold[0] == math.inf
    assert (fpir[0], fnir[0], fpir[-1]) == (0, 1, 1)
    for place in (0, 3, len(threshold) - 1):
        assert (fpir[place], fnir[place]) == metrics.fpir_fnir(scores, correct, known, threshold[place])
    area = np.trapezoid(1 - fnir, fpir)
    assert metrics.oscr(scores, correct, known) == pytest.approx(area, abs=1e-12)
    # Dhamija et al. by pairs: an enrolled probe named rightly above a stranger
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, right in zip(scores[known], correct[known], strict=True)
        for b in scores[~known]
        if right
    ]
    assert metrics.oscr(scores, correct, known) == pytest.approx(sum(wins) / (known.sum() * (~known).sum()))
    assert metrics.unknown_auroc(scores, known) == pytest.approx(sklearn.metrics.roc_auc_score(known, scores))


def test_multilabel_report_equals_scikit_learn():
    random = np.random.default_rng(0)
    target = random.random((200, 6)) < [0.5, 0.2, 0.05, 0.7, 0.0, 1.0]
    scores = random.random((200, 6)) + 0.4 * target
    prediction = scores > 0.7
    report = metrics.multilabel_report(prediction, target, scores=scores, beta=2)
    kept = slice(0, 4)  # the last two labels have one kind of sample only
    y, p, s = target[:, kept], prediction[:, kept], scores[:, kept]
    macro = {"average": "macro"}
    tables = sklearn.metrics.multilabel_confusion_matrix(y, p)
    specificity = np.mean([t[0, 0] / t[0].sum() for t in tables])
    recall = sklearn.metrics.recall_score(y, p, **macro)
    assert report == pytest.approx(
        {
            "exact_match": sklearn.metrics.accuracy_score(target, prediction),
            "labels": 4,
            "accuracy": 1 - sklearn.metrics.hamming_loss(y, p),
            "balanced_accuracy": (recall + specificity) / 2,
            "precision": sklearn.metrics.precision_score(y, p, **macro),
            "recall": recall,
            "f_beta": sklearn.metrics.fbeta_score(y, p, beta=2, **macro),
            "f1": sklearn.metrics.f1_score(y, p, **macro),
            "specificity": specificity,
            "fpr": 1 - specificity,
            "fnr": 1 - recall,
            "mcc": np.mean([sklearn.metrics.matthews_corrcoef(y[:, c], p[:, c]) for c in range(4)]),
            "auc": sklearn.metrics.roc_auc_score(y, s, **macro),
            "average_precision": sklearn.metrics.average_precision_score(y, s, **macro),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("bins", [7, 15])
def test_calibration_error_equals_torchmetrics(bins, norm):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(400, generator=generator, dtype=torch.float64)
    target = (torch.rand(400, generator=generator) < probability**2).long()
    kinds = torchmetrics.functional.classification
    want = kinds.binary_calibration_error(probability, target, n_bins=bins, norm=norm)
    assert metrics.calibration_error(probability, target, bins=bins, norm=norm) == pytest.approx(want.item(), abs=1e-6)
    rows = torch.softmax(2 * torch.randn(400, 5, generator=generator, dtype=torch.float64), dim=1)
    classes = torch.multinomial(rows.sqrt(), 1, generator=generator)[:, 0]
    want = kinds.multiclass_calibration_error(rows, classes, num_classes=5, n_bins=bins, norm=norm)
    assert metrics.calibration_error(rows, classes, bins=bins, norm=norm) == pytest.approx(want.item(), abs=1e-6)


def test_confidence_on_the_last_edge_counts():
    assert metrics.calibration_error([1.0, 1.0], [1, 0]) == 0.5
    assert metrics.calibration_error([[0.0, 1.0]], [1]) == 0


def masks(images, classes, seed=0):
    random = np.random.default_rng(seed)
    target = random.integers(0, classes, (images, 9, 7))
    wrong = random.random(target.shape) < 0.4
    return np.where(wrong, random.integers(0, classes, target.shape), target), target


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, list], ids=["numpy", "torch", "list of images"])
def test_segmentation_equals_scikit_learn(convert):
    prediction, target = masks(6, 4)
    target[target == 3] = 2  # class 3 is predicted but never there; class 4 is nowhere
    p, y = prediction.ravel(), target.ravel()
    given = {"classes": 5}
    prediction, target = convert(prediction), convert(target)
    assert metrics.pixel_accuracy(prediction, target, **given) == pytest.approx((p == y).mean())
    recall = sklearn.metrics.recall_score(y, p, average=None, labels=[0, 1, 2])
    assert metrics.mean_pixel_accuracy(prediction, target, **given) == pytest.approx(recall.mean())
    jaccard = sklearn.metrics.jaccard_score(y, p, average=None)
    assert jaccard[3] == 0
    assert metrics.mean_iou(prediction, target, **given) == pytest.approx(jaccard.mean())
    np.testing.assert_allclose(metrics.mean_iou(prediction, target, **given, per_class=True), [*jaccard, np.nan])
    f1 = sklearn.metrics.f1_score(y, p, average=None)
    assert metrics.dice(prediction, target, **given) == pytest.approx(f1.mean())
    np.testing.assert_allclose(metrics.dice(prediction, target, **given, per_class=True), [*f1, np.nan])
    np.testing.assert_allclose(
        metrics.mean_pixel_accuracy(prediction, target, **given, per_class=True), [*recall, np.nan, np.nan]
    )


def test_ignored_pixels_do_not_count_and_sizes_may_differ():
    prediction, target = masks(2, 3)
    ignored = target.copy()
    ignored[:, :3] = 255
    got = metrics.mean_iou(prediction, ignored, classes=3, ignore=255)
    assert got == metrics.mean_iou(prediction[:, 3:], target[:, 3:], classes=3)
    ragged = ([prediction[0], prediction[1, :4]], [target[0], target[1, :4]])
    joined = [np.concatenate([side[0].ravel(), side[1].ravel()]) for side in ragged]
    assert metrics.dice(*ragged, classes=3) == metrics.dice(*joined, classes=3)


def test_thresholds_are_taken_in_the_precision_of_each_map():
    single, double = np.array([[0.3, 0.1]], dtype=np.float32), np.array([[0.3, 0.1]])
    masks = [np.array([[1, 0]])] * 2
    for maps in ([single, single], [double, double], [single, double]):
        assert metrics.ods(maps, masks, thresholds=[0.3]) == 1


def test_a_whole_number_may_be_a_float():
    scores, truth = [0.9, 0.3, 0.6], [1, 0, 0]
    assert metrics.calibration_error(scores, truth, bins=5.0) == metrics.calibration_error(scores, truth, bins=5)
    assert metrics.mean_iou([[0, 1]], [[1, 1]], classes=2.0) == metrics.mean_iou([[0, 1]], [[1, 1]], classes=2)
    vectors, labels = [[1, 0], [9, 1], [0, 1], [1, 9]], ["a", "a", "b", "b"]
    assert metrics.clustering_report(vectors, labels, clusters=2.0, restarts=2.0) == {"nmi": 1.0, "ari": 1.0}
    assert metrics.bootstrap_interval([0, 1, 1, 0], labels, resamples=9.0) == metrics.bootstrap_interval(
        [0, 1, 1, 0], labels, resamples=9
    )


def test_probabilities_in_bfloat16_are_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 100, generator=generator)
    target = torch.randint(100, (500,), generator=generator)
    exact = metrics.calibration_error(logits.softmax(dim=1), target)
    assert metrics.calibration_error(logits.softmax(dim=1).bfloat16(), target) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("grid", [None, np.arange(1, 100) / 100], ids=["every value", "99 thresholds"])
def test_ods_and_ois_equal_the_loops(grid):
    random = np.random.default_rng(0)
    truth = [random.random(shape) < share for shape, share in [((6, 5), 0.3), ((4, 8), 0.1), ((7, 7), 0.6)]]
    maps = [np.round(0.6 * random.random(m.shape) + 0.35 * m, 2) for m in truth]

    def f1(threshold, images):
        tp = sum(int(((maps[i] >= threshold) & truth[i]).sum()) for i in images)
        wrong = sum(int(((maps[i] >= threshold) != truth[i]).sum()) for i in images)
        return 2 * tp / (2 * tp + wrong)

    tried = [np.unique(maps[i]) if grid is None else grid for i in range(3)]
    every = np.unique(np.concatenate(tried))
    assert metrics.ods(maps, truth, thresholds=grid) == pytest.approx(max(f1(t, range(3)) for t in every))
    best = [max(tried[i], key=lambda t, i=i: f1(t, [i])) for i in range(3)]
    assert metrics.ois(maps, truth, thresholds=grid) == pytest.approx(np.mean([f1(best[i], [i]) for i in range(3)]))
    tp = sum(((maps[i] >= best[i]) & truth[i]).sum() for i in range(3))
    wrong = sum(((maps[i] >= best[i]) != truth[i]).sum() for i in range(3))
    assert metrics.ois(maps, truth, thresholds=grid, pooled=True) == pytest.approx(2 * tp / (2 * tp + wrong))
    tensors = [torch.from_numpy(m) for m in maps], [torch.from_numpy(m).long() for m in truth]
    assert metrics.ods(*tensors, thresholds=grid) == metrics.ods(maps, truth, thresholds=grid)
    # an image without a defect: false positives for ODS, no say in the mean of OIS
    more = [*maps, np.full((5, 5), 0.99)], [*truth, np.zeros((5, 5), dtype=bool)]
    assert metrics.ods(*more, thresholds=grid) < metrics.ods(maps, truth, thresholds=grid)
    assert metrics.ois(*more, thresholds=grid) == metrics.ois(maps, truth, thresholds=grid)
    if grid is not None:
        assert metrics.ois(*more, thresholds=grid, pooled=True) == pytest.approx(2 * tp / (2 * tp + wrong + 25))


def test_a_float32_probability_reaches_its_own_threshold():
    maps, truth = [np.array([[0.3, 0.1]], dtype=np.float32)], [np.array([[1, 0]])]
    assert metrics.ods(maps, truth, thresholds=[0.3]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_clustering_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, 60)
    clusters = np.where(random.random(60) < seed / 4, random.integers(0, 9, 60), labels + 3)
    words = [f"class {n}" for n in labels]
    want = sklearn.metrics.normalized_mutual_info_score(labels, clusters)
    assert metrics.normalized_mutual_information(clusters, words) == pytest.approx(want, abs=1e-12)
    want = sklearn.metrics.adjusted_rand_score(labels, clusters)
    assert metrics.adjusted_rand_index(clusters, words) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("clusters", "labels"), [([1, 1, 1], [0, 0, 0]), ([0, 1, 2], [5, 6, 7]), ([1], [1])])
def test_clustering_at_its_edges(clusters, labels):
    assert metrics.normalized_mutual_information(clusters, labels) == 1
    assert metrics.adjusted_rand_index(clusters, labels) == 1
    assert metrics.adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]) < 0
    assert metrics.normalized_mutual_information([0, 0, 0], [0, 1, 2]) == 0


def test_clustering_report_is_seeded_and_ignores_norms():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 120)
    vectors = 2 * random.standard_normal((4, 8))[labels] + random.standard_normal((120, 8))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = KMeans(4, n_init=10, random_state=3).fit_predict(unit)
    got = metrics.clustering_report(vectors * random.uniform(0.1, 9, (120, 1)), labels, seed=3)
    assert got["nmi"] == pytest.approx(sklearn.metrics.normalized_mutual_info_score(labels, found), abs=1e-9)
    assert got["ari"] == pytest.approx(sklearn.metrics.adjusted_rand_score(labels, found), abs=1e-9)
    assert metrics.clustering_report(vectors, labels, clusters=1)["ari"] == 0


def test_paired_interval_sees_what_two_intervals_do_not():
    random = np.random.default_rng(0)
    owners = np.repeat(np.arange(50), 6)
    hard = random.standard_normal(50)[owners]
    first, second = hard + 0.1 + 0.1 * random.standard_normal(300), hard + 0.1 * random.standard_normal(300)
    low, high = metrics.paired_interval(first, second, owners)
    assert 0 < low < 0.1 < high < 0.2
    alone = metrics.bootstrap_interval(first, owners)
    assert alone[1] - alone[0] > 5 * (high - low)
    holed = first.copy()
    holed[:6] = np.nan
    assert metrics.paired_interval(holed, second, owners) == metrics.bootstrap_interval(
        (first - second)[6:], owners[6:]
    )


ONES = np.ones((2, 2), dtype=int)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.best_accuracy([1, 2, 3], [1, 0, 0], folds=2), "at least 2 folds.*got 2 folds for 1 genuine"),
        (lambda: metrics.best_accuracy([1, 2, 3], [1, 0, 0], folds=[0, 1]), "folds has 2 entries for 3 rows"),
        (lambda: metrics.roc_curve([1.0], [1]), "roc_curve compares genuine with impostor pairs and needs both"),
        (lambda: metrics.oscr([1.0], [1], [1]), "of strangers, got 1 and 0"),
        (lambda: metrics.unknown_auroc([1.0, 2.0], [1, 2]), "known must be booleans"),
        (lambda: metrics.open_set_curve([1.0], [1], [1]), "FPIR needs strangers"),
        (lambda: metrics.multilabel_report([[0.5]], [[1]]), r"prediction must be \(N, C\).*Compare with a threshold"),
        (lambda: metrics.multilabel_report([[1], [1]], [[1], [1]]), "none of the 1 labels"),
        (lambda: metrics.multilabel_report([[1, 0]], [[1]]), r"prediction of shape \(1, 2\) for a target of \(1, 1\)"),
        (lambda: metrics.multilabel_report([[1], [0]], [[1], [0]], scores=[0.5, 0.5]), r"scores of shape \(2,\)"),
        (lambda: metrics.multilabel_report([[1], [0]], [[1], [0]], beta=0), "beta > 0, got 0"),
        (lambda: metrics.calibration_error([2.5, -1.0], [1, 0]), "logits.*Apply the sigmoid or softmax first"),
        (lambda: metrics.calibration_error([[0.5, 0.6]], [1]), "adding up to 1.*sums 1.1"),
        (lambda: metrics.calibration_error([0.5], [2]), r"target must be 0 and 1.*got \[2\]"),
        (lambda: metrics.calibration_error([0.5], [1], bins=0), "bins must be a whole number of at least 1, got 0"),
        (
            lambda: metrics.calibration_error([0.5], [1], bins="15"),
            "bins must be a whole number of at least 1, got '15'",
        ),
        (lambda: metrics.calibration_error([0.5], [1], norm="l3"), "norm must be 'l1', 'l2' or 'max', got 'l3'"),
        (lambda: metrics.calibration_error([], []), r"at least one row, got shape \(0,\)"),
        (lambda: metrics.mean_iou(ONES, ONES[0], classes=2), r"shape \(2, 2\) for a target of \(2,\)"),
        (
            lambda: metrics.mean_iou(ONES, 255 * ONES, classes=2),
            "target holds 255 to 255, expected class numbers 0 to 1",
        ),
        (lambda: metrics.mean_iou(ONES / 2, ONES, classes=2), "class numbers, got float64.*Take the argmax"),
        (lambda: metrics.mean_iou([ONES], [ONES, ONES], classes=2), "as many targets as predictions, got 2 and 1"),
        (lambda: metrics.mean_iou(ONES, ONES, classes=2, ignore=1), "no pixel counts"),
        (lambda: metrics.dice(ONES, ONES, classes=0), "classes must be a whole number of at least 1, got 0"),
        (lambda: metrics.dice(ONES, ONES, classes=math.nan), "classes must be a whole number of at least 1, got nan"),
        (lambda: metrics.clustering_report(ONES, [0, 1], clusters=1.5), "clusters to be a whole number.*got 1.5"),
        (lambda: metrics.clustering_report(ONES, [0, 1], clusters=3), "clusters between 1 and the 2 rows, got 3"),
        (
            lambda: metrics.ods([ONES * 3.0], [ONES]),
            "image 0: probabilities must lie in .0, 1., got 3.0.*sigmoid first",
        ),
        (lambda: metrics.ods([ONES * 0.5], [ONES * 255]), "image 0: the mask must be booleans.*mask > 0"),
        (lambda: metrics.ods([ONES * 0.5], [ONES * 0]), "ods needs a positive pixel"),
        (lambda: metrics.ois([ONES * 0.5], [ONES * 0]), "ois needs a positive pixel"),
        (
            lambda: metrics.ois([ONES * 0.5], [ONES[0]]),
            r"image 0: probabilities of shape \(2, 2\) for a mask of \(2,\)",
        ),
        (lambda: metrics.ods([], []), "at least one, got 0 and 0"),
        (lambda: metrics.normalized_mutual_information([0, 1], [0]), "labels has 1 entries for 2 rows"),
        (lambda: metrics.adjusted_rand_index([], []), "adjusted_rand_index needs at least one row"),
        (lambda: metrics.clustering_report(np.eye(2), [0, 1], clusters=3), "between 1 and the 2 rows, got 3"),
        (lambda: metrics.paired_interval([1.0], [1.0, 2.0], [0, 1]), "two different test sets"),
    ],
)
def test_refusals_say_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


# ---- figures over identities ---------------------------------------------------------------------------------------


def test_bootstrap_statistic_equals_drawing_by_hand():
    owners = RANDOM.integers(0, 9, 240)
    got = metrics.bootstrap_statistic(lambda rows: metrics.roc_auc(SMOOTH[rows], SAME[rows]), owners, resamples=40)
    generator, figures = np.random.default_rng(0), []
    for _ in range(40):
        rows = [row for name in generator.integers(9, size=9) for row in np.flatnonzero(owners == name)]
        figures.append(sklearn.metrics.roc_auc_score(SAME[rows], SMOOTH[rows]))
    assert got == pytest.approx(tuple(np.quantile(figures, [0.025, 0.975])), abs=1e-12)
    mean = metrics.bootstrap_statistic(lambda rows: SMOOTH[rows].mean(), owners, resamples=2000)
    assert mean == pytest.approx(metrics.bootstrap_interval(SMOOTH, owners), abs=0.03)


@pytest.mark.parametrize("block", [None, 64])
def test_leave_identity_out_and_its_pooled_folds_equal_the_loops(block, monkeypatch):
    if block:
        monkeypatch.setattr("embedlab.metrics.open_set.BUDGET", block)
    folds, genuine, strangers = [], [], []
    for fold in range(3):  # each with people of its own
        names = np.array([f"{fold}-{number}" for number in RANDOM.permutation(np.repeat(np.arange(5), 6))])
        centres = {name: RANDOM.standard_normal(4) for name in sorted(set(names))}
        vectors = np.stack([centres[name] for name in names]) + 0.7 * RANDOM.standard_normal((30, 4))
        enrolled = np.zeros(30, dtype=bool)
        for name in centres:
            enrolled[np.flatnonzero(names == name)[:2]] = True
        pieces = vectors[~enrolled], names[~enrolled], vectors[enrolled], names[enrolled]
        folds.append(metrics.leave_identity_out(*pieces))
        own, others = naive.naive_leave_identity_out(*pieces)
        scores, correct, known, who = folds[-1]
        np.testing.assert_allclose(scores, [score for score, _ in own] + others, atol=1e-12)
        assert correct.tolist() == [right for _, right in own] + [False] * 20
        assert known.tolist() == [True] * 20 + [False] * 20
        assert who.tolist() == [*names[~enrolled], *names[~enrolled]]
        genuine += own
        strangers += others
    scores, correct, known, who = map(np.concatenate, zip(*folds, strict=True))
    for fpir in (0.05, 0.1, 0.3):
        # the lowest threshold that accepts at most so many strangers, tried one by one
        allowed = int(fpir * len(strangers) + 1e-9)
        best = 0
        for threshold in sorted([score for score, _ in genuine]):
            if sum(score >= threshold for score in strangers) <= allowed:
                best = max(best, sum(score >= threshold and right for score, right in genuine))
        got = metrics.detection_identification_rate(scores, correct, known, fpir=fpir)
        assert got == pytest.approx(best / len(genuine))
    low, high = metrics.bootstrap_statistic(
        lambda rows: metrics.detection_identification_rate(scores[rows], correct[rows], known[rows], fpir=0.1), who
    )
    assert 0 <= low < high <= 1


def test_hierarchical_figures_equal_the_loops():
    parents = {name: name[0] for name in ("aa", "ab", "ba", "bb", "ca")}
    grand = {"a": "x", "b": "x", "c": "y"}
    names = np.array(sorted(parents))
    prediction, target = RANDOM.choice(names, 200), RANDOM.choice(names, 200)
    want = []
    for guess, truth in zip(prediction.tolist(), target.tolist(), strict=True):
        if guess == truth:
            want.append(0)
        elif guess[0] == truth[0]:
            want.append(1)
        else:
            want.append(2 if grand[guess[0]] == grand[truth[0]] else 3)
    assert metrics.hierarchical_distance(prediction, target, [parents, grand]).tolist() == want
    assert metrics.hierarchical_distance(prediction, target, parents).tolist() == np.minimum(want, 2).tolist()
    report = metrics.hierarchical_report(prediction, target, [parents, grand])
    wrong = [distance for distance in want if distance]
    assert report["accuracy"] == pytest.approx(want.count(0) / 200)
    assert report["coarse_accuracy"] == pytest.approx(sum(d <= 1 for d in want) / 200)
    assert report["near_misses"] == pytest.approx(wrong.count(1) / len(wrong))
    assert report["distance"] == pytest.approx(sum(want) / 200)
    assert report["mistake_severity"] == pytest.approx(sum(wrong) / len(wrong))
    assert math.isnan(metrics.hierarchical_report(["aa"], ["aa"], parents)["near_misses"])


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("beta", [0.5, 1, 2])
def test_best_threshold_reaches_the_best_f_beta(kind, beta):
    scores, same = SCORES[kind][:40], SAME[:40]
    threshold = metrics.best_threshold(scores, same, beta=beta)
    tried = {float(t): sklearn.metrics.fbeta_score(same, scores >= t, beta=beta) for t in np.unique(scores)}
    assert sklearn.metrics.fbeta_score(same, scores >= threshold, beta=beta) == pytest.approx(max(tried.values()))
    assert threshold not in tried or threshold == scores.min()
    highest = max(t for t, figure in tried.items() if figure == pytest.approx(max(tried.values()), abs=1e-12))
    assert threshold <= highest


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.bootstrap_statistic(len, ["a", "a"]), "needs at least 2, got 1"),
        (
            lambda: metrics.bootstrap_statistic(len, ["a", "b"], resamples=0),
            "resamples to be a whole number of at least 1",
        ),
        (
            lambda: metrics.bootstrap_statistic(lambda rows: math.nan if 0 not in rows else 1.0, ["a", "b", "c"]),
            r"undefined in \d+ of 1000 draws of 3 identities: too few of them",
        ),
        (
            lambda: metrics.bootstrap_statistic(
                lambda rows: metrics.roc_auc(SMOOTH[rows], SAME[rows] & False), np.arange(240)
            ),
            "compares genuine with impostor pairs",
        ),
        (lambda: metrics.leave_identity_out([[1, 0]], ["a"], [[1, 0]], ["a"]), "two identities or more"),
        (
            lambda: metrics.leave_identity_out([[1, 0]], ["z"], [[1, 0], [0, 1]], ["a", "b"]),
            "1 of them without a template, first 'z'",
        ),
        (lambda: metrics.leave_identity_out([[1, 0, 0]], ["a"], [[1, 0]], ["a"]), "probes have 3 numbers, templates 2"),
        (lambda: metrics.hierarchical_distance(["a"], ["b"], {"a": "x"}), "no entry for 'b' on level 1"),
        (lambda: metrics.hierarchical_distance([1], [2], {"1": "x", "2": "x"}), "1 is not '1'"),
        (lambda: metrics.hierarchical_report([], [], {}), "at least one row"),
        (lambda: metrics.best_threshold([0.5], [False]), "undefined without a positive, got 1 negatives"),
        (lambda: metrics.best_threshold([0.5], [True], beta=0), "beta > 0, got 0"),
    ],
)
def test_figures_over_identities_refuse_and_say_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [10, 15, 20, 50, 100])
def test_a_confidence_on_an_edge_belongs_to_the_upper_bin(bins, kind) -> None:
    below = np.arange(bins) / bins + 0.5 / bins
    for edge in range(1, bins):
        confidence = np.array([edge / bins, *below]).astype(kind)
        right = np.array([0] + [1] * bins)
        gap = abs((2 * (edge / bins) + 0.5 / bins) - 1)  # of the two in the upper bin
        want = (gap + sum(abs(1 - one) for place, one in enumerate(below) if place != edge)) / (bins + 1)
        assert metrics.calibration_error(confidence, right, bins=bins) == pytest.approx(want, abs=2e-3 / bins + 1e-4)


@pytest.mark.parametrize(
    ("upper", "lower"), [(0.9, -np.inf), (np.inf, -np.inf), (np.inf, 0.0), (1 - 2**-53, 1 - 2**-52), (0.9, 0.1)]
)
def test_thresholds_lie_between_what_they_part(upper, lower) -> None:
    threshold = metrics.best_threshold([upper, lower], [1, 0])
    assert lower < threshold <= upper
    assert metrics.best_accuracy([upper] * 2 + [lower] * 2, [1, 1, 0, 0], folds=2) == (1.0, 0.0)


def test_integers_of_two_kinds_keep_their_digits() -> None:
    signed, unsigned = np.array([2**60]), np.array([2**60 + 1, 2**60], np.uint64)
    vectors = np.array([[1.0, 0], [0, 1]])
    assert metrics.recall_at_k(vectors[:1], signed, vectors, unsigned) == 0
    large = np.array([2**63 + 1, 2**60], np.uint64)
    assert metrics.recall_at_k(vectors[:1], signed, vectors[::-1], large) == 1
    with pytest.raises(ValueError, match="no type holds both. Convert both to strings"):
        metrics.recall_at_k(vectors[:1], np.array([-1]), vectors, large)


def test_rare_impostors_are_all_taken_or_drawn_evenly() -> None:
    labels = np.zeros(1201, int)
    labels[-1] = 1
    pairs = metrics.draw_pairs(labels, most=2000)
    assert pairs.impostors_total == 1200
    assert pairs.impostors.tolist() == [[row, 1200] for row in range(1200)]
    few = metrics.draw_pairs(labels, most=400)
    assert few.impostors.shape == (400, 2)
    assert set(few.impostors[:, 1]) == {1200}
    assert abs(few.impostors[:, 0].mean() - 600) < 60
    # groups that leave few: all pairs but those with one of the last four
    labels, groups = np.arange(600) % 3, np.array([0] * 596 + [1, 2, 3, 4])
    grouped = metrics.draw_pairs(labels, groups=groups, most=5000)
    want = [[i, j] for i in range(600) for j in range(i + 1, 600) if labels[i] != labels[j] and groups[i] != groups[j]]
    assert grouped.impostors.tolist() == want
    split = metrics.draw_pairs(labels[:300], labels, groups=(groups[:300], groups), most=5000)
    assert len(split.impostors) == split.impostors_total
    assert (labels[split.impostors[:, 0]] != labels[split.impostors[:, 1]]).all()
    assert (groups[split.impostors[:, 0]] != groups[split.impostors[:, 1]]).all()


def test_many_classes_need_no_table_of_all_by_all() -> None:
    labels = np.arange(12_000) // 2
    clusters = np.random.default_rng(7).permutation(labels)
    tracemalloc.start()
    nmi, ari = metrics.normalized_mutual_information(clusters, labels), metrics.adjusted_rand_index(clusters, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert nmi == pytest.approx(sklearn.metrics.normalized_mutual_info_score(labels, clusters), abs=1e-12)
    assert ari == pytest.approx(sklearn.metrics.adjusted_rand_score(labels, clusters), abs=1e-12)


def test_counts_may_be_scalars_of_arrays_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    for classes in (np.array(2), np.int64(2), torch.tensor(2), 2.0):
        assert metrics.mean_iou(ONES, ONES, classes=classes) == metrics.mean_iou(ONES, ONES, classes=2)
