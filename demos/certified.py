"""How many certified digits three methods reach on NIST's 27 nonlinear regressions, from both starts.

The National Institute of Standards and Technology has certified the least-squares parameters of 27
nonlinear regressions to eleven digits, each with a start far from them and one near them. Programs are
judged by the digits of the worst parameter, min −log₁₀ |θᵢ − cᵢ|/|cᵢ|. Here three methods of `gd.methods`
run on them as they come, without scaled parameters or a tuned constant:

    gauss_newton           least squares of the tangent
    levenberg_marquardt    the same, damped by how well it predicted
    lbfgs                  a quasi-Newton method, which knows nothing of residuals but the loss

Both starts of a problem are one run under vmap. A run ends when its parameters no longer change.

Sources: NIST, "Statistical reference datasets", 1998; B. D. McCullough, "Assessing the reliability of
statistical software", 1998.

    python demos/certified.py [--out DIR] [--fast]
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

QUESTION = "How many certified digits do least squares reach, from far and from near?"
ENOUGH = 6  # digits
FAST = ("DanWood", "BoxBOD", "Rat42")


class Method(NamedTuple):
    make: Callable[[gd.problems.CertifiedFit], gd.Step]
    chunk: int  # steps between two looks at whether the parameters still change
    most: int  # steps


METHODS = {
    "Gauss-Newton": Method(lambda fit: gd.methods.gauss_newton(fit.residual_fn), 5, 50),
    "Levenberg-Marquardt": Method(lambda fit: gd.methods.levenberg_marquardt(fit.residual_fn), 15, 600),
    # More pairs than parameters say little new, and 50 steps are longer than two searches that fail.
    "L-BFGS": Method(lambda fit: gd.methods.lbfgs(fit.loss_fn, len(fit.minimizer)), 50, 200),
}
Digits = dict[str, list[tuple[float, float]]]  # by method, of each problem from the far and the near start


def solve(fit: gd.problems.CertifiedFit, method: Method) -> tuple[Tensor, int]:
    """Run from both starts until nothing changes; return the parameters [2, P] and the steps taken."""
    step, index = method.make(fit), gd.full_batch(len(fit.data[1]), method.chunk)

    def params_of(carry: object) -> Tensor:
        return getattr(carry, "params", carry)

    def go_on(carry: object) -> object:
        return gd.train(step, carry, fit.data, index, 1.0, record=(), backend="eager")[0]

    carry, steps, changes = vmap(step.init)(fit.starts), 0, True
    while changes and steps < method.most:
        before, carry, steps = params_of(carry), vmap(go_on)(carry), steps + method.chunk
        changes = not torch.allclose(params_of(carry), before, rtol=1e-9, atol=0.0, equal_nan=True)
    return params_of(carry), steps


def conclusion(digits: Digits, names: Sequence[str]) -> str:
    """Say how many problems each method solves to six digits, and how well the best one does from near."""
    counts = []
    for method, rows in digits.items():
        far, near = (sum(row[i] >= ENOUGH for row in rows) for i in range(2))
        counts.append(f"{method} in {far} and {near}")
    best = max(digits, key=lambda method: sum(row[1] >= ENOUGH for row in digits[method]))
    pairs = list(zip(names, digits[best], strict=True))
    missed = ", ".join(name for name, (_, near) in pairs if near < ENOUGH)
    least, where = min((near, name) for name, (_, near) in pairs)
    rest = f"fails even near {missed}" if missed else f"has at least {least:.1f} from near ({where})"
    return (
        f"Of {len(names)} problems, six digits from the far and the near start: {', '.join(counts)}. "
        f"{best} {rest}"
    )


def draw(digits: Digits, names: Sequence[str]) -> Figure:
    """Draw the digits of each problem (column) by method and start (row)."""
    figure = Figure((11, 4.2), layout="constrained")
    ax = figure.subplots()
    labels = [f"{method}, {start}" for method in digits for start in ("far", "near")]
    rows = [[row[i] for row in digits[method]] for method in digits for i in range(2)]
    image = ax.imshow(rows, cmap="RdYlBu", vmin=0, vmax=11, aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            shade = "white" if value < 2 or value > 9.4 else "black"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color=shade)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    for y in range(2, len(labels), 2):
        ax.axhline(y - 0.5, color="white", linewidth=4)
    for level in ("lower", "average", "higher"):
        inside = [j for j, name in enumerate(names) if name in gd.problems.nist_names(level)]
        if inside:
            middle = (inside[0] + inside[-1]) / 2
            ax.text(middle, -0.62, f"{level} difficulty", ha="center", va="bottom", fontsize=10)
            if inside[0]:
                ax.axvline(inside[0] - 0.5, color="white", linewidth=4)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, pad=0.01, label="certified digits of the worst parameter")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, QUESTION, argv) as card:
        names = FAST if card.fast else gd.problems.nist_names()
        digits: Digits = {method: [] for method in METHODS}
        rows = []
        print("Certified digits from the far and from the near start, and the steps taken")
        print(f"{'':9}" + "".join(f"{method:>26}" for method in METHODS))
        for name in names:
            fit, cells = gd.problems.nist(name), []
            for title, method in METHODS.items():
                params, steps = solve(fit, method)
                far, near = fit.digits(params).tolist()
                digits[title].append((far, near))
                cells.append(f"{far:5.1f} {near:5.1f} {steps:5d}")
                rows.append((name, fit.level, title, far, near, steps))
            print(f"{name:9}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
        said = conclusion(digits, names)
        numbers = {method: dict(zip(names, pairs, strict=True)) for method, pairs in digits.items()}
        card.picture("digits", draw(digits, names), said, numbers)
        card.table("digits", ["problem", "difficulty", "method", "far", "near", "steps"], rows)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
