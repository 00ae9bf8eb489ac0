"""The report of `embedlab evaluate`: figures, curves and pictures as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedlab.metrics import open_set_curve
from embedlab.retrieval.comparison import TOO_FEW, any_too_few
from embedlab.retrieval.evaluation import Evaluation, Verification
from embedlab.retrieval.findings import class_figures
from embedlab.retrieval.open_set import OpenSetReport
from embedlab.retrieval.robustness import FIGURES, mean_of
from embedlab.serving.evaluation_pictures import (
    CONFUSIONS,
    EXAMPLES,
    MAP_POINTS,
    confusions_section,
    disagreements_section,
    examples_section,
    map_section,
)
from embedlab.serving.html import (
    Axis,
    Column,
    Html,
    Line,
    joined,
    line_chart,
    page,
    section,
    table,
    tag,
)

if TYPE_CHECKING:
    from embedlab.encoders.capacity import Capacity

CLASSES = 1_000  # rows of the table
BINS = 80  # of a distribution, at most
CURVE = 300  # points of a curve
TONES = ("accent", "warn", "good", "bad")

Interval = Sequence[float] | None


def evaluation_report(
    found: Sequence[Evaluation],
    comparison: Mapping[str, Any] | None,
    protocol: Mapping[str, Any],
    *,
    capacities: Mapping[str, Capacity] | None = None,
) -> str:
    """An evaluation as one HTML document.

    Args:
        found: What was evaluated; pictures are of the first, and of the second where they are compared.
        comparison: Of `compare`, or None.
        protocol: Of `protocol_of`.
        capacities: Subject to what it costs.
    """
    first = found[0]
    data = protocol["data"]["query"]
    title = _title(first, comparison)
    links = [
        ("summary", "Summary"),
        ("retrieval", "Retrieval"),
        *([("verification", "Verification")] if first.verification else []),
        *([("open-set", "Open set")] if first.open_set else []),
        *([("degraded", "Bad conditions")] if "degraded" in first.figures else []),
        ("examples", "Examples"),
        ("confusions", "Confusions"),
        ("classes", "Classes"),
        ("map", "Map"),
        *([("cost", "Cost")] if capacities else []),
        ("protocol", "Protocol"),
    ]
    return page(
        f"Evaluation of {title}",
        tag(
            "header",
            tag("div", "Comparison" if comparison else "Evaluation", class_="eyebrow"),
            tag("h1", title),
            tag("p", _told(found, data, compared=comparison is not None), class_="quiet"),
            tag("nav", [tag("a", text, href=f"#{name}") for name, text in links]),
        ),
        tag(
            "main",
            _warnings(found),
            _tiles(found, comparison),
            _summary(found, comparison),
            _retrieval(found),
            _verification(found, 2 if comparison else 1) if first.verification else None,
            _open_set(found) if first.open_set else None,
            _degraded(found, 2 if comparison else 1) if "degraded" in first.figures else None,
            examples_section(first),
            disagreements_section(first, found[1]) if comparison else None,
            confusions_section(first),
            _classes(first),
            map_section(found[:2] if comparison else found[:1]),
            _cost(capacities) if capacities else None,
            _protocol(protocol),
        ),
        tag(
            "footer",
            tag("p", f"Made by embedlab {protocol['versions']['embedlab']}, embedlab evaluate.", class_="quiet"),
        ),
    )


def _title(first: Evaluation, comparison: Mapping[str, Any] | None) -> str:
    if comparison:
        return f"{comparison['first']} and {comparison['second']}"
    return _last_parts(first.plan.path)


def _last_parts(path: str) -> str:
    return "/".join(path.rstrip("/").split("/")[-2:]) or path


def _told(found: Sequence[Evaluation], data: Mapping[str, Any], *, compared: bool) -> str:
    first = found[0]
    dims = list(dict.fromkeys(str(one.query.embeddings.vectors.shape[1]) for one in found[: 2 if compared else 1]))
    where = (
        "every image searched among the others (leave-one-out)"
        if first.reference is None
        else f"searched in {len(first.searched.embeddings):,} reference images"
    ) + (f", without those of its own {_group(first)}" if first.plan.groups else "")
    lost = data["skipped"]
    return (
        (f"{_last_parts(first.plan.path)}: " if compared else "")
        + f"{data['images']:,} images of {data['identities']:,} identities, {where}; "
        + f"{' and '.join(dims)} numbers per image."
        + (f" {lost:,} unreadable images were skipped." if lost else "")
    )


# ---- figures -------------------------------------------------------------------------------------------------------


def _range(interval: Interval, digits: int = 1) -> str:
    return "" if interval is None else f"{100 * interval[0]:.{digits}f} to {interval[1]:.{digits}%}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _tiles(found: Sequence[Evaluation], comparison: Mapping[str, Any] | None) -> Html:
    """The five or six figures that say most; of two encoders side by side with the interval of their difference."""
    figures = found[0].figures
    pairs, trial = figures.get("verification"), figures.get("open_set")
    place = _shown_far(pairs) if pairs else None
    wanted = [
        "recall_at_1",
        "map_at_r",
        "eer",
        "" if pairs is None or place is None else f"tar_at_{pairs['far'][place]:g}",
        *(("detection_rate", "observed_fpir") if trial else ("knn_accuracy",)),
    ]
    tiles = []
    for key, name, values, _ in _summary_rows(found):
        if key not in wanted or values[0][0] is None:
            continue
        row = comparison["figures"].get(key) if comparison else None
        if row is None:
            shown, under = _percent(values[0][0]), [_small(_range(values[0][1]))]
        else:
            shown = f"{100 * row['first']:.1f} / {_percent(row['second'])}"
            interval = row["interval"]
            under = [_small("difference"), _small(_points_range(interval))] if interval else []
        tiles.append(tag("div", tag("b", shown), tag("span", name), under, class_="figure"))
    count = figures["identities"]
    told = f"95% intervals over {count:,} identities" if count > 1 else "No intervals, which take two identities"
    told += f", {_mode(found[0])}"
    return joined(
        tag("div", tiles, class_="figures two" if comparison else "figures"),
        tag(
            "p",
            f"{comparison['first']} / {comparison['second']}, with the paired interval of the difference in points; "
            if comparison
            else "",
            f"{told}; how each is measured stands in the summary.",
            class_="quiet note",
        ),
    )


def _warnings(found: Sequence[Evaluation]) -> Html | None:
    """What must be known before any figure is read."""
    told = [(one.name, text) for one in found for text in one.figures["warnings"]]
    if not told:
        return None
    several = len(found) > 1
    return section(
        "Before you read this",
        tag("ul", [tag("li", f"{name}: {text}" if several else text) for name, text in told]),
    )


def _points_range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _shown_far(pairs: Mapping[str, Any]) -> int | None:
    """The false accept rate for the tile: 0.001, or the nearest that the pairs support."""
    if not pairs["far"]:
        return None
    return int(np.abs(np.log10(pairs["far"]) + 3).argmin())


def _summary(found: Sequence[Evaluation], comparison: Mapping[str, Any] | None) -> Html:
    rows = _summary_rows(found)
    head = [tag("th", "Figure", scope="col")]
    head += [tag("th", one.name, scope="col", class_="number") for one in found]
    if comparison:
        head.append(tag("th", "Difference", scope="col", class_="number"))
    head.append(tag("th", "Measured by", scope="col"))
    body = []
    for key, name, values, how in rows:
        cells = [tag("th", name, scope="row")]
        for value, interval in values:
            cells.append(tag("td", _percent(value), _small(_range(interval)), class_="number"))
        if comparison:
            cells.append(_difference(comparison["figures"].get(key)))
        cells.append(tag("td", how, class_="quiet how"))
        body.append(tag("tr", cells))
    return section(
        "Summary",
        tag(
            "p",
            ("With 95% intervals by resampling identities." if found[0].figures["identities"] > 1 else "No intervals.")
            + (
                " Differences are paired: both are resampled together, over the same identities. In percentage points."
                + (f" {TOO_FEW}" if any_too_few(comparison) else "")
                if comparison
                else ""
            ),
            class_="quiet",
        ),
        tag(
            "div",
            tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="summary"),
            class_="scroll",
            tabindex=0,
        ),
        _health(found),
        name="summary",
    )


def _small(text: str) -> Html | None:
    return tag("div", text, class_="range") if text else None


def _difference(row: Mapping[str, Any] | None) -> Html:
    if row is None:
        return tag("td", "-", class_="number")
    interval = row["interval"]
    shown = "" if interval is None else _points_range(interval)
    badge = tag("span", f"{row['better']} is better", class_="badge good") if row["better"] else None
    return tag("td", f"{100 * row['difference']:+.1f}", _small(shown), badge, class_="number")


def _summary_rows(found: Sequence[Evaluation]) -> list[tuple[str, str, list[tuple[float | None, Interval]], str]]:
    """Key, name, value and interval of each subject, and how the figure is measured."""
    first = found[0]
    figures = first.figures
    queries = f"{figures['queries'] - figures['without_match']:,} queries of {figures['identities']:,} identities"
    mode = _mode(first)
    where = f"{mode}, {queries}, cosine"
    names = {
        "recall_at_1": ("recall@1", "nearest is of the same class"),
        "recall_at_5": ("recall@5", "one of the 5 nearest is"),
        "recall_at_10": ("recall@10", "one of the 10 nearest is"),
        "r_precision": ("R-precision", "share of the R nearest; R: images that could be found"),
        "map_at_r": ("MAP@R", "the same with order"),
        "knn_accuracy": (f"k-NN, k = {figures['knn_k']}", "vote weighted by exp(cosine / 0.1)"),
    }
    rows = [
        (key, name, [(one.figures[key], one.figures["intervals"].get(key)) for one in found], f"{how}; {where}")
        for key, (name, how) in names.items()
    ]
    if "coarse" in figures:
        coarse = figures["coarse"]
        rows.append(
            (
                "coarse_recall_at_1",
                "coarse recall@1",
                [(one.figures["coarse"]["recall_at_1"], one.figures["coarse"]["interval"]) for one in found],
                f"nearest is of the same of {coarse['classes']} {coarse['column']} classes; {where}",
            )
        )
    if first.verification:
        rows += _verification_rows(found, mode)
    if first.open_set:
        rows += _open_set_rows(found)
    return rows


def _verification_rows(
    found: Sequence[Evaluation], mode: str
) -> list[tuple[str, str, list[tuple[float | None, Interval]], str]]:
    pairs = [one.figures["verification"] for one in found]
    all_pairs = f"all {pairs[0]['genuine']:,} genuine and {pairs[0]['impostors']:,} impostor pairs, {mode}"
    rows = [
        ("auc", "ROC AUC", [(p["auc"], p["intervals"]["auc"]) for p in pairs], f"genuine above impostor; {all_pairs}"),
        (
            "eer",
            "equal error rate",
            [(p["eer"], p["intervals"]["eer"]) for p in pairs],
            f"lower is better; {all_pairs}",
        ),
    ]
    for place, far in enumerate(pairs[0]["far"]):
        key = f"tar_at_{far:g}"
        rows.append(
            (
                key,
                f"TAR at FAR {far:g}",
                [(p["tar"][place], p["intervals"].get(key)) for p in pairs],
                f"genuine accepted, with {100 * far:g}% of impostors; {all_pairs}",
            )
        )
    return rows


def _open_set_rows(found: Sequence[Evaluation]) -> list[tuple[str, str, list[tuple[float | None, Interval]], str]]:
    trials = [one.figures["open_set"] for one in found]
    first = trials[0]
    who = f"{first['enrolled']} enrolled, {first['strangers']} strangers, means over identities"
    names = {
        "closed_set_accuracy": ("closed-set accuracy", f"best identity is right; {who}"),
        "detection_rate": ("detection rate", f"right and above the threshold; {who}"),
        "observed_fpir": (
            "strangers let in (FPIR)",
            f"promised at most {first['target_fpir']:.1%} by a threshold set on {first['calibration_strangers']} "
            f"others; {who}",
        ),
    }
    return [
        (key, name, [(one[key], one["intervals"].get(key)) for one in trials], how)
        for key, (name, how) in names.items()
    ]


def _health(found: Sequence[Evaluation]) -> Html:
    columns = [
        Column("Health of the embedding"),
        Column("effective rank", number=True, digits=1),
        Column("feature std x root D", number=True, digits=2),
        Column("uniformity", number=True, digits=2),
        Column("hubness, k = 10", number=True, digits=2),
    ]
    rows = [
        (
            one.name,
            one.figures["health"]["effective_rank"],
            one.figures["health"]["feature_std"] * one.query.embeddings.vectors.shape[1] ** 0.5,
            one.figures["health"]["uniformity"],
            one.figures["health"]["hubness"],
        )
        for one in found
    ]
    rows_told = found[0].figures["health"]["rows"]
    return joined(
        table(columns, rows),
        tag(
            "p",
            f"On {rows_told:,} vectors. Collapse shows as an effective rank near 1 and a standard deviation near 0; "
            "healthy are a standard deviation near 1, a uniformity towards -4 and a hubness near 0.",
            class_="quiet",
        ),
    )


# ---- curves --------------------------------------------------------------------------------------------------------


def _tone_of(number: int) -> tuple[str, bool]:
    return TONES[number % len(TONES)], number >= len(TONES)


def _retrieval(found: Sequence[Evaluation]) -> Html:
    curves, classes = [], []
    for number, one in enumerate(found):
        tone, dashed = _tone_of(number)
        curve, ranges = one.figures["cmc"], one.figures["cmc_intervals"]
        band = [(rank, low, high) for rank, (low, high) in enumerate(ranges, 1)] if number < 2 else []
        curves.append(Line(one.name, list(enumerate(curve, 1)), tone, dashed, band=band))
        recalls = sorted(row.recall_at_1 for row in class_figures(one) if row.recall_at_1 is not None)
        recalls *= 2 if len(recalls) == 1 else 1  # a level line
        steps = [(place / max(1, len(recalls) - 1), recall) for place, recall in enumerate(recalls)]
        classes.append(Line(one.name, _every(steps, CURVE), tone, dashed))
    figures = found[0].figures
    low = min(min(one.figures["cmc"]) for one in found)
    elsewhere = f" of another {_group(found[0])}" if found[0].plan.groups else ""
    lonely = (
        f" {figures['without_match']:,} queries without a class-mate{elsewhere} are left out."
        if figures["without_match"]
        else ""
    )
    charts = [
        line_chart(
            curves,
            x=Axis("rank", exact=True),
            y=Axis("CMC: queries with a match", percent=True, low=max(0.0, low - 0.05)),
            narrow=True,
            description=f"Recall at rank 1 is {figures['cmc'][0]:.1%}, at rank {len(figures['cmc'])} "
            f"{figures['cmc'][-1]:.1%}",
        ),
        line_chart(
            classes,
            x=Axis("classes, the worst first", percent=True, low=0.0),
            y=Axis("recall@1 of a class", percent=True, low=0.0),
            narrow=True,
            description="Recall at rank 1 of each class, in ascending order",
        ),
    ]
    return section(
        "Retrieval",
        tag(
            "p",
            f"Left: the share of queries with an image of their class among the first so many ({_mode(found[0])}); the "
            f"band is the 95% interval over identities.{lonely} Right: how evenly classes are found.",
            class_="quiet",
        ),
        tag("div", charts, class_="charts"),
        name="retrieval",
    )


def _every(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, both ends among them."""
    if len(points) <= most:
        return points
    return [points[place] for place in np.linspace(0, len(points) - 1, most).round().astype(int).tolist()]


def _mode(first: Evaluation) -> str:
    mode = "leave-one-out" if first.reference is None else "query against reference"
    return f"{mode}, own {_group(first)} left out" if first.plan.groups else mode


def _group(first: Evaluation) -> str:
    """What images of one group have in common."""
    return " and ".join(first.plan.groups)


def _verification(found: Sequence[Evaluation], seen: int) -> Html:
    shown = [(number, one.name, one.verification) for number, one in enumerate(found) if one.verification]
    report, sample = shown[0][2].report, shown[0][2].pairs
    drawn = len(sample.genuine) < sample.genuine_total or len(sample.impostors) < sample.impostors_total
    return section(
        "Verification",
        tag(
            "p",
            f"Are two images of the same identity? Curves are over all {report.genuine:,} genuine and "
            f"{report.impostors:,} impostor pairs, drawn through at most some hundred of their points"
            + (
                f"; distributions and intervals are of {len(sample.genuine):,} and {len(sample.impostors):,} pairs "
                "drawn by seed."
                if drawn
                else "; distributions and intervals are of the same pairs."
            ),
            class_="quiet",
        ),
        tag("div", [*_pair_curves(shown), *_cosines(shown, seen)], class_="charts"),
        _rates(found[:seen]),
        name="verification",
    )


def _pair_curves(shown: Sequence[tuple[int, str, Verification]]) -> list[Html]:
    """ROC, DET and precision over recall, of all encoders in each; words are on the first."""
    roc, det, recall = [], [], []
    for number, name, pairs in shown:
        tone, dashed = _tone_of(number)
        curve = pairs.report.curve
        assert curve is not None
        far, tar = curve.far.tolist(), curve.tar.tolist()
        smallest = 1 / pairs.report.impostors
        roc.append(Line(name, [(max(f, smallest), t) for f, t in zip(far, tar, strict=True)], tone, dashed))
        det.append(Line(name, [(max(f, smallest), 1 - t) for f, t in zip(far, tar, strict=True)], tone, dashed))
        steps = zip(tar[1:], curve.precision.tolist()[1:], strict=True)
        recall.append(Line(name, [(t, p) for t, p in steps if p == p], tone, dashed))
    report = shown[0][2].report
    far_axis = Axis("false accept rate", log=True)
    charts = [
        line_chart(
            roc,
            x=far_axis,
            y=Axis("ROC: genuine pairs accepted", percent=True, low=0.0),
            narrow=True,
            description=f"ROC curve, area {report.auc:.4f}",
        ),
        line_chart(
            recall,
            x=Axis("genuine pairs found (recall)", percent=True, low=0.0),
            y=Axis("precision of accepted pairs", percent=True, low=0.0),
            narrow=True,
            description=f"Precision over recall of pairs, average precision {report.average_precision:.4f}",
        ),
    ]
    if any(rejected > 0 for line in det for _, rejected in line.points):  # a logarithm shows nothing else
        axis = Axis("DET: share of genuine pairs rejected", log=True)
        words = f"DET curve, equal error rate {report.eer:.2%}"
        charts.insert(1, line_chart(det, x=far_axis, y=axis, narrow=True, description=words))
    return charts


def _cosines(shown: Sequence[tuple[int, str, Verification]], seen: int) -> list[Html]:
    """Distributions of both kinds of pairs, a chart for each encoder."""
    return [
        line_chart(
            _distributions(*pairs.scores, ("genuine pairs", "impostor pairs")),
            x=Axis("cosine"),
            y=Axis(
                "distribution of cosines" + (f": {name}" if len(shown) > 1 else ""),
                percent=True,
                low=0.0,
                values=False,
            ),
            mark=(pairs.report.eer_threshold, f"EER {pairs.report.eer_threshold:.3f}"),
            narrow=True,
            description="Cosines of genuine and impostor pairs, each with an area of one",
        )
        for _, name, pairs in shown[:seen]
    ]


def _distributions(
    first: Any, second: Any, names: tuple[str, str], tones: tuple[str, str] = ("good", "bad")
) -> list[Line]:
    """Two histograms over one scale, each with an area of one."""
    low, high = (float(edge) for edge in (min(first.min(), second.min()), max(first.max(), second.max())))
    low = min(low, high - 1e-3)  # ticks that can be told apart, however alike all are
    bins = int(np.clip(2 * min(len(first), len(second)) ** (1 / 3), 10, BINS))  # Rice's rule
    edges = np.linspace(low, high, bins + 1)
    places = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])  # drawn to both ends of the scale
    lines = []
    for values, name, tone in zip((first, second), names, tones, strict=True):
        share = np.histogram(values, edges)[0] / len(values)
        shares = share[[0, *range(bins), -1]]
        lines.append(Line(name, list(zip(places.tolist(), shares.tolist(), strict=True)), tone, filled=True))
    return lines


def _rates(found: Sequence[Evaluation]) -> Html:
    rows = [
        (one.name, f"{far:g}", tar, "-" if np.isinf(threshold) else f"{threshold:.4f}")
        for one in found
        if one.verification
        for far, tar, threshold in zip(
            one.verification.report.far, one.verification.report.tar, one.verification.report.threshold, strict=True
        )
    ]
    columns = [
        Column("Encoder"),
        Column("FAR", number=True),
        Column("TAR", number=True, digits=4),
        Column("Lowest cosine accepted", number=True),
    ]
    return joined(
        tag("h3", "Thresholds", class_="sub"),
        tag(
            "p",
            "To accept at a false accept rate. Rates that fewer than ten impostor pairs could support are left out.",
            class_="quiet",
        ),
        table(columns, rows),
    )


def _open_set(found: Sequence[Evaluation]) -> Html:
    first = found[0].open_set
    assert first is not None
    kept = first.observed_fpir is None or first.observed_fpir <= first.target_fpir
    trial = found[0].figures["open_set"]
    badge = tag("span", "kept" if kept else "exceeded on these strangers", class_=f"badge {'good' if kept else 'warn'}")
    return section(
        "Strangers",
        tag(
            "p",
            f"Of strangers at most {first.target_fpir:.1%} were to be taken for somebody; ",
            "-" if first.observed_fpir is None else f"{first.observed_fpir:.1%} were. ",
            badge,
            class_="lead",
        ),
        tag(
            "p",
            f"{first.enrolled:,} identities with {trial['templates']:,} templates are enrolled, "
            f"{first.genuine_probes:,} probes are of them and {first.stranger_probes:,} of {first.strangers:,} "
            f"strangers; the threshold was set on {first.calibration_strangers:,} other identities (upper bound "
            f"{first.bound:.2%}).",
            f" By probe, strangers told from enrolled: AUROC {trial['unknown_auroc']:.3f}; area under open-set "
            f"classification (OSCR) {trial['oscr']:.3f}."
            if first.strangers
            else "",
            class_="quiet",
        ),
        tag("div", _open_set_charts(found, first), class_="charts"),
        name="open-set",
    )


def _open_set_charts(found: Sequence[Evaluation], first: OpenSetReport) -> list[Html]:
    """The first encoder's scores, and the rates of all; none without probes of both kinds."""
    probed = first.probed
    named, strangers = probed.scores[probed.known & probed.right], probed.scores[~probed.known]
    if not len(named) or not len(strangers):
        return []
    lines = []
    for number, one in enumerate(found):
        if one.open_set is None:
            continue
        tone, dashed = _tone_of(number)
        rates = open_set_curve(one.open_set.probed.scores, one.open_set.probed.right, one.open_set.probed.known)
        points = list(zip(rates[0].tolist(), (1 - rates[1]).tolist(), strict=True))
        lines.append(Line(one.name, _every(points, CURVE), tone, dashed))
    return [
        line_chart(
            _distributions(named, strangers, ("enrolled, best identity right", "strangers")),
            x=Axis("best score of a probe"),
            y=Axis("distribution of scores", percent=True, low=0.0, values=False),
            mark=(first.threshold, f"threshold {first.threshold:.3f}"),
            narrow=True,
            description="Best scores of enrolled and of strangers with the calibrated threshold",
        ),
        line_chart(
            lines,
            x=Axis("strangers let in (FPIR), by probe", percent=True, low=0.0),
            y=Axis("enrolled named right, by probe", percent=True, low=0.0),
            mark=(first.target_fpir, f"promised {first.target_fpir:.1%}"),
            narrow=True,
            description="Detection and identification rate over the false-positive identification rate",
        ),
    ]


def _classes(found: Evaluation) -> Html:
    rows = class_figures(found)
    shown = rows[:CLASSES]
    columns = [
        Column("Class"),
        Column("Queries", number=True),
        Column("Recall@1", number=True, digits=3),
        Column("Recall@5", number=True, digits=3),
        Column("MAP@R", number=True, digits=3),
        Column("Most often taken for"),
        Column("Times", number=True),
    ]
    cells = [
        (row.label, row.queries, row.recall_at_1, row.recall_at_5, row.map_at_r, row.taken_for, row.times)
        for row in shown
    ]
    perfect = sum(row.recall_at_1 == 1 for row in rows)
    return section(
        "Classes",
        tag(
            "p",
            f"{len(rows):,} classes, the worst first; {perfect:,} with every nearest right."
            + (f" The first {len(shown):,} are shown, the JSON has all." if len(shown) < len(rows) else "")
            + " A click on the head of a column sorts by it.",
            class_="quiet",
        ),
        tag("div", table(columns, cells), class_="tall"),
        name="classes",
    )


def _degraded(found: Sequence[Evaluation], drawn: int) -> Html:
    """Recall at rank 1 under bad conditions, by severity; drawn for the first subjects, means for all."""
    charts = []
    for one in found[:drawn]:
        kinds: dict[str, list[tuple[float, float]]] = {}
        report = one.figures["degraded"]
        clean = next(row["recall_at_1"] for row in report["rows"] if not row["severity"])
        for row in report["rows"]:
            if row["severity"]:
                kinds.setdefault(row["degradation"], [(0, clean)]).append((row["severity"], row["recall_at_1"]))
        lines = [
            Line(name.replace("_", " "), sorted(points), *_tone_of(number), dots=True)
            for number, (name, points) in enumerate(kinds.items())
        ]
        title = f"recall@1 of {one.name}" if drawn > 1 else "recall@1"
        axis = Axis(title, percent=True, low=0.0)
        charts.append(line_chart(lines, x=Axis("severity", low=0.0), y=axis, narrow=drawn > 1))
    means = {one.name: one.figures["degraded"]["means"] for one in found}
    figures = {
        figure: f"Mean {title}"
        for figure, title in FIGURES.items()
        if mean_of(means[found[0].name]["all"], figure)[0] is not None
    }
    columns = [Column("Degradation"), Column("Encoder"), *(Column(title, number=True) for title in figures.values())]
    cells = [
        [name.replace("_", " "), subject, *(_mean_cell(*mean_of(by_kind[name], figure)) for figure in figures)]
        for name in means[found[0].name]
        for subject, by_kind in means.items()
    ]
    return section(
        "Bad conditions",
        tag(
            "p",
            "Recall@1 "
            + ("" if drawn > 1 else f"of {found[0].name} ")
            + f"where queries are degraded and what is searched stays clean, {_mode(found[0])}; 0 is clean. The table "
            "has means over the severities.",
            class_="quiet",
        ),
        tag("div", charts, class_="charts") if drawn > 1 else charts,
        table(columns, cells),
        name="degraded",
    )


def _mean_cell(value: float | None, interval: Interval) -> Html:
    return joined(_percent(value), _small(_range(interval)))


# ---- cost and protocol ---------------------------------------------------------------------------------------------


def costs_of(
    found: Sequence[Evaluation], *, precision: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, Capacity]:
    """What the encoders cost here, baselines left aside."""
    encoders = {one.name: one.subject.encoder for one in found if one.subject.about.get("path")}
    if not any(encoders.values()):
        return {}
    from embedlab.encoders import measure_capacity

    return {
        name: measure_capacity(encoder, seconds=0.5, precision=precision)
        for name, encoder in encoders.items()
        if encoder is not None
    }


def _cost(capacities: Mapping[str, Capacity]) -> Html:
    columns = [
        Column("Encoder"),
        Column("Parameters", number=True),
        Column("Weights", number=True),
        Column("Multiply-adds", number=True),
        Column("Batch", number=True),
        Column("Latency", number=True),
        Column("Images per second", number=True),
        Column("Peak memory", number=True),
    ]
    rows = [
        (
            name,
            "-" if found.parameters is None else f"{found.parameters:,}",
            f"{found.megabytes:.1f}\u00a0MB",
            "-" if found.multiply_adds is None else f"{found.multiply_adds / 1e6:,.1f}\u00a0M",
            speed.batch,
            f"{speed.milliseconds:,.2f}\u00a0ms",
            f"{speed.images_per_second:,.0f}",
            "-" if speed.peak_mebibytes is None else f"{speed.peak_mebibytes:,.1f}\u00a0MiB",
        )
        for name, found in capacities.items()
        for speed in found.speeds
    ]
    one = next(iter(capacities.values()))
    return section(
        "What it costs",
        tag(
            "p",
            f"From uint8 images of {one.image_size} px to embeddings of {one.dim} numbers on {one.device}, "
            f"{one.threads} {'thread' if one.threads == 1 else 'threads'}, {one.precision}; median of repeated calls, "
            "without decoding.",
            class_="quiet",
        ),
        table(columns, rows),
        name="cost",
    )


def _protocol(protocol: Mapping[str, Any]) -> Html:
    subjects = protocol["subjects"]
    data = [(f"{side} {name}", value) for side, told in protocol["data"].items() for name, value in told.items()]
    plan = [(name, value) for name, value in protocol.items() if not isinstance(value, Mapping)]
    chosen = [(name, value) for name, value in protocol.items() if "select" in name and isinstance(value, Mapping)]
    made = [
        ("intervals", protocol["intervals"]),
        ("versions", protocol["versions"]),
        ("hardware", protocol["hardware"]),
    ]
    facts = list(dict.fromkeys(name for about in subjects.values() for name in about))
    caps = (
        f"At most {MAP_POINTS} images are on the map, drawn by seed; {EXAMPLES} examples of a kind, {CONFUSIONS} "
        f"confusions with pictures and {CLASSES:,} classes are shown; curves are drawn through some hundred points. "
        "Pictures are reduced copies; the file holds all that it shows."
    )
    return section(
        "Protocol",
        tag("p", "What it takes to make the same figures again.", class_="quiet"),
        table(
            [Column("Measured"), *(Column(name) for name in subjects)],
            [
                (_words(name), *(_plain(about.get(name)) for about in subjects.values()))
                for name in facts
                if any(about.get(name) is not None for about in subjects.values())
            ],
        ),
        table(
            [Column("Protocol"), Column("Value")],
            [
                (_words(name), _plain(value))
                for name, value in [*plan, *chosen, *data, *made]
                if _plain(value) not in ("", "-")
            ],
        ),
        tag("p", caps, class_="quiet"),
        name="protocol",
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> str:
    """Nested names and values in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(key))} {_plain(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
