"""Losses without labels against loops in float64, against lightly, and over several processes."""

import ddp_worker_selfsupervised as worker
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from embedlab._ops import sum_over_ranks
from embedlab.losses import selfsupervised
from embedlab.losses.selfsupervised import (
    BarlowTwinsLoss,
    DINOLoss,
    KoLeoLoss,
    NegativeCosineLoss,
    SwAVLoss,
    VICRegLoss,
)

# --- the papers in loops: slow on purpose, no line shared with the library -------------------------------------------


def columns(z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per column its mean and its sum of squared deviations."""
    means = [sum(z[i, d] for i in range(len(z))) / len(z) for d in range(z.shape[1])]
    return means, [sum((z[i, d] - means[d]) ** 2 for i in range(len(z))) for d in range(z.shape[1])]


def naive_barlow(a: Tensor, b: Tensor, off_diagonal: float = 5e-3) -> Tensor:
    rows, dim = a.shape
    (mean_a, square_a), (mean_b, square_b) = columns(a), columns(b)
    total = torch.zeros((), dtype=a.dtype)
    for i in range(dim):
        for j in range(dim):
            scale = ((square_a[i] / rows + 1e-5) * (square_b[j] / rows + 1e-5)).sqrt()
            c = sum((a[n, i] - mean_a[i]) * (b[n, j] - mean_b[j]) for n in range(rows)) / rows / scale
            total = total + ((1 - c) ** 2 if i == j else off_diagonal * c**2)
    return total


def naive_vicreg(a: Tensor, b: Tensor, invariance: float = 25, variance: float = 25, covariance: float = 1) -> Tensor:
    rows, dim = a.shape
    total = invariance * sum((a[n, d] - b[n, d]) ** 2 for n in range(rows) for d in range(dim)) / (rows * dim)
    for z in (a, b):
        mean, square = columns(z)
        for i in range(dim):
            total = total + variance / 2 / dim * (1 - (square[i] / (rows - 1) + 1e-4).sqrt()).clamp(min=0)
            for j in range(dim):
                if i != j:
                    c = sum((z[n, i] - mean[i]) * (z[n, j] - mean[j]) for n in range(rows)) / (rows - 1)
                    total = total + covariance * c**2 / dim
    return total


def naive_negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    return -sum(p[i] @ z[i] / (p[i].norm() * z[i].norm()) for i in range(len(p))) / len(p)


def naive_cross_entropy(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean over rows, one number at a time."""
    total = torch.zeros((), dtype=scores.dtype)
    for i in range(len(scores)):
        log_total = sum((x / temperature).exp() for x in scores[i]).log()
        total = total - sum(target[i, k] * (scores[i, k] / temperature - log_total) for k in range(scores.shape[1]))
    return total / len(scores)


def naive_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    q = (scores / epsilon).exp().T.clone()  # (K, B), as the paper's matrix Q
    prototypes, rows = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for i in range(rows):
            q[:, i] = q[:, i] / q[:, i].sum() / rows
    return q.T * rows


def naive_swav(
    scores: list[Tensor],
    queue: list[Tensor] | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    total = torch.zeros((), dtype=scores[0].dtype)
    for i in range(2):
        together = scores[i] if queue is None else torch.cat([scores[i], queue[i]])
        code = naive_sinkhorn(together.detach(), epsilon, iterations)[: len(scores[i])]
        others = [v for v in range(len(scores)) if v != i]
        total = total + sum(naive_cross_entropy(code, scores[v], temperature) for v in others) / len(others) / 2
    return total


def naive_dino(
    teacher: list[Tensor],
    student: list[Tensor],
    center: Tensor,
    teacher_temperature: float = 0.04,
    student_temperature: float = 0.1,
) -> Tensor:
    terms = []
    for t, scores in enumerate(teacher):
        target = torch.stack([((row - center) / teacher_temperature).softmax(0) for row in scores.detach()])
        terms += [naive_cross_entropy(target, student[s], student_temperature) for s in range(len(student)) if s != t]
    return sum(terms) / len(terms)


def naive_koleo(z: Tensor) -> Tensor:
    unit = [row / row.norm() for row in z]
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        distances = [(unit[i] - unit[j] + 1e-8).norm() for j in range(len(z)) if j != i]
        total = total - (min(distances, key=lambda d: d.item()) + 1e-8).log()
    return total / len(z)


# --- every loss as a function of three views (B, K) -------------------------------------------------------------------


def teacher_of(views: list[Tensor]) -> list[Tensor]:
    """In float32 for half precision, so that an oracle in float64 sees the same teacher."""
    dtype = torch.promote_types(views[0].dtype, torch.float32)
    return [(0.3 * view.double().roll(1, dims=1) + 0.1).to(dtype) for view in views[:2]]


def queue_of(views: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    scores = 0.4 * torch.randn(2, 5, views[0].shape[1], generator=generator, dtype=torch.float64)
    return list(scores.to(torch.promote_types(views[0].dtype, torch.float32)))


CENTER = torch.tensor([[0.1, -0.2, 0.05, 0.0]], dtype=torch.float64)


def dino(**settings) -> DINOLoss:
    loss = DINOLoss(4, **settings).double()
    loss.center.copy_(CENTER)
    return loss.eval()  # the same value in every call


# a new loss is one row: constructor, its call, its oracle
CASES = {
    "BarlowTwinsLoss": (BarlowTwinsLoss, lambda loss, v: loss(v[0], v[1]), lambda v: naive_barlow(v[0], v[1])),
    "BarlowTwinsLoss 0.3": (
        lambda: BarlowTwinsLoss(off_diagonal=0.3),
        lambda loss, v: loss(v[0], v[1]),
        lambda v: naive_barlow(v[0], v[1], 0.3),
    ),
    "VICRegLoss": (VICRegLoss, lambda loss, v: loss(v[0], v[1]), lambda v: naive_vicreg(v[0], v[1])),
    "VICRegLoss 2 3 5": (
        lambda: VICRegLoss(invariance=2, variance=3, covariance=5),
        lambda loss, v: loss(v[0], v[1]),
        lambda v: naive_vicreg(v[0], v[1], 2, 3, 5),
    ),
    "NegativeCosineLoss": (
        NegativeCosineLoss,
        lambda loss, v: loss(v[0], v[1]),
        lambda v: naive_negative_cosine(v[0], v[1]),
    ),
    "SwAVLoss": (SwAVLoss, lambda loss, v: loss(v), naive_swav),
    "SwAVLoss two crops": (SwAVLoss, lambda loss, v: loss(v[:2]), lambda v: naive_swav(v[:2])),
    "SwAVLoss queue": (
        lambda: SwAVLoss(temperature=0.3, epsilon=0.2, iterations=2),
        lambda loss, v: loss(v, queue_of(v)),
        lambda v: naive_swav(v, queue_of(v), 0.3, 0.2, 2),
    ),
    "DINOLoss": (dino, lambda loss, v: loss(teacher_of(v), v), lambda v: naive_dino(teacher_of(v), v, CENTER[0])),
    "DINOLoss one teacher crop": (
        lambda: dino(student_temperature=0.4, teacher_temperature=0.2),
        lambda loss, v: loss(teacher_of(v)[:1], v[:2]),
        lambda v: naive_dino(teacher_of(v)[:1], v[:2], CENTER[0], 0.2, 0.4),
    ),
    "KoLeoLoss": (KoLeoLoss, lambda loss, v: loss(v[2]), lambda v: naive_koleo(v[2])),
}
cases = pytest.mark.parametrize(("make", "apply", "oracle"), CASES.values(), ids=CASES.keys())


def three_views(rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(3, rows, 4)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, rows, 4, generator=generator, dtype=torch.float64)
    return (images + 0.5 * torch.randn(3, rows, 4, generator=generator, dtype=torch.float64)).to(dtype)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found


def test_every_loss_stands_in_the_table() -> None:
    here = {n for n, kind in vars(selfsupervised).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert here == {name.split()[0] for name in CASES} == {name.split()[0] for name in worker.LOSSES}


@cases
@pytest.mark.parametrize("rows", [2, 7])
def test_value_and_gradient_equal_the_paper(make, apply, oracle, rows) -> None:
    x = three_views(rows).requires_grad_()
    got, want = apply(make(), list(x.unbind())), oracle(list(x.unbind()))
    assert got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(got, x), gradient(want, x), rtol=1e-7, atol=1e-8)


@cases
def test_gradcheck(make, apply, oracle) -> None:
    x, fixed, loss = three_views(5).requires_grad_(), list(three_views(5, seed=1).unbind()), make()

    def value(x: Tensor) -> Tensor:
        if isinstance(loss, DINOLoss):  # no gradient flows into the teacher
            return loss(teacher_of(fixed), list(x.unbind()))
        if isinstance(loss, SwAVLoss):  # nor into the crops through their codes
            return loss([*fixed[:2], *x.unbind()], queue_of(fixed))
        return apply(loss, list(x.unbind()))

    assert torch.autograd.gradcheck(value, x)


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(make, apply, oracle, dtype) -> None:
    x = three_views(6).to(dtype).requires_grad_()
    want = oracle([view.detach().double() for view in x.unbind()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = apply(make().float(), list(x.unbind()))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach().double(), want, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(gradient(value, x)).all()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "batch",
    [torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), 1e-30), torch.ones(1, 4), torch.rand(1, 4)],
    ids=["zero", "coincide", "tiny", "one row", "one random row"],
)
def test_degenerate_batches_stay_finite(make, apply, oracle, dtype, batch) -> None:
    x = batch.to(dtype).expand(3, *batch.shape).clone().requires_grad_()
    value = apply(make().to(dtype), list(x.unbind()))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, x)).all()


@cases
def test_no_rows_give_a_finite_loss_with_a_graph(make, apply, oracle) -> None:
    x = torch.zeros(3, 0, 4, requires_grad=True)
    loss = make().float().train()
    value = apply(loss, list(x.unbind()))
    assert torch.isfinite(value)
    assert gradient(value, x).shape == x.shape
    assert all(torch.isfinite(buffer).all() for buffer in loss.buffers())


def test_what_a_single_row_costs() -> None:
    row = torch.tensor([[0.3, -2.0, 1.0, 5.0]])
    assert BarlowTwinsLoss()(row, -row).item() == 4, "no variance, no correlation: D"
    assert VICRegLoss()(row, row).item() == pytest.approx(25 * (1 - 1e-2), rel=1e-6), "variance 0"
    assert KoLeoLoss()(row).item() == 0, "nobody is near"


def test_rows_that_coincide_still_move_apart_from_others() -> None:
    """Two of three rows are the same: the value is large, the gradient finite and not zero."""
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.5]], requires_grad=True)
    value = KoLeoLoss()(x)
    assert value > 10
    assert torch.isfinite(gradient(value, x)).all()
    assert gradient(KoLeoLoss()(x), x)[2].norm() > 0.01


# --- what is particular to one loss ----------------------------------------------------------------------------------


def test_negative_cosine_detaches_nothing() -> None:
    p, z = three_views(3)[:2].requires_grad_().unbind()
    z.retain_grad(), p.retain_grad()
    NegativeCosineLoss()(p, z).backward()
    assert z.grad.norm() > 0.01
    assert p.grad.norm() > 0.01


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("epsilon", [1e-4, 0.05])
def test_codes_are_finite_distributions_spread_over_prototypes(scale, epsilon) -> None:
    scores = list(scale * three_views(64, dtype=torch.float32)[:2])
    codes = SwAVLoss(epsilon=epsilon, iterations=500)._codes(scores, None)
    torch.testing.assert_close(codes.sum(dim=2), torch.ones(2, 64))
    assert not codes.requires_grad
    if scale / epsilon < 100:  # harder problems take even more rounds
        torch.testing.assert_close(codes.sum(dim=1), torch.full((2, 4), 16.0), rtol=0.02, atol=0)


def test_the_plain_way_would_have_failed_where_ours_does_not() -> None:
    """The control of the test above: exp(scores / epsilon) in float32 overflows."""
    scores = 1e3 * three_views(8, dtype=torch.float32)[0]
    assert not torch.isfinite(naive_sinkhorn(scores, 0.05, 3)).all()
    x = torch.stack([scores, scores]).requires_grad_()
    value = SwAVLoss()(list(x.unbind()))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, x)).all()


def test_queue_changes_the_codes_but_not_the_rows_that_count() -> None:
    views = list(three_views(3).unbind())
    assert SwAVLoss()(views, queue_of(views)) != SwAVLoss()(views)
    empty = [view[:0] for view in views[:2]]
    torch.testing.assert_close(SwAVLoss()(views, empty), SwAVLoss()(views))


def test_dino_uses_the_centre_before_it_moves_it() -> None:
    loss = DINOLoss(4, momentum=0.7).double()
    center, views = torch.zeros(4, dtype=torch.float64), list(three_views(5).unbind())
    for seed in range(3):
        teacher = [view + seed for view in teacher_of(views)]
        value = loss(teacher, views)
        torch.testing.assert_close(value, naive_dino(teacher, views, center), rtol=1e-9, atol=0)
        center = 0.7 * center + 0.3 * torch.cat(teacher).mean(dim=0)
        torch.testing.assert_close(loss.center, center[None])
    before = loss.center.clone()
    loss.eval()
    loss(teacher, views)
    assert torch.equal(loss.center, before)
    assert loss.steps == 3


def test_dino_gives_the_teacher_no_gradient() -> None:
    student, teacher = three_views(3).requires_grad_(), three_views(3, seed=1)[:2].requires_grad_()
    DINOLoss(4).double()(list(teacher.unbind()), list(student.unbind())).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0.01


@pytest.mark.parametrize(
    ("warmup_steps", "temperatures"),
    [(0, [0.5, 0.5]), (1, [0.1, 0.5, 0.5]), (2, [0.1, 0.5, 0.5]), (5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5])],
)
def test_dino_warms_the_teacher_up(warmup_steps, temperatures) -> None:
    loss = DINOLoss(4, teacher_temperature=0.5, warmup_temperature=0.1, warmup_steps=warmup_steps, momentum=1).double()
    views = list(three_views(4).unbind())
    for temperature in temperatures:
        want = naive_dino(teacher_of(views), views, torch.zeros(4), temperature)
        torch.testing.assert_close(loss.eval()(teacher_of(views), views), want, msg="validation does not count")
        torch.testing.assert_close(loss.train()(teacher_of(views), views), want)


def test_dino_resumed_equals_unbroken() -> None:
    def make() -> DINOLoss:
        return DINOLoss(4, teacher_temperature=0.5, warmup_temperature=0.1, warmup_steps=5)

    batches = [three_views(4, seed=seed, dtype=torch.float32) for seed in range(4)]
    unbroken = make()
    want = [unbroken(teacher_of(list(b.unbind())), list(b.unbind())) for b in batches]
    first = make()
    for b in batches[:2]:
        first(teacher_of(list(b.unbind())), list(b.unbind()))
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"center", "steps"}
    got = [resumed(teacher_of(list(b.unbind())), list(b.unbind())) for b in batches[2:]]
    assert got == want[2:]
    assert torch.equal(resumed.center, unbroken.center)
    assert resumed.steps == 4


@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_neighbours_do_not_depend_on_the_size_of_the_blocks(monkeypatch, elements) -> None:
    x = nn.functional.normalize(three_views(23)[0], dim=1)
    monkeypatch.setattr(selfsupervised, "_SEARCH_ELEMENTS", elements)
    similarity = (x @ x.T).fill_diagonal_(-2)
    assert torch.equal(selfsupervised._nearest(x), similarity.argmax(dim=1))


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_koleo_holds_no_square_of_the_batch() -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with Largest() as largest:
        KoLeoLoss()(x).backward()
    assert 2**21 < largest.elements <= 2**22 < 3000**2


def test_sum_over_ranks_of_one_process_is_the_identity() -> None:
    x = torch.ones(3, requires_grad=True)
    assert sum_over_ranks(x) is x


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightly():
    return pytest.importorskip("lightly.loss", reason="lightly is not installed: no comparison with it")


@pytest.mark.parametrize(
    "name", ["BarlowTwinsLoss", "VICRegLoss", "NegativeCosineLoss", "SwAVLoss", "SwAVLoss queue", "KoLeoLoss"]
)
def test_equals_lightly(lightly, name) -> None:
    peers = {
        "BarlowTwinsLoss": lambda v: lightly.BarlowTwinsLoss()(v[0], v[1]),
        "VICRegLoss": lambda v: lightly.VICRegLoss()(v[0], v[1]),
        "NegativeCosineLoss": lambda v: lightly.NegativeCosineSimilarity()(v[0], v[1]),
        "SwAVLoss": lambda v: lightly.SwaVLoss()(v[:2], v[2:])[0],
        "SwAVLoss queue": lambda v: lightly.SwaVLoss(0.3, 2, 0.2)(v[:2], v[2:], queue_of(v))[0],
        "KoLeoLoss": lambda v: lightly.KoLeoLoss()(v[2]),
    }
    make, apply, _ = CASES[name]
    x = three_views(9, seed=3).requires_grad_()
    got, want = apply(make(), list(x.unbind())), peers[name](list(x.unbind()))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(gradient(got, x), gradient(want, x), rtol=1e-6, atol=1e-8)


def test_dino_equals_lightly_over_several_calls(lightly) -> None:
    ours = DINOLoss(4, teacher_temperature=0.3, warmup_temperature=0.1, warmup_steps=3).double()
    peer = lightly.DINOLoss(4, warmup_teacher_temp=0.1, teacher_temp=0.3, warmup_teacher_temp_epochs=3).double()
    peer.teacher_temp_schedule = peer.teacher_temp_schedule.double()
    for call in range(5):
        x = three_views(6, seed=call).requires_grad_()
        views = list(x.unbind())
        got, want = ours(teacher_of(views), views), peer([t.detach() for t in teacher_of(views)], views, epoch=call)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # lightly's schedule has float32 digits
        torch.testing.assert_close(gradient(got, x), gradient(want, x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.center, peer.center[0])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [BarlowTwinsLoss(), VICRegLoss(), NegativeCosineLoss()], ids=lambda x: str(x)[:-2])
@pytest.mark.parametrize(("first", "second"), [((4, 3), (3, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((4, 3, 1),) * 2])
def test_views_that_do_not_fit_are_explained(loss, first, second) -> None:
    with pytest.raises(ValueError, match="takes two aligned batches") as error:
        loss(torch.zeros(first), torch.zeros(second))
    assert str(error.value).startswith(
        f"{type(loss).__name__} takes two aligned batches (B, D), got {first} and {second}"
    )
    assert "drop no rows between the views" in str(error.value)


B3, B4 = torch.zeros(4, 3), torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SwAVLoss()([B3]), r"SwAVLoss needs scores of at least 2 crop\(s\), got 1"),
        (lambda: SwAVLoss()([]), r"SwAVLoss needs scores of at least 2 crop\(s\), got 0"),
        (lambda: SwAVLoss()(B3), r"as a list .* got one tensor \(4, 3\); split .* scores.chunk"),
        (lambda: SwAVLoss()([B3, B4]), r"of one shape for all crops, got \[\(4, 3\), \(4, 4\)\]"),
        (lambda: SwAVLoss()([B3, B3[:2]]), "every crop holds the same images"),
        (lambda: SwAVLoss()([B3[0], B3[0]]), r"scores \(B, K\) of one shape for all crops, got \[\(3,\), \(3,\)\]"),
        (lambda: SwAVLoss()([B3, B3], [B3]), r"needs queue_scores of at least 2 crop\(s\), got 1"),
        (lambda: SwAVLoss()([B3, B3], [B3] * 3), "for the two full crops, got 3 of shape"),
        (lambda: SwAVLoss()([B3, B3], [B4, B4]), r"\(4, 4\) beside scores \(4, 3\); score both queues"),
        (lambda: DINOLoss(3)([B3], [B3]), "one teacher crop and one student crop, .* make no pair"),
        (lambda: DINOLoss(3)([], [B3]), r"needs teacher scores of at least 1 crop\(s\), got 0"),
        (lambda: DINOLoss(3)([B3], []), r"needs student scores of at least 1 crop\(s\), got 0"),
        (lambda: DINOLoss(3)(B3, [B3]), r"teacher scores as a list .* got one tensor"),
        (lambda: DINOLoss(4)([B3], [B3, B3]), r"DINOLoss\(4\) takes scores \(B, 4\), got \(4, 3\) from the teacher"),
        (lambda: DINOLoss(3)([B3[:2]], [B3, B3]), r"got \(2, 3\) from the teacher and \(4, 3\) from the student"),
        (lambda: DINOLoss(3)([B3, B4], [B3, B3]), r"teacher scores \(B, K\) of one shape for all crops"),
        (lambda: KoLeoLoss()(torch.zeros(3)), r"takes embeddings \(B, D\), got \(3,\); .* once per crop"),
        (lambda: BarlowTwinsLoss(off_diagonal=-1), "BarlowTwinsLoss needs off_diagonal >= 0 .* got -1"),
        (lambda: VICRegLoss(invariance=-1), "needs invariance >= 0"),
        (lambda: VICRegLoss(variance=-1), "needs variance >= 0"),
        (lambda: VICRegLoss(covariance=float("nan")), "needs covariance >= 0 .* got nan"),
        (lambda: SwAVLoss(temperature=0), "SwAVLoss needs temperature > 0, got 0"),
        (lambda: SwAVLoss(epsilon=-1), "SwAVLoss needs epsilon > 0, got -1"),
        (lambda: SwAVLoss(iterations=0), "SwAVLoss needs iterations >= 1"),
        (lambda: DINOLoss(0), "needs dim >= 1, the number of outputs of the head, got 0"),
        (lambda: DINOLoss(3, student_temperature=0), "needs student_temperature > 0"),
        (lambda: DINOLoss(3, teacher_temperature=0), "needs teacher_temperature > 0, got 0"),
        (lambda: DINOLoss(3, warmup_temperature=0), "needs warmup_temperature > 0"),
        (lambda: DINOLoss(3, warmup_steps=-1), "needs warmup_steps >= 0"),
        (lambda: DINOLoss(3, momentum=1.5), r"momentum in \[0, 1\] \(1 keeps the centre\), got 1.5"),
    ],
)
def test_mistakes_are_explained(call, text) -> None:
    with pytest.raises(ValueError, match=text):
        call()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    results = {}
    for world in (2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        arguments = (world, str(folder / "store"), str(folder / "results"))
        torch.multiprocessing.spawn(worker.run, arguments, nprocs=world)
        results |= torch.load(folder / "results")
    return results


@pytest.mark.ddp
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", worker.LOSSES)
@pytest.mark.parametrize("shards", worker.SHARDS)
def test_several_processes_equal_one_on_the_union(found, shards, name, dtype, tolerance) -> None:
    values, gradients, states = found[shards, name, str(dtype), True]
    value, union, state = worker.on_one_process(name, worker.data(sum(worker.SHARDS[shards]), dtype))
    assert union.norm() > 1e-3, "the test would pass on a zero gradient"
    assert (gradients - union).norm() / union.norm() < tolerance
    assert values == pytest.approx([value] * len(values), rel=tolerance)
    for rank_state in states:  # DINO's centre and step; empty otherwise
        assert torch.equal(rank_state, states[0])
        torch.testing.assert_close(rank_state, state, rtol=1e-6, atol=1e-7)
    if name == "DINOLoss":
        assert state[1:-1].abs().min() > 0.01, "the centre has moved"


@pytest.mark.ddp
@pytest.mark.parametrize("name", worker.LOSSES)
def test_without_gathering_every_rank_is_alone(found, name) -> None:
    """The control: it also shows that the comparison above can tell the difference."""
    values, gradients, _ = found[worker.ALONE, name, "torch.float64", False]
    images = worker.data(sum(worker.SHARDS[worker.ALONE]), torch.float64)
    alone = [worker.on_one_process(name, part) for part in images.split(worker.SHARDS[worker.ALONE])]
    assert values == pytest.approx([value for value, _, _ in alone], rel=1e-9)
    mean = torch.stack([part for _, part, _ in alone]).mean(dim=0)
    torch.testing.assert_close(gradients, mean, rtol=1e-9, atol=1e-12)
    gathered = found[worker.ALONE, name, "torch.float64", True][1]
    assert (gradients - gathered).norm() / gathered.norm() > 0.01
