"""Bodies that are drawn from a grammar, traced and in the nine-line loop; many are compiled together."""

import functools
import types

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import gdfunc as gd

from .references import loop, normal
from .tables import TABLE, make

REVERSE = gd.adjoints.Reverse()

# A grammar of expressions: an operation makes a tensor of two others, a whole number k, and what there is
# besides: f.count and f.flag of the carry. Results stay bounded, so that all steps stay comparable.

MOST = 400  # elements of a tensor


def like(b, shape):
    """As many of b's elements as the shape has; all of b is in its sum."""
    size = torch.Size(shape).numel()
    flat = torch.cat([b.flatten(), torch.tanh(b.sum())[None]])
    return flat.repeat(-(-size // len(flat)))[:size].reshape(shape)


def matrix(a):
    return a.reshape(a.shape[0] if a.ndim > 1 else 1, -1)


def along(a, k):
    """A tensor that has axes, and one of them."""
    a = a if a.ndim else a[None]
    return a, k % a.ndim


def reduced(function):
    return lambda a, b, k, f: function(*along(a, k), bool(k & 4))


def axis(function):
    return lambda a, b, k, f: function(*along(a, k))


def pair(function):
    return lambda a, b, k, f: function(a, like(b, a.shape))


def one(function):
    return lambda a, b, k, f: function(a)


def in_place(a, b, k, f):
    fresh = a * 0.5 + like(b, a.shape)
    fresh.mul_(0.5).add_(a).sin_()
    return fresh


def in_place_in_part(a, b, k, f):
    other = like(b, a.shape)
    fresh = torch.stack([torch.sin(a), other * 0.0])
    fresh[1:] = other
    fresh[0] += 0.1
    return fresh


def gathered(a, dim):
    index = (a.detach() * 7).long() % a.shape[dim]
    return a.gather(dim, index)


def placed(a, b, k, f):
    a, dim = along(a, k)
    index = (like(b, a.shape).detach() * 5).long() % a.shape[dim]
    return torch.tanh(torch.zeros_like(a).scatter_add(dim, index, a))


def accumulated(a, b, k, f):
    a = a if a.ndim else a[None]
    index = torch.stack([f.count, f.count + k]) % len(a)
    return torch.tanh(a.index_put((index,), like(b, (2, *a.shape[1:])), accumulate=True))


def product(a, b, k, f):
    a = matrix(a)
    return torch.tanh(a @ like(b, (a.shape[1], (1, 4, 9, 16)[k % 4])))


def batched(a, b, k, f):
    a = like(a, (2 + k % 3, 3, 5))
    return torch.tanh(torch.einsum("bik,bjk->bij" if k & 4 else "bik,bjk->ij", a, like(b, a.shape)))


def convolved(a, b, k, f):
    x = matrix(a)[None]
    width = min(3, x.shape[-1])
    return torch.tanh(F.conv1d(x, like(b, (2, x.shape[1], width)), stride=1 + k % 2, padding=k % 3))


def convolved_2d(a, b, k, f):
    x = like(a, (2, 2, 5, 4 + k % 3))
    y = F.conv2d(x, like(b, (4, 2 - k % 2, 3, 2)), padding=k % 2, groups=1 + k % 2)
    return torch.tanh(F.conv_transpose2d(y, like(b, (4, 1, 2, 2)), stride=2) if k & 4 else y)


def pooled(a, b, k, f):
    x = like(a, (2, 5, 6))
    pool = (F.max_pool1d, F.avg_pool1d)[k % 2] if k & 2 else (F.max_pool2d, F.avg_pool2d)[k % 2]
    return pool(x, 2 + k % 3, 1 + k % 3, padding=1)


def whole(a, b, k, f):
    n, m = (a.detach() * 9).long(), (like(b, a.shape).detach() * 9).long()
    made = [n % 5, n // 3, (n & m) | 3, (n ^ m) << 1, n >> 1, n * m - n, torch.minimum(n, m), n.sum() + m]
    return torch.sin(made[k % len(made)].to(a.dtype)) * a


def masked(a, b, k, f):
    b = like(b, a.shape)
    masks = [a > b, ~(a > 0) & (b > 0), (a > 0).any() | (b < 0), (a > b).all() ^ f.flag, a.isfinite()]
    return torch.where(masks[k % len(masks)], a, 0.5 * b) * ((a > 0).sum() % 3)


def attended(a, b, k, f):
    q, keys = like(a, (3, 4)), like(b, (5, 4))
    return (q @ keys.T / 2).softmax(-1) @ keys


def looped(a, b, k, f):
    other = like(b, a.shape)
    xs = torch.linspace(0.5, 1, 1 + k % 3, dtype=a.dtype)
    return gd.scan(lambda c, x: (torch.sin(c + other) * x, c), a, xs)[k & 1]


def named(module, names):
    return {name: getattr(module, name) for name in names.split()}


ELEMENTARY = "sin cos tanh sigmoid relu abs erf atan neg square asinh expm1 sinc sign floor erfc"
ACTIVATIONS = "gelu silu softplus elu leaky_relu hardtanh logsigmoid mish selu celu relu6"
OPERATIONS = {
    **{name: one(function) for name, function in named(torch, ELEMENTARY).items()},
    **{name: one(function) for name, function in named(F, ACTIVATIONS).items()},
    **{name: one(lambda a, f=f: f(a * a + 0.5)) for name, f in named(torch, "log sqrt rsqrt").items()},
    **{name: pair(f) for name, f in named(torch, "mul maximum minimum copysign logaddexp").items()},
    **{name: reduced(function) for name, function in named(torch, "mean amax logsumexp").items()},
    "exp": one(lambda a: torch.exp(-a * a)),
    "log1p": one(lambda a: torch.log1p(a * a)),
    "pow": one(lambda a: (a * a + 0.5) ** 1.7),
    "cube": one(lambda a: torch.tanh(a**3)),
    "reciprocal": one(lambda a: 1 / (2 + a.sin())),
    "erfinv": one(lambda a: torch.erfinv(0.9 * torch.tanh(a))),
    "clamp": one(lambda a: a.clamp(-0.4, 0.6)),
    "gelu by tanh": one(lambda a: F.gelu(a, approximate="tanh")),
    "add": pair(lambda a, b: a - 0.5 * b),
    "alpha": pair(lambda a, b: torch.add(a, b, alpha=0.3)),
    "div": pair(lambda a, b: a / (1 + b * b)),
    "atan2": pair(lambda a, b: torch.atan2(a, 1 + b * b)),
    "hypot": pair(lambda a, b: torch.hypot(a + 2, b)),
    "lerp": pair(lambda a, b: torch.lerp(a, b, 0.3)),
    "smooth l1": pair(lambda a, b: F.smooth_l1_loss(a, b, reduction="none")),
    "xlogy": pair(lambda a, b: torch.xlogy(a, b * b + 0.5)),
    "outer": lambda a, b, k, f: torch.outer(a.flatten()[:9], b.flatten()[:9]),
    "broadcast": lambda a, b, k, f: a[..., None] * like(b, (3,)),
    "transpose": lambda a, b, k, f: (a if a.ndim > 1 else matrix(a)).mT,
    "flip": axis(lambda a, d: a.flip(d)),
    "flatten": one(lambda a: a.flatten()),
    "reshape": lambda a, b, k, f: a.reshape(a.shape[::-1]),
    "unsqueeze": axis(lambda a, d: a.unsqueeze(d)),
    "select": axis(lambda a, d: a.select(d, -1)),
    "slice": axis(lambda a, d: a.narrow(d, a.shape[d] // 3, a.shape[d] - a.shape[d] // 3)),
    "stride": lambda a, b, k, f: a.flatten()[:: 2 + k % 2],
    "expand": lambda a, b, k, f: a.expand(2 + k % 2, *a.shape),
    "diagonal": lambda a, b, k, f: matrix(a).diagonal(k % 2 if a.ndim > 1 and a.shape[-1] > 1 else 0),
    "unfold": axis(lambda a, d: a.unfold(d, (a.shape[d] + 1) // 2, 1)),
    "roll": axis(lambda a, d: a.roll(1, d)),
    "pad": lambda a, b, k, f: F.pad(a.flatten(), (k % 3, 1), value=0.2),
    "repeat": lambda a, b, k, f: a.flatten()[:50].repeat(1 + k % 3),
    "cat": lambda a, b, k, f: torch.cat([a.flatten(), b.flatten()[:20], a.flatten()[:3]]),
    "stack": lambda a, b, k, f: torch.stack([a, like(b, a.shape)], k % 2 if a.ndim else 0),
    "tril": lambda a, b, k, f: matrix(a).tril(k % 2),
    "unbind": axis(lambda a, d: a.unbind(d)[0] * 1.1),
    "chunk": axis(lambda a, d: a.chunk(2, d)[-1]),
    "sum": reduced(lambda a, d, keep: torch.tanh(a.sum(d, keep))),
    "sum of all": one(lambda a: torch.tanh(a.sum())),
    "var": reduced(lambda a, d, keep: torch.tanh(a.var(d, correction=0, keepdim=keep))),
    "norm": reduced(lambda a, d, keep: torch.sqrt((a * a).sum(d, keep) + 0.1)),
    "prod": reduced(lambda a, d, keep: torch.tanh(a).prod(d, keep)),
    "max": axis(lambda a, d: a.max(d).values),
    "argmax": axis(lambda a, d: a.argmax(d, keepdim=True) * a),
    "sums of sums": lambda a, b, k, f: (
        (a[..., None] * like(b, (3,))).sum(-1).sum(0 if a.ndim else ()).tanh()
    ),
    "softmax": axis(lambda a, d: a.softmax(d)),
    "log_softmax": axis(lambda a, d: 0.2 * a.log_softmax(d)),
    "cumsum": axis(lambda a, d: torch.tanh(a.cumsum(d))),
    "layer_norm": one(lambda a: torch.tanh(F.layer_norm(matrix(a), [matrix(a).shape[1]], eps=0.1))),
    "group_norm": lambda a, b, k, f: F.group_norm(like(a, (2, 4, 3)), 2, like(b, (4,)), eps=0.1).tanh(),
    "cross entropy": one(
        lambda a: F.cross_entropy(matrix(a), torch.arange(len(matrix(a))) % matrix(a).shape[1])
    ),
    "bce": pair(lambda a, b: F.binary_cross_entropy_with_logits(a, torch.sigmoid(b))),
    "sort": axis(lambda a, d: a.sort(dim=d, stable=True).values),
    "gather": axis(gathered),
    "placed": placed,
    "accumulated": accumulated,
    "index_select": lambda a, b, k, f: matrix(a).index_select(1, (f.count + k)[None] % matrix(a).shape[1]),
    "row": lambda a, b, k, f: matrix(a)[(f.count + k) % len(matrix(a))],
    "one_hot": lambda a, b, k, f: F.one_hot((f.count + k) % 4, 4) * a.sum().tanh(),
    "embedding": lambda a, b, k, f: F.embedding(
        torch.stack([f.count, f.count + k]) % len(matrix(a)), matrix(a)
    ),
    "matmul": product,
    "gram": one(lambda a: torch.tanh(matrix(a).T[:12] @ matrix(a)[:, :12])),
    "bmm": batched,
    "conv1d": convolved,
    "conv2d": convolved_2d,
    "pool": pooled,
    "whole": whole,
    "masked": masked,
    "attention": attended,
    "loop": looped,
    "in place": in_place,
    "in place in part": in_place_in_part,
    "flagged": lambda a, b, k, f: torch.where(f.flag, a, like(b, a.shape)),
    "detach": pair(lambda a, b: a.detach() * b),
    "inner grad": pair(lambda a, b: grad(lambda z: (z * b).sin().sum())(a)),
    "inner jvp": pair(lambda a, b: jvp(lambda z: torch.tanh(z) * b, (a.clone(),), (b,))[1]),
    "inner vmap": lambda a, b, k, f: vmap(lambda row: (row.sin() * b.sum()).cumsum(0).tanh())(matrix(a)),
    "per sample": lambda a, b, k, f: vmap(grad(lambda w, x: torch.tanh(w @ x).sum()), (None, 0))(
        like(b, (3, matrix(a).shape[1])), matrix(a)
    ).mean(0),
}
lines = st.tuples(
    st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 7)
)
SHAPES = [((5,), (3, 4)), ((1,), (2, 1)), ((17,), (16,)), ((), (6,))]  # of the carry's two tensors


class Program:
    """A function of a carry (a, b, count, flag), a closure and x, which is what its lines say."""

    def __init__(self, code, outputs, finish=lambda made: made):
        self.code, self.outputs, self.finish = code, outputs, finish

    def __repr__(self):
        return f"Program({self.code}, {self.outputs})"

    def __call__(self, closure, carry, x):
        a, b, count, flag = carry
        here = types.SimpleNamespace(count=count, flag=flag)
        made = [self.finish(leaf) for leaf in (a, b, closure, x)]
        for name, i, j, k in self.code:
            new = OPERATIONS[name](made[-1 - i % len(made)], made[-1 - j % len(made)], k, here)
            new = self.finish(new)
            made.append(new if new.numel() <= MOST else new.flatten()[:MOST])
        new = torch.tanh(like(made[-1], a.shape)), torch.sin(like(made[-2], b.shape) + x.sum())
        return (*new, count + 1, ~flag), [made[i % len(made)] for i in self.outputs]


programs = st.builds(
    Program, st.lists(lines, min_size=1, max_size=7), st.lists(st.integers(0, 9), max_size=2)
)


def arguments(seed, shapes, length, dtype):
    first, second = shapes
    shapes = (first, second, (4, 3), (length, 3))
    return tuple(normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def results(programs, scan, reverse, args):
    """What one scan of all programs gives, each with arguments of its own: leaves of each."""

    def f(carry, x):
        new = [p(a[2], c, r) for p, a, c, r in zip(programs, args, carry, x.unbind(), strict=True)]
        return [carry for carry, _ in new], [y for _, y in new]

    init = [(a[0], a[1], torch.tensor(0), torch.tensor(True)) for a in args]
    carry, ys = scan(f, init, torch.stack([a[3] for a in args], 1), reverse=reverse)
    return [[*c, *y] for c, y in zip(carry, ys, strict=True)]


def numbers(run):
    """What is differentiable of the results."""
    return lambda args: [[leaf for leaf in each if leaf.is_floating_point()] for each in run(args)]


def loss(run):
    """Some weighted sum of all that depends on the arguments."""

    def total(args):
        leaves = [leaf for each in numbers(run)(args) for leaf in each]
        weights = [torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)) for leaf in leaves]
        return sum((w * leaf.flatten()).sum() for w, leaf in zip(weights, leaves, strict=True))

    return total


def waves(args):
    return gd._tree.map(torch.cos, args)


def members(args):
    """Two members, of which some arguments are shared."""
    return [(torch.stack([a, a * 0.5]), b, torch.stack([c, -c], 1), x) for a, b, c, x in args]


def over_members(run):
    return lambda args: vmap(run, ([(0, None, 1, None)] * len(args),))(members(args))


SINGLE = {
    "grad": lambda run: grad(loss(run)),
    "jvp": lambda run: lambda args: jvp(numbers(run), (args,), (waves(args),))[1],
    "vmap": over_members,
}
PAIRS = {
    f"{outer} of {inner}": lambda run, f=f, g=g: f(g(run))
    for outer, f in SINGLE.items()
    for inner, g in SINGLE.items()
}
TRANSFORMATIONS = {"value": lambda run: run, **SINGLE, **PAIRS}


def verdicts(programs, transformation, reverse, shapes, length, seed, dtype=torch.float64, adjoint=REVERSE):
    """Return for each program "" if both backends give the results of the loop, else the difference."""
    args = [arguments(seed + 10 * n, shapes, length, dtype) for n in range(len(programs))]
    transform = TRANSFORMATIONS[transformation]

    def run(programs, scan):
        return transform(functools.partial(results, programs, scan, reverse))(args)

    expected, found = run(programs, loop), [""] * len(programs)
    for options in ({"backend": "native", "adjoint": adjoint}, {"adjoint": traced(adjoint)}):
        got = run(programs, functools.partial(gd.scan, **options))
        found = [a or b for a, b in zip(found, differences(got, expected, dtype), strict=True)]
    for sign in (-1, 1) if any(found) else ():
        # Neither result is wrong where last digits decide, as for an argmax of nearly equal numbers.
        nudged = [Program(p.code, p.outputs, functools.partial(nudge, sign)) for p in programs]
        unsettled = differences(run(nudged, loop), expected, dtype)
        found = ["" if by_rounding else what for what, by_rounding in zip(found, unsettled, strict=True)]
    return found


def traced(adjoint):
    """Make an eager loop run from a trace: checkpoints ask for one."""
    return gd.adjoints.Checkpoint(5) if adjoint == REVERSE else adjoint


def nudge(sign, leaf):
    """Change the last digits."""
    if not leaf.is_floating_point():
        return leaf
    wave = torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)).reshape(leaf.shape)
    return leaf * (1 + sign * 4 * torch.finfo(leaf.dtype).eps * wave)


def differences(got, expected, dtype):
    return [difference(*pair, dtype) for pair in zip(got, expected, strict=True)]


def difference(got, expected, dtype):
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    for left, right in zip(got, expected, strict=True):
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return f"{left.shape} {left.dtype} for {right.shape} {right.dtype}"
        if right.numel():
            off = (left.double() - right.double()).abs()
            if not (off <= tolerance * (1 + right.double().abs().max())).all():
                return f"{off.max():.1e} beside {right.double().abs().max():.1e}"
    return ""


# A grammar of training: a network, a loss, what is made of the gradients, and a transformation.


def image(width):
    """Make a convolution of the entries as an image of two channels, pooled."""
    side = max(width // 4, 1)
    stride, across = 2 - side % 2, (side - 1) // (2 - side % 2) + 1
    pad = Function(lambda x: F.pad(x, (0, 4 * side - width)).unflatten(1, (2, 2, side)))
    conv = nn.Conv2d(2, 3, 3, (1, stride), 1, bias=False)
    return nn.Sequential(
        pad, conv, nn.MaxPool2d((2, 1)) if side % 2 else nn.AvgPool2d((2, 1)), nn.Flatten()
    ), 3 * across


class Function(nn.Module):
    """A function as a layer, of the input and of weights that are drawn."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function, self.weights = function, nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x):
        return self.function(x, *self.weights)


def row(*layers):
    """Layers of one channel."""
    return nn.Sequential(nn.Unflatten(1, (1, -1)), *layers, nn.Flatten())


def attention(x, q, k):
    queries, keys = x[:, :, None] * q, x[:, :, None] * k
    return ((queries @ keys.mT).softmax(-1) @ keys).sum(-1)


def embedded(x, table):
    return F.embedding((x.detach() * 3).long() % 5, table).flatten(1)


def normalised(x):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 0.1).sqrt()


def plain(function):
    return lambda n: (Function(function), n)


LAYERS = {  # of a width: a module, and the width that it makes
    **{f"linear {out}": lambda n, out=out: (nn.Linear(n, out), out) for out in (1, 3, 8, 16, 17)},
    **{name: plain(function) for name, function in named(F, ACTIVATIONS).items()},
    **{name: plain(function) for name, function in named(torch, "tanh sigmoid relu").items()},
    "filters": lambda n: (row(nn.Conv1d(1, 2, min(3, n), padding=1)), 2 * (n - min(3, n) + 3)),
    "filter": lambda n: (row(nn.Conv1d(1, 1, min(2, n), padding=1)), n - min(2, n) + 3),
    "image": image,
    "layer norm": lambda n: (nn.LayerNorm(n, eps=0.1), n),
    "embedding": lambda n: (Function(embedded, (5, 3)), 3 * n),
    "attention": lambda n: (Function(attention, (2,), (2,)), n),
    "residual": lambda n: (Function(lambda x, w: x + torch.tanh(x @ w / n**0.5), (n, n)), n),
    "max pool": lambda n: (row(nn.MaxPool1d(2, 1, padding=1)), n + 1),
    "group norm": lambda n: (
        Function(lambda x: F.group_norm(F.pad(x, (0, 1), value=0.5), 1, eps=0.1)),
        n + 1,
    ),
    "normalised": plain(normalised),
}
LOSSES = {
    "mse": lambda out, y: F.mse_loss(out, y),
    "l1": lambda out, y: F.l1_loss(out, y),
    "huber": lambda out, y: F.huber_loss(out, y, delta=0.7),
    "smooth l1": lambda out, y: F.smooth_l1_loss(out, y, beta=0.5),
    "cross entropy": lambda out, y: F.cross_entropy(out, y.argmax(-1), label_smoothing=0.1),
    "weighted": lambda out, y: F.cross_entropy(out, y.argmax(-1), out.new_tensor([1.0, 2.0, 0.5])),
    "soft": lambda out, y: F.cross_entropy(out, y.softmax(-1)),
    "nll": lambda out, y: F.nll_loss(out.log_softmax(-1), y.argmax(-1)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, (y > 0).to(out.dtype)),
    "kl": lambda out, y: F.kl_div(out.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "hinge": lambda out, y: F.relu(1 - out * y.sign()).mean(),
    "poisson": lambda out, y: F.poisson_nll_loss(out.tanh(), y.abs()),
    "cosine": lambda out, y: 1 - F.cosine_similarity(out, y, eps=0.1).mean(),
}


def summarised(summary):
    """Gradients of single samples, made one by a function of [B, ...]."""

    def gradients(loss_fn, params, batch):
        grads, losses = gd.per_sample_grad(loss_fn)(params, batch)
        return summary(grads), losses.mean()

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def clipped(grads):
    size = torch.sqrt(sum((leaf.flatten(1) ** 2).sum(1) for leaf in gd._tree.leaves(grads)) + 1e-3)
    share = torch.clamp(0.5 / size, max=1.0)
    return gd._tree.map(lambda leaf: torch.einsum("b,b...->...", share, leaf) / len(leaf), grads)


def by_leaf(function):
    return summarised(lambda grads: gd._tree.map(function, grads))


def curved(loss_fn):
    def gradients(params, batch):
        grads, loss = gd.batch_grad(loss_fn)(params, batch)
        curvature = grad(lambda p: gd._tree.dot(grad(loss_fn)(p, batch), grads))(params)
        return gd._tree.map(lambda g, h: g - 0.1 * h, grads, curvature), loss

    return gradients


GRADIENTS = {
    "batch": gd.batch_grad,
    "mean": by_leaf(lambda leaf: leaf.mean(0)),
    "clipped": summarised(clipped),
    "signal to noise": by_leaf(lambda g: g.mean(0) ** 3 / (g.mean(0) ** 2 + g.var(0, correction=0) + 0.1)),
    "trimmed": by_leaf(lambda g: g.sort(dim=0).values[len(g) // 3 : len(g) - len(g) // 3].mean(0)),
    "largest": by_leaf(lambda leaf: leaf.amax(0)),
    "curved": curved,
}
# Signs of gradients that are zero but for rounding are of no meaning; masks are for the table's own trees.
SMOOTH = sorted(set(TABLE) - {"sign", "lion", "rprop", "muon", "masked", "partition", "lbfgs"})


class Training:
    """A step, its first state and its data."""

    def __init__(self, layers, loss, gradients, transformation, batch_size, width, seed):
        self.names = layers, loss, gradients, transformation, batch_size, width, seed
        self.data = normal(seed + 200, 20, width), normal(seed + 201, 20, 3)
        modules = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in [*layers, "linear 3"]:
                module, width = LAYERS[name](width)
                modules.append(module)
            apply, params, _ = gd.modules.functional(nn.Sequential(*modules).double())

        def loss_fn(params, batch):
            return LOSSES[loss](apply(params, batch[0]), batch[1])

        self.transform, self.lr = make(TABLE[transformation]), 0.1 * TABLE[transformation].lr
        self.gradients = GRADIENTS[gradients](loss_fn)
        self.state = gd.TrainState(params, self.transform.init(params))
        self.index = torch.stack([torch.arange(batch_size) * (t + 2) % 20 for t in range(3)])

    def __repr__(self):
        return f"Training{self.names}"

    def step(self, state, index):
        grads, value = self.gradients(state.params, gd.take(self.data, index))
        updates, inner = self.transform.update(grads, state.opt_state, state.params)
        return gd.TrainState(gd.apply_updates(state.params, updates, self.lr), inner), value


trainings = st.builds(
    Training,
    st.lists(st.sampled_from(sorted(LAYERS)), max_size=4),
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from(sorted(GRADIENTS)),
    st.sampled_from(SMOOTH),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(0, 2**31),
)


def trained(trainings):
    """For each training "" if its native run is that of the loop, else what is wrong."""

    def body(states, x):
        done = [t.step(state, index) for t, state, index in zip(trainings, states, x, strict=True)]
        return [state for state, _ in done], [value for _, value in done]

    states, indices = [t.state for t in trainings], [t.index for t in trainings]
    got, values = gd.scan(body, states, indices, backend="native")
    expected, rights = gd.scan(body, states, indices)
    pairs = (map(gd._tree.leaves, zip(*each, strict=True)) for each in ((got, values), (expected, rights)))
    return differences(*pairs, torch.float64)


# Both grammars, as far as there is time.

TOGETHER = 5  # bodies that are compiled as one
MANY = 10_000
KINDS = [*["value"] * 12, *SINGLE, *PAIRS]
together = functools.partial(st.lists, min_size=TOGETHER, max_size=TOGETHER)


bodies = st.tuples(
    together(programs),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(SHAPES),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float64, torch.float32]),
    st.sampled_from([REVERSE, REVERSE, *map(gd.adjoints.Checkpoint, (1, 2))]),
)


def drawn(strategy, count):
    """Draw so many, and do not try to make smaller what fails: it is named, and small."""
    how = settings(max_examples=count // TOGETHER, phases=[Phase.explicit, Phase.generate])
    return lambda test: how(given(strategy)(test))


def assert_right(programs, found):
    wrong = [(program, what) for program, what in zip(programs, found, strict=True) if what]
    assert not wrong


def is_the_loop(body):
    programs, kind, *how, dtype, adjoint = body
    dtype = dtype if kind == "value" else torch.float64
    assert_right(programs, verdicts(programs, kind, *how, dtype, adjoint))


# torch has no batching rule for filling, which forward mode of forward mode does.
slow_filling = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.long
@slow_filling
@drawn(bodies, 10)
def test_drawn_bodies_are_the_loop(body):
    is_the_loop(body)


@pytest.mark.long
@drawn(together(trainings), 5)
def test_drawn_training_is_that_of_eager(trainings):
    assert_right(trainings, trained(trainings))


@slow_filling
@pytest.mark.slow
@drawn(bodies, MANY)
def test_many_drawn_bodies_are_the_loop(body):
    is_the_loop(body)


@pytest.mark.slow
@drawn(together(trainings), MANY // 10)
def test_much_drawn_training_is_that_of_eager(trainings):
    assert_right(trainings, trained(trainings))
