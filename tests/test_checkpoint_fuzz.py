"""Ten thousand damaged and forged files: each is an error of ours, within bounds of memory."""

import subprocess
import sys

import pytest

pytest.importorskip("safetensors")

CHILD = """
import io, random, resource, sys
from pathlib import Path

import torch
import gdfunc as gd
from gdfunc.checkpoint import _file

count, path = int(sys.argv[1]), Path(sys.argv[2])
step = gd.make_step(lambda params, batch: (params["w"] ** 2).sum(), gd.adam())
state = step.init({"w": torch.arange(6.0).reshape(2, 3)})
pair = torch.ones(2, dtype=torch.complex64)
tree = {"state": state, "rows": [1, 2.5, None, "text", True], "a.b": (pair, pair)}
gd.save(path, tree)
written, draw = path.read_bytes(), random.Random(0)
gd.load(path)
torch.ones(3).sum()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))  # a quarter of a GiB more


def changed(content):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        i, j = sorted(draw.choices(range(len(content) + 1), k=2))
        kind = draw.randrange(6)
        if kind == 0 and i < len(content):
            content[i] = draw.randrange(256)
        elif kind == 1:
            del content[i : min(j, i + 40)]
        elif kind == 2:
            content[i:i] = bytes(draw.choices(range(256), k=draw.randrange(1, 20)))
        elif kind == 3:
            content[i:i] = content[j : j + 30]
        elif kind == 4:  # a number in the header
            digits = [k for k in range(8, len(content)) if 48 <= content[k] <= 57]
            if digits:
                content[draw.choice(digits)] = draw.choice(b"0123456789")
        else:
            content[:8] = draw.choice([len(content), 2**62, 2**64 - 1, 7, 0]).to_bytes(8, "little")
    return bytes(content)


def signed(content):
    '''Give a file the digest and size that it says it has, so that what comes after the check is tested.'''
    header = _file._header(io.BytesIO(content))
    made = {_file._SIZE: lambda c: f"{len(c):020}", _file._DIGEST: lambda c: _file._digest(io.BytesIO(c))}
    for pattern, digits in made.items():
        found = pattern.search(header)
        if found:
            start = 8 + found.start(1)
            put = digits(content).encode()
            content = content[:start] + put + content[start + len(put) :]
            header = content[8 : 8 + len(header)]
    return content


refused = read = 0
for i in range(count):
    content = changed(written)
    path.write_bytes(signed(content) if i % 2 else content)
    for like in (None, tree):
        try:
            gd.load(path, like=like)
            read += 1
        except gd.CheckpointError:
            refused += 1
print(refused, read)
"""


@pytest.mark.long
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_fuzzed_file_is_an_error_of_ours_within_bounds_of_memory(count, tmp_path):
    command = [sys.executable, "-c", CHILD, str(count), str(tmp_path / "fuzzed")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, read = map(int, done.stdout.split())
    assert refused + read == 2 * count
    assert refused > count
    assert read  # some changes are in a number of a tensor, and signed
