"""Slow float64 oracles, by loops and letter by letter; they share no line with the library."""

import itertools
import math

import numpy as np
import torch

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


def naive_leave_identity_out(probes, labels, templates, template_labels):
    """Search by search: best score, whether the best is right, and the best of all others."""
    enrolled, strange = [], []
    for vector, label in zip(probes, labels, strict=True):
        best = {}
        for template, name in zip(templates, template_labels, strict=True):
            dot = sum(float(x) * float(y) for x, y in zip(vector, template, strict=True))
            norms = math.sqrt(sum(float(x) ** 2 for x in vector)) * math.sqrt(sum(float(y) ** 2 for y in template))
            cosine = dot / norms
            best[name] = max(best.get(name, -2.0), cosine)
        winner = max(best, key=lambda name: best[name])
        enrolled.append((best[winner], winner == label))
        strange.append(max(score for name, score in best.items() if name != label))
    return enrolled, strange


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


def naive_reciprocal_rank(hits, k=None):
    return 1 / (hits.index(True) + 1) if any(hits[:k]) else 0.0


def naive_ndcg(hits, k=None):
    """Jarvelin and Kekalainen 2002, gain 1 for a match, against the same matches in front."""
    gained, best = (
        sum(1 / math.log2(place + 2) for place, hit in enumerate(order[:k]) if hit)
        for order in (hits, sorted(hits, reverse=True))
    )
    return gained / best if best else 0.0


def naive_knn_accuracy(train, train_labels, test, test_labels, k, temperature, groups=(None, None)):
    """Wu et al. 2018, section 3.4; a tie goes to the class that sorts first, and without voters nobody is right."""
    right = 0
    for i, ranking in enumerate(naive_rankings(test, train, *groups)):
        if not ranking:
            continue
        votes = dict.fromkeys(sorted(set(train_labels)), 0.0)
        for j in ranking[:k]:
            dot = sum(float(x) * float(y) for x, y in zip(test[i], train[j], strict=True))
            norms = math.sqrt(sum(float(x) ** 2 for x in test[i])) * math.sqrt(sum(float(y) ** 2 for y in train[j]))
            votes[train_labels[j]] += math.exp(dot / norms / temperature)
        highest = max(votes.values())  # sums in two orders may differ in the last digit, and are a tie
        right += max(votes, key=lambda label: round(votes[label] / highest, 12)) == test_labels[i]
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


def _unit(z):
    """Rows of length 1 in float64; a zero row stays zero."""
    return z.double() / z.double().norm(dim=1, keepdim=True).clamp(min=1e-12)


def _cosines(z, reference):
    return _unit(z) @ _unit(z if reference is None else reference).T


def _partners(i, y, reference_labels):
    """Column numbers of the positives and negatives of anchor i."""
    others = y if reference_labels is None else reference_labels
    columns = [j for j in range(len(others)) if reference_labels is not None or j != i]
    return [j for j in columns if others[j] == y[i]], [j for j in columns if others[j] != y[i]]


def _mean(terms, *inputs):
    """The mean, 0 without terms; always with a graph to the inputs."""
    nothing = sum(0 * x.double().sum() for x in inputs)
    return nothing + sum(terms) / len(terms) if terms else nothing


def _log_sum_exp(terms):
    top = max(t.detach().item() for t in terms)
    return top + sum((t - top).exp() for t in terms).log()


def _softplus(*terms):
    """log(1 + sum of exp)."""
    return _log_sum_exp([torch.zeros((), dtype=torch.float64), *terms])


def supcon(z, y, reference=None, reference_labels=None, *, temperature=0.1):
    """Khosla et al. 2020, eq. 2."""
    c, anchors = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        total = sum((c[i, a] / temperature).exp() for a in positives + negatives)
        if positives:
            anchors.append(sum(total.log() - c[i, p] / temperature for p in positives) / len(positives))
    return _mean(anchors, z)


def nt_xent(z, y, reference=None, reference_labels=None, *, temperature=0.07):
    """Chen et al. 2020, eq. 1, per positive pair against itself and all negatives."""
    c, pairs = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        for p in positives:
            total = sum((c[i, a] / temperature).exp() for a in [p, *negatives])
            pairs.append(total.log() - c[i, p] / temperature)
    return _mean(pairs, z)


def _distances(z, reference):
    return [[(a - b).norm() for b in _unit(z if reference is None else reference)] for a in _unit(z)]


def contrastive(z, y, reference=None, reference_labels=None, *, positive_margin=0.0, negative_margin=1.0):
    """Hadsell et al. 2006, unsquared hinges, each term a mean over its violating pairs."""
    d, pull, push = _distances(z, reference), [], []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        pull += [d[i][p] - positive_margin for p in positives if d[i][p] > positive_margin]
        push += [negative_margin - d[i][n] for n in negatives if d[i][n] < negative_margin]
    return _mean(pull, z) + _mean(push, z)


def triplet(z, y, reference=None, reference_labels=None, *, margin=0.05, mining="all", soft=False):
    """Schroff et al. 2015, eq. 1, mean over violating triplets of the chosen ones."""
    d, terms = _distances(z, reference), []
    batch = (z, y, reference, reference_labels)
    chosen = {
        "all": lambda: _all_triplets(y, reference_labels),
        "batch-hard": lambda: mine_batch_hard(*batch),
        "semi-hard": lambda: mine_semi_hard(*batch, margin=margin),
        "easy-positive": lambda: mine_easy_positive(*batch),
        "angular": lambda: mine_angular(*batch),
        "multi-similarity": lambda: _triplets_of_pairs(*mine_multi_similarity(*batch)),
    }
    for a, p, n in sorted(chosen[mining]()):
        violation = margin + d[a][p] - d[a][n]
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


def info_nce(z, y, reference=None, reference_labels=None, *, temperature=0.07):
    """van den Oord et al. 2018, eq. 4: NT-Xent against a reference."""
    if reference is None:
        raise ValueError("InfoNCE needs a reference")
    return nt_xent(z, y, reference, reference_labels, temperature=temperature)


def dcl(z, y, reference=None, reference_labels=None, *, temperature=0.1):
    """Yeh et al. 2022, eq. 6: the positive is not in the denominator."""
    c, pairs = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if negatives:
            total = _log_sum_exp([c[i, n] / temperature for n in negatives])
            pairs += [total - c[i, p] / temperature for p in positives]
    return _mean(pairs, z)


def multi_similarity(z, y, reference=None, reference_labels=None, *, alpha=2.0, beta=50.0, base=0.5):
    """Wang et al. 2019 (multi-similarity), section 4, mean over all anchors."""
    c, anchors = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        pull = _softplus(*[-alpha * (c[i, p] - base) for p in positives]) / alpha
        push = _softplus(*[beta * (c[i, n] - base) for n in negatives]) / beta
        anchors.append(pull + push)
    return _mean(anchors, z)


def circle(z, y, reference=None, reference_labels=None, *, margin=0.4, scale=80.0):
    """Sun et al. 2020, eq. 5 and 6, with O_p = 1 + m, O_n = -m, delta_p = 1 - m, delta_n = m."""
    c, anchors = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        pull, push = [], []
        for p in positives:
            weight = max(1 + margin - c[i, p].item(), 0.0)  # a number: no gradient through the weight
            pull.append(-scale * weight * (c[i, p] - (1 - margin)))
        for n in negatives:
            weight = max(c[i, n].item() + margin, 0.0)
            push.append(scale * weight * (c[i, n] - margin))
        if pull and push:
            anchors.append(_softplus(_log_sum_exp(push) + _log_sum_exp(pull)))
    return _mean(anchors, z)


def n_pair(z, y):
    """Sohn 2016, eq. 7: one pair per class, its two first rows."""
    c, pairs = _cosines(z, None), []
    labels = y.tolist()
    for label in dict.fromkeys(labels):
        rows = [i for i, other in enumerate(labels) if other == label]
        if len(rows) > 1:
            pairs.append((rows[0], rows[1]))
    return _mean([_log_sum_exp([c[a, other] for _, other in pairs]) - c[a, p] for a, p in pairs], z)


def lifted_structure(z, y, reference=None, reference_labels=None, *, positive_margin=0.0, negative_margin=1.0):
    """Hermans et al. 2017, eq. 8, the generalised form; mean over anchors with a positive and a negative."""
    d, anchors = _distances(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if positives and negatives:
            pull = _log_sum_exp([d[i][p] - positive_margin for p in positives])
            push = _log_sum_exp([negative_margin - d[i][n] for n in negatives])
            anchors.append((pull + push).clamp(min=0))
    return _mean(anchors, z)


def margin_loss(z, y, reference=None, reference_labels=None, *, beta, margin=0.2, nu=0.0):
    """Wu et al. 2017, section 4, over all triplets; beta (1,), or (classes,) that of the anchor's class."""
    d, beta = _distances(z, reference), beta.double()
    terms, borders = [], []
    for a, p, n in sorted(_all_triplets(y, reference_labels)):
        border = beta[0] if len(beta) == 1 else beta[y[a]]
        terms += [t for t in (d[a][p] - border + margin, border - d[a][n] + margin) if t > 0]
        borders.append(border)
    if len(beta) == 1:
        return _mean(terms, z, beta) + nu * beta[0]
    penalty = sum(borders) / len(terms) if terms else 0.0
    return _mean(terms, z, beta) + nu * penalty


def angular(z, y, reference=None, reference_labels=None, *, margin_degrees=40.0):
    """Wang et al. 2017 (angular), log-sum-exp form, on unit vectors, mean over positive pairs."""
    a, squared_tangent, pairs = _unit(z), math.tan(math.radians(margin_degrees)) ** 2, []
    others, any_negative = a if reference is None else _unit(reference), False
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        any_negative = any_negative or bool(negatives)
        for p in positives:
            far = 2 * (1 + squared_tangent) * (a[i] @ others[p])
            pairs.append(_softplus(*[4 * squared_tangent * ((a[i] + others[p]) @ others[n]) - far for n in negatives]))
    return _mean(pairs if any_negative else [], z)


def fast_ap(z, y, reference=None, reference_labels=None, *, bins=10):
    """Cakir et al. 2019: soft histograms of squared distances in [0, 4]."""
    d, anchors, width = _distances(z, reference), [], 4 / bins
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        seen_positives, seen, precision = 0.0, 0.0, 0.0
        for b in range(bins + 1):
            near = [(1 - (d[i][j] ** 2 - b * width).abs() / width).clamp(min=0) for j in positives + negatives]
            here = sum(near[: len(positives)])
            seen_positives, seen = seen_positives + here, seen + sum(near)
            if positives and here > 0:
                precision = precision + here * seen_positives / seen
        if positives:
            anchors.append(1 - precision / len(positives))
    return _mean(anchors, z)


def smooth_ap(z, y, reference=None, reference_labels=None, *, temperature=0.01):
    """Brown et al. 2020; as in the authors' code an anchor is its own positive when there is no reference."""
    c, anchors = _cosines(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        positives = positives + ([i] if reference is None else [])
        ratios = []
        for k in positives:
            above = {j: ((c[i, j] - c[i, k]) / temperature).sigmoid() for j in positives + negatives if j != k}
            rank_among_positives = 1 + sum(above[j] for j in positives if j != k)
            ratios.append(rank_among_positives / (1 + sum(above.values())))
        if positives:
            anchors.append(1 - sum(ratios) / len(ratios))
    return _mean(anchors, z)


def soft_nearest_neighbor(z, y, reference=None, reference_labels=None, *, temperature=1.0):
    """Frosst et al. 2019, eq. 1, on unit vectors, mean over anchors with a positive."""
    d, anchors = _distances(z, reference), []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if positives:
            near = {j: -(d[i][j] ** 2) / temperature for j in positives + negatives}
            anchors.append(_log_sum_exp(list(near.values())) - _log_sum_exp([near[p] for p in positives]))
    return _mean(anchors, z)


def focal_contrastive(z, y, reference=None, reference_labels=None, *, gamma=2.0, margin=0.5, scale=10.0):
    """Lin et al. 2017, eq. 4, on the question "same class?" of every pair."""
    c, pull, push = _cosines(z, reference), [], []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        for j in positives + negatives:
            x = scale * (c[i, j] - margin)
            p, minus_log_p, minus_log_not_p = x.sigmoid(), _softplus(-x), _softplus(x)
            if j in positives:
                pull.append((1 - p) ** gamma * minus_log_p)
            else:
                push.append(p**gamma * minus_log_not_p)
    return _mean(pull, z) + _mean(push, z)


def threshold_consistent_margin(
    z, y, reference=None, reference_labels=None, *, loss=None, weight=1.0, positive_margin=0.9, negative_margin=0.5
):
    """Zhang et al. 2024; `loss` is another oracle, called with (z, y, reference, reference_labels)."""
    c, pull, push = _cosines(z, reference), [], []
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        pull += [positive_margin - c[i, p] for p in positives if c[i, p] <= positive_margin]
        push += [c[i, n] - negative_margin for n in negatives if c[i, n] >= negative_margin]
    regulariser = _mean(pull, z) + _mean(push, z)
    if loss is None:
        return weight * regulariser
    return loss(z, y, reference, reference_labels) + weight * regulariser


# ---- losses over proxies: class c owns rows c * K to c * K + K - 1 --------------------------------------------------


def _cross_entropy(logits, target, gamma):
    """-log softmax of the target, times (1 - p)^gamma (Lin et al. 2017, eq. 4)."""
    entropy = _log_sum_exp(logits) - logits[target]
    return entropy if gamma == 0 else (1 - (-entropy).exp()) ** gamma * entropy


def norm_softmax(z, y, proxies, *, temperature=0.05, gamma=0.0):
    """Zhai and Wu 2019."""
    c = _cosines(z, proxies)
    return _mean([_cross_entropy(list(c[i] / temperature), y[i], gamma) for i in range(len(z))], z, proxies)


def arcface(
    z,
    y,
    proxies,
    *,
    margin_degrees=28.6,
    scale=64.0,
    sub_centers=1,
    noise_degrees=None,
    noise_after=0,
    calls=0,
    gamma=0.0,
):
    """Deng et al. 2019, eq. 3; sub-centres of Deng et al. 2020. `calls` training calls came before this one."""
    c, m, terms = _cosines(z, proxies), math.radians(margin_degrees), []
    for i in range(len(z)):
        by_class = [c[i, k : k + sub_centers].max() for k in range(0, len(proxies), sub_centers)]
        cosine = by_class[y[i]]
        theta = cosine.clamp(-1, 1).acos()
        if noise_degrees is not None and calls >= noise_after and math.degrees(theta.item()) > noise_degrees:
            continue
        target = (theta + m).cos() if theta <= math.pi - m else cosine - m * math.sin(m)
        logits = [scale * (target if k == y[i] else by_class[k]) for k in range(len(by_class))]
        terms.append(_cross_entropy(logits, y[i], gamma))
    return _mean(terms, z, proxies)


def cosface(z, y, proxies, *, margin=0.35, scale=64.0, gamma=0.0):
    """Wang et al. 2018, eq. 4."""
    c, terms = _cosines(z, proxies), []
    for i in range(len(z)):
        logits = [scale * (c[i, k] - (margin if k == y[i] else 0)) for k in range(len(proxies))]
        terms.append(_cross_entropy(logits, y[i], gamma))
    return _mean(terms, z, proxies)


def adaface(z, y, proxies, *, mean, std, margin=0.4, concentration=0.333, scale=64.0, gamma=0.0):
    """Kim et al. 2022, eq. 5 to 7; mean and std of the norms are those after the update by this batch."""
    c, terms = _cosines(z, proxies), []
    for i in range(len(z)):
        norm = min(max(z[i].double().norm().item(), 1e-3), 100.0)
        k = min(max(concentration * (norm - mean) / (std + 1e-3), -1.0), 1.0)
        theta = c[i, y[i]].clamp(-1, 1).acos()
        target = (theta - margin * k).clamp(1e-3, math.pi - 1e-3).cos() - (margin + margin * k)
        logits = [scale * (target if j == y[i] else c[i, j]) for j in range(len(proxies))]
        terms.append(_cross_entropy(logits, y[i], gamma))
    return _mean(terms, z, proxies)


def proxy_nca(z, y, proxies, *, temperature=1 / 9):
    """ProxyNCA++, 2020: the proxy of the own class is in the denominator too; squared distances of unit vectors."""
    d = _distances(z, proxies)
    terms = [_cross_entropy([-(x**2) / temperature for x in d[i]], y[i], 0) for i in range(len(z))]
    return _mean(terms, z, proxies)


def proxy_anchor(z, y, proxies, *, margin=0.1, scale=32.0):
    """Kim et al. 2020, eq. 4."""
    c, pull, push = _cosines(z, proxies), [], []
    for k in range(len(proxies)):
        positives = [i for i in range(len(z)) if y[i] == k]
        negatives = [i for i in range(len(z)) if y[i] != k]
        if positives:
            pull.append(_softplus(*[-scale * (c[i, k] - margin) for i in positives]))
        push.append(_softplus(*[scale * (c[i, k] + margin) for i in negatives]))
    return _mean(pull, z, proxies) + _mean(push, z, proxies)


def soft_triple(z, y, proxies, *, centers=10, margin=0.01, scale=20.0, gamma=0.1, regularization=0.0):
    """Qian et al. 2019, eq. 8, 9."""
    c, terms, w = _cosines(z, proxies), [], _unit(proxies)
    classes = [range(k, k + centers) for k in range(0, len(proxies), centers)]
    for i in range(len(z)):
        by_class = []
        for rows in classes:
            total = _log_sum_exp([c[i, k] / gamma for k in rows])
            by_class.append(sum((c[i, k] / gamma - total).exp() * c[i, k] for k in rows))
        logits = [scale * (s - (margin if k == y[i] else 0)) for k, s in enumerate(by_class)]
        terms.append(_cross_entropy(logits, y[i], 0))
    apart = [(2 - 2 * w[s] @ w[t]).sqrt() for rows in classes for s in rows for t in rows if t > s]
    spread = sum(apart) / (len(proxies) * (centers - 1)) if apart and regularization else 0.0
    return _mean(terms, z, proxies) + regularization * spread


def center(z, y, centers):
    """Wen et al. 2016, eq. 2, on unit embeddings, mean instead of sum."""
    a = _unit(z)
    return _mean(
        [sum((x - c) ** 2 for x, c in zip(a[i], centers[y[i]].double(), strict=True)) / 2 for i in range(len(z))],
        z,
        centers,
    )


# ---- losses without labels ------------------------------------------------------------------------------------------


def barlow_twins(first, second, *, off_diagonal=5e-3):
    """Zbontar et al. 2021, eq. 1, 2; biased variance, with 1e-5 added as batch normalisation does."""
    n, dim = first.shape
    columns = []
    for z in (first.double(), second.double()):
        centred = [z[:, k] - z[:, k].sum() / max(n, 1) for k in range(dim)]
        columns.append([x / ((x**2).sum() / max(n, 1) + 1e-5).sqrt() for x in centred])
    total = 0 * (first.double().sum() + second.double().sum())
    for i in range(dim):
        for j in range(dim):
            correlation = (columns[0][i] * columns[1][j]).sum() / max(n, 1)
            total = total + ((1 - correlation) ** 2 if i == j else off_diagonal * correlation**2)
    return total


def vicreg(first, second, *, invariance=25.0, variance=25.0, covariance=1.0):
    """Bardes et al. 2022, eq. 1 to 6; unbiased variances, the variance term averaged over the two branches."""
    n, dim = first.shape
    first, second = first.double(), second.double()
    squares = [(first[i, k] - second[i, k]) ** 2 for i in range(n) for k in range(dim)]
    spread, correlated = [], 0.0
    for z in (first, second):
        centred = [z[:, k] - z[:, k].sum() / max(n, 1) for k in range(dim)]
        spread += [(1 - ((x**2).sum() / max(n - 1, 1) + 1e-4).sqrt()).clamp(min=0) for x in centred]
        for i in range(dim):
            for j in range(dim):
                if i != j:
                    correlated = correlated + ((centred[i] * centred[j]).sum() / max(n - 1, 1)) ** 2 / dim
    return invariance * _mean(squares, first, second) + variance * sum(spread) / len(spread) + covariance * correlated


def negative_cosine(prediction, target):
    """Chen and He 2021, eq. 1."""
    a, b = _unit(prediction), _unit(target)
    return _mean([-(a[i] @ b[i]) for i in range(len(a))], prediction, target)


def _sinkhorn(scores, epsilon, iterations):
    """Caron et al. 2020, eq. 5: codes of rows over prototypes, plain numbers."""
    top = max(max(row) for row in scores)
    q = [[math.exp((s - top) / epsilon) for s in row] for row in scores]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        per_prototype = [sum(column) for column in zip(*q, strict=True)]
        q = [[x / s for x, s in zip(row, per_prototype, strict=True)] for row in q]
        q = [[x / sum(row) / len(q) for x in row] for row in q]
    return [[x * len(q) for x in row] for row in q]


def swav(scores, queue_scores=None, *, temperature=0.1, epsilon=0.05, iterations=3):
    """Caron et al. 2020, eq. 1, 2: the codes of a full crop (the first two) predicted from every other crop."""
    terms = []
    for i in (0, 1):
        queue = [] if queue_scores is None else queue_scores[i].double().tolist()
        codes = _sinkhorn(scores[i].detach().double().tolist() + queue, epsilon, iterations)[: len(scores[i])]
        for v, crop in enumerate(scores):
            if v != i:
                logits = crop.double() / temperature
                for code, row in zip(codes, logits, strict=True):
                    total = _log_sum_exp(list(row))
                    terms.append(sum(q * (total - s) for q, s in zip(code, row, strict=True)))
    return _mean(terms, *scores)


def dino(teacher, student, *, center, student_temperature=0.1, teacher_temperature=0.04):
    """Caron et al. 2021, eq. 1 to 3, for a given centre (dim,) and teacher temperature; no gradient to the teacher."""
    terms = []
    for t, target in enumerate(teacher):
        for s, prediction in enumerate(student):
            if s != t:
                for old, new in zip(target.detach().double(), prediction.double(), strict=True):
                    old, new = (old - center.double().flatten()) / teacher_temperature, new / student_temperature
                    total_old, total_new = _log_sum_exp(list(old)), _log_sum_exp(list(new))
                    terms.append(sum((a - total_old).exp() * (total_new - b) for a, b in zip(old, new, strict=True)))
    return _mean(terms, *student)


def dino_center(center, teacher, *, momentum=0.9):
    """Caron et al. 2021, eq. 4: the centre after a call."""
    rows = [row for view in teacher for row in view.detach().double()]
    return momentum * center.double() + (1 - momentum) * sum(rows) / len(rows)


def koleo(z):
    """Sablayrolles et al. 2019, eq. 2, on unit vectors."""
    d, terms = _distances(z, None), []
    for i in range(len(z)):
        others = [d[i][j] for j in range(len(z)) if j != i]
        if others:
            terms.append(-(min(others) + 1e-8).log())
    return _mean(terms, z)


# ---- wrappers -------------------------------------------------------------------------------------------------------


def matryoshka(z, y, reference=None, reference_labels=None, *, loss, dims):
    """Kusupati et al. 2022, eq. 1, mean over prefixes; `loss` is another oracle."""
    terms = []
    for d in dims:
        prefix = None if reference is None else reference[:, :d]
        terms.append(loss(z[:, :d], y, prefix, reference_labels))
    return _mean(terms, z)


def cross_batch_memory(batches, *, loss, capacity, weight=1.0):
    """Wang et al. 2020, algorithm 1, the batch never against itself: the loss of each (z, y) in turn."""
    bank, bank_labels, values = [], [], []
    for z, y in batches:
        value = loss(z, y, None, None)
        if bank:
            value = value + weight * loss(z, y, torch.stack(bank), torch.stack(bank_labels))
        values.append(value)
        bank, bank_labels = [*bank, *z.detach()], [*bank_labels, *y]
        bank, bank_labels = bank[max(len(bank) - capacity, 0) :], bank_labels[max(len(bank) - capacity, 0) :]
    return values


# ---- miners: the chosen triplets (anchor, positive, negative), or the chosen pairs ----------------------------------


def _all_triplets(y, reference_labels):
    triplets = set()
    for i in range(len(y)):
        positives, negatives = _partners(i, y, reference_labels)
        triplets |= {(i, p, n) for p in positives for n in negatives}
    return triplets


def _triplets_of_pairs(positive_pairs, negative_pairs):
    return {(a, p, n) for a, p in positive_pairs for b, n in negative_pairs if a == b}


def mine_batch_hard(z, y, reference=None, reference_labels=None):
    """Hermans et al. 2017, eq. 5: per anchor the farthest positive with the nearest negative."""
    d, chosen = _distances(z, reference), set()
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if positives and negatives:
            chosen.add((i, max(positives, key=lambda p: d[i][p]), min(negatives, key=lambda n: d[i][n])))
    return chosen


def mine_semi_hard(z, y, reference=None, reference_labels=None, *, margin):
    """Schroff et al. 2015, eq. 4, and inside the margin."""
    d = _distances(z, reference)
    return {(a, p, n) for a, p, n in _all_triplets(y, reference_labels) if d[a][p] < d[a][n] <= d[a][p] + margin}


def mine_easy_positive(z, y, reference=None, reference_labels=None):
    """Xuan et al. 2020: the nearest positive with the nearest negative that is farther than it."""
    d, chosen = _distances(z, reference), set()
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if positives:
            p = min(positives, key=lambda p: d[i][p])
            farther = [n for n in negatives if d[i][n] > d[i][p]]
            if farther:
                chosen.add((i, p, min(farther, key=lambda n: d[i][n])))
    return chosen


def mine_multi_similarity(z, y, reference=None, reference_labels=None, *, epsilon=0.1):
    """Wang et al. 2019 (multi-similarity), section 4: (set of positive pairs, set of negative pairs)."""
    c, kept_positives, kept_negatives = _cosines(z, reference), set(), set()
    for i in range(len(z)):
        positives, negatives = _partners(i, y, reference_labels)
        if positives and negatives:
            hardest_positive, hardest_negative = min(c[i, p] for p in positives), max(c[i, n] for n in negatives)
            kept_positives |= {(i, p) for p in positives if c[i, p] - epsilon < hardest_negative}
            kept_negatives |= {(i, n) for n in negatives if c[i, n] + epsilon > hardest_positive}
    return kept_positives, kept_negatives


def mine_angular(z, y, reference=None, reference_labels=None, *, angle_degrees=20.0):
    """Wang et al. 2017 (angular): the angle at the negative, over the middle of anchor and positive, on unit rows."""
    a, chosen = _unit(z), set()
    others = a if reference is None else _unit(reference)
    for i, p, n in _all_triplets(y, reference_labels):
        half, height = (a[i] - others[p]).norm() / 2, (others[n] - (a[i] + others[p]) / 2).norm()
        if math.degrees(math.atan2(half.item(), height.item())) > angle_degrees:
            chosen.add((i, p, n))
    return chosen


def distance_weights(z, y, reference=None, reference_labels=None, *, cutoff=0.5, nonzero_loss_cutoff=1.4):
    """Wu et al. 2017, section 4: per anchor the probability of each negative, (B, M); a row of zeros without any."""
    d, dim = _distances(z, reference), z.shape[1]
    weights = torch.zeros(len(d), len(z if reference is None else reference), dtype=torch.float64)
    for i in range(len(z)):
        _, negatives = _partners(i, y, reference_labels)
        logs = {}
        for n in negatives:
            x = max(d[i][n].item(), cutoff)
            if x < nonzero_loss_cutoff:
                logs[n] = (2 - dim) * math.log(x) - (dim - 3) / 2 * math.log(1 - x**2 / 4)
        for n, log in logs.items():
            weights[i, n] = 1 / sum(math.exp(other - log) for other in logs.values())
    return weights


def naive_resampled_verification(genuine, impostor, genuine_rows, impostor_rows, left, right, *, far, resamples, seed):
    """AUC, EER and TAR@FAR on lists of pairs that are written out as often as their identities were drawn."""
    count = max(max(left), max(right)) + 1
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"auc": [], "eer": [], **{f"tar_at_{rate:g}": [] for rate in far}}
    for _ in range(resamples):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=1)[0]
        yes = [score for score, (a, _) in zip(genuine, genuine_rows, strict=True) for _ in range(drawn[left[a]])]
        no = [
            score
            for score, (a, b) in zip(impostor, impostor_rows, strict=True)
            for _ in range(drawn[left[a]] * drawn[right[b]])
        ]
        if not yes or not no:
            for values in found.values():
                values.append(math.nan)
            continue
        found["auc"].append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]))
        points = [(0.0, 1.0)] + [
            (np.mean([b >= t for b in no]), np.mean([a < t for a in yes])) for t in sorted({*yes, *no}, reverse=True)
        ]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if y1 <= x1:  # the straight line between both crosses the diagonal
                way = (y0 - x0) / ((y0 - x0) - (y1 - x1))
                found["eer"].append(x0 + way * (x1 - x0))
                break
        for rate in far:
            found[f"tar_at_{rate:g}"].append(max(1 - miss for accept, miss in points if accept <= rate + 1e-12))
    return {name: np.array(values) for name, values in found.items()}


def naive_matches_of_others(query, reference, labels, *, knn_k: int, temperature: float = 0.1) -> tuple[float, float]:
    """Recall@1 and weighted k-NN accuracy of row i among all reference rows but row i."""
    right = votes = 0
    for row in range(len(query)):
        scores = {}
        for other in range(len(reference)):
            if other != row:
                pairs = [(float(x), float(y)) for x, y in zip(query[row], reference[other], strict=True)]
                norms = math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))
                scores[other] = sum(x * y for x, y in pairs) / norms
        ranked = sorted(scores, key=lambda other: -scores[other])
        right += labels[ranked[0]] == labels[row]
        ballot: dict[str, float] = {}
        for other in ranked[:knn_k]:
            ballot[labels[other]] = ballot.get(labels[other], 0.0) + math.exp(scores[other] / temperature)
        votes += max(sorted(ballot), key=lambda name: ballot[name]) == labels[row]
    return right / len(query), votes / len(query)


# ---- encoders -------------------------------------------------------------------------------------------------------


def naive_whitened(vectors, labels, power, images):
    """Cosines of images whitened by the D x D covariance of vectors, shrunk by scikit-learn's Ledoit-Wolf estimate.

    The noise in a covariance falls with the vectors that are free around the means, where scikit-learn counts all.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    unit = [np.array(v, dtype=float) / math.sqrt(sum(float(x) ** 2 for x in v)) for v in vectors]
    mean = sum(unit) / len(unit)
    rest = []
    for vector, label in zip(unit, labels or [0] * len(unit), strict=True):
        same = [u for u, other in zip(unit, labels or [0] * len(unit), strict=True) if other == label]
        rest.append(vector - sum(same) / len(same))
    rest, count = np.array(rest), len(unit)
    shrinkage = min(1, ledoit_wolf_shrinkage(rest, assume_centered=True) * count / (count - len(set(labels or [0]))))
    covariance = rest.T @ rest / count
    average = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * average)
    root = vectors @ np.diag(values ** (-power / 2)) @ vectors.T
    moved = [root @ (np.array(v, dtype=float) / np.linalg.norm(v) - mean) for v in images]
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in moved] for a in moved])
