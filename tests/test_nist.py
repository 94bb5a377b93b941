"""NIST's nonlinear regressions: what was typed in is what was certified."""

import math

import pytest
import torch
from torch.func import jacfwd

import gdfunc as gd
from gdfunc.problems import nist, nist_names

from .assertions import assert_refused

NAMES = nist_names()
# Its sum of squares, 1.4e-25, is far below what eleven digits of the parameters leave.
ROUNDED = "Lanczos1"


@pytest.mark.parametrize("name", NAMES)
def test_the_certified_parameters_have_the_certified_loss(name):
    fit = nist(name)
    loss = fit.loss_fn(fit.minimizer, fit.data)
    if name == ROUNDED:
        assert loss < 1e-21
    else:
        assert abs(loss / fit.minimum - 1) < 1.1e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_certified_parameters_have_the_certified_deviations(name):
    """The standard deviations are those of the linear regression at the solution."""
    fit = nist(name)
    jacobian = jacfwd(lambda params: fit.residual_fn(params, fit.data))(fit.minimizer)
    scale = jacobian.norm(dim=0)
    inverse = torch.linalg.inv(torch.linalg.qr(jacobian / scale)[1])
    freedom = len(fit.data[1]) - len(fit.minimizer)
    deviations = inverse.norm(dim=1) / scale * math.sqrt(fit.minimum * len(fit.data[1]) / freedom)
    torch.testing.assert_close(deviations, fit.deviations, rtol=1e-5, atol=0)


def test_the_problems_are_nists_27():
    assert [len(nist_names(level)) for level in ("lower", "average", "higher")] == [8, 11, 8]
    assert len(set(NAMES)) == 27
    assert {nist(name).level for name in nist_names("higher")} == {"higher"}
    counts = {name: (nist(name).data[1].shape[0], nist(name).minimizer.shape[0]) for name in NAMES}
    assert counts["Gauss1"] == (250, 8)
    assert counts["BoxBOD"] == (6, 2)


@pytest.mark.parametrize("name", NAMES)
def test_starts_are_worse_than_the_solution_and_the_residuals_fit_the_loss(name):
    fit = nist(name)
    for start in fit.starts:
        assert fit.loss_fn(start, fit.data) > fit.minimum
        squares = fit.residual_fn(start, fit.data).square()
        torch.testing.assert_close(squares.mean(), fit.loss_fn(start, fit.data), rtol=1e-14, atol=0)
        predictions = fit.model_fn(start, fit.data[0])
        torch.testing.assert_close(predictions - fit.data[1], fit.residual_fn(start, fit.data))


def test_digits_are_the_worst_parameters():
    fit = nist("Misra1a")
    wrong = fit.minimizer * torch.tensor([1 + 1e-7, 1 - 1e-4])
    rows = torch.stack([fit.minimizer, wrong, fit.minimizer * torch.nan, -fit.minimizer * torch.inf])
    assert fit.digits(rows).round(decimals=3).abs().tolist() == [11.0, 4.0, 0.0, 0.0]


def test_another_dtype_and_other_names():
    fit = nist("Nelson", dtype=torch.float32)
    assert (fit.data[0].shape, fit.data[0].dtype, fit.starts.dtype) == ((128, 2), *[torch.float32] * 2)
    assert repr(fit).startswith("CertifiedFit(name='Nelson', level='average'")
    assert_refused(lambda: nist("Misra"), "^name must be 'Misra1a' or 'Chwirut2'")
    assert_refused(
        lambda: nist_names("easy"), "^level must be 'lower' or 'average' or 'higher'; got 'easy'"
    )
    assert gd.problems.nist is nist
