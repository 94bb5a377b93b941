"""A forked child, such as a worker of torch's DataLoader, computes although the parent was compiling."""

import importlib
import os
import pkgutil
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import torch

import gdfunc as gd
from gdfunc import _lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def run(number):
    """Trace and compile a loop that no other test has; return whether its result is right."""
    xs = torch.ones(5, 3)
    return (
        gd.scan(lambda c, x: (c * x + number, c), xs[0], xs, backend="native")[0].tolist()
        == [1 + 5 * number] * 3
    )


def answer_of_child(function, seconds=60):
    """Fork; return whether the child's function was True, or None if the child had to be killed."""
    child = os.fork()
    if not child:
        status = 2
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    for _ in range(seconds * 20):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_module_level_locks_are_all_renewed_in_a_child():
    names = [name for _, name, _ in pkgutil.walk_packages(gd.__path__, "gdfunc.")]
    plain = type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore
    for name in names:
        assert not [x for x in vars(importlib.import_module(name)).values() if isinstance(x, plain)], name


@pytest.mark.long
def test_locks_that_another_thread_holds_are_free_in_the_child(monkeypatch):
    held, release = threading.Event(), threading.Event()

    def hold():
        with ExitStack() as stack:
            for lock in _lock._locks:
                monkeypatch.setattr(lock, "_patience", 0.0)
                stack.enter_context(lock)
            held.set()
            release.wait(100)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert len(_lock._locks) >= 5
        assert answer_of_child(lambda: run(0.5))
    finally:
        release.set()
        holder.join()


@pytest.mark.long
def test_lock_that_the_forking_thread_holds_is_held_in_both():
    lock = _lock.Lock()
    with lock:
        child = answer_of_child(lambda: lock.before_fork() or lock._taken)
        assert child
        assert run(0.25)
    assert answer_of_child(lambda: run(0.75))


@pytest.mark.long
def test_fork_while_a_thread_compiles_leaves_the_child_able_to_compile():
    stop, wrong, before = threading.Event(), [], torch.get_default_dtype()

    def compile_many():
        for number in range(100, 10**6):
            if stop.is_set():
                return
            if not run(number):
                wrong.append(number)

    compiler = threading.Thread(target=compile_many)
    compiler.start()
    try:
        for number in range(4):
            time.sleep(0.13)
            assert answer_of_child(lambda n=number: run(n) and torch.get_default_dtype() == before)
    finally:
        stop.set()
        compiler.join()
    assert not wrong
