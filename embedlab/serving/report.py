"""Reports for people: what a gallery holds and promises, and what an audit of vectors found, each as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from embedlab.data.images import read_image
from embedlab.retrieval.audit import Audit, Confusable, Duplicates, audit
from embedlab.retrieval.calibration import Calibration
from embedlab.retrieval.pictures import THUMBNAIL_SIDE, thumbnail
from embedlab.serving.html import (
    Column,
    Html,
    Line,
    figures,
    joined,
    line_chart,
    page,
    picture,
    section,
    strip,
    table,
    tag,
)

if TYPE_CHECKING:
    from embedlab.retrieval.gallery import Gallery

Pictures = Callable[[int], bytes | None]

SHOWN = 300  # identities with pictures
FINDINGS = 40  # of each kind
SAMPLES = 4  # pictures of an identity


def gallery_report(gallery: Gallery) -> str:
    """A gallery as one HTML document that loads nothing from elsewhere.

    It holds the promise in words, the operating curve, what is worth a look (rows that may be mislabelled, suspected
    duplicates, identities that are taken for each other), the identities with sample pictures, and facts about the
    search. Pictures are the gallery's thumbnails or the files at the stored paths; where there is neither, a neutral
    tile stands.

    Example:
        >>> import tempfile
        >>> from embedlab import Gallery
        >>> with tempfile.TemporaryDirectory() as place, Gallery.create(f"{place}/door", dim=2) as door:
        ...     _ = door.enroll(embeddings=[[1, 0], [0, 1]], labels=["Ada", "<b>"])
        ...     "&lt;b&gt;" in gallery_report(door)
        True
    """
    held, info, calibration = gallery.embeddings(), gallery.info(), gallery.calibration
    labels = held.labels or []
    pictures = template_pictures(gallery)
    found = _audited(gallery, info["settings"]) if len(set(labels)) > 1 else None
    members: dict[str, list[int]] = {}
    for label, key in zip(labels, held.ids.tolist(), strict=True):
        members.setdefault(label, []).append(key)
    sizes = [len(keys) for keys in members.values()]
    threshold = None if calibration is None else calibration.threshold
    name = gallery.name
    return page(
        f"Gallery {name}",
        _header("Gallery", name, _state(calibration, len(members)), _LINKS if found else _LINKS[-2:]),
        tag(
            "main",
            figures(
                [
                    (f"{len(members):,}", "identities"),
                    (f"{len(labels):,}", "templates"),
                    ("-" if not sizes else f"{np.median(sizes):.4g}", "templates of the typical identity"),
                    ("none" if threshold is None else f"{threshold:.4f}", "threshold"),
                    (info["dim"] or "-", "numbers per vector"),
                ]
            ),
            _promise(calibration, len(members)),
            _findings(found, members, pictures) if found else _too_few(len(members)),
            _identities(members, pictures),
            _facts(info),
        ),
        _footer(f"embedlab gallery report {name}"),
    )


def audit_report(found: Audit, labels: Sequence[str], ids: Sequence[int], pictures: Pictures | None = None) -> str:
    """An audit as one HTML document that loads nothing from elsewhere.

    Args:
        found: What `audit` gave.
        labels: N identities of the rows.
        ids: N names of the rows.
        pictures: From the name of a row to a JPEG or PNG, or None where there is no picture.
    """
    members: dict[str, list[int]] = {}
    for label, key in zip(labels, ids, strict=True):
        members.setdefault(label, []).append(key)
    threshold = None if found.calibration is None else found.calibration.threshold
    if found.calibration is None:
        promise = section("The threshold", tag("p", f"There is none: {found.refusal}"), name="promise")
    else:
        promise = _promise(found.calibration, found.identities)
    return page(
        "Audit",
        _header("Audit", f"{found.rows:,} vectors of {found.identities:,} identities", None, _LINKS[:-2]),
        tag(
            "main",
            figures(
                [
                    ("none" if threshold is None else f"{threshold:.4f}", "threshold"),
                    ("-" if found.recall_at_1 is None else f"{found.recall_at_1:.1%}", "nearest row is of the same"),
                    ("-" if found.detection_rate is None else f"{found.detection_rate:.1%}", "named at the threshold"),
                    (f"{found.single:,}", "identities with one vector"),
                    (f"{found.effective_rank:.1f}", f"effective rank of {found.dim}"),
                ]
            ),
            promise,
            _findings(found, members, pictures or (lambda _key: None)),
        ),
        _footer("embedlab audit"),
    )


def template_pictures(gallery: Gallery) -> Pictures:
    """From the id of a template to its picture: the thumbnail, else the file at the stored path, else None."""
    notes = gallery.metadata()

    def find(key: int) -> bytes | None:
        return gallery.thumbnail(key) or file_picture(notes[key].get("path"))

    return find


def file_picture(path: object, *, side: int = THUMBNAIL_SIDE) -> bytes | None:
    """A small JPEG of an image file; None where there is no such file or it is none."""
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    try:
        return thumbnail(read_image(path), side=side)
    except (ValueError, OSError):
        return None


# ---- pieces --------------------------------------------------------------------------------------------------------

_LINKS = (
    ("promise", "Promise"),
    ("mislabelled", "Wrong labels"),
    ("confusable", "Look-alikes"),
    ("duplicates", "Duplicates"),
    ("identities", "Identities"),
    ("facts", "Facts"),
)


def _header(kind: str, title: str, state: Html | None, links: Sequence[tuple[str, str]]) -> Html:
    return tag(
        "header",
        tag("div", kind, class_="eyebrow"),
        tag("h1", title),
        tag("p", state) if state else None,
        tag("nav", [tag("a", text, href=f"#{name}") for name, text in links]),
    )


def _footer(command: str) -> Html:
    return tag("footer", tag("p", f"Made by {command}.", class_="quiet"))


def _state(calibration: Calibration | None, identities: int) -> Html:
    if calibration is None:
        return tag("span", "not calibrated", class_="badge warn")
    if calibration.is_stale(identities):
        return tag("span", "outgrown its calibration", class_="badge warn")
    return tag("span", "calibrated", class_="badge good")


def _promise(calibration: Calibration | None, identities: int) -> Html:
    if calibration is None:
        return section(
            "No promise yet",
            tag("p", "The gallery has no threshold, so that everybody is answered with unknown.", class_="lead"),
            tag("p", "Calibrate it with pictures of strangers: embedlab gallery calibrate.", class_="quiet"),
            name="promise",
        )
    found = calibration
    stale = found.is_stale(identities)
    warning = (
        f"It was made for {found.gallery_identities:,} identities and now holds {identities:,}: strangers are let in "
        "more often than this. Calibrate again."
    )
    rests = (
        "Every identity has played the stranger to the others (leave-identity-out): it holds for strangers and "
        "pictures like the enrolled ones, which those at the door are not. Calibrate with pictures of real strangers."
        if found.source == "leave-identity-out"
        else f"It rests on {found.images:,} pictures of {found.strangers:,} strangers, worth "
        f"{found.effective_strangers:.0f} independent ones."
    )
    return section(
        "What it promises",
        tag(
            "p",
            f"Of strangers, at most {found.fpir:.2%} are taken for somebody enrolled, with {found.confidence:.0%} "
            f"confidence. Upper bound {found.bound:.2%}; seen while calibrating {found.observed:.2%}.",
            class_="lead",
        ),
        tag("p", tag("span", "stale", class_="badge warn"), f" {warning}") if stale else None,
        tag("p", rests, class_="quiet"),
        None
        if found.detection_rate is None
        else tag(
            "p",
            f"Of the enrolled, {found.detection_rate:.1%} are named right, on {found.genuine_images:,} pictures.",
            class_="quiet",
        ),
        _curve(found),
        name="promise",
    )


def _curve(found: Calibration) -> Html | None:
    if not found.curve:
        return None
    detected = [(limit, rate) for limit, _, _, rate in found.curve if rate is not None]
    lines = [
        Line("strangers taken for somebody", [(limit, rate) for limit, rate, _, _ in found.curve], "warn"),
        Line(
            f"upper bound, {found.confidence:.0%}", [(limit, bound) for limit, _, bound, _ in found.curve], "warn", True
        ),
        *([Line("enrolled named right", detected, "good")] if detected else []),
    ]
    words = (
        f"Rates over the threshold; at {found.threshold:.4f} the bound of strangers taken for somebody is "
        f"{found.bound:.2%}"
    )
    mark = (found.threshold, f"threshold {found.threshold:.3f}")
    return line_chart(lines, x="threshold", y="share", mark=mark, description=words)


def _audited(gallery: Gallery, settings: dict[str, object]) -> Audit:
    held, calibration = gallery.embeddings(), gallery.calibration
    plain = settings.get("fusion") == "max" and not settings.get("normalisation")  # else scores are no cosines
    return audit(
        held.vectors,
        held.labels or [],
        held.ids,
        fpir=0.01 if calibration is None else calibration.fpir,
        threshold=calibration.threshold if plain and calibration is not None else None,
    )


def _too_few(identities: int) -> Html:
    return section(
        "Nothing to compare",
        tag("p", f"Look-alikes, duplicates and wrong labels show among two identities or more; here are {identities}."),
    )


def _findings(found: Audit, members: dict[str, list[int]], pictures: Pictures) -> Html:
    return joined(
        _mislabelled(found, pictures), _confusable(found, members, pictures), _duplicates(found.duplicates, pictures)
    )


def _mislabelled(found: Audit, pictures: Pictures) -> Html:
    rows = [
        (
            picture(pictures(row.id), row.label),
            row.id,
            row.label,
            picture(pictures(row.nearest), row.suggestion),
            row.suggestion,
            row.score,
            row.own,
            row.other,
        )
        for row in found.mislabelled[:FINDINGS]
    ]
    columns = [
        Column("Picture"),
        Column("Row", number=True),
        Column("Label"),
        Column("Nearest"),
        Column("Lies with"),
        Column("Score", number=True, digits=2),
        Column("Own cosine", number=True, digits=3),
        Column("Other cosine", number=True, digits=3),
    ]
    return section(
        "May be mislabelled",
        _count(len(rows), len(found.mislabelled), "rows lie with another identity, the surest first"),
        None
        if found.recall_at_1 is None
        else tag(
            "p",
            f"{found.recall_at_1:.1%} of rows have their nearest row in their own identity: the fewer, the less such a "
            "suspicion means.",
            class_="quiet",
        ),
        table(columns, rows) if rows else None,
        name="mislabelled",
    )


def _confusable(found: Audit, members: dict[str, list[int]], pictures: Pictures) -> Html:
    pairs = found.confused or found.confusable[:4]
    shown = pairs[:FINDINGS]
    if found.threshold is None:
        words = f"Without a threshold nobody is taken for anybody; the nearest {len(shown)} pairs:"
    elif found.confused:
        words = (
            f"{_of(len(shown), len(pairs))} pairs are taken for each other at the threshold {found.threshold:.3f} "
            "when one of the two is not enrolled."
        )
    else:
        words = f"No pair reaches the threshold {found.threshold:.3f}; the nearest {len(shown)}:"
    return section(
        "Identities that look alike",
        tag("p", words, class_="quiet"),
        tag("div", [_pair(pair, members, pictures) for pair in shown], class_="pairs"),
        name="confusable",
    )


def _pair(pair: Confusable, members: dict[str, list[int]], pictures: Pictures) -> Html:
    sides = []
    for label, nearest, taken, count in zip(pair.labels, pair.ids, pair.taken, pair.templates, strict=True):
        keys = [nearest, *(key for key in members[label] if key != nearest)][: SAMPLES - 1]
        sides.append(
            tag(
                "div",
                tag("h3", label),
                tag("span", f"{taken} of {count} taken for the other", class_="quiet"),
                strip([picture(pictures(key), label) for key in keys]),
            )
        )
    between = tag("div", tag("b", f"{pair.share:.0%}"), f"nearest cosine {pair.cosine:.3f}", class_="between")
    return tag("div", sides[0], between, sides[1], class_="pair")


def _duplicates(groups: Sequence[Duplicates], pictures: Pictures) -> Html:
    shown = groups[:FINDINGS]
    return section(
        "Suspected duplicates",
        _count(len(shown), len(groups), "groups of rows are as good as the same"),
        tag("div", [_group(group, pictures) for group in shown], class_="grid") if shown else None,
        name="duplicates",
    )


def _group(group: Duplicates, pictures: Pictures) -> Html:
    named = list(zip(group.ids, group.labels, strict=True))[:SAMPLES]
    return tag(
        "div",
        tag("h3", " / ".join(sorted(set(group.labels))[:3])),
        tag("span", f"{len(group.ids)} rows, cosine {group.cosine:.4f}", class_="quiet"),
        [" ", tag("span", "different labels", class_="badge warn")] if group.across else None,
        strip([picture(pictures(key), label, title=f"{key}: {label}") for key, label in named]),
        class_="item",
    )


def _identities(members: dict[str, list[int]], pictures: Pictures) -> Html:
    names = sorted(members)[:SHOWN]
    samples = {name: [pictures(key) for key in members[name][:SAMPLES]] for name in names}
    kept = any(content is not None for some in samples.values() for content in some)
    cards = [
        tag(
            "div",
            tag("h3", name),
            tag("span", _templates(len(members[name])), class_="quiet"),
            strip([picture(content, name) for content in samples[name]]),
            class_="item",
            data_name=name,
        )
        for name in names
    ]
    return section(
        "Identities",
        tag("p", f"{_of(len(names), len(members))}, in alphabetical order.", class_="quiet"),
        None
        if kept or not names
        else tag(
            "p",
            "No pictures are kept: make the gallery with thumbnails, or enroll from files that stay where they are.",
            class_="quiet",
        ),
        tag("div", cards, class_="grid", data_search="Search identities") if cards else None,
        name="identities",
    )


def _facts(info: dict[str, object]) -> Html:
    told = {"folder", "calibration", "calibrated", "identities", "templates", "dim"}  # elsewhere in the report
    rows: list[tuple[str, str]] = []
    for name, value in info.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [
            (f"{name} {key}".strip().replace("_", " "), _told(entry))
            for key, entry in entries
            if name not in told and entry not in (None, [], ())
        ]
    return section("Facts", table([Column("What"), Column("Value")], rows), name="facts")


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _count(shown: int, total: int, words: str) -> Html:
    return tag("p", f"{_of(shown, total)} {words}." if total else "None found.", class_="quiet")


def _of(shown: int, total: int) -> str:
    return f"{total:,}" if shown == total else f"The first {shown:,} of {total:,}"


def _templates(count: int) -> str:
    return "1 template" if count == 1 else f"{count:,} templates"
