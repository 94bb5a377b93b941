"""Files of trees: what comes back is what went in, to the bit, and a damaged file is refused."""

import ast
import contextlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import checkpoint

from .assertions import assert_refused, assert_same
from .disk import filling

pytest.importorskip("safetensors")

PACKAGE = Path(checkpoint.__file__).parent
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64]


class Layer(NamedTuple):
    w: torch.Tensor
    b: torch.Tensor | None


def safetensors_torch():
    from safetensors import torch as module

    return module


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = draw(st.binary(min_size=64 * 16, max_size=64 * 16))
    if dtype == torch.bool:
        leaf = torch.tensor([byte % 2 == 1 for byte in raw])
    else:
        leaf = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    leaf = leaf[: int(np.prod(shape))].reshape(shape).clone()
    return leaf.permute(draw(st.permutations(range(leaf.ndim))))


KEYS = (
    st.text(max_size=4)
    | st.sampled_from(["a.b", "a\\", "a\\.b", "", "#1", "\\#1", "0"])
    | st.integers(-2, 2)
    | st.sampled_from([0.5, True, -0.5])
)
LEAVES = tensors() | st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.booleans()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.builds(gd.TrainState, inner, inner)
    ),
    max_leaves=8,
)


@pytest.mark.long
@given(tree=TREES)
@example(tree={"": [0], "0": 1})
@example(tree={0: {"5": 0}, 0.5: 1})
@example(tree={"#''": 0, "": 1, "\\#''": 2})
def test_a_tree_comes_back_to_the_bit(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    gd.save(path, tree)
    assert_same(gd.load(path), tree)
    assert_same(gd.load(path, like=tree), tree)


def test_names_are_flat_and_others_read_them(tmp_path):
    path = tmp_path / "a.safetensors"
    tree = {
        "layer": Layer(torch.ones(2, dtype=torch.bfloat16), None),
        "a.b": [torch.zeros(())],
        "a": {"b": [torch.ones(1)]},
    }
    gd.save(path, tree)
    read = safetensors_torch().load_file(path)
    assert sorted(read) == ["a.b.0", "a\\.b.0", "layer.w"]
    assert torch.equal(read["layer.w"], tree["layer"].w)
    with pytest.raises(gd.CheckpointError, match="layer is a Layer, a class that is not known here"):
        gd.load(path)
    assert_same(gd.load(path, like=tree), tree)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_reads_the_same_tensors(tmp_path):
    from torch.distributed import checkpoint

    tree = {
        "params": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()},
        "n": torch.tensor(3),
    }
    gd.save(tmp_path / "model.safetensors", tree)
    names = {"params.w": tree["params"]["w"], "params.b": tree["params"]["b"], "n": tree["n"]}
    found = {name: torch.zeros_like(leaf) for name, leaf in names.items()}
    checkpoint.load(found, storage_reader=checkpoint.HuggingFaceStorageReader(str(tmp_path)))
    assert_same(found, names)


def test_containers_of_every_kind_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    tree = OrderedDict(b=torch.ones(1), a=[{}, (), [], None, torch.tensor(2.0)])
    gd.save(path, tree)
    assert_same(gd.load(path), tree)


def test_a_key_may_have_the_name_of_the_metadata(tmp_path):
    tree = {"__metadata__": torch.ones(2), "\\__metadata__": torch.zeros(3), "a": {"__metadata__": 1}}
    gd.save(tmp_path / "a", tree)
    assert_same(gd.load(tmp_path / "a"), tree)
    assert_same(gd.load(tmp_path / "a", like=tree), tree)


@pytest.mark.parametrize("name", ["TrainState", "Trajectory"])
def test_a_class_of_the_user_is_not_ours_of_the_same_name(name, tmp_path):
    own = namedtuple(name, ["params", "more"])
    tree = own(torch.ones(2), torch.zeros(3))
    gd.save(tmp_path / "a", tree)
    with pytest.raises(gd.CheckpointError, match=f"a user's {name}, a class that is not known here"):
        gd.load(tmp_path / "a")
    back = gd.load(tmp_path / "a", like=tree)
    assert type(back) is own
    assert_same(back, tree)


def test_leaves_that_were_one_are_one_again(tmp_path):
    path, w = tmp_path / "a.safetensors", torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    gd.save(path, {"in": w, "out": w, "view": w[:2], "turned": w.mT, "copy": w.clone()})
    back = gd.load(path)
    assert back["in"] is back["out"]
    assert len({leaf.untyped_storage().data_ptr() for leaf in back.values()}) == 4
    assert torch.equal(back["turned"], w.mT)
    assert back["turned"].stride() == (1, 3)
    assert os.path.getsize(path) < 2000  # no bytes of the storage behind a view


def test_what_a_run_returns_comes_back(tmp_path):
    path, problem = tmp_path / "a.safetensors", gd.problems.stock_regression()
    step = gd.make_step(problem.loss_fn, gd.adam())
    index = gd.sample_batches(gd.random.key(0), 389, 8, 20)
    final, trajectory = gd.train(step, step.init(problem.params), problem.data, index, 0.1)
    gd.save(path, (final, trajectory))
    assert_same(gd.load(path), (final, trajectory))
    assert isinstance(gd.load(path)[1], gd.Trajectory)


def test_a_sweep_comes_back_with_its_grid(tmp_path):
    path = tmp_path / "a.safetensors"
    grid = gd.grid(f=[torch.sin, torch.cos], power=[1, 2], x=torch.linspace(0, 1, 3))
    result = gd.sweep(lambda f, power, x: {"y": f(x) ** power}, grid)
    gd.save(path, result)
    back = gd.load(path)
    assert back.to_records() == result.to_records()
    assert repr(back) == repr(result)
    assert torch.equal(
        back.select(f="sin", power=2).outputs["y"], result.select(f="sin", power=2).outputs["y"]
    )
    assert torch.equal(back.axes["x"], result.axes["x"])


def interrupted():
    problem = gd.problems.stock_regression()
    step = gd.make_step(problem.loss_fn, gd.adam())
    index = gd.sample_batches(gd.random.key(0), 389, 8, 300)

    def stop(done, total):
        if done >= 100:
            raise KeyboardInterrupt

    def run(**options):
        return gd.train(step, step.init(problem.params), problem.data, index, 0.1, **options)

    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(progress=stop)
    return run, caught.value


@pytest.mark.long
def test_an_interruption_comes_back_and_is_resumed(tmp_path):
    path = tmp_path / "a.safetensors"
    run, error = interrupted()
    gd.save(path, error)
    back = gd.load(path)
    assert str(back) == str(error)
    assert_same(back.state, error.state)
    assert_same(run(resume=back), run())


CIRCLE = {"a": [1]}
CIRCLE["a"].append(CIRCLE)
BAD = {
    "an object": (object(), "the tree is <object"),
    "an array": ({"w": np.ones(2)}, r"w is float64\[2\].* make it a tensor with torch.as_tensor"),
    "a number of NumPy": ({"w": np.float64(3)}, r"w is np.float64\(3.0\).* make it a tensor"),
    "a module": (
        {"net": torch.nn.Linear(2, 2)},
        r"net is Linear\(.* its tensors are module.state_dict\(\)",
    ),
    "a circle": (CIRCLE, "the tree is nested too deeply for a file, or contains itself"),
    "a dtype": (
        {"w": torch.ones(2).byte().view(torch.bits8)},
        "w is torch.bits8, which safetensors does not",
    ),
    "a sparse tensor": ({"w": torch.eye(2).to_sparse()}, "w is .* without values of its own"),
    "meta": ([torch.ones(2, device="meta")], "0 is .* without values of its own"),
    "a key": ({(1, 2): torch.ones(1)}, r"the tree has the key \(1, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_file_cannot_hold_is_named(name, tmp_path):
    tree, words = BAD[name]
    with pytest.raises(gd.CheckpointError, match=words):
        gd.save(tmp_path / "a", tree)
    assert not list(tmp_path.iterdir())


def test_a_transformed_tensor_is_refused(tmp_path):
    def f(x):
        gd.save(tmp_path / "a", {"x": x})
        return x

    with pytest.raises(gd.CheckpointError, match="save it outside of vmap and grad"):
        torch.func.vmap(f)(torch.ones(2))


DIFFERENT = {
    "shape": ({"w": torch.ones(3), "b": None}, r"w is float32\[2\] in it, float32\[3\] in like"),
    "dtype": ({"w": torch.ones(2).double(), "b": None}, r"w is float32\[2\] in it, float64\[2\] in like"),
    "missing": ({"w": torch.ones(2), "b": None, "c": torch.ones(1)}, "c is missing in it"),
    "more": ({"b": None}, "w is in it, not in like"),
    "no None": ({"w": torch.ones(2), "b": torch.ones(1)}, r"b is None in it, float32\[1\] in like"),
    "kind": ([torch.ones(2)], "the tree is dict in it, list in like"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_tree_is_refused_by_name(name, tmp_path):
    like, words = DIFFERENT[name]
    gd.save(tmp_path / "a", {"w": torch.ones(2), "b": None})
    with pytest.raises(gd.CheckpointError, match=f"a: it differs from like: .*{words}"):
        gd.load(tmp_path / "a", like=like)


def test_the_order_of_keys_does_not_matter(tmp_path):
    gd.save(tmp_path / "a", {"w": torch.ones(2), "b": torch.zeros(1)})
    assert list(gd.load(tmp_path / "a", like={"b": torch.ones(1), "w": torch.ones(2)})) == ["b", "w"]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.safetensors"
    gd.save(path, {"w": torch.arange(3.0), "n": 1})
    return path


@pytest.mark.long
def test_every_changed_byte_and_every_missing_end_is_told(small):
    written = small.read_bytes()
    other = small.with_name("other")
    changed = [
        written[:i] + bytes([byte ^ 1 << i % 8]) + written[i + 1 :] for i, byte in enumerate(written)
    ]
    cut = [written[:i] for i in range(len(written))]
    for content in [*changed, *cut, written + b"\0"]:
        other.write_bytes(content)
        with pytest.raises(gd.CheckpointCorruptError, match="other is damaged"):
            gd.load(other)
    assert gd.load(small)["n"] == 1


def test_a_missing_end_tells_both_sizes(small):
    written = small.read_bytes()
    small.write_bytes(written[:-4])
    with pytest.raises(
        gd.CheckpointCorruptError, match=f"expected {len(written)} bytes, found {len(written) - 4}"
    ):
        gd.load(small)


def rewritten(path, about):
    """A file with another description, and a digest that is right."""
    tensors, _ = checkpoint._file.read(path)
    checkpoint._file.write(path, tensors, {"gdfunc": about})


def test_a_later_format_is_told(small):
    _, metadata = checkpoint._file.read(small)
    rewritten(small, json.dumps(json.loads(metadata["gdfunc"]) | {"format": 2}))
    with pytest.raises(
        gd.CheckpointVersionError, match="it has format 2, but this gdfunc reads formats up to 1"
    ):
        gd.load(small)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(
        ["tensor", "dict", "list", "value", "none", "TrainState", "SweepResult", "Grid", "w"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=10,
)


@pytest.mark.long
@given(node=JSON, ties=JSON)
def test_a_forged_description_is_an_error_of_ours(node, ties, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "forged"
    about = json.dumps({"format": 1, "tree": node, "ties": ties})
    checkpoint._file.write(path, {"w": torch.ones(2)}, {"gdfunc": about})
    for like in (None, {"w": torch.ones(2)}):
        with contextlib.suppress(gd.CheckpointError):
            gd.load(path, like=like)


@given(content=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_what_is_no_checkpoint_is_an_error_of_ours(content, length, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(struct.pack("<Q", length) + content)
    with pytest.raises(gd.CheckpointCorruptError):
        gd.load(path)


def test_a_file_of_others_is_told(tmp_path):
    safetensors_torch().save_file({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(gd.CheckpointCorruptError, match="was not written by gd\\.save: it has no digest"):
        gd.load(tmp_path / "a")


def test_a_file_is_its_owners_alone_and_follows_links(tmp_path):
    gd.save(tmp_path / "a", torch.ones(1))
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "a")
    gd.save(tmp_path / "link", torch.zeros(1))
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(gd.load(tmp_path / "a"), torch.zeros(1))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        gd.save(tmp_path, torch.zeros(1))
    with pytest.raises(FileNotFoundError):
        gd.save(tmp_path / "none" / "a", torch.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    gd.save(path, torch.ones(2))
    with filling() as fill:
        fill(4096)
        with pytest.raises(OSError, match="a could not be written, and is as it was"):
            gd.save(path, torch.ones(10_000))
    assert torch.equal(gd.load(path), torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


POINTS = [
    "tempfile.mkdtemp",
    "safetensors.torch.save_file",
    "os.fsync",
    "os.chmod",
    "os.replace",
    "shutil.rmtree",
]
CHILD = """
import os, shutil, signal, sys, tempfile
import torch, safetensors.torch
import gdfunc as gd

module, _, name = sys.argv[2].rpartition(".")
module = sys.modules[module]
original, after = getattr(module, name), sys.argv[3] == "after"


def killed(*args, **kwargs):
    if after:
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)


setattr(module, name, killed)
gd.save(sys.argv[1], torch.full((1000,), 2.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_process_leaves_the_old_file_or_the_new_one(point, moment, tmp_path):
    path = tmp_path / "a"
    gd.save(path, torch.full((1000,), 1.0))
    done = subprocess.run([sys.executable, "-c", CHILD, path, point, moment], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert gd.load(path).unique().tolist() in ([1.0], [2.0])
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["a"]
    gd.save(path, torch.ones(1))  # and removes what was left
    assert list(tmp_path.iterdir()) == [path]


def test_the_room_runs_nothing_of_a_file():
    for file in PACKAGE.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not names & {
            "pickle",
            "eval",
            "exec",
            "import_module",
            "__import__",
            "allow_pickle",
            "marshal",
        }


def test_the_classes_of_the_package_have_one_name_each():
    from gdfunc import testing  # noqa: F401  (whose classes are in no run)

    seen = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("gdfunc.") and not name.startswith("gdfunc.testing"):
            for cls in vars(module).values():
                if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
                    assert seen.setdefault(cls.__name__, cls) is cls


@pytest.mark.long
def test_a_file_that_many_write_at_once_is_one_of_theirs(tmp_path):
    path = tmp_path / "file"

    def write(i):
        for _ in range(40):
            gd.save(path, {"i": i})

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(write, range(8))] == [None] * 8
    assert gd.load(path)["i"] in range(8)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("to_folder", [True, False])
def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path, to_folder):
    file = tmp_path / "file"
    file.touch()

    def train(path):
        step = gd.make_step(lambda w, batch: w**2)
        gd.train(step, torch.tensor(1.0), None, gd.full_batch(1, 2), 0.1, checkpoint_to=path)

    def sweep(path):
        gd.sweep(lambda lr: lr, gd.grid(lr=[1.0]), checkpoint_to=path)

    if to_folder:
        for call in (train, gd.load, lambda path: gd.save(path, {})):
            assert_refused(lambda call=call: call(tmp_path), "IsADirectoryError: .* is a folder; give")
            assert_refused(lambda call=call: call(file / "b"), "NotADirectoryError: .*file is a file")
            assert_refused(lambda call=call: call(3), "TypeError: .* is int, not the path of a file")
    else:
        for path in (file, file / "b"):
            assert_refused(lambda path=path: sweep(path), "NotADirectoryError: .* a sweep writes a folder")
