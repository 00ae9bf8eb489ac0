"""The promise about strangers through whole galleries of vectors with known truth."""

import numpy as np
import pytest

from embedlab.retrieval import Gallery
from embedlab.retrieval.calibration import strangers_needed

DIM = 32
TARGETS = (0.02, 0.05, 0.1, 0.2)


class World:
    """Identities in random directions; images of one correlate in their scores by `correlation`."""

    def __init__(self, random, correlation):
        self.random, self.correlation = random, correlation

    def images(self, sizes):
        """Vectors of so many images of each of so many new identities."""
        centres = self.random.standard_normal((len(sizes), DIM), dtype=np.float32).repeat(sizes, axis=0)
        noise = self.random.standard_normal(centres.shape, dtype=np.float32)
        return np.sqrt(self.correlation) * centres + np.sqrt(1 - self.correlation) * noise

    def labelled(self, sizes, kind):
        return self.images(sizes), [f"{kind} {i}" for i in np.arange(len(sizes)).repeat(sizes)]


def sizes_of(random, identities, most):
    """Uneven numbers of images."""
    return np.minimum(random.geometric(random.uniform(0.15, 1), identities), most)


def true_fpir(gallery, world, count):
    """Share of new strangers, seen once each, that is taken for somebody."""
    answers = gallery.identify(embeddings=world.images(np.ones(count, dtype=int)), k=1)
    return np.mean([answer.label is not None for answer in answers])


def share_of_broken_promises(folder, runs, *, most, trials, growth=(1.0,), seed=0):
    """Over galleries of 10 (or 16, to grow) to `most` identities; promised threshold and naive percentile."""
    random = np.random.default_rng(seed)
    broken = np.zeros(2)
    for run in range(runs):
        world, fpir = World(random, random.uniform(0, 0.7)), float(random.choice(TARGETS))
        times = float(random.choice(growth))
        identities = round(np.exp(random.uniform(np.log(16 if times > 1 else 10), np.log(most))))
        fusion = str(random.choice(["max", "mean", "vote"][: 2 if times > 1 else 3]))
        with Gallery.create(folder / f"{run}", dim=DIM, fusion=fusion) as gallery:
            templates = sizes_of(random, int(times * identities), 5)
            vectors, labels = world.labelled(templates[:identities], "person")
            gallery.enroll(embeddings=vectors, labels=labels)
            strangers = int(np.ceil(strangers_needed(fpir) * random.uniform(1, 4)))
            probes, names = world.labelled(sizes_of(random, strangers, 20), "stranger")
            gallery.calibrate(embeddings=probes, labels=names, fpir=fpir, growth=times)
            percentile = np.quantile([answer.score for answer in gallery.identify(embeddings=probes, k=1)], 1 - fpir)
            if times > 1:
                vectors, labels = world.labelled(templates[identities:], "new")
                gallery.enroll(embeddings=vectors, labels=labels)
                assert not gallery.info()["stale"]
            broken[0] += true_fpir(gallery, world, trials) > fpir
            answers = gallery.identify(embeddings=world.images(np.ones(trials, dtype=int)), k=1)
            broken[1] += np.mean([answer.score >= percentile for answer in answers]) > fpir
    print(f"of {runs} galleries the promise was broken in {broken[0]:.0f}, by the naive percentile in {broken[1]:.0f}")
    return broken / runs


def test_the_promise_holds_in_simulated_galleries(tmp_path):
    promised, naive = share_of_broken_promises(tmp_path, 24, most=200, trials=2_000)
    assert promised <= 3 / 24  # 95 % of such tests pass with a true share of 6 %
    assert naive > 0.3


def test_a_promise_for_a_growing_gallery_holds_in_the_grown_one(tmp_path):
    promised, naive = share_of_broken_promises(tmp_path, 16, most=100, trials=2_000, growth=(1.5, 2, 3))
    assert promised <= 2 / 16
    assert naive > 0.5


@pytest.mark.full
def test_1000_whole_galleries(tmp_path):
    promised, naive = share_of_broken_promises(tmp_path, 1000, most=10_000, trials=10_000)
    assert promised <= 0.06
    assert naive > 0.3


@pytest.mark.full
def test_300_galleries_that_grow(tmp_path):
    promised, naive = share_of_broken_promises(tmp_path, 300, most=1_000, trials=10_000, growth=(1.5, 2, 3))
    assert promised <= 0.06
    assert naive > 0.5
