"""Slow float64 oracles, by loops and letter by letter; they share no line with the library."""

import math

# ---------------------------------------------------------------------------------------------------------- metrics


def naive_rankings(query, reference=None, query_groups=None, reference_groups=None):
    """For each query the reference rows, nearest first by float64 cosine, without itself and its own group."""
    itself, reference = reference is None, query if reference is None else reference
    rankings = []
    for i, a in enumerate(query):
        scored = []
        for j, b in enumerate(reference):
            if (itself and i == j) or (query_groups is not None and query_groups[i] == reference_groups[j]):
                continue
            dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
            norms = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
            scored.append((-round(dot / norms, 12), j))
        rankings.append([j for _, j in sorted(scored)])
    return rankings


def naive_hits(rankings, query_labels, reference_labels):
    """For each query, match or no match at each place."""
    return [[reference_labels[j] == query_labels[i] for j in ranking] for i, ranking in enumerate(rankings)]


def naive_recall_at_k(hits, k):
    return float(any(hits[:k]))


def naive_precision_at_k(hits, k):
    return sum(hits[:k]) / k


def naive_r_precision(hits):
    return sum(hits[: sum(hits)]) / sum(hits) if any(hits) else 0.0


def naive_map_at_r(hits):
    """Musgrave et al. 2020, eq. 3, 4: (1/R) sum over i = 1..R of P(i), the precision at i if i is a match, else 0."""
    total = sum(hits)
    return sum(sum(hits[:i]) / i if hits[i - 1] else 0.0 for i in range(1, total + 1)) / total if total else 0.0


def naive_average_precision(hits, k=None):
    k = len(hits) if k is None else k
    found = [sum(hits[:i]) / i for i in range(1, min(k, len(hits)) + 1) if hits[i - 1]]
    return sum(found) / min(sum(hits), k) if any(hits) else 0.0


def naive_knn_accuracy(train, train_labels, test, test_labels, k, temperature):
    """Wu et al. 2018, section 3.4; a tie goes to the class that sorts first."""
    right = 0
    for i, ranking in enumerate(naive_rankings(test, train)):
        votes = dict.fromkeys(sorted(set(train_labels)), 0.0)
        for j in ranking[:k]:
            dot = sum(float(x) * float(y) for x, y in zip(test[i], train[j], strict=True))
            norms = math.sqrt(sum(float(x) ** 2 for x in test[i])) * math.sqrt(sum(float(y) ** 2 for y in train[j]))
            votes[train_labels[j]] += math.exp(dot / norms / temperature)
        right += max(votes, key=votes.get) == test_labels[i]
    return right / len(test)


def naive_tar_at_far(scores, same, far):
    """The best true accept rate over all thresholds that keep to `far`."""
    genuine = [s for s, yes in zip(scores, same, strict=True) if yes]
    impostors = [s for s, yes in zip(scores, same, strict=True) if not yes]
    best = 0.0
    for threshold in [*scores, math.inf]:
        if sum(s >= threshold for s in impostors) <= far * len(impostors):
            best = max(best, sum(s >= threshold for s in genuine) / len(genuine))
    return best


def naive_fpir_fnir(scores, correct, known, threshold):
    strangers = [s for s, k in zip(scores, known, strict=True) if not k]
    enrolled = [(s, c) for s, c, k in zip(scores, correct, known, strict=True) if k]
    fpir = sum(s >= threshold for s in strangers) / len(strangers)
    return fpir, sum(not (c and s >= threshold) for s, c in enrolled) / len(enrolled)


# ---- losses: float64, loops over anchors, positives and negatives, letter by letter ---------------------------------


def _cosines(z, reference):
    z = z.double() / z.double().norm(dim=1, keepdim=True)
    r = z if reference is None else reference.double() / reference.double().norm(dim=1, keepdim=True)
    return z @ r.T


def _partners(i, y, reference_labels):
    """Column numbers of the positives and negatives of anchor i."""
    others = y if reference_labels is None else reference_labels
    columns = [j for j in range(len(others)) if reference_labels is not None or j != i]
    return [j for j in columns if others[j] == y[i]], [j for j in columns if others[j] != y[i]]


def _mean(terms, z):
    return sum(terms) / len(terms) if terms else 0 * z.double().sum()


def supcon(z, y, reference=None, reference_labels=None, *, temperature):
    """Khosla et al. 2020, eq. 2."""
    c, anchors = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        total = sum((c[i, a] / temperature).exp() for a in positives + negatives)
        if positives:
            anchors.append(sum(total.log() - c[i, p] / temperature for p in positives) / len(positives))
    return _mean(anchors, z)


def nt_xent(z, y, reference=None, reference_labels=None, *, temperature):
    """Chen et al. 2020, eq. 1, per positive pair against itself and all negatives."""
    c, pairs = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        for p in positives:
            total = sum((c[i, a] / temperature).exp() for a in [p, *negatives])
            pairs.append(total.log() - c[i, p] / temperature)
    return _mean(pairs, z)


def _distances(z, reference):
    z = z.double() / z.double().norm(dim=1, keepdim=True)
    r = z if reference is None else reference.double() / reference.double().norm(dim=1, keepdim=True)
    return [[(a - b).norm() for b in r] for a in z]


def contrastive(z, y, reference=None, reference_labels=None, *, positive_margin=0.0, negative_margin=1.0):
    """Hadsell et al. 2006, unsquared hinges, each term a mean over its violating pairs."""
    d, pull, push = _distances(z, reference), [], []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        pull += [d[i][p] - positive_margin for p in positives if d[i][p] > positive_margin]
        push += [negative_margin - d[i][n] for n in negatives if d[i][n] < negative_margin]
    return _mean(pull, z) + _mean(push, z)


def triplet(z, y, reference=None, reference_labels=None, *, margin, mining="all", soft=False):
    """Schroff et al. 2015, eq. 1, mean over violating triplets; batch-hard of Hermans et al. 2017, eq. 5."""
    d, terms = _distances(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        triplets = [(p, n) for p in positives for n in negatives]
        if mining == "batch-hard" and triplets:
            triplets = [(max(positives, key=lambda p: d[i][p]), min(negatives, key=lambda n: d[i][n]))]
        for p, n in triplets:
            violation = margin + d[i][p] - d[i][n]
            term = (1 + violation.exp()).log() if soft else violation
            if term > 0:
                terms.append(term)
    return _mean(terms, z)


def focal(logits, targets, *, gamma, weights=None):
    """Lin et al. 2017, eq. 5 with a softmax."""
    terms = []
    for row, target in zip(logits.double(), targets, strict=True):
        p = (row - row.max()).exp()[target] / (row - row.max()).exp().sum()
        terms.append(-(1 if weights is None else weights[target]) * (1 - p) ** gamma * p.log())
    return sum(terms) / len(terms)


def binary_focal(logits, targets, *, gamma, alpha):
    """Lin et al. 2017, eq. 5."""
    terms = []
    for x, t in zip(logits.double().flatten(), targets.flatten(), strict=True):
        p = 1 / (1 + (-x).exp())
        p_t, a_t = (p, alpha) if t == 1 else (1 - p, None if alpha is None else 1 - alpha)
        terms.append(-(1 if alpha is None else a_t) * (1 - p_t) ** gamma * p_t.log())
    return sum(terms) / len(terms)
