"""Forward mode, which `hypergrad` alone offers."""

from dataclasses import dataclass

from .._errors import check_int


@dataclass(frozen=True)
class Forward:
    """Carry the derivative along with the run; an adjoint of `hypergrad` alone.

        dθ_{t+1} = J_t · dθ_t + ∂Φ_t/∂φ · dφ

    Memory does not grow with T. Time grows with the entries of φ, whose directions are vmapped: few, then.

    Args:
        chunk_size: how many entries of φ at once; None: all.

    Raises:
        ValueError: chunk_size is no int of at least 1.

    Example:
        >>> gd.hypergrad(lambda lr: lr**2, adjoint=gd.adjoints.Forward())(3.0).grads
        tensor(6., dtype=torch.float64)

    References:
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse gradient-based hyperparameter
        optimization", 2017.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_int("chunk_size", self.chunk_size, 1)
