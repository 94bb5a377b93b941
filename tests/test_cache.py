"""The directory of compiled code is the user's alone, and others cannot put code there or replace it."""

import grp
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gdfunc as gd
from gdfunc._scan.backends import _cache
from gdfunc._scan.backends._cache import private_directory

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gdfunc"


def refused(message):
    return pytest.raises(gd.BackendError, match=message)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
@pytest.mark.parametrize("backend", ["native", "inductor"])
def test_directory_open_to_others_is_refused_before_anything_is_compiled(mode, backend, cache):
    cache.mkdir()
    cache.chmod(mode)
    with refused(f"{cache} is open to others \\(mode {mode:04o}\\), .*chmod 700"):
        gd.scan(lambda c, x: (c * 0.123456789, c), torch.tensor(1.0), length=2, backend=backend)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda cache: cache.symlink_to(cache.parent), "{} is a link or a file"),
        (lambda cache: cache.symlink_to(cache.parent / "nowhere"), "cache directory cannot be made"),
        (lambda cache: cache.touch(), "{} is a link or a file"),
    ],
)
def test_link_or_file_in_place_of_the_directory_is_refused(make, message, cache):
    cache.parent.chmod(0o700)
    make(cache)
    with refused(message.format(cache)):
        private_directory()


def test_directory_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with refused(rf"{cache} belongs to user \d+, not to you \(12345\), .* set XDG_CACHE_HOME"):
        private_directory()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_directory_that_others_could_replace_is_refused(mode, tmp_path, monkeypatch):
    parent = tmp_path / "shared"
    (parent / "caches").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(parent / "caches"))
    parent.chmod(mode)
    monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name="staff", gr_mem=[]))
    with refused(rf"{parent} can be written by others \(mode {mode:04o}\), .*could replace .*chmod go-w"):
        private_directory()
    parent.chmod(mode | stat.S_ISVTX)  # as /tmp: others cannot rename what is not theirs
    assert private_directory() == parent / "caches" / "gdfunc"


def test_parent_behind_a_link_is_checked_too(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    (shared / "caches").mkdir(parents=True)
    shared.chmod(0o777)
    (tmp_path / "link").symlink_to(shared / "caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    with refused(f"{shared} can be written by others"):
        private_directory()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_parent_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs" / "caches").mkdir(parents=True)
    os.chown(tmp_path / "theirs", 12345, -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs" / "caches"))
    with refused("theirs belongs to user 12345, who could replace"):
        private_directory()


@pytest.mark.parametrize(("members", "accepted"), [([], True), (["me"], True), (["me", "you"], False)])
def test_parent_that_only_the_users_own_group_can_write_is_accepted(members, accepted, cache, monkeypatch):
    import pwd

    monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name="me", gr_mem=members))
    cache.parent.chmod(0o775)
    if accepted:
        assert private_directory() == cache
    else:
        with refused(f"{cache.parent} can be written by others"):
            private_directory()


def test_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with refused("cannot be made .*set XDG_CACHE_HOME to a directory of your own"):
        private_directory()


def test_directory_and_missing_parents_are_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        made = private_directory()
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b" / "gdfunc"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, *made.parents[:2])] == [0o700] * 3


@pytest.mark.parametrize("value", [None, "", "relative", "./relative"])
def test_relative_or_empty_setting_is_ignored(value, tmp_path, monkeypatch):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert private_directory() == tmp_path / ".cache" / "gdfunc"
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]


def fill(directory, **files):
    """Write files as a compiler would, in a new process."""
    _cache._checked.clear()
    with _cache.guarded(directory):
        for name, text in files.items():
            (directory / name).write_text(text)


def contents(directory, limit=_cache.LIMIT):
    """Return what a new process finds."""
    _cache._checked.clear()
    with _cache.guarded(directory, limit):
        return {path.name: path.read_text() for path in directory.glob("[!.]*")}


def test_changed_and_unfinished_files_are_deleted_once_per_process(tmp_path):
    directory = tmp_path / "inductor"
    fill(directory, a="1", b="22")
    fill(directory, c="333", b="new")
    assert contents(directory) == {"a": "1", "b": "new", "c": "333"}
    (directory / "a").write_text("2")
    (directory / "b").write_text("")
    (directory / "killed").write_text("half of")
    assert contents(directory) == {"c": "333"}
    (directory / "c").write_text("334")
    with _cache.guarded(directory):
        assert (directory / "c").exists()  # checked before in this process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists the files")
def test_added_files_their_digests_and_directories_are_on_the_disk(tmp_path, monkeypatch):
    done, fsync = [], os.fsync

    def synced(file):
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path))
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    (tmp_path / "deeper").mkdir()
    fill(tmp_path, **{"a": "1", "deeper/b": "22"})
    assert sorted(done) == [".", ".sha256", "a", "deeper", "deeper/b"]


def test_files_of_a_process_that_compiles_now_stay(tmp_path):
    directory = tmp_path / "inductor"
    fill(directory, a="1")
    with _cache.guarded(directory):
        (directory / "busy").write_text("half of")
        (directory / "a").write_text("2")
        assert contents(directory, limit=0) == {"busy": "half of"}


def test_full_directory_is_emptied(tmp_path):
    directory = tmp_path / "inductor"
    fill(directory, a="1", b="22")
    assert contents(directory, limit=3) == {"a": "1", "b": "22"}
    assert contents(directory, limit=2) == {}


def test_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "inductor").touch()
    with refused("inductor cannot be written .*set XDG_CACHE_HOME"), _cache.guarded(tmp_path / "inductor"):
        pass


FRESH = """
import torch, gdfunc as gd
print(gd.scan(lambda c, x: (c + x, c), torch.zeros(3), torch.ones(5, 3), backend="BACKEND")[0].tolist())
"""


@pytest.mark.slow  # the laws above hold it within one process
@pytest.mark.parametrize(("backend", "suffix"), [("native", ".so"), ("inductor", ".main.so")])
def test_truncated_library_does_not_kill_a_new_process(backend, suffix, cache):
    def run():
        script = FRESH.replace("BACKEND", backend)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.stdout, done.returncode) == ("[5.0, 5.0, 5.0]\n", 0), done.stderr

    run()
    (library,) = cache.rglob(f"*{suffix}")
    os.truncate(library, library.stat().st_size // 2)
    run()
