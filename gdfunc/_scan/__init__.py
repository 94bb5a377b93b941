"""The loop: its meaning, its trace, its derivatives and the backends that run it.

The stages, in the order in which `scan(f, init, xs, backend="native")` runs them:

    _scan           the checks of arguments and of every step, the eager loop
    _cost           the constants by which backend="auto" decides
    _loop           trace_and_run: f to a body, and the loop over the body
    trace/          from f to a body
      _key            all that f can reach, as the key of its trace
      _code           the names in f's code, for the key
      _trace          the recording of f's operations, and the caches in which it looks first
      _purity         two recordings that must agree
      _reach          the changeable objects in f's reach: compared, and put back
      _lift           the mode in which f runs: tensors from outside become inputs
      _cuts           results that no derivative goes through, such as those under no_grad
      _rewrites       calls of torch in forms that a trace can follow
    _body           Body, the graph that a backend receives, and Loop
    _adjoint        the way back through a loop; the other adjoints are in gdfunc.adjoints
    _loop           Bound, the loop as one operation, with rules for vmap, jvp and vjp
    _derived        the bodies of the loops that these rules make
    backends/       run a Loop forward, on plain tensors

The caches, in the order in which a call asks them:

    seen                  traces, by signature: the structures, shapes, dtypes and devices of carry and x.
                          For one run of `train`, whose segments are many scans.
    _trace._recipes       traces, by signature and key of f. Without a key, f is traced on every call.
    _trace._bodies        bodies, by the text of their graph: other functions may compute the same.
    Body.derived          the bodies of vmap, jvp and vjp of a body, by rule and flags.
    Body.layout, .native, .inductor, .cudagraph
                          the compiled loops of a body.
    ~/.cache/gdfunc       compiled code of all processes, by its text, compiler and settings.

`_recipes` and `_bodies` are `_recent.Recent`, which forgets the entries unused for longest. A body, with
all that was compiled of it, lives as long as a cache or another body refers to it.
"""

from ._scan import scan as scan
