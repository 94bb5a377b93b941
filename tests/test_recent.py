"""What is remembered is bounded in number and in bytes, and forgotten in the order of use."""

import sys
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from gdfunc._scan import _recent
from gdfunc._scan._recent import Recent


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 40))))
def test_the_least_recently_used_are_forgotten(actions):
    """Against a list of keys in the order of their use."""
    recent, order, sizes = Recent(), [], {}
    before = _recent.REMEMBERED, _recent.BYTES
    _recent.REMEMBERED, _recent.BYTES = 4, 100
    try:
        for keeps, key, size in actions:
            if key in order and (keeps or recent.find(key) == (key, sizes[key])):
                order.remove(key)
                order.append(key)
            elif not keeps:
                assert recent.find(key) is None
            elif keeps:
                order.append(key)
            if keeps:
                sizes[key] = size
                recent.keep(key, (key, size), size)
                while len(order) > 4 or (sum(sizes[each] for each in order) > 100 and len(order) > 1):
                    order.pop(0)
            assert set(recent._entries) == set(order)
            assert recent._bytes == sum(sizes[each] for each in order)
    finally:
        _recent.REMEMBERED, _recent.BYTES = before


def test_threads_keep_and_find_side_by_side():
    recent = Recent()

    def work(seed):
        for i in range(3000):
            recent.keep((seed, i % 700), i, 8)
            assert recent.find((seed, i % 700)) in (i, None)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(recent._entries) == _recent.REMEMBERED
    assert recent._bytes == 8 * _recent.REMEMBERED
