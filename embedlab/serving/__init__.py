"""Answers for people: pictures of decisions and of the embedding, reports. Names load on first use."""

from typing import TYPE_CHECKING

from embedlab._lazy import lazy_names

if TYPE_CHECKING:
    from embedlab.serving.app import create_app as create_app
    from embedlab.serving.evaluation import evaluation_report as evaluation_report
    from embedlab.serving.pictures import Decision as Decision
    from embedlab.serving.pictures import draw_decisions as draw_decisions
    from embedlab.serving.pictures import draw_identifications as draw_identifications
    from embedlab.serving.pictures import draw_map as draw_map
    from embedlab.serving.report import audit_report as audit_report
    from embedlab.serving.report import gallery_report as gallery_report
    from embedlab.serving.server import serve as serve

__getattr__ = lazy_names(
    __name__,
    {
        ".app": ["create_app"],
        ".evaluation": ["evaluation_report"],
        ".pictures": ["Decision", "draw_decisions", "draw_identifications", "draw_map"],
        ".report": ["audit_report", "gallery_report"],
        ".server": ["serve"],
    },
)
