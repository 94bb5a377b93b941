"""Curvature without its matrix: products with it, its largest eigenvalues, its trace.

`hvp(loss_fn)` and `ggn_vp(model_fn, loss_fn)` multiply with the Hessian and the Gauss-Newton matrix.
`top_eigenvalues` (Lanczos; `Eigenpairs` with their residuals) and `hutchinson_trace` (a `TraceEstimate`
with its standard error) read them. A run follows them with `train(record=…)`.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> largest = gd.curvature.top_eigenvalues(gd.curvature.hvp(problem.loss_fn), 1)
    >>> pairs = largest(problem.params, problem.data, gd.random.key(0))
    >>> bool((pairs.eigenvalues[0] / problem.L - 1).abs() < 1e-6)
    True
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from . import _tree, random
from ._errors import check_choice, check_int, check_options
from ._gradients import LossFn, apart, batch_grad, checked
from ._inputs import check_inputs, check_params, kind
from ._numerics import norms, safe_ratio, widest
from ._scan import scan
from ._scan._scan import BACKENDS
from ._torch._transforms import differentiable_attention
from ._tree import Tree

Product = Callable[[Tree, Tree, Tree], Tree]


class Eigenpairs(NamedTuple):
    """Eigenvalues, their eigenvectors, and the residual of each pair; see `top_eigenvalues`.

    Attributes:
        eigenvalues: λ, [k].
        eigenvectors: v, a tree like params with leaves [k, ...]; each has norm 1 over all leaves.
        residuals: ‖Av − λv‖, [k].

    Example:
        >>> pairs = gd.curvature.Eigenpairs(torch.tensor([2.0]), torch.eye(1, 2), residuals=torch.zeros(1))
        >>> pairs.eigenvalues
        tensor([2.])
    """

    eigenvalues: Tensor
    eigenvectors: Tree
    residuals: Tensor


class TraceEstimate(NamedTuple):
    """A trace, and the standard error of its estimate; see `hutchinson_trace`.

    Attributes:
        trace: 0-d.
        standard_error: 0-d.

    Example:
        >>> gd.curvature.TraceEstimate(torch.tensor(5.0), torch.tensor(0.1)).trace
        tensor(5.)
    """

    trace: Tensor
    standard_error: Tensor


def hvp(loss_fn: LossFn) -> Product:
    """Turn a loss into the function that multiplies its Hessian with a vector.

    Hv = d/dε ∇θ L(θ + εv, batch) at ε = 0

    Forward mode over reverse mode: exact, with the memory of a gradient and a small multiple of its time.

    Args:
        loss_fn: `(params, batch) -> loss`, as in `batch_grad`.

    Returns:
        `(params, batch, vector) -> Hv`; vector and Hv are trees like params.

    Raises:
        TypeError, ValueError: as in `batch_grad`; a leaf of vector differs from that of params in shape,
            dtype or device.

    Example:
        >>> def loss_fn(params, batch):
        ...     return params["a"] ** 2 * params["b"]
        >>> params = {"a": torch.tensor(1.0), "b": torch.tensor(3.0)}
        >>> vector = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
        >>> gd.curvature.hvp(loss_fn)(params, None, vector)
        {'a': tensor(6.), 'b': tensor(2.)}

    References:
        B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """
    gradients = batch_grad(loss_fn)

    def curve(params: Tree, batch: Tree, vector: Tree) -> Tree:
        return jvp(lambda at: gradients(at, batch)[0], (params,), (vector,))[1]

    return _guarded(curve)


def ggn_vp(
    model_fn: Callable[[Tree, Tree], Tree], output_loss_fn: Callable[[Tree, Tree], Tensor]
) -> Product:
    """Turn a model and a loss of its predictions into the product with the Gauss-Newton matrix.

    Gv = Jᵀ H J v,  J = ∂ predictions / ∂θ,  H = the Hessian of the loss in the predictions

    It is the Hessian of the loss with the model replaced by its tangent at θ: equal to the Hessian where
    the model is linear in θ, never indefinite where the loss is convex in the predictions, and the Fisher
    matrix where that loss is the cross-entropy, or half the squared error.

    Args:
        model_fn: `(params, inputs) -> predictions`, such as `apply` of `modules.functional`; a tree of
            float tensors.
        output_loss_fn: `(predictions, targets) -> loss`, the mean over the batch as a 0-d tensor, such as
            `losses.mse` and `losses.cross_entropy`.

    Returns:
        `(params, batch, vector) -> Gv`; batch is the pair `(inputs, targets)`, vector and Gv are trees like
        params.

    Raises:
        TypeError: as in `hvp`; batch is no pair, or a prediction no float tensor.
        ValueError: as in `hvp`; no prediction depends on params, or the loss not on the predictions.

    Example:
        >>> def model_fn(params, x):
        ...     return params["w"] * x
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> product = gd.curvature.ggn_vp(model_fn, gd.losses.mse)
        >>> product({"w": torch.tensor(1.0)}, batch, {"w": torch.tensor(1.0)})
        {'w': tensor(5.)}

    References:
        N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
        J. Martens, "New insights and perspectives on the natural gradient method", 2020.
    """

    output_loss = checked(output_loss_fn)

    def curve(params: Tree, batch: Tree, vector: Tree) -> Tree:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"batch must be a pair (inputs, targets); got {type(batch).__name__}")
        inputs, targets = batch

        def model(at: Tree) -> Tree:
            return _check_predictions(model_fn(at, inputs))

        def slope(at: Tree) -> Tree:
            return grad(output_loss)(at, targets)

        predictions, pushed, *_ = jvp(model, (params,), (vector,))
        curved = jvp(slope, (predictions,), (pushed,))[1]
        # The derivative of ⟨f(θ), c⟩ is Jᵀc.
        return grad(checked(lambda at, c: _tree.dot(model(at), c)))(params, curved)

    return _guarded(curve)


def top_eigenvalues(
    product: Product,
    k: int = 1,
    *,
    iterations: int = 30,
    which: str = "largest",
    backend: str = "auto",
) -> Callable[[Tree, Tree, Tensor], Eigenpairs]:
    """Turn products with a symmetric matrix into its k outermost eigenvalues and their eigenvectors.

    A v = λ v + r,  ‖v‖ = 1:  an eigenvalue of A lies within ‖r‖ of λ

    Lanczos' method: the eigenpairs of A restricted to the space that a random vector and its images span,
    with a basis orthogonalised in full at every step. Where that space is exhausted (fewer distinct
    eigenvalues than iterations, a zero Hessian), it is extended at random. λ is vᵀAv, so the k largest are
    never above the true ones. They converge first if they stand apart; the residual tells how far. What it
    cannot tell is that one was missed: copies of a multiple eigenvalue show up only as iterations come near
    the number of parameters P, and with P of them all are found.

    Its cost is that of iterations + k products, one after another, and memory for as many vectors.
    Derivatives of λ with respect to params and batch hold v fixed: exact first derivatives of a simple
    eigenvalue where the residual is zero. Second ones are not. For the largest eigenvalue of a network
    alone 10 iterations often do: watch the residual.

    Args:
        product: `(params, batch, vector) -> tree`, linear and symmetric in vector: `hvp(loss_fn)`,
            `ggn_vp(model_fn, loss_fn)`, or your own.
        k: how many, in [1, P].
        iterations: how many dimensions the space has, at least k; beyond P they are not made.
        which: `"largest"`, `"smallest"`, or those of largest `"magnitude"`.
        backend: who runs the iterations; see `scan`.

    Returns:
        `(params, batch, key) -> Eigenpairs`, outermost first. Nothing reads a value, so it can be vmapped,
        and recorded by `train` on any backend that has `torch.linalg.eigh`. Where A is not finite, neither
        is the result.

    Raises:
        TypeError: key is no key; see the product.
        ValueError: k, iterations or which is out of range; see the product.

    Example:
        >>> problem = gd.problems.quadratic([1.0, 2.0, 10.0], key=gd.random.key(0))
        >>> sharpness = gd.curvature.top_eigenvalues(gd.curvature.hvp(problem.loss_fn), k=2)
        >>> pairs = sharpness(problem.params, None, gd.random.key(1))
        >>> pairs.eigenvalues
        tensor([10.0000,  2.0000], dtype=torch.float64)
        >>> bool((pairs.residuals < 1e-13).all())
        True
        >>> index = gd.full_batch(1, steps=100)
        >>> def top(params, loss):  # of a run with a transformation: top(state, loss), with state.params
        ...     return sharpness(params, None, gd.random.key(1)).eigenvalues[0]
        >>> step = gd.make_step(lambda params, batch: problem.loss_fn(params))
        >>> run = gd.train(step, problem.params, None, index, 0.1, record=top, every=50)
        >>> run[1].top
        tensor([10.0000, 10.0000], dtype=torch.float64)

    References:
        C. Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential
        and integral operators", 1950.
        B. Parlett, "The symmetric eigenvalue problem", 1980: the bound, and full orthogonalisation.
        G. Golub, C. Van Loan, "Matrix computations", 4th edition, 2013, chapter 10.
        J. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks
        typically occurs at the edge of stability", 2021.
    """
    k = check_int("k", k, 1)
    if check_int("iterations", iterations, 1) < k:
        raise ValueError(f"iterations must be at least k; got iterations={iterations} and k={k}")
    check_choice("which", which, ("largest", "smallest", "magnitude"))
    check_choice("backend", backend, BACKENDS)

    def eigenpairs(params: Tree, batch: Tree, key: Tensor) -> Eigenpairs:
        matvec, start = _flat_product(product, params, batch), _probe(params, key)
        if k > len(start):
            raise ValueError(f"k must be at most the number of parameters, {len(start)}; got {k}")
        ritz_values, ritz_vectors = _lanczos(matvec, start, min(iterations, len(start)), backend)
        rank = {"largest": ritz_values, "smallest": -ritz_values, "magnitude": ritz_values.abs()}[which]
        chosen = ritz_vectors[rank.argsort(descending=True)[:k]]
        _, images = scan(lambda carry, vector: (carry, matvec(vector)), (), chosen, backend=backend)
        eigenvalues = (chosen * images).sum(dim=1)
        residuals = norms(images - eigenvalues[:, None] * chosen)
        return Eigenpairs(eigenvalues, _tree.unravel(chosen, params), residuals)

    return eigenpairs


def hutchinson_trace(
    product: Product, probes: int = 100, *, distribution: str = "rademacher", chunk_size: int | None = None
) -> Callable[[Tree, Tree, Tensor], TraceEstimate]:
    """Turn products with a matrix into an estimate of its trace, and the estimate's standard error.

    tr A ≈ 1/n Σᵢ vᵢᵀ A vᵢ,  with E v vᵀ = I

    The variance is 2/n times the sum of the squares of A's entries, for Rademacher probes of those off the
    diagonal alone: with them the trace of a diagonal matrix is exact.

    Args:
        product: `(params, batch, vector) -> tree`, linear in vector: `hvp(loss_fn)`,
            `ggn_vp(model_fn, loss_fn)`, or your own.
        probes: n, at least 2.
        distribution: of the probes' entries: `"rademacher"`, +1 or −1, or `"normal"`.
        chunk_size: how many products to take at once, by `vmap`; None: all.

    Returns:
        `(params, batch, key) -> TraceEstimate(trace, standard_error)`, both 0-d. It can be vmapped,
        differentiated, and recorded by `train` on any backend.

    Raises:
        TypeError: key is no key; see the product.
        ValueError: probes, distribution or chunk_size is out of range; see the product.

    Example:
        >>> problem = gd.problems.quadratic([1.0, 2.0, 10.0], key=gd.random.key(0))
        >>> trace = gd.curvature.hutchinson_trace(gd.curvature.hvp(problem.loss_fn), probes=1000)
        >>> trace(problem.params, None, gd.random.key(1))
        TraceEstimate(trace=tensor(12.9071, dtype=torch.float64),
                      standard_error=tensor(0.0873, dtype=torch.float64))

    References:
        M. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
        splines", 1990.
    """
    probes = check_int("probes", probes, 2)
    check_choice("distribution", distribution, ("rademacher", "normal"))
    check_options(chunk_size)

    def estimate(params: Tree, batch: Tree, key: Tensor) -> TraceEstimate:
        random._check_key(key)
        matvec = _flat_product(product, params, batch)

        def sample(key: Tensor) -> Tensor:
            probe = _probe(params, key, distribution)
            return probe @ matvec(probe)

        samples = vmap(sample, chunk_size=chunk_size)(random.split(key, probes))
        return TraceEstimate(samples.mean(), samples.std() / probes**0.5)

    return estimate


def _guarded(curve: Product) -> Product:
    """Check what a product is given, and keep its inputs and its result apart."""

    def product(params: Tree, batch: Tree, vector: Tree) -> Tree:
        _, batch, _ = check_inputs(params, batch)
        directions = _check_vector(vector, params)
        vector = _tree.unflatten(_tree.flatten(params)[1], directions)
        with differentiable_attention():
            return apart(curve, params=params, batch=batch, vector=vector)

    return product


def _check_vector(vector: Tree, params: Tree) -> list[Tensor]:
    """Return the leaves of a vector that has the structure, shapes, dtypes and device of params."""
    directions = _tree.check_like(vector, params, "vector", "params")
    for (path, leaf), direction in zip(_tree.named_leaves(params, ""), directions, strict=True):
        if direction.dtype != leaf.dtype or direction.device != leaf.device:
            raise ValueError(
                f"vector{path} is {kind(direction)} on {direction.device} but params{path} is "
                f"{kind(leaf)} on {leaf.device}; convert it with .to(params{path})"
            )
    return directions


def _check_predictions(predictions: Tree) -> Tree:
    for path, leaf in _tree.named_leaves(predictions, "predictions"):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"model_fn must return float tensors; {path} is {kind(leaf)}")
    return predictions


def _lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, iterations: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Eigenvalues [m] and unit eigenvectors [m, P] of a symmetric matrix on a Krylov space."""
    rows = torch.arange(iterations, device=start.device)
    positions = torch.arange(len(start), device=start.device)

    def put(vector: Tensor, row: Tensor | int) -> Tensor:
        return (rows == row).to(vector.dtype)[:, None] * vector

    def extend(basis: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        newest = basis.mT @ (rows == row).to(basis.dtype)
        # Because every derivative treats the eigenvectors as constants, nothing here is differentiated.
        image = matvec(newest).detach()
        nudge = start[(positions + row + 1) % len(start)]
        # eigh would raise on NaN for all members of a vmapped run, so NaN is kept in the basis alone.
        return basis + put(_extension(basis, image, nudge), row + 1), (basis @ image).nan_to_num(0, 0, 0)

    basis, projected = scan(extend, put(_unit(start), 0), rows, backend=backend)
    values, coordinates = torch.linalg.eigh(projected)  # it reads the lower triangle, which is filled
    return values, _unit(coordinates.mT @ basis)


def _extension(basis: Tensor, image: Tensor, nudge: Tensor) -> Tensor:
    """Return the unit vector that spans the image together with the basis, or else the nudge.

    Of an image in the basis' span nothing is left but rounding, a few eps. A shift of the start is then as
    good as a new draw: the shifts are independent of each other, and of the matrix.
    """

    def orthogonal(vector: Tensor) -> Tensor:
        return vector - basis.mT @ (basis @ vector)

    new = orthogonal(_unit(image))
    new = torch.where(norms(new) <= 100 * torch.finfo(new.dtype).eps, nudge, new)
    return _unit(orthogonal(_unit(orthogonal(_unit(new)))))


def _unit(vectors: Tensor) -> Tensor:
    """Scale vectors [..., P] to norm 1, and leave zero alone."""
    return safe_ratio(vectors, norms(vectors)[..., None])


def _flat_product(product: Product, params: Tree, batch: Tree) -> Callable[[Tensor], Tensor]:
    """Make the product a function of vectors [P]."""
    dtype = widest(check_params(params))

    def matvec(vector: Tensor) -> Tensor:
        result = product(params, batch, _tree.unravel(vector, params))
        return _tree.ravel(_tree.check_structure(result, params, "product", "params"), dtype)

    return matvec


def _probe(params: Tree, key: Tensor, distribution: str = "normal") -> Tensor:
    """Draw a vector [P] in the dtype and on the device of params."""
    random._check_key(key)
    leaves = check_params(params)
    shape, dtype = (sum(leaf.numel() for leaf in leaves),), widest(leaves)
    signs = distribution == "rademacher"
    probe = 2 * (random.bits(key, shape) & 1) - 1 if signs else random.normal(key, shape, dtype)
    return probe.to(leaves[0].device, dtype)
