"""Streamed reductions: each equals the same reduction of gradients computed one sample at a time."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import gdfunc as gd
from gdfunc import _per_sample
from gdfunc._reductions import _patterns

from .assertions import assert_pure, assert_refused
from .references import gradients_one_by_one, linear_data, linear_loss, normal

R = gd.reducers
SWITCH = torch.tensor(1.0)
CHUNKS = {1: [None], 2: [1], 5: [1, 2, 3, 6], 20: ["auto", 9]}  # of batches of these sizes


def drawn(seed, *shape):
    return normal(seed, *shape) / shape[-1] ** 0.5


def squared(output):
    """A loss in which every output has a slope of its own."""
    return (torch.sin(output) ** 2).flatten(1).sum(1).mean()


def flat(leaf):
    return leaf.reshape(len(leaf), -1)


def net(factors, build, *inputs):
    """The loss of a module of torch on inputs of these shapes, and the leaves that are kept as factors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        apply, params, _ = gd.modules.functional(build().double())

    def loss_fn(params, batch):
        output = apply(params, *batch)
        return squared(output[0] if isinstance(output, tuple) else output)

    return loss_fn, params, lambda n: tuple(normal(i, n, *shape) for i, shape in enumerate(inputs)), factors


def of(factors, f, shapes, *inputs):
    params = {
        name: drawn(i, *shape or (1,)).reshape(shape) for i, (name, shape) in enumerate(shapes.items())
    }

    def data(n):
        return tuple(x(n) if callable(x) else normal(9 + i, n, *x) for i, x in enumerate(inputs))

    return (lambda p, batch: squared(f(p, *batch))), params, data, factors


def words(vocabulary, *shape):
    return lambda n: (normal(3, n, *shape).abs() * 1000).long() % vocabulary


def rnn(p, x):
    h = torch.zeros(len(x), 16, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ p["in"] + h @ p["again"].T)
    return h


def attention(p, x):
    q, k, v = (heads.unflatten(-1, (2, -1)).transpose(1, 2) for heads in (x @ p["qkv"]).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ p["out"]


def tied(p, index):
    return p["table"][index].mean(1) @ p["table"].T


CASES = {
    "linear": net(
        "0.weight 2.weight", lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)), (9,)
    ),
    "linear at two places": net("weight", lambda: nn.Linear(16, 12), (2, 16)),
    "linear at many places": net("", lambda: nn.Linear(5, 4), (6, 5)),
    "conv1d": net("weight", lambda: nn.Conv1d(8, 12, 3, padding=1, stride=2), (8, 3)),
    "conv1d over many": net("", lambda: nn.Conv1d(2, 3, 3), (2, 9)),
    "conv2d over many": net("", lambda: nn.Conv2d(4, 6, (3, 2), 2, 1, (1, 2), groups=2), (4, 7, 8)),
    "conv1d over many, same": net("", lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 9)),
    "conv2d over many, circular": net(
        "", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)
    ),
    "conv3d over many": net("", lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 3)),
    "transposed conv2d over many": net(
        "", lambda: nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), (2, 4, 3)
    ),
    "conv2d": net(
        "weight", lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 0), dilation=(2, 1), bias=False), (6, 3, 3)
    ),
    "conv2d, groups": net("weight", lambda: nn.Conv2d(8, 24, 3, groups=2, stride=2), (8, 3, 4)),
    "conv2d, same": net("weight", lambda: nn.Conv2d(6, 16, (3, 1), padding="same"), (6, 1, 2)),
    "conv3d": net("weight", lambda: nn.Conv3d(2, 12, 2), (2, 2, 2, 3)),
    "transposed conv1d": net(
        "weight", lambda: nn.ConvTranspose1d(12, 8, 3, stride=2, output_padding=1, padding=1), (12, 2)
    ),
    "transposed conv1d, padded": net(
        "weight", lambda: nn.ConvTranspose1d(12, 8, 3, dilation=2, output_padding=1), (12, 2)
    ),
    "transposed conv2d": net(
        "weight", lambda: nn.ConvTranspose2d(8, 12, 2, groups=2, dilation=2), (8, 1, 1)
    ),
    "layer norm": net("1.weight", lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), (6,)),
    "group norm": net("", lambda: nn.GroupNorm(2, 4), (4, 3)),
    "attention module": net(
        "out_proj.weight", lambda: nn.MultiheadAttention(16, 2, batch_first=True), *[(2, 16)] * 3
    ),
    "attention": of("qkv out", attention, {"qkv": (16, 48), "out": (16, 16)}, (3, 16)),
    "embedding": of("t", lambda p, i: F.embedding(i, p["t"], 7), {"t": (30, 4)}, words(9, 4)),
    "table": of("t", lambda p, i: p["t"][i - 9], {"t": (30, 4)}, words(30, 4)),
    "few rows": of("", lambda p, i: p["t"][i], {"t": (4, 3)}, words(4, 6)),
    "selected rows": of(
        "t", lambda p, i: p["t"].index_select(0, i.flatten())[None], {"t": (30, 2, 3)}, words(30, 4)
    ),
    "two tables in one": of(
        "t", lambda p, i: p["t"][i] * F.embedding(1 - i % 2, p["t"]), {"t": (30, 4)}, words(30, 4)
    ),
    "weight used twice": of("in again", rnn, {"in": (12, 16), "again": (16, 16)}, (2, 12)),
    "weight and its transpose": of(
        "w", lambda p, x: torch.tanh(x @ p["w"]) @ p["w"].T, {"w": (20, 12)}, (20,)
    ),
    "one activation after another": of(
        "a b", lambda p, x: x @ p["a"] @ p["b"], {"a": (9, 8), "b": (8, 7)}, (9,)
    ),
    "product of weights": of("", lambda p, x: x @ (p["a"] @ p["b"]), {"a": (12, 2), "b": (2, 12)}, (12,)),
    "square of a weight": of("", lambda p, x: x @ (p["w"] @ p["w"]), {"w": (9, 9)}, (9,)),
    "scaled product": of(
        "", lambda p, x: torch.addmm(p["b"], x, p["w"], alpha=2), {"w": (9, 8), "b": (8,)}, (9,)
    ),
    "tied embedding": of("", tied, {"table": (30, 4)}, words(30, 4)),
    "heads": of("w", lambda p, x: torch.einsum("bhi,hio->bho", x, p["w"]), {"w": (3, 8, 7)}, (3, 8)),
    "heads, arranged": of(
        "w", lambda p, x: torch.einsum("bhi,ohi->bho", x, p["w"]), {"w": (7, 3, 8)}, (3, 8)
    ),
    "product of views": of("w", lambda p, x: x @ p["w"].view(9, 8), {"w": (3, 24)}, (9,)),
    "matrix times vector": of("w", lambda p, x: (p["w"] @ x[0])[None], {"w": (7, 9)}, (9,)),
    "matrix times matrix": of("w", lambda p, x: p["w"] @ x, {"w": (16, 12)}, (12, 2)),
    "penalised": of("", lambda p, x: (x @ p["w"]) + (p["w"] ** 2).sum(), {"w": (9, 8)}, (9,)),
    "scalars": of("", lambda p, x: x * p["a"] + p["b"], {"a": (), "b": ()}, (3,)),
    "an unused leaf": of("w", lambda p, x: x @ p["w"], {"w": (9, 8), "rest": (3,)}, (9,)),
}
PRODUCTS = {  # of what are the factors found, but not kept
    "linear at many places": {"weight"},
    **{name: {"weight"} for name in CASES if "conv" in name and "over many" in name},
    "few rows": {"t"},
    "product of weights": {"a", "b"},
}


def materialised(loss_fn, params, batch):
    """The gradients of all samples, one by one, as a matrix [B, P] and as leaves."""
    rows = gradients_one_by_one(loss_fn, params, batch)
    leaves = {name: torch.stack([row[name] for row in rows]) for name in params}
    return torch.cat([flat(leaf) for leaf in leaves.values()], 1), leaves


def like(params, seed):
    return {name: normal(seed, *leaf.shape or (1,)).reshape(leaf.shape) for name, leaf in params.items()}


def every_reducer(params, size):
    direction = like(params, 77)
    return {
        "mean": R.mean(),
        "weighted_sum": R.weighted_sum(normal(5, size)),
        "second_moment": R.second_moment(),
        "variance": R.variance(correction=0),
        "norms": R.norms(),
        "leaf_norms": R.leaf_norms(),
        "clipped_sum": R.clipped_sum(0.1),
        "dots": R.dots(direction),
        "gram": R.gram(),
        "histogram": R.histogram(-0.53, 0.47, 8),
    }, direction


def by_definition(params, matrix, leaves):
    size = len(matrix)
    _, direction = every_reducer(params, size)
    weights, lengths = normal(5, size), matrix.norm(dim=1)
    factors = 1 / (lengths / 0.1).clamp_min(1)

    def each(f):
        return {name: f(leaf) for name, leaf in leaves.items()}

    def over_samples(w):
        return each(lambda leaf: torch.tensordot(w, leaf, 1))

    def counts(leaf):
        return torch.histc(leaf.clamp(-0.53, 0.47), 8, -0.53, 0.47).long()

    return {
        "mean": each(lambda leaf: leaf.mean(0)),
        "weighted_sum": over_samples(weights),
        "second_moment": each(lambda leaf: leaf.square().mean(0)),
        "variance": each(lambda leaf: leaf.var(0, correction=0)),
        "norms": lengths,
        "leaf_norms": each(lambda leaf: flat(leaf).norm(dim=1)),
        "clipped_sum": over_samples(factors),
        "dots": matrix @ torch.cat([leaf.flatten() for leaf in direction.values()]),
        "gram": matrix @ matrix.T,
        "histogram": each(counts),
    }


def leaf_pairs(got, expected):
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            yield name, got[name], wanted
        else:
            yield from ((name, got[name][k], wanted[k]) for k in wanted)


def close(got, expected, rtol=1e-10):
    """Equal up to rounding, which scales with the largest entry of a tensor."""
    for name, found, reference in leaf_pairs(got, expected):
        scale = max(float(reference.abs().max()), name == "variance")
        atol = 1e-13 * scale + 1e-30
        torch.testing.assert_close(found, reference, rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("name", CASES)
def test_every_reduction_is_that_of_materialised_gradients(name, size):
    loss_fn, params, data, _ = CASES[name]
    batch = data(size)
    matrix, leaves = materialised(loss_fn, params, batch)
    expected = by_definition(params, matrix, leaves)
    reducers, _ = every_reducer(params, size)
    grads, losses = gd.per_sample_grad(loss_fn)(params, batch)
    close(grads, leaves)
    for chunk_size in CHUNKS[size]:
        results, found = gd.reduce_per_sample(loss_fn, reducers, chunk_size=chunk_size)(params, batch)
        close(results, expected)
        close({"loss": found}, {"loss": losses}, 1e-12)


LAYERS_OF_TORCH = [
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "embedding",
    "layer norm",
    "group norm",
    "attention",
]


@pytest.mark.parametrize("name", LAYERS_OF_TORCH)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_per_sample_gradients_are_exact_to_a_share_of_their_norm(name, size, is_sum, dtype, share):
    loss_fn, params, data, _ = CASES[name]
    batch = data(size)

    def loss(params, batch):  # sees one sample at a time, of which a sum and a mean are the same
        return loss_fn(params, batch) * (len(batch[0]) if is_sum else 1)

    expected, _ = materialised(loss_fn, params, batch)
    cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    grads, _ = gd.per_sample_grad(loss)(*gd._tree.map(cast, (params, batch)))
    got = torch.cat([flat(leaf) for leaf in grads.values()], 1)
    assert got.dtype == dtype
    assert ((got - expected).norm(dim=1) <= share * expected.norm(dim=1)).all()


@pytest.mark.parametrize("name", CASES)
def test_each_leaf_takes_the_way_it_should(name):
    loss_fn, params, data, factors = CASES[name]
    ways = gd.reducers.explain(loss_fn)(params, data(2))
    assert list(ways) == [f"params['{leaf}']" for leaf in params]
    for kind, leaves in (("factors: ", set(factors.split())), ("products: ", PRODUCTS.get(name, set()))):
        assert {path[8:-2] for path, way in ways.items() if way.startswith(kind)} == leaves, ways
    assert all(way.startswith(("factors: ", "products: ", "direct: ")) for way in ways.values())


@st.composite
def architectures(draw):
    """A chain of layers on [positions, width], some of whose weights come back."""
    width, positions = draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2, 4]))
    kinds = draw(st.lists(st.sampled_from([*LAYERS]), min_size=1, max_size=5))
    return width, positions, ["linear", *kinds], draw(st.booleans()), draw(st.integers(0, 2**20))


LAYERS = {  # of the values, the layer's own weight, and that of the first layer
    "linear": lambda x, own, first: torch.tanh(x @ own),
    "again": lambda x, own, first: torch.tanh(x @ first),
    "back": lambda x, own, first: torch.sin(F.linear(x, first)),
    "scale": lambda x, own, first: x * own,
    "shift": lambda x, own, first: x + own,
    "norm": lambda x, own, first: F.layer_norm(x, x.shape[-1:]),
    "mix": lambda x, own, first: own @ x,
}


def built(width, positions, kinds, mean, seed):
    shapes = {"linear": (width, width), "scale": (width,), "shift": (positions, width)}
    shapes["mix"] = positions, positions
    params = {f"{i}": drawn(seed + i, *shapes[kind]) for i, kind in enumerate(kinds) if kind in shapes}

    def loss_fn(params, batch):
        (x,) = batch
        for i, kind in enumerate(kinds):
            x = LAYERS[kind](x, params.get(f"{i}"), params["0"])
        per_sample = (x**2 + x).flatten(1)
        return (per_sample.mean(1) if mean else per_sample.sum(1)).mean()

    return loss_fn, params


@pytest.mark.long
@given(architectures(), st.integers(1, 7), st.integers(1, 8))
def test_drawn_architectures(architecture, size, chunk_size):
    loss_fn, params = built(*architecture)
    batch = (normal(architecture[-1] + 99, size, architecture[1], architecture[0]),)
    reducers, _ = every_reducer(params, size)
    del reducers["histogram"]  # rounding may move an entry across an edge
    results, _ = gd.reduce_per_sample(loss_fn, reducers, chunk_size=chunk_size)(params, batch)
    expected = by_definition(params, *materialised(loss_fn, params, batch))
    del expected["histogram"]
    largest = float(expected["norms"].max())
    for name, found, reference in leaf_pairs(results, expected):
        power = 2 if name in ("second_moment", "variance", "gram") else 1
        # Sums over positions may cancel, and a normalisation undo all: √ε of the terms can be lost.
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-9 * largest**power + 1e-13)


def test_sums_in_place_of_means_make_no_difference_to_a_sample():
    results = [reduce(R.norms(), f)[0] for f in (lambda p, b: len(b[1]) * linear_loss(p, b), linear_loss)]
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)


def test_the_mean_is_the_batch_gradient():
    loss_fn, params, data, _ = CASES["linear"]
    batch = data(7)
    results, losses = gd.reduce_per_sample(loss_fn, R.mean(), chunk_size=3)(params, batch)
    grads, loss = gd.batch_grad(loss_fn)(params, batch)
    close({"grads": results, "loss": losses.mean()}, {"grads": grads, "loss": loss}, 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear at two places", "conv1d over many", "table"])
def test_a_reduction_writes_nothing_in_place(name):
    """Or a loop that is to be compiled could not have it in what it records."""
    loss_fn, params, data, _ = CASES[name]
    reduce = gd.reduce_per_sample(loss_fn, every_reducer(params, 3)[0], chunk_size=2)
    graph = make_fx(lambda params, batch: reduce(params, batch))(params, data(3)).graph
    called = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert called
    assert not [op for op in called if op._schema.is_mutable]


def test_windows_are_made_of_a_few_samples_at_a_time(monkeypatch):
    loss_fn, params, data, _ = CASES["conv1d over many"]
    expected, _ = gd.reduce_per_sample(loss_fn, R.norms(), chunk_size=None)(params, data(5))
    monkeypatch.setattr(_per_sample, "_MANY", 100)
    seen = []
    windows = _patterns._windows
    monkeypatch.setattr(_patterns, "_windows", lambda x, *a: seen.append(len(x)) or windows(x, *a))
    found, _ = gd.reduce_per_sample(loss_fn, R.norms(), chunk_size=None)(params, data(5))
    assert seen == [1] * 5
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_reducer_of_ones_own_sees_every_sample_once():
    loss_fn, params, data, _ = CASES["linear at many places"]
    batch = data(7)
    entries = R.Reducer(
        init=lambda params: [],
        add=lambda acc, grads: [*acc, (grads.start, grads.losses, grads.dense())],
        finish=lambda acc: [
            torch.tensor([start for start, _, _ in acc]),
            torch.cat([g["weight"] for *_, g in acc]),
        ],
    )
    (starts, weight), _ = gd.reduce_per_sample(loss_fn, entries, chunk_size=3)(params, batch)
    assert starts.tolist() == [0, 3, 6]
    torch.testing.assert_close(
        weight, materialised(loss_fn, params, batch)[1]["weight"], rtol=1e-12, atol=1e-14
    )


def test_a_tree_of_reducers_gives_a_tree_of_results():
    loss_fn, params, data, _ = CASES["scalars"]
    results, _ = gd.reduce_per_sample(loss_fn, (R.mean(), [R.norms(), None]))(params, data(3))
    assert isinstance(results, tuple)
    assert results[1][0].shape == (3,)
    assert results[1][1] is None


TRANSFORMED = [
    "linear",
    "conv2d",
    "conv1d over many",
    "table",
    "attention",
    "linear at two places",
    "scalars",
]


@pytest.mark.long
@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_and_scan_go_through_a_reduction(name):
    loss_fn, params, data, _ = CASES[name]
    batch, tangents = data(3), (like(params, 8),)
    reduce = gd.reduce_per_sample(loss_fn, {"n": R.norms(), "c": R.clipped_sum(0.1)}, chunk_size=2)

    def fast(params):
        return reduce(params, batch)[0]

    def slow(params):
        grads = gd.per_sample_grad(loss_fn)(params, batch)[0]
        norms = torch.stack([flat(leaf).square().sum(1) for leaf in grads.values()]).sum(0).sqrt()
        factors = (0.1 / norms).clamp(max=1)
        return {"n": norms, "c": {k: torch.tensordot(factors, leaf, 1) for k, leaf in grads.items()}}

    def total(f):
        def value(params):
            results = f(params)
            return results["n"].sum() + sum((leaf**2).sum() for leaf in results["c"].values())

        return value

    close(grad(total(fast))(params), grad(total(slow))(params), 1e-9)
    slopes = (jvp(total(f), (params,), tangents)[1] for f in (fast, slow))
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)
    many = {k: torch.stack([leaf, 2 * leaf]) for k, leaf in params.items()}
    found = vmap(fast)(many)
    for i in range(2):
        alone = fast({k: leaf[i] for k, leaf in many.items()})
        close({"n": found["n"][i], "c": {k: v[i] for k, v in found["c"].items()}}, alone)

    def body(params, _):
        results = fast(params)
        return {k: params[k] - 0.1 * results["c"][k] for k in params}, results["n"]

    (p, n), (p_traced, n_traced) = (
        gd.scan(body, params, None, 3, adjoint=adjoint)
        for adjoint in (gd.adjoints.Reverse(), gd.adjoints.Checkpoint(2))
    )
    close({"p": p_traced, "n": n_traced}, {"p": p, "n": n})


def test_inputs_are_left_alone_and_outputs_are_the_callers_own():
    for name in ("linear", "scalars", "table"):
        loss_fn, params, data, _ = CASES[name]
        batch = data(3)
        reduce = gd.reduce_per_sample(loss_fn, every_reducer(params, 3)[0])
        assert_pure(reduce, params, batch)


def test_parameters_in_any_layout():
    _, params, data, _ = CASES["product of views"]
    batch = data(3)
    strided = {"w": params["w"].T.contiguous().T}
    reduce = gd.reduce_per_sample(
        lambda p, b: squared(b[0] @ p["w"].reshape(9, 8)), {"s": R.clipped_sum(0.1)}
    )
    close(reduce(strided, batch)[0], reduce(params, batch)[0])


def test_a_change_in_what_the_loss_reads_is_seen():
    state = {"factor": 1.0, "shift": torch.zeros(8, dtype=torch.float64)}

    def loss_fn(params, batch):
        return squared(state["factor"] * (batch[0] @ params["w"] + state["shift"]))

    params, batch = {"w": drawn(0, 9, 8)}, (normal(1, 3, 9),)
    reduce = gd.reduce_per_sample(loss_fn, {"norms": R.norms()})
    for factor, shift in ((1.0, 0.0), (2.0, 0.0), (2.0, 1.0)):
        state |= {"factor": factor, "shift": torch.full((8,), shift, dtype=torch.float64)}
        close(reduce(params, batch)[0], {"norms": materialised(loss_fn, params, batch)[0].norm(dim=1)})


NUMBERS = iter([1])
UNTRACED = {  # losses that are differentiated as they are, and why
    "decides on a value": (
        lambda p, b: squared(b[0] @ p["w"]) * (2.0 if float(SWITCH) > 0 else 1.0),
        "direct: the loss cannot be traced (BackendError)",
    ),
    "closes over what cannot be compared": (
        lambda p, b: squared(b[0] @ p["w"]) + 0 * (NUMBERS is None),
        "direct: the loss reaches what cannot be compared from call to call",
    ),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_a_loss_that_cannot_be_traced_is_differentiated_as_it_is(name):
    (loss_fn, why), params, batch = UNTRACED[name], {"w": drawn(0, 9, 8)}, (normal(1, 3, 9),)
    assert gd.reducers.explain(loss_fn)(params, batch) == {"params['w']": why}
    another = gd.reducers.explain(lambda p, b: squared(b[0] @ p["w"]))(params, batch)
    assert another == {"params['w']": "factors: mm"}
    sizes, _ = gd.reduce_per_sample(loss_fn, R.norms())(params, batch)
    torch.testing.assert_close(sizes, materialised(loss_fn, params, batch)[0].norm(dim=1))


@pytest.mark.long
def test_random_numbers_are_drawn_if_asked_for():
    def loss_fn(params, batch):
        return squared(F.dropout(batch[0] @ params["w"], 0.5))

    params, batch = {"w": drawn(0, 9, 8)}, (normal(1, 3, 9),)
    with torch.random.fork_rng():
        sizes, _ = gd.reduce_per_sample(loss_fn, R.norms(), randomness="different")(params, batch)
        assert sizes.shape == (3,)
        with pytest.raises(RuntimeError, match="randomness"):
            gd.reduce_per_sample(loss_fn, R.norms())(params, batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 300.0, 1e30])
@pytest.mark.parametrize("positions", [1, 2])
def test_whatever_is_finite_is_clipped_to_the_norm(dtype, size, positions):
    """Entries whose squares overflow or vanish, in factors and in gradients as they are."""
    size = min(max(size, 2 * torch.finfo(dtype).tiny), torch.finfo(dtype).max / 512)
    x = (normal(0, 1, positions, 16).clamp(-4, 4) * size).to(dtype)

    def loss_fn(params, batch):
        return ((batch[0] @ params["w"]).sum() + (batch[0] * params["b"]).sum()).float()

    params = {"w": torch.ones(16, 12, dtype=dtype), "b": torch.ones(16, dtype=dtype)}
    if positions == 1 or dtype.itemsize >= 4:
        assert "factors" in gd.reducers.explain(loss_fn)(params, (x,))["params['w']"]
    bound = min(size, 1.0) / 3
    clipped, _ = gd.reduce_per_sample(loss_fn, R.clipped_sum(bound, nonfinite="zero"))(params, (x,))
    length = torch.cat([leaf.double().flatten() for leaf in clipped.values()]).norm()
    eps = torch.finfo(dtype).eps
    assert bound * (1 - 16 * eps) <= length <= bound * (1 + 8 * eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e308])
@pytest.mark.parametrize(
    "name", ["linear", "linear at two places", "conv2d", "conv1d over many", "scalars"]
)
def test_samples_that_are_not_finite_add_exactly_nothing_when_asked(name, bad):
    loss_fn, params, data, _ = CASES[name]

    def linear(p, b):
        return loss_fn(p, b) * 1e10 if bad == 1e308 else loss_fn(p, b)

    batch = data(5)
    spoilt = tuple(leaf.clone() for leaf in batch)
    spoilt[0][2] = bad
    rest = tuple(leaf[[0, 1, 3, 4]] for leaf in batch)
    asked = gd.reduce_per_sample(linear, {"s": R.clipped_sum(0.1, nonfinite="zero")}, chunk_size=2)
    if bad != 1e308:
        close(asked(params, spoilt)[0], asked(params, rest)[0])
        seen, _ = gd.reduce_per_sample(linear, R.clipped_sum(0.1), chunk_size=2)(params, spoilt)
        assert any(leaf.isnan().any() for leaf in seen.values())
    assert all(leaf.isfinite().all() for leaf in asked(params, spoilt)[0]["s"].values())


def test_cancelling_positions_cost_no_accuracy():
    """Two places whose errors nearly cancel: float32 products would lose the norm altogether."""
    x = normal(0, 3, 1, 16, dtype=torch.float32)
    x = torch.cat([x, x + 1e-4 * normal(1, 3, 1, 16, dtype=torch.float32)], 1)

    def loss_fn(params, batch):
        y = batch[0] @ params["w"]
        return (y[:, 0] - y[:, 1]).sum()

    params = {"w": torch.ones(16, 12)}
    sizes, _ = gd.reduce_per_sample(loss_fn, R.norms())(params, (x,))
    assert "factors" in gd.reducers.explain(loss_fn)(params, (x,))["params['w']"]
    torch.testing.assert_close(sizes, materialised(loss_fn, params, (x,))[0].norm(dim=1), rtol=1e-4, atol=0)


def test_the_norm_has_a_derivative_where_it_is_zero():
    def value(w):
        return gd.reduce_per_sample(lambda w, x: ((x @ w) ** 2).mean(), R.norms())(
            w, torch.zeros(2, 2, 16)
        )[0].sum()

    slope = grad(value)(torch.ones(16, 12))
    assert torch.equal(slope, torch.zeros(16, 12))


def test_the_variance_of_a_single_sample():
    loss_fn, params, data, _ = CASES["scalars"]
    with pytest.warns(UserWarning, match="one sample, too few .* take at least 2") as caught:
        unbiased, _ = gd.reduce_per_sample(loss_fn, R.variance())(params, data(1))
    assert [warning.filename for warning in caught] == [__file__]
    biased, _ = gd.reduce_per_sample(loss_fn, R.variance(correction=0))(params, data(1))
    assert unbiased["a"].isnan()
    assert biased["a"] == 0


def test_a_chunk_is_gone_before_the_next_one_is_made():
    loss_fn, params, data, _ = CASES["linear at many places"]
    seen, left = [], []

    def watched(params, batch):
        left.extend(chunk for chunk in seen if chunk() is not None)
        return loss_fn(params, batch)

    def add(acc, grads):
        seen.append(weakref.ref(grads))
        return acc

    watch = R.Reducer(init=lambda params: torch.tensor(0), add=add, finish=lambda acc: acc)
    gd.reduce_per_sample(watched, watch, chunk_size=2)(params, data(6))
    assert len(seen) == 3
    assert not left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_limit": 600, "chunk_size": None}, "over the limit of 600; chunk_size=3 fits"),
        ({"memory_limit": 600, "chunk_size": 4}, "over the limit of 600; chunk_size=3 fits"),
        ({"memory_limit": 600, "chunk_size": 10}, "over the limit of 600; chunk_size=3 fits"),
        ({"memory_limit": 100}, "one sample takes 192: raise memory_limit"),
        ({"memory_limit": 600, "chunk_size": 3}, None),
        ({"memory_limit": 600, "chunk_size": "auto"}, None),
    ],
)
def test_a_chunk_over_the_limit_raises_and_names_one_that_fits(options, message):
    loss_fn, params, data, _ = CASES["linear at many places"]  # 24 entries of 8 bytes, all direct
    reduce = gd.reduce_per_sample(loss_fn, R.norms(), **options)
    if message:
        assert_refused(lambda: reduce(params, data(10)), f"MemoryError: {message}")
    else:
        expected = materialised(loss_fn, params, data(10))[0].norm(dim=1)
        torch.testing.assert_close(reduce(params, data(10))[0], expected)


def test_factors_count_for_what_they_are_unless_entries_are_read():
    loss_fn, params, data, _ = CASES["linear"]
    options = {"chunk_size": 5, "memory_limit": 5 * 8 * (9 + 8 + 8 + 7 + 15)}
    gd.reduce_per_sample(loss_fn, R.norms(), **options)(params, data(5))
    with pytest.raises(MemoryError, match="chunk_size=1 fits"):
        gd.reduce_per_sample(loss_fn, R.histogram(-1, 1, 2), **options)(params, data(5))


def test_per_sample_gradients_over_the_limit_raise_before_anything_is_allocated():
    def never(params, batch):
        raise AssertionError("the loss was called")

    loss_fn, params, data, _ = CASES["linear at many places"]
    gradients = gd.per_sample_grad(loss_fn, memory_limit=600)
    match = r"take 1920 bytes.* of 600; take at most 3 samples .* or reduce_per_sample\(.*=3\)"
    with pytest.raises(MemoryError, match=match):
        gradients(params, data(10))
    gradients(params, (data(10)[0][:3],))
    with pytest.raises(MemoryError, match="one sample's alone take more"):
        gd.per_sample_grad(loss_fn, memory_limit=6)(params, data(10))
    with pytest.raises(MemoryError, match="bytes, over the limit"):  # of any machine
        gd.per_sample_grad(never)(torch.zeros(1).expand(2**45), torch.ones(5))
    for limit in (0, -1, 2.0, True):
        for make in (gd.per_sample_grad, lambda f, **k: gd.reduce_per_sample(f, R.mean(), **k)):
            with pytest.raises(ValueError, match="memory_limit must be an int >= 1; got"):
                make(linear_loss, memory_limit=limit)


PARAMS, BATCH = {"w": normal(0, 9), "b": normal(1, 1)[0]}, linear_data(0, 5, 9)


def reduce(reducer, loss_fn=linear_loss, **options):
    return gd.reduce_per_sample(loss_fn, reducer, **options)(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reduce(R.mean), "TypeError: reducers is function, not a Reducer; call"),
        (lambda: reduce({"a": 3}), r"TypeError: reducers\['a'\] is int, not a Reducer"),
        (lambda: reduce(R.mean(), chunk_size=0), "chunk_size must be an int >= 1"),
        (lambda: reduce(R.mean(), chunk_size="all"), "chunk_size must be 'auto'"),
        (lambda: reduce(R.mean(), randomness="any"), "randomness must be"),
        (lambda: R.clipped_sum(0.0), "max_norm must be a finite number in"),
        (lambda: R.clipped_sum(1.0, nonfinite="skip"), "nonfinite must be 'propagate' or 'zero'"),
        (lambda: R.variance(correction=-1), "correction must be an int >= 0"),
        (lambda: R.histogram(1.0, 1.0, 3), "low must be below high; got 1.0 and 1.0"),
        (lambda: R.histogram(0.0, 1.0, 0), "bins must be an int >= 1"),
        (lambda: R.weighted_sum(torch.ones(2, 2)), r"weights must be a tensor \[B\].* got \(2, 2\)"),
        (
            lambda: reduce(R.weighted_sum(torch.ones(4)), chunk_size=2),
            "weights has 4 entries, but the batch has at least 5 samples",
        ),
        (
            lambda: reduce(R.weighted_sum(torch.ones(9))),
            "weights has 9 entries, but the batch has 5 samples",
        ),
        (lambda: reduce(R.dots({"w": torch.ones(9)})), r"direction does not .*: missing params\['b'\]"),
        (lambda: reduce(R.dots(PARAMS | {"w": torch.ones(3)})), r"direction\['w'\] has shape \(3,\) but"),
        (lambda: reduce(R.mean(), lambda p, b: b[1].mean()), "loss does not depend on params"),
        (lambda: reduce(R.mean(), lambda p, b: p["b"].detach()), "loss does not depend on params"),
        (lambda: reduce(R.mean(), lambda p, b: b[0] @ p["w"]), r"real floating-point .* shape \(1,\)"),
        (lambda: reduce(R.mean(), lambda p, b: b[1].add_(1) @ b[1] + p["b"]), "the loss wrote into batch"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    assert_refused(call, message)
