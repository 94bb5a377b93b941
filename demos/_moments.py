"""The exact moments of constant-step descent on least squares.

With a constant learning rate η, and batches of B samples drawn with replacement, the iterates wander about
the optimum θ*. With the design vector a and the residual r at θ* of sample i, h = aaᵀ and g = ar, a step is

    θ' − θ* = (I − η h_B)(θ − θ*) − η g_B,  h_B and g_B the means over the batch,

and with δ = (θ − θ*, 1) it is δ' = A_B δ, A_B the mean over the batch of A = [[I − ηh, −ηg], [0, 1]]. So
the stationary second moment S = E δδᵀ solves a linear equation, correlations of h and g included:

    S = E A_B S A_Bᵀ = (1 − 1/B) ĀSĀᵀ + (1/B) mean A S Aᵀ,  Ā = mean A,  S[-1, -1] = 1.

Its last column is the mean of δ, which comes out as 0; so the rest is the covariance Σ.
"""

import math

import torch
from torch import Tensor

import gdfunc as gd

# In how many ways the factors of a product, each of some sample of the batch, share their samples:
# (2, 1, 1): 6 says that in six groupings of four factors two are of one sample and two of others.
GROUPINGS = {
    2: {(1, 1): 1, (2,): 1},
    4: {(1, 1, 1, 1): 1, (2, 1, 1): 6, (2, 2): 3, (3, 1): 4, (4,): 1},
}


def vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def samples(problem: gd.problems.Problem) -> tuple[Tensor, Tensor]:
    """Return h [n, p, p] and g [n, p]: every sample's Hessian, and its gradient at the optimum."""
    x, y = problem.data
    design = torch.cat([x, torch.ones_like(y)[:, None]], dim=1)
    residual = design @ vector(problem.minimizers[0]) - y
    return design[:, :, None] * design[:, None, :], design * residual[:, None]


def contraction(problem: gd.problems.Problem, lr: float) -> Tensor:
    """Return I − ηh of every sample, [n, p, p]."""
    h, _ = samples(problem)
    return torch.eye(h.shape[-1]).to(h) - lr * h


def one_step(problem: gd.problems.Problem, lr: float) -> Tensor:
    """Return A of every sample, [n, p+1, p+1]."""
    _, g = samples(problem)
    top = torch.cat([contraction(problem, lr), -lr * g[:, :, None]], dim=2)
    bottom = torch.eye(g.shape[1] + 1).to(g)[-1:].expand(len(g), 1, -1)
    return torch.cat([top, bottom], dim=1)


def kron(a: Tensor, b: Tensor, equation: str) -> Tensor:
    product = torch.einsum(equation, a, b)
    return product.reshape(*product.shape[:-4], a.shape[-2] * b.shape[-2], -1)


def mean_powers(factors: Tensor, largest: int) -> dict[int, Tensor]:
    """Return mean A⊗…⊗A, m times, for each m up to 2 or 4: [pᵐ, pᵐ]."""
    pairs = kron(factors, factors, "nij,nkl->nikjl")
    powers = {1: factors.mean(dim=0), 2: pairs.mean(dim=0)}
    if largest > 2:
        for m, others in ((3, factors), (4, pairs)):
            powers[m] = kron(pairs, others, "nij,nkl->ikjl") / len(factors)
    return powers


def second_moment(problem: gd.problems.Problem, batch_size: int, lr: float) -> Tensor:
    """Solve the linear equation for S, [p+1, p+1], whether or not it is positive."""
    powers = mean_powers(one_step(problem, lr), 2)
    map_of_s = (1 - 1 / batch_size) * torch.kron(powers[1], powers[1]) + powers[2] / batch_size
    # The last entry of S is known to be 1: what it is multiplied by goes to the right-hand side.
    system = torch.eye(len(map_of_s) - 1).to(map_of_s) - map_of_s[:-1, :-1]
    solution = torch.linalg.solve(system, map_of_s[:-1, -1])
    return torch.cat([solution, solution.new_ones(1)]).reshape(powers[1].shape)


def diffusion(problem: gd.problems.Problem, batch_size: int, lr: float) -> Tensor:
    """Return Mandt, Hoffman and Blei's Σ, [p, p]: HΣ + ΣH = (η/B) mean ggᵀ."""
    h, g = samples(problem)
    hessian, eye = h.mean(dim=0), torch.eye(g.shape[1]).to(g)
    operator = torch.kron(hessian, eye) + torch.kron(eye, hessian)
    noise = lr / batch_size * g.T @ g / len(g)
    return torch.linalg.solve(operator, noise.flatten()).reshape(noise.shape)


def growth(problem: gd.problems.Problem, batch_size: int, lr: float, order: int) -> float:
    """Return by what a step multiplies E (θ − θ*)⊗…⊗(θ − θ*) in the long run, but for the noise.

    It is the spectral radius of E A_B⊗…⊗A_B on symmetric tensors: below 1, and only there, the stationary
    law has a finite moment of this (even) order.
    """
    powers = mean_powers(contraction(problem, lr), order)
    p, total = len(powers[1]), torch.zeros(())
    for groups, ways in GROUPINGS[order].items():
        term = torch.ones(1, 1, dtype=powers[1].dtype)
        for m in groups:
            term = torch.kron(term, powers[m])
        total = total + ways * math.perm(batch_size, len(groups)) / batch_size**order * term
    indices = torch.cartesian_prod(*[torch.arange(p)] * order).sort(dim=1).values
    _, entry, count = indices.unique(dim=0, return_inverse=True, return_counts=True)
    to_tensor = torch.nn.functional.one_hot(entry).to(total)
    on_symmetric = (to_tensor / count).T @ total @ to_tensor
    return float(torch.linalg.eigvals(on_symmetric).abs().max())


def limit(problem: gd.problems.Problem, batch_size: int, order: int) -> float:
    """Find the learning rate above which the stationary moment of this order is infinite, by bisection."""
    low, high = 0.0, 2 / problem.L  # where full batches diverge
    for _ in range(12 if order > 2 else 40):
        middle = (low + high) / 2
        stable = growth(problem, batch_size, middle, order) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


def trace(moments: Tensor) -> Tensor:
    """Return the trace of E (θ − θ*)(θ − θ*)ᵀ, the corner of δδᵀ."""
    return moments.diagonal(dim1=-2, dim2=-1)[..., :-1].sum(dim=-1)
