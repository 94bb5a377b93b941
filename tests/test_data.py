"""The door for data: what becomes tensors, and what is refused with a line that works."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import gdfunc as gd
from gdfunc import _tree
from tests.assertions import assert_same_bits

X, Y = torch.linspace(-1, 1, 6), torch.linspace(0, 3, 6)
W, KEY = torch.tensor(0.5), gd.random.key(0)
INDEX = gd.epoch_batches(KEY, 6, 2, 3)


def loss_fn(w, batch):
    x, y = batch
    return ((x * w - y) ** 2).mean()


def _step_of(method):
    def run(data, w=W):
        step = method(loss_fn, data)
        return step(step.init(w), torch.tensor([1, 3]), 0.1)

    return run


DOORS = {
    "train": lambda data: gd.train(gd.make_step(loss_fn), W, data, INDEX, 0.1)[0],
    "sweep": lambda data: gd.sweep(
        lambda lr: gd.train(gd.make_step(loss_fn), W, data, INDEX, lr), gd.grid(lr=[0.1, 0.2])
    ).outputs[0],
    "take": lambda data: gd.take(data, torch.tensor([2, 0])),
    "scan": lambda data: gd.scan(lambda w, xy: (w + xy[0] * xy[1], None), W, data)[0],
    "a step": lambda data, w=W: gd.make_step(loss_fn)(w, data, 0.1),
    "line search": lambda data: _taken(gd.methods.line_search(loss_fn), data),
    "batch_grad": lambda data, w=W: gd.batch_grad(loss_fn)(w, data),
    "per_sample_grad": lambda data, w=W: gd.per_sample_grad(loss_fn)(w, data),
    "low_precision": lambda data: gd.low_precision(loss_fn, torch.bfloat16)(W, data),
    "svrg": _step_of(gd.methods.svrg),
    "saga": _step_of(gd.methods.saga),
    "pad": lambda data: gd.privacy.pad(data).samples,
}


def _taken(step, batch):
    return step(step.init(W), batch, 0.1)


each_door = pytest.mark.parametrize("door", DOORS)


@each_door
def test_a_tensor_dataset_is_the_tuple_of_its_tensors(door):
    assert_same_bits(DOORS[door](TensorDataset(X, Y)), DOORS[door]((X, Y)))


def test_a_tensor_dataset_is_a_leaf_like_others():
    batch = gd.take({"seen": TensorDataset(X, Y), "z": Y}, torch.tensor([1]))
    assert_same_bits(batch, {"seen": (X[1:2], Y[1:2]), "z": Y[1:2]})


class Doubled(TensorDataset):
    def __getitem__(self, i):
        return tuple(2 * tensor for tensor in super().__getitem__(i))


class Rows(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i], Y[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class HuggingFace:
    """The part of `datasets.Dataset` that its remedy uses."""

    __module__ = "datasets.arrow_dataset"

    def with_format(self, kind):
        assert kind == "torch"
        return self

    def __getitem__(self, rows):
        return {"x": X[rows], "y": Y[rows]}


class Streamed(Stream):
    __module__ = "datasets.iterable_dataset"

    def with_format(self, kind):
        assert kind == "torch"
        return self


class Column:
    __module__ = "datasets.arrow_dataset"

    def __getitem__(self, rows):
        return X.tolist()[rows]


class Splits(dict):
    __module__ = "datasets.dataset_dict"


SETS = {  # data, and the line that the refusal names for it
    "a data set that computes": (
        Doubled(X, Y),
        "torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])",
    ),
    "a data set": (Rows(), "torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])"),
    "a stream": (Stream(), "torch.utils.data.default_collate(list(dataset))"),
    "a subset": (
        Subset(TensorDataset(X, Y), [4, 1]),
        "gd.take(subset.dataset, torch.as_tensor(subset.indices))",
    ),
    "a stream of Hugging Face": (
        Streamed(),
        'torch.utils.data.default_collate(list(dataset.with_format("torch")))',
    ),
    "a column of Hugging Face": (Column(), "torch.as_tensor(column[:])"),
    "splits of Hugging Face": (Splits(train=X), "dataset['train']"),
    "Hugging Face": (HuggingFace(), 'dataset.with_format("torch")[:]'),
    "an iterator": (iter([(X[0], 1.0), (X[1], 2.0)]), "torch.utils.data.default_collate(list(samples))"),
    "other": (range(3), "torch.as_tensor"),
    "a generator": (
        ((x, y) for x, y in zip(X, Y, strict=True)),
        "torch.utils.data.default_collate(list(samples))",
    ),
    "a list of samples": ([(X[0], 1), (X[1], 2)], "torch.utils.data.default_collate(data)"),
    "a list of dicts": (
        [{"x": np.ones(3), "y": 1}, {"x": np.ones(3), "y": 0}],
        "torch.utils.data.default_collate(data)",
    ),
    "a list of numbers": ([1.0, 2.0, 3.0], "torch.tensor(data)"),
    "a list of rows": ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "torch.tensor(data)"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_refused_with_the_line_that_works(name):
    data, line = SETS[name]
    with pytest.raises(TypeError, match=rf"^data is .*{re.escape(line)}$"):
        gd.take(data, torch.tensor([1, 0]))
    names = {
        "data": data,
        "dataset": data,
        "subset": data,
        "samples": data,
        "column": data,
        "gd": gd,
        "torch": torch,
    }
    data = eval(line, names)
    leaves = gd.take(data(SETS[name][0]) if callable(data) else data, torch.tensor([1, 0]))
    assert all(len(leaf) == 2 for leaf in tree_leaves(leaves))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dataset", [TensorDataset(X, Y), Rows()], ids=["tensors", "computed"])
def test_a_loader_is_refused_with_its_data_set_and_a_plan(dataset, shuffle):
    loader = DataLoader(dataset, batch_size=2, shuffle=shuffle)
    with pytest.raises(TypeError, match="data is DataLoader") as refusal:
        gd.train(gd.make_step(loss_fn), W, loader, INDEX, 0.1)
    words = re.search(r"pass (.*), and as the index .*: (gd.epoch_batches\(.*\))$", str(refusal.value))
    names = {"loader": loader, "gd": gd, "torch": torch, "key": KEY, "epochs": 3}
    data, index = (eval(line, names) for line in words.groups())
    final, _ = gd.train(gd.make_step(loss_fn), W, data, index, 0.1)
    if shuffle:
        assert_same_bits(final, DOORS["train"]((X, Y)))
        return
    w = W
    with torch.random.fork_rng():  # because a loader draws, even one that does not shuffle
        batches = [batch for _ in range(3) for batch in loader]
    for batch in batches:
        w, _ = gd.make_step(loss_fn)(w, batch, 0.1)
    assert_same_bits(final, w)


ROWS = [np.ones(2), np.zeros(2)]
OBJECTS = np.empty(2, dtype=object)
OBJECTS[:] = ROWS
RAGGED = np.empty(2, dtype=object)
RAGGED[:] = [np.ones(2), np.ones(3)]
ARRAYS = {
    "numbers": (np.array([1, 2.5], dtype=object), "x.astype('float32')"),
    "rows": (OBJECTS, "np.stack(x).astype('float32')"),
    "ragged": (
        RAGGED,
        "torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in x], batch_first=True)",
    ),
    "texts as objects": (
        np.array(["b", "a"], dtype=object),
        "np.unique(x.astype(str), return_inverse=True)[1]",
    ),
    "texts": (np.array(["b", "a"]), "np.unique(x, return_inverse=True)[1]"),
    "structured": (
        np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
        "{name: x[name] for name in x.dtype.names}",
    ),
    "dates": (
        np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"),
        "((x - x.min()) / np.timedelta64(1, 's')).astype('float32')",
    ),
    "durations": (
        np.array([1, 2], dtype="timedelta64[s]"),
        "((x - x.min()) / np.timedelta64(1, 's')).astype('float32')",
    ),
    "long double": (np.ones(2, dtype=np.longdouble), "x.astype('float32')"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_torch_cannot_hold_is_refused_with_the_line_that_works(name):
    array, line = ARRAYS[name]
    pattern = rf"^data\['x'\] is an array of dtype .*{re.escape(line)}"
    with pytest.raises(TypeError, match=pattern):
        gd.take({"x": array, "y": X}, torch.tensor([1, 0]))
    with pytest.raises(TypeError, match=r"^batch\['x'\] is an array"):
        gd.batch_grad(loss_fn)(W, {"x": array, "y": X})
    found = gd.take(eval(line, {"x": array, "np": np, "torch": torch}), torch.tensor([1, 0]))
    assert all(len(leaf) == 2 for leaf in tree_leaves(found))


def test_an_array_with_masked_entries_is_refused_because_a_tensor_would_lose_the_mask():
    x = np.ma.masked_array(np.arange(3.0), mask=[False, True, False])
    with pytest.raises(
        TypeError, match=r"data\['x'\] is an array with masked entries.*x.filled\(0\).*~x.mask"
    ):
        gd.take({"x": x}, torch.tensor([1]))
    assert gd.take({"x": x[[0, 2]]}, torch.tensor([1]))["x"] == 2.0
    assert gd.take((x.filled(0), ~x.mask), torch.tensor([1])) == (0.0, False)


def test_a_list_of_samples_that_is_a_tree_as_well_is_named_where_the_plan_leaves_it():
    samples = [torch.full((2,), float(i)) for i in range(5)]
    step = gd.make_step(lambda w, x: (w * x).square().mean())
    with pytest.raises(IndexError, match=r"0 to 4, but data has samples 0 to 1; the 5 entries of a list"):
        gd.train(step, W, samples, gd.full_batch(5, 3), 0.1)
    gd.train(step, W, torch.utils.data.default_collate(samples), gd.full_batch(5, 3), 0.1)


@each_door
@pytest.mark.parametrize("data", [DataLoader(TensorDataset(X, Y)), OBJECTS, [(1.0, 2.0), (3.0, 4.0)]])
def test_every_door_refuses(door, data):
    with pytest.raises(
        TypeError, match=r"^(data|batch|xs) is (DataLoader|an array of dtype object|a list)"
    ):
        DOORS[door](data)


def _frame(pandas):
    """A column for every kind that pandas has, each with the line that the refusal names."""
    objects = np.empty(2, dtype=object)
    objects[:] = [[1.0, 2.0], [3.0, 4.0]]
    dates = pandas.to_datetime(["2020-01-01", "2020-01-02"])
    seconds = "(df[{0!r}] - df[{0!r}].min()).dt.total_seconds().astype('float32')"
    dummies = "pandas.get_dummies(df, columns=[{0!r}], dtype='float32')"
    return {
        "text": (["b", "a"], dummies),
        "text as objects": (np.array(["b", "a"], dtype=object), dummies),
        "category": (pandas.Categorical(["b", "a"]), dummies),
        "numbers as objects": (np.array([1, 2.5], dtype=object), "df.astype({{{0!r}: 'float32'}})"),
        "nullable": (pandas.array([1, 2], dtype="Int64"), "df.astype({{{0!r}: 'int64'}})"),
        "nullable float": (pandas.array([1, 2], dtype="Float64"), "df.astype({{{0!r}: 'float32'}})"),
        "nullable bool": (pandas.array([True, False], dtype="boolean"), "df.astype({{{0!r}: 'bool'}})"),
        "missing": (
            pandas.array([1, None], dtype="Int64"),
            "df.dropna(subset=[{0!r}]).astype({{{0!r}: 'float32'}})",
        ),
        "date": (dates, "df.assign(**{{{0!r}: " + seconds + "}})"),
        "zoned": (dates.tz_localize("UTC"), "df.assign(**{{{0!r}: " + seconds + "}})"),
        "duration": (
            dates - dates[0],
            "df.assign(**{{{0!r}: df[{0!r}].dt.total_seconds().astype('float32')}})",
        ),
        "rows": (objects, "{{**df.drop(columns=[{0!r}]), {0!r}: np.stack(df[{0!r}])}}"),
        "period": (dates.to_period("D"), "df.drop(columns=[{0!r}])"),
    }


@pytest.mark.long
def test_a_frame_of_numbers_is_the_dict_of_its_columns():
    pandas = pytest.importorskip("pandas")
    columns = {
        "x": X.numpy(),
        "label": np.arange(6),
        "seen": np.arange(6) > 2,
        3: Y.numpy(),
    }
    frame = pandas.DataFrame(columns, index=[*"uvwxyz"])
    wanted = {name: torch.as_tensor(column) for name, column in columns.items()}
    assert_same_bits(gd.take(frame, INDEX[0]), gd.take(wanted, INDEX[0]))
    targets = frame["x"], frame[3]
    for door in DOORS:
        assert_same_bits(DOORS[door](targets), DOORS[door]((X, Y)))

    def loss(w, batch):
        return loss_fn(w, (batch["x"], batch[3]))

    final, _ = gd.train(gd.make_step(loss), W, frame, INDEX, 0.1)
    assert_same_bits(final, DOORS["train"]((X, Y)))


def test_a_column_of_no_numbers_is_refused_with_the_line_that_works():
    pandas = pytest.importorskip("pandas")
    for name, (values, line) in _frame(pandas).items():
        frame, line = pandas.DataFrame({"x": [1.0, 2.0], name: values}), line.format(name)
        with pytest.raises(
            TypeError, match=rf"^data\['{name}'\] is a column of dtype .*{re.escape(line)}$"
        ):
            gd.take(frame, torch.tensor([0]))
        with pytest.raises(TypeError, match=rf"^batch\[1\]\['{name}'\] is a column of dtype"):
            gd.batch_grad(loss_fn)(W, (X[:2], frame))
        taken = gd.take(eval(line, {"df": frame, "pandas": pandas, "np": np}), torch.tensor([0]))
        assert all(len(leaf) == 1 for leaf in taken.values())


def test_a_series_of_no_numbers_is_refused_with_the_line_that_works():
    pandas = pytest.importorskip("pandas")
    for name, (values, _) in _frame(pandas).items():
        series = pandas.Series(values)
        with pytest.raises(TypeError, match=r"^data\[1\] is a column of dtype") as refusal:
            gd.take((X, series), torch.tensor([0]))
        if name != "period":
            line = re.search(r": ([^:]*)$", str(refusal.value))[1]
            taken = gd.take(eval(line, {"series": series, "pandas": pandas, "np": np}), torch.tensor([0]))
            assert len(taken) == 1


def test_columns_of_one_name_are_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([[1.0, 2.0]], columns=["a", "a"])
    with pytest.raises(
        TypeError, match=r"^data is a DataFrame with two columns 'a', .*df.columns.duplicated"
    ):
        gd.take(frame, torch.tensor([0]))
    assert gd.take(frame.loc[:, ~frame.columns.duplicated()], torch.tensor([0]))["a"] == 1.0


@pytest.mark.long
def test_pandas_is_not_imported_for_users_who_have_not():
    code = """
import sys, numpy, torch, gdfunc
gdfunc.take({"x": numpy.ones(3)}, torch.tensor([1]))
try:
    gdfunc.take(iter([]), torch.tensor([1]))
except TypeError:
    print("pandas" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_dtype_that_does_not_fit_is_refused_with_the_method_that_converts(dtype):
    array = np.ones(4, dtype="float32" if dtype == torch.float64 else "float64")
    for door in ("batch_grad", "per_sample_grad", "a step", "svrg"):
        with pytest.raises(ValueError, match="convert a tensor with") as refusal:
            DOORS[door]((torch.ones(4, dtype=dtype), array), W.to(dtype))
        lines = re.search(r"a tensor with (x\S+), an array or a column with (.*)$", str(refusal.value))
        for line, x in zip(lines.groups(), [torch.from_numpy(array), array], strict=True):
            assert _tree.as_tensors(eval(line, {"x": x, "torch": torch})).dtype == dtype


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_is_named_where_the_loss_stops_being_finite(backend, value):
    x = torch.ones(9, 2, 3)
    x[7, 1, 2] = value
    data = {"label": torch.arange(9), "x": x}

    def loss(w, batch):
        return (w * batch["x"].sum((1, 2)) - batch["label"]).square().mean()

    index = torch.tensor([[0, 1], [2, 8], [3, 7], [7, 4]])
    with pytest.raises(
        gd.NonFiniteError, match=r"loss is .* step 2, and neither is data\['x'\]\[7\]"
    ) as error:
        gd.train(gd.make_step(loss), W, data, index, 1e-3, check_finite="loss", backend=backend)
    assert (error.value.step, error.value.sample) == (2, "data['x'][7]")
    with pytest.raises(gd.NonFiniteError, match=r"after step 0; \.state") as error:
        gd.train(gd.make_step(lambda w, batch: w * torch.inf), W, X, INDEX, 1e-3, check_finite="loss")
    assert error.value.sample is None


def test_a_sample_of_a_single_tensor_is_named_by_its_row():
    x = X.clone()
    x[4] = torch.nan
    step = gd.make_step(lambda w, x: (w * x).square().mean())
    with pytest.raises(gd.NonFiniteError, match=r"neither is data\[4\] in its batch"):
        gd.train(step, W, x, gd.full_batch(6, 5), 0.1, check_finite="all")
    with pytest.raises(gd.NonFiniteError) as error:
        gd.train(gd.make_step(lambda w, _: w / 0), W, None, gd.full_batch(1, 5), 0.1, check_finite="all")
    assert error.value.sample is None
