"""Dropout from keys in modules: one mask for a batch, its chunks and its samples, on every backend."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gdfunc as gd

from .assertions import assert_agrees, assert_refused, assert_same_bits
from .references import COMPILED, normal

KEY = gd.random.key(3)
ROWS = gd.random.fold_in(KEY, torch.arange(6))


class Applied(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def applied(function):
    """The function of inputs and a key that `apply` makes of a layer, or of a function."""
    module = function if isinstance(function, nn.Module) else Applied(function)
    apply, params, _ = gd.modules.functional(module.double())
    return lambda *inputs, key=KEY, **options: apply(params, *inputs, key=key, **options)


def written(operation):
    """A function that returns what an operation in place wrote into a copy."""

    def write(x):
        x = x.clone()
        returned = operation(x)
        assert returned is x or returned.shape == x.shape
        return x

    return write


def attend(x):
    return F.scaled_dot_product_attention(x, x + 1, x - 1, dropout_p=0.4)


LAYERS = {  # a layer or a function, and the shape of its input
    "dropout": (nn.Dropout(0.3), (6, 5)),
    "of vectors": (nn.Dropout(0.3), (6,)),
    "dropout1d": (nn.Dropout1d(0.3), (6, 4, 5)),
    "dropout2d": (nn.Dropout2d(0.3), (6, 4, 2, 3)),
    "dropout3d": (nn.Dropout3d(0.3), (6, 4, 2, 3, 2)),
    "alpha": (nn.AlphaDropout(0.3), (6, 5)),
    "channels of alpha": (nn.FeatureAlphaDropout(0.3), (6, 4, 2, 3)),
    "rrelu": (nn.RReLU(), (6, 5)),
    "functional": (lambda x: F.dropout(F.alpha_dropout(x, 0.2, True), 0.5), (6, 5)),
    "torch": (lambda x: torch.feature_dropout(torch.dropout(x, 0.2, True), 0.5, True), (6, 5)),
    "torch alpha": (
        lambda x: torch.feature_alpha_dropout(torch.alpha_dropout(x, 0.2, True), 0.5, True),
        (6, 5),
    ),
    "in place": (nn.Sequential(nn.Tanh(), nn.Dropout(0.3, inplace=True), nn.RReLU(inplace=True)), (6, 5)),
    "written": (written(lambda x: F.dropout2d(x, 0.3, inplace=True)), (6, 3, 2, 2)),
    "torch in place": (written(lambda x: torch.feature_alpha_dropout_(x, 0.3, True)), (6, 3, 2, 2)),
    "blocks of rows": (lambda x: F.dropout(x.flatten(0, 1), 0.3), (6, 4, 5)),
    "attention": (attend, (6, 2, 4, 3)),
    "attention of blocks": (lambda x: attend(x.flatten(0, 1)).unflatten(0, (-1, 2)), (6, 2, 4, 3)),
    "certain": (lambda x: F.dropout(F.dropout(x, 1.0), 0.5) + F.dropout(x, 0.5), (6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_its_chunks_and_its_samples_have_the_same_masks(name, dtype):
    layer, shape = LAYERS[name]
    run, x = applied(layer), normal(0, *shape).to(dtype)
    whole = run(x)
    chunks = torch.cat(
        [run(x[i : i + size], key=ROWS[i : i + size]) for i, size in ((0, 1), (1, 3), (4, 2))]
    )
    mapped = vmap(lambda x, key: run(x[None], key=key[None]))(x, ROWS).reshape(whole.shape)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-6}
    for result in (run(x, key=ROWS), chunks, mapped):
        if "attention" in name:  # whose products round by their sizes
            torch.testing.assert_close(result, whole, **tolerance)
        else:
            assert_same_bits(result, whole)
    assert not run(x, key=gd.random.key(4)).equal(whole)
    assert not whole.equal(run(x, training=False)) or not isinstance(layer, nn.Module)


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_masks_are_the_eager_ones(backend):
    few = ("dropout2d", "channels of alpha", "in place", "written", "attention", "blocks of rows")
    names = few if backend == "native" else few[:2]  # because Inductor is slow
    runs = [(applied(LAYERS[name][0]), normal(0, *LAYERS[name][1])) for name in names]

    def body(key, _):
        key, now = gd.random.split(key)
        return key, [run(x, key=now) for run, x in runs]

    (last, eager), (end, ours) = (
        gd.scan(body, KEY, None, length=2, backend=each) for each in ("eager", backend)
    )
    assert last.equal(end)
    for name, y, own in zip(names, eager, ours, strict=True):
        torch.testing.assert_close(own, y, rtol=1e-12, atol=1e-13, msg=name)
        assert (own == 0).equal(y == 0)
        assert not y[0].equal(y[1])


def test_call_c_draws_row_i_from_fold_in_of_its_key():
    def twice(x):
        x = F.dropout(x, 0.0)  # which draws nothing, and is not counted
        return F.dropout(x, 0.3), F.dropout(F.dropout(x, 0.5, training=False), 0.4)

    x = normal(0, 6, 7)
    first, second = applied(twice)(x)
    assert_same_bits(first, gd.random.dropout(gd.random.fold_in(ROWS, 0), x, 0.3))
    assert_same_bits(second, gd.random.dropout(gd.random.fold_in(ROWS, 1), x, 0.4))


def test_the_sequence_first_has_a_mask_for_the_whole_batch():
    x = normal(0, 6, 7)
    mask = applied(lambda x: F.dropout(x.T, 0.3))(x)
    assert_same_bits(mask, gd.random.dropout(gd.random.fold_in(ROWS[0], 0), x.T, 0.3))


def test_a_member_of_a_vmap_over_keys_drops_out_alone():
    keys, x, run = gd.random.split(KEY, 4), normal(0, 6, 5), applied(nn.Dropout(0.5))
    masks = vmap(lambda key: run(x, key=key))(keys)
    assert_same_bits(masks, torch.stack([run(x, key=key) for key in keys]))


N = 40_000


def moments(y):
    return y.mean(), y.var()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d"])
def test_dropout_keeps_torchs_moments(name, p):
    """Of standard normal inputs: mean 0; variance 1/(1 − p), or 1 for alpha dropout."""
    x = normal(1, N, 1, 1)
    mean, variance = moments(applied(lambda x: getattr(F, name)(x, p, training=True))(x))
    expected = 1.0 if "alpha" in name else 1 / (1 - p)
    fourth = 3 / (1 - p) ** 3  # an upper bound on the fourth moment
    assert abs(mean) < 6 * (expected / N) ** 0.5
    assert abs(variance - expected) < 6 * (fourth / N) ** 0.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = getattr(F, name)(x, p, training=True)
    values = (getattr(F, name)(torch.zeros(N, 1, 1), p, training=True) for _ in range(1))
    assert abs(theirs.mean() - mean) < 12 * (expected / N) ** 0.5
    with torch.random.fork_rng():
        theirs = next(values).unique()
    ours = applied(lambda x: getattr(F, name)(x, p, training=True))(torch.zeros(N, 1, 1)).unique()
    torch.testing.assert_close(ours, theirs)  # what is kept and dropped becomes


def test_channels_are_dropped_as_a_whole():
    kept = applied(lambda x: F.dropout2d(x, 0.3))(torch.ones(200, 50, 2, 3, dtype=torch.float64)) != 0
    assert kept.flatten(2).all(-1).equal(kept.flatten(2).any(-1))
    assert abs(kept.double().mean() - 0.7) < 6 * (0.3 * 0.7 / 10_000) ** 0.5
    assert len(kept[:, :, 0, 0].unique(dim=0)) == 200
    single = applied(lambda x: F.dropout3d(x, 0.5))(torch.ones(64, 2, 3, 2, dtype=torch.float64))
    assert 0 < (single[:, 0, 0, 0] != 0).sum() < 64  # the channels of one image without a batch


def test_slopes_of_rrelu_are_uniform():
    y = applied(nn.RReLU(0.2, 0.6))(-torch.ones(N, dtype=torch.float64))
    assert ((y >= -0.6) & (y <= -0.2)).all()
    assert abs(y.mean() + 0.4) < 6 * 0.4 / math.sqrt(12 * N)
    assert abs(y.var() - 0.16 / 12) < 6 * 0.16 * math.sqrt(1 / 180 / N)
    assert_same_bits(applied(nn.RReLU())(normal(0, 9).abs()), normal(0, 9).abs())


def test_a_slope_goes_through_the_mask():
    x, run = normal(0, 6, 5), applied(nn.Dropout(0.3))
    assert_same_bits(grad(lambda x: run(x).sum())(x), run(torch.ones_like(x)))


TINY = 1e-12  # keeps all


def causal(length, width):
    return torch.ones(length, width, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": causal(4, 5)},
        {"attn_mask": normal(5, 4, 5)},
        {"attn_mask": normal(5, 3, 1, 4, 5)},
        {"attn_mask": causal(4, 5) & (torch.arange(4) != 2)[:, None]},  # a row that attends to nothing
        {"enable_gqa": True, "is_causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_without_dropout_is_torchs(options, dtype):
    heads = 2 if options.get("enable_gqa") else 4
    query, keys, value = normal(0, 3, 4, 4, 6), normal(1, 3, heads, 5, 6), normal(2, 3, heads, 5, 7)
    query, keys, value = (x.to(dtype) for x in (query, keys, value))
    options = {
        k: v.to(dtype) if torch.is_tensor(v) and v.dtype != torch.bool else v for k, v in options.items()
    }

    def attend(query, keys, value, p):
        return F.scaled_dot_product_attention(query, keys, value, dropout_p=p, **options)

    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {}
    expected = attend(query, keys, value, 0.0)
    for p in (0.0, TINY):
        ours = applied(lambda *inputs, p=p: attend(*inputs, p))
        torch.testing.assert_close(ours(query, keys, value), expected, **tolerance)
        slopes, theirs = (
            grad(lambda *inputs, f=f: f(*inputs).square().sum(), (0, 1, 2))(query, keys, value)
            for f in (ours, lambda *inputs: attend(*inputs, 0.0))
        )
        for slope, their in zip(slopes, theirs, strict=True):
            torch.testing.assert_close(slope, their, **tolerance)
    assert not applied(lambda *inputs: attend(*inputs, 1.0))(query, keys, value).any()


HEADS = {
    "need_weights": ({}, {"need_weights": True}),
    "fast": ({}, {"need_weights": False}),
    "other sizes": ({"kdim": 3, "vdim": 5}, {}),
    "biases": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False, False, True]] * 6)}),
    "causal": ({}, {"attn_mask": ~causal(3, 3), "is_causal": True, "need_weights": False}),
    "each head": ({}, {"average_attn_weights": False}),
    "time first": ({"batch_first": False}, {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_multihead_attention_without_dropout_is_torchs_and_with_it_drops_weights(name):
    settings, options = HEADS[name]
    settings = {"batch_first": True} | settings

    def make(p):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.MultiheadAttention(4, 2, dropout=p, **settings).double()

    sizes = [4, settings.get("kdim", 4), settings.get("vdim", 4)]
    inputs = [
        normal(i, *((6, 3) if settings["batch_first"] else (3, 6)), size) for i, size in enumerate(sizes)
    ]
    expected, weights = make(0.0)(*inputs, **options)
    ours, ours_weights = applied(make(TINY))(*inputs, **options)
    torch.testing.assert_close(ours, expected.detach())
    if weights is not None:
        torch.testing.assert_close(ours_weights, weights.detach())
    run = applied(make(0.5))
    dropped = run(*inputs, **options)
    assert not torch.allclose(dropped[0], ours)
    assert_same_bits(run(*inputs, **options), dropped)
    if options.get("need_weights", True):
        assert (dropped[1] == 0).any()
    if settings["batch_first"]:
        padded = "key_padding_mask" in options

        def one(*rows, key):
            more = options | ({"key_padding_mask": options["key_padding_mask"][:1]} if padded else {})
            return run(*[row[None] for row in rows], key=key[None], **more)[0][0]

        torch.testing.assert_close(
            vmap(lambda *rows: one(*rows[:3], key=rows[3]))(*inputs, ROWS), dropped[0]
        )


def make_encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        return nn.Sequential(nn.Linear(3, 4), layer, nn.Dropout(0.2), nn.Linear(4, 1)).double()


APPLY, PARAMS, _ = gd.modules.functional(make_encoder())
X = normal(0, 6, 4, 3)


def loss_fn(params, batch):
    x, key = batch
    return APPLY(params, x, key=key).square().mean()


@pytest.mark.long
def test_per_sample_gradients_of_a_transformer_average_to_that_of_the_batch():
    batch = X, ROWS
    grads, losses = gd.per_sample_grad(loss_fn)(PARAMS, batch)
    whole, loss = gd.batch_grad(loss_fn)(PARAMS, batch)
    chunked, _ = gd.per_sample_grad(loss_fn, chunk_size=4)(PARAMS, batch)
    norms, _ = gd.reduce_per_sample(loss_fn, gd.reducers.norms())(PARAMS, batch)
    torch.testing.assert_close(losses.mean(), loss)
    for name, leaf in whole.items():
        torch.testing.assert_close(grads[name].mean(0), leaf, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(chunked[name], grads[name], rtol=1e-9, atol=1e-12)
    squares = sum(leaf.flatten(1).square().sum(1) for leaf in grads.values())
    torch.testing.assert_close(norms, squares.sqrt())
    gd.check_mean_loss(loss_fn, PARAMS, batch)
    same, _ = gd.batch_grad(lambda p, x: APPLY(p, x, key=KEY).square().mean())(PARAMS, X)
    assert_same_bits(same, whole)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_transformer_trains_with_a_key_in_the_carry(backend):
    def step(carry, batch, lr):
        params, key = carry
        key, now = gd.random.split(key)
        keys = gd.random.fold_in(now, torch.arange(len(batch)))
        grads, loss = gd.batch_grad(loss_fn)(params, (batch, keys))
        return (gd.tree.map(lambda p, g: p - lr * g, params, grads), key), loss

    index = gd.epoch_batches(gd.random.key(1), n=6, batch_size=3, epochs=6)
    (params, key), trajectory = gd.train(step, (PARAMS, KEY), X, index, 0.05, backend=backend)
    carry = PARAMS, KEY
    for t, rows in enumerate(index):
        carry, loss = step(carry, X[rows], 0.05)
        torch.testing.assert_close(trajectory.loss[t], loss, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(params, carry[0], rtol=1e-7, atol=1e-10)
    assert key.equal(carry[1])
    assert trajectory.loss[-4:].mean() < trajectory.loss[:4].mean()


def test_training_false_is_eval_mode_and_true_the_modes_that_the_module_had():
    module = make_encoder()
    module[2].eval()
    apply, params, _ = gd.modules.functional(module)
    assert module[2].training is False
    assert module[1].training is True
    assert not apply(params, X, key=KEY).equal(apply(params, X, key=gd.random.key(4)))
    calm = apply(params, X, training=False)
    torch.testing.assert_close(apply(params, X, training=False, key=KEY), calm)
    torch.testing.assert_close(calm, module.eval()(X).detach())
    assert_same_bits(gd.modules.functional(module).apply(params, X), calm)
    assert_same_bits(applied(nn.Dropout(0.5).eval())(X, key=None), X)
    several = gd.modules.stack([nn.Dropout(0.5), nn.Dropout(0.5)])
    assert_same_bits(several.apply({}, X, training=False), X)


def drawing(function):
    return lambda *inputs, **options: applied(function)(*inputs, **options)


def state_is_kept(call):
    """Whether torch's generator is neither read nor written by a call."""
    with torch.random.fork_rng():
        results = []
        for seed in range(2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(call())
            assert torch.get_rng_state().equal(before)
    assert_same_bits(*results)


def test_torchs_generator_is_neither_read_nor_written():
    state_is_kept(lambda: APPLY(PARAMS, X, key=KEY))
    state_is_kept(lambda: applied(lambda x: F.rrelu(F.dropout(x, 0.5), training=True))(X))


OFF = r"turn it off: training=False, or module.eval\(\) before functional"
DRAWING = {
    "nn.Dropout 'net.1'": nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))}),
    "nn.Dropout2d '0'": nn.Sequential(nn.Dropout2d(0.5)),
    "nn.FeatureAlphaDropout '0'": nn.Sequential(nn.FeatureAlphaDropout(0.5)),
    "nn.RReLU '1'": nn.Sequential(nn.Dropout(0.0), nn.RReLU()),
    "nn.MultiheadAttention '1.self_attn'": nn.Sequential(
        nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3)
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_layer_without_a_key_is_refused_by_name(name):
    module = DRAWING[name]
    apply, params, _ = gd.modules.functional(module)
    message = rf"{name} in training mode draws .* apply\(params, x, key=key\), or {OFF}"
    for backend in ("eager", "native"):
        assert_refused(
            lambda backend=backend: gd.scan(
                lambda c, x: (c, apply(params, x)), torch.tensor(0.0), torch.ones(2, 4, 3), backend=backend
            ),
            message,
        )
    assert_refused(lambda: vmap(lambda x: apply(params, x[None]))(torch.ones(4, 3)), message)


def in_a_line(x):
    return F.dropout(x, 0.5)  # the line


HIDDEN = {
    "dropout": (in_a_line, "aten.bernoulli.* at .*test_dropout.py:.*the line"),
    "rand": (lambda x: x + torch.rand(3), "aten.rand.default at .*test_dropout.py"),
    "pool": (nn.FractionalMaxPool2d(2, output_size=2), r"aten.rand.default at"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_draw_without_a_key_is_refused_by_its_operator(name):
    function, operator = HIDDEN[name]
    apply, _, _ = gd.modules.functional(Applied(function))
    x = normal(0, 2, 3, 3, 3)
    message = (
        rf"the forward pass draws from torch's generator \({operator}.* key=key\), or {OFF}.*gd.random"
    )
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        assert_refused(lambda: apply({}, x), message)
        assert_refused(lambda: grad(lambda x: apply({}, x).sum())(x), message)
        assert_refused(
            lambda: gd.scan(lambda c, x: (c, apply({}, x)), None, x[None], backend="native"), message
        )
        assert_refused(
            lambda: vmap(lambda x: apply({}, x[None]))(x), "the forward pass draws .*a random operation at"
        )
        assert torch.get_rng_state().equal(before)


def test_an_operator_that_is_turned_off_is_not_blamed():
    apply, _, _ = gd.modules.functional(Applied(lambda x: F.rrelu(x) + torch.rand(3)))
    with torch.random.fork_rng():
        assert_refused(lambda: apply({}, BATCH), r"generator \(aten.rand.default at")


@pytest.mark.parametrize("name", ["rand", "pool"])
def test_a_key_does_not_stand_for_other_draws(name):
    function, operator = HIDDEN[name]
    apply, _, _ = gd.modules.functional(Applied(function))
    x = normal(0, 2, 3, 3, 3)
    message = rf"{operator}.* and key= replaces dropout alone; draw from gd.random with a key of its own"
    assert_refused(lambda: apply({}, x, key=KEY), message)
    assert_refused(
        lambda: gd.scan(lambda c, x: (c, apply({}, x, key=KEY)), None, x[None], backend="native"), message
    )
    assert_refused(lambda: vmap(lambda x: apply({}, x[None], key=KEY))(x), "key= replaces dropout alone")


@pytest.mark.long
def test_a_trace_sees_what_a_forward_pass_asks_and_prints_beyond_the_mode_of_a_key():
    def prints(x):
        return F.dropout(x + len(f"{x}"), 0.5)

    def asks(x):
        return F.dropout(x, 0.5) * (2.0 if x.requires_grad else 3.0)

    def call(function):
        body = lambda c, x: (c, applied(function)(x))  # noqa: E731
        return lambda x: gd.scan(body, None, x, backend="native")[1].sum()

    for function, message in (
        (prints, "formats or prints a tensor at .*len"),
        (asks, "what autograd knows"),
    ):
        with pytest.raises(gd.BackendError, match=message):
            grad(call(function))(X)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.memory = nn.GRU(3, 2, num_layers=2, dropout=0.5).double()

    def forward(self, x):
        return self.memory(x)[0]


def mapped_inside(x):
    return vmap(lambda row: F.dropout(row, 0.5))(x)


def recomputed(x):
    return checkpoint(lambda x: F.dropout(x.exp(), 0.5), x, use_reentrant=False)


REFUSED = {
    "recurrent": (
        lambda: applied(Recurrent())(X),
        r"nn.GRU 'memory' in training mode draws its dropout .* use cells \(nn.GRUCell.*nn.Dropout between",
    ),
    "recurrent without a key": (lambda: applied(Recurrent())(X, key=None), "nn.GRU 'memory' in training"),
    "script": (
        lambda: applied(nn.Sequential(torch.jit.script(nn.Dropout(0.5))))(X),
        "RecursiveScriptModule '0' in training mode may draw inside its script",
    ),
    "checkpoint": (
        lambda: gd.batch_grad(lambda w, x: applied(recomputed)(w * x).mean())(X[0], X),
        "dropout inside torch.utils.checkpoint is run again for the gradient, without the key",
    ),
    "vmap": (lambda: applied(mapped_inside)(X), "dropout inside a vmap of the forward pass would draw one"),
    "int": (lambda: applied(F.dropout)(X, key=5), "TypeError: key must be int64 .* got 5.* by position"),
    "float": (lambda: applied(F.dropout)(X, key=ROWS.double()), r"TypeError: key must be int64 \[2\]"),
    "shape": (lambda: applied(F.dropout)(X, key=ROWS[None]), r"TypeError: key .* got shape \(1, 6, 2\)"),
    "rows": (
        lambda: applied(F.dropout)(X, key=ROWS[:4]),
        r"key has 4 rows, but the batch 6 \(the first tensor argument is \[6, 4, 3\]\)",
    ),
    "no key": (lambda: applied(nn.Tanh())(X, key=5), "TypeError: key must be int64"),
    "both masks": (
        lambda: applied(
            lambda x: F.scaled_dot_product_attention(
                x, x, x, attn_mask=causal(4, 4), is_causal=True, dropout_p=0.5
            )
        )(X),
        "attn_mask or is_causal=True, not both",
    ),
    "probability": (
        lambda: applied(lambda x: F.dropout(x, 1.5))(X),
        "probability has to be between 0 and 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_dropout_that_a_key_cannot_replace_is_refused(name):
    call, message = REFUSED[name]
    assert_refused(call, message)


def test_recurrent_layers_without_dropout_and_evaluated_scripts_go_on():
    module = Recurrent()
    module.memory.dropout = 0.0
    torch.testing.assert_close(applied(module)(X), module(X).detach())
    module = Recurrent()
    torch.testing.assert_close(applied(module)(X, training=False), module.eval()(X).detach())
    script = nn.Sequential(torch.jit.script(nn.Dropout(0.5)))
    assert_same_bits(applied(script)(X, training=False), X)


class Counting(nn.Module):
    """Buffers that are replaced, written in place, written by an operator unseen, and left alone."""

    def __init__(self):
        super().__init__()
        for name in ("replaced", "in_place", "unseen", "constant"):
            self.register_buffer(name, torch.zeros(3, dtype=torch.float64))
        self.writes = ("replaced", "in_place", "unseen")

    def forward(self, x):
        mean = x.detach().mean(0)
        if "replaced" in self.writes:
            self.replaced = self.replaced + mean
        if "in_place" in self.writes:
            self.in_place += mean
        if "unseen" in self.writes:
            F.batch_norm(x, self.unseen, torch.ones_like(self.unseen), training=True)
        return x + self.constant


def of_counting(*writes):
    module = Counting()
    module.writes = writes
    return gd.modules.functional(module)


TRANSFORMED = {
    "eager": lambda f, x: f(x),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: vmap(f)(x[None]),
    "native": lambda f, x: gd.scan(lambda c, x: (c, f(x)), None, x[None], backend="native"),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
}
BATCH = normal(2, 5, 3)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("buffer", ["replaced", "in_place", "unseen"])
def test_a_buffer_that_would_be_lost_is_refused(name, buffer):
    if buffer == "unseen" and name in ("vmap", "native"):
        pytest.skip("torch refuses the one, and does not show the other")
    apply, _, buffers = of_counting(buffer)
    message = (
        rf"Counting '' in training mode writes its buffer '{buffer}', .* gd.stateful\(loss_fn\) and apply"
    )
    if name == "vmap" and buffer == "in_place":  # torch's own, because the buffer is not mapped
        buffers = gd.tree.map(lambda leaf: leaf[None], buffers)
        assert_refused(lambda: vmap(lambda b: apply({}, BATCH, buffers=b))(buffers), message)
        return
    assert_refused(lambda: TRANSFORMED[name](lambda x: apply({}, x, buffers=buffers), BATCH), message)


@pytest.mark.parametrize("name", [name for name in TRANSFORMED if name != "vmap"])
def test_running_statistics_that_would_be_lost_are_refused(name):
    apply, params, buffers = gd.modules.functional(nn.Sequential(nn.BatchNorm1d(3)).double())
    message = (
        "nn.BatchNorm1d '0' in training mode writes its buffer '0.running_mean'.*or use training=False"
    )
    assert_refused(lambda: TRANSFORMED[name](lambda x: apply(params, x), BATCH), message)
    still = TRANSFORMED[name](lambda x: apply(params, x, buffers=buffers, training=False), BATCH)
    assert still is not None
    shared = vmap(lambda x: apply(params, x, buffers=buffers, return_buffers=True))
    alone = apply(params, BATCH, buffers=buffers, return_buffers=True)
    assert_agrees(gd.tree.map(lambda leaf: leaf[0], shared(BATCH[None])), alone, 1e-12)


@pytest.mark.parametrize("buffer", ["replaced", "in_place", "unseen"])
def test_a_written_buffer_is_new_and_any_other_the_very_tensor(buffer):
    apply, _, buffers = of_counting(buffer)
    output, updated = apply({}, BATCH, buffers=buffers, return_buffers=True)
    assert list(updated) == list(buffers)
    for name, leaf in updated.items():
        assert (leaf is buffers[name]) == (name != buffer)
        assert not buffers[name].any()
    share = 0.1 if buffer == "unseen" else 1.0
    torch.testing.assert_close(updated[buffer], share * BATCH.mean(0))
    own = apply({}, BATCH, return_buffers=True)[1]
    own["constant"].add_(1)  # which belongs to the caller
    assert_same_bits(apply({}, BATCH, return_buffers=True)[0], output)
    assert not apply({}, BATCH, return_buffers=True)[1][buffer].equal(own["constant"])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_buffers_are_carried_through_a_run(backend):
    apply, params, buffers = gd.modules.functional(
        nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    )

    def body(carry, x):
        buffers, key = carry
        key, now = gd.random.split(key)
        y, buffers = apply(params, x, buffers=buffers, return_buffers=True, key=now)
        return (buffers, key), y

    xs = normal(3, 4, 6, 3)
    (final, _), ys = gd.scan(body, (buffers, KEY), xs, backend=backend)
    norm = nn.BatchNorm1d(3).double()
    for x in xs:
        norm(x)
    torch.testing.assert_close(final["0.running_mean"], norm.running_mean)
    torch.testing.assert_close(final["0.running_var"], norm.running_var)
    assert final["0.num_batches_tracked"] == 4
    assert 0 < (ys == 0).sum() < ys.numel()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_stateful_loss_hands_its_keys_to_dropout(backend):
    apply, params, _ = gd.modules.functional(filled_linear())
    step = gd.make_step(
        gd.stateful(lambda p, x, buffers, key: (apply(p, x, key=key).square().mean(), buffers)), gd.adam()
    )
    start, xs = step.init(params, key=KEY), normal(4, 6, 3)
    index = gd.full_batch(6, 5)
    final, trajectory = gd.train(step, start, xs, index, 0.01, backend=backend)
    assert len(trajectory.loss.unique()) == 5
    assert not final.key.equal(KEY)
    first = apply(params, xs, key=ROWS).square().mean()
    torch.testing.assert_close(trajectory.loss[0], first)


def filled_linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).double()


def test_a_batch_without_samples_draws_nothing_that_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * nn.functional.dropout(self.scale, 0.5)

    apply, params, _ = gd.modules.functional(Scaled())
    assert apply(params, torch.ones(0, 3), key=KEY).shape == (0, 3)
