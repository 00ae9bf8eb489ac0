"""Any sequence of changes, reopenings and copies leaves what a dictionary says, in the gallery and for its readers.

The full tier: `pytest -m full -s tests/test_gallery_machine.py`.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from harness_gallery import NAMES, Model, create, means, perform, unit, view
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from embedlab import Gallery
from embedlab.retrieval.store import Store

MODEST = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
SEEDS = st.integers(0, 2**32 - 1)


class Changes(RuleBasedStateMachine):
    """A gallery, a reader that follows it, and the model."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.gallery, self.model = create(self.folder / "g"), Model()
        self.reader = Gallery.open(self.folder / "g", means, read_only=True)
        self.again = None

    def teardown(self):
        self.reader.close()
        self.gallery.close()
        shutil.rmtree(self.folder)

    def do(self, step):
        perform(self.gallery, step)
        self.model = self.model.apply(step)

    @rule(seed=SEEDS, labels=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), pictures=st.booleans())
    def enroll(self, seed, labels, pictures):
        key = f"key {seed}" if seed % 2 else None
        if key not in self.model.keys:
            self.again = {"do": "enroll", "seed": seed, "labels": labels, "key": key}
            self.again |= {"images": True} if pictures else {}
            self.do(self.again)

    @precondition(lambda self: self.again and self.again["key"])
    @rule()
    def repeat_a_request(self):
        first = self.model.keys[self.again["key"]]
        perform(self.gallery, self.again)
        assert self.gallery._store.recall(self.again["key"])[0] == first

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), purge=st.booleans())
    def remove(self, data, purge):
        labels = data.draw(st.lists(st.sampled_from(self.model.labels()), min_size=1, unique=True))
        self.do({"do": "remove", "labels": labels, "purge": purge})

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data())
    def remove_templates(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model.rows)), min_size=1, unique=True))
        assert self.gallery.remove(ids=ids) == len(ids)
        self.model.rows = {i: row for i, row in self.model.rows.items() if i not in ids}

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), new=st.sampled_from(NAMES))
    def rename_or_merge(self, data, new):
        old = data.draw(st.sampled_from(self.model.labels()))
        if old != new:
            self.do({"do": "relabel", "old": old, "new": new})

    @rule(fusion=st.sampled_from(["max", "mean", "vote"]))
    def configure(self, fusion):
        self.do({"do": "configure", "fusion": fusion})

    @rule()
    def compact(self):
        self.do({"do": "compact"})

    @rule()
    def reopen(self):
        self.gallery.close()
        self.gallery = Gallery.open(self.folder / "g", means)

    @rule()
    def refuse(self):
        with pytest.raises(ValueError, match="not in the gallery"):
            self.gallery.remove([*self.model.labels(), "nobody"])

    @rule()
    def backup(self):
        with Gallery.open(self.gallery.backup(self.folder / "copy"), means) as copy:
            self.compare(copy)
        shutil.rmtree(self.folder / "copy")

    @invariant()
    def both_hold_what_the_model_says(self):
        self.compare(self.gallery)
        self.compare(self.reader)

    def compare(self, gallery):
        assert view(gallery, self.model.keys) == self.model.view()
        kept = [row[0] for row in gallery._store._side_rows("thumbnail")]
        assert kept == sorted(i for i, (_, _, pictured) in self.model.rows.items() if pictured)
        if not self.model.rows:
            return
        probe = np.frombuffer(self.model.rows[min(self.model.rows)][1], np.float32)
        table = unit(np.stack([np.frombuffer(v, np.float32) for _, v, _ in self.model.rows.values()]).astype(float))
        near = gallery.search(embeddings=probe[None], k=1)
        assert near.scores[0, 0] == pytest.approx((table @ probe).max(), abs=1e-6)
        assert near.labels[0][0] == self.model.rows[int(near.ids[0, 0])][0]


def run(examples):
    # without shrinking: the seconds go into more sequences, and a failure prints its own
    chosen = settings(MODEST, max_examples=examples, derandomize=True, phases=[Phase.generate])
    run_state_machine_as_test(Changes, settings=chosen)


@pytest.mark.parametrize(
    "examples", [pytest.param(15, id="short"), pytest.param(1000, marks=pytest.mark.full, id="full")]
)
def test_any_sequence_of_changes_equals_a_dictionary(examples):
    run(examples)
    print(f"\n{examples} sequences of up to 25 changes: 0 differences to a dictionary, in writer, reader and copies")


def test_a_store_that_forgets_to_delete_a_thumbnail_is_found(monkeypatch):
    delete = Store._delete_side
    monkeypatch.setattr(
        Store, "_delete_side", lambda self, meta, table, keys: delete(self, meta, table, list(keys)[1:])
    )
    with pytest.raises(AssertionError):
        run(100)
