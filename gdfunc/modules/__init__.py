"""`torch.nn.Module` in and out: a module, or an ensemble of them, as a pure function of its parameters.

`functional(module)` gives a `Functional`: a pure `apply`, the `params` and the `buffers`. `state_dict`
goes back. An ensemble is a `vmap` of that. `init(make_module, keys)` makes its members, each from its
own key by the init schemes of its layers. With a single key it works inside a run that is itself
vmapped over keys. `stack` stacks modules or parameters that exist already, and `member` takes one out.
`predict` gives a `Prediction`: the results of all members, their mean and their spread.

Batch normalisation in training mode and `nn.RNN`, `nn.GRU`, `nn.LSTM` have no per-sample gradients: use
`nn.GroupNorm`, and a cell in a `scan`. A module that updates buffers, as batch normalisation does, returns
them: `apply(params, x, buffers=buffers, return_buffers=True)`.

Dropout draws from a key: `apply(params, x, key=key)`, and `training=False` turns it off. Per-sample
gradients take a key for each row in the batch, `keys = gd.random.fold_in(key, torch.arange(B))`, and have
the masks of the whole batch: `gd.per_sample_grad(lambda p, b: loss(apply(p, b[0], key=b[1]), b[2]))`. The
spread of one network's predictions over many masks is that of
`torch.func.vmap(lambda key: apply(params, x, key=key))(gd.random.split(key, 100))`.

Running statistics of batch normalisation, and keys for dropout, are state beside the parameters:
`gd.stateful` marks a loss that carries them, and its step's carry is a `StatefulState`.

Example:
    >>> def make_net():
    ...     linear = torch.nn.Linear
    ...     return torch.nn.Sequential(linear(5, 8), torch.nn.Tanh(), linear(8, 1)).double()
    >>> init_keys, order_keys = gd.random.split(gd.random.key(1), 6).reshape(2, 3, 2)
    >>> apply, params, _ = gd.modules.init(make_net, init_keys)
    >>> problem = gd.problems.stock_regression()
    >>> step = gd.make_step(lambda p, batch: gd.losses.mse(apply(p, batch[0])[:, 0], batch[1]))
    >>> def train_member(params, key):
    ...     index = gd.epoch_batches(key, n=389, batch_size=30, epochs=20)
    ...     return gd.train(step, params, problem.data, index, 0.1)[0]
    >>> ensemble = torch.func.vmap(train_member)(params, order_keys)
    >>> prediction = gd.modules.predict(apply, ensemble, problem.data[0])
    >>> prediction.members.shape, prediction.mean.shape
    (torch.Size([3, 389, 1]), torch.Size([389, 1]))
    >>> errors = (prediction.members[..., 0] - problem.data[1]).square().mean(dim=-1)
    >>> bool(gd.losses.mse(prediction.mean[:, 0], problem.data[1]) < errors.mean())
    True
"""

from ._functional import Functional as Functional
from ._functional import Prediction as Prediction
from ._functional import functional as functional
from ._functional import member as member
from ._functional import predict as predict
from ._functional import stack as stack
from ._functional import state_dict as state_dict
from ._init import init as init
