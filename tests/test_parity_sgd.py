"""Step by step with torch.optim.SGD, measured against how far the parameters have moved."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gdfunc as gd

from .references import linear_data, relative_error


def flat(params):
    return torch.cat([leaf.flatten() for leaf in params.values()])


@given(st.integers(0, 2**32), st.floats(0.001, 0.2), st.integers(1, 6))
def test_sgd_is_torch_optim_sgd_step_by_step(seed, lr, batch_size):
    x, y = linear_data(seed, 24, 3)
    assert float(y.std()) > 0
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    apply, params, _ = gd.modules.functional(model)
    step = gd.make_step(lambda params, batch: ((apply(params, batch[0])[:, 0] - batch[1]) ** 2).mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    start = params
    for row in gd.epoch_batches(gd.random.key(seed), 24, batch_size, 2)[:10]:
        batch = gd.take((x, y), row)
        optimizer.zero_grad()
        loss = ((model(batch[0])[:, 0] - batch[1]) ** 2).mean()
        loss.backward()
        optimizer.step()
        params, ours = step(params, batch, lr)
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
        theirs = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert relative_error(flat(params), flat(theirs), flat(start)) <= 1e-12
