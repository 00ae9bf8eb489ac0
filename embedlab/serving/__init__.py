"""Answers for people: pictures of decisions and of the embedding."""

from embedlab.serving.pictures import Decision as Decision
from embedlab.serving.pictures import draw_decisions as draw_decisions
from embedlab.serving.pictures import draw_map as draw_map
