"""Batch sizes that follow from the spread of the gradients."""

from typing import NamedTuple

from torch import Tensor

from .._errors import check_int, check_scalar
from ._spread import Spread


def noise_scale(spread: Spread, *, unbiased: bool = False) -> Tensor:
    """Compute the simple noise scale: the batch size at which noise is as large as the gradient.

    B_simple = tr Σ / ‖G‖²

    Much smaller batches waste steps, much larger ones waste samples.

    Args:
        spread: of a batch, or [T] of them.
        unbiased: take ‖ḡ‖² − tr Σ̂/B for ‖G‖², which ‖ḡ‖² overestimates by the noise of a batch that is not
            all of the data. The estimate is negative where the noise hides the gradient: then average both
            over several batches before the division.

    Returns:
        0-d, or [T], in samples.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.noise_scale(spread), gd.stats.noise_scale(spread, unbiased=True)
        (tensor(0.5000), tensor(0.6667))

    References:
        S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota team, "An empirical model of large-batch training",
        2018.
    """
    signal = spread.squared_norm
    if unbiased:
        signal = signal - spread.variance / spread.size
    return spread.variance / signal


def two_batch(
    small: float | Tensor, big: float | Tensor, *, sizes: tuple[int, int]
) -> tuple[float | Tensor, float | Tensor]:
    """Estimate signal and noise from the gradients of two batches alone, without bias.

    ‖G‖² ≈ (B‖g_B‖² − b‖g_b‖²)/(B − b),  tr Σ ≈ (‖g_b‖² − ‖g_B‖²)/(1/b − 1/B)

    For where there are no per-sample gradients, only those of workers and their mean. One pair is very
    noisy, and the ratio of the two is biased: average each over many steps, then divide, and
    tr Σ / ‖G‖² is the noise scale.

    Args:
        small: ‖g_b‖², the squared norm of the smaller batch's gradient, of any shape.
        big: ‖g_B‖² of the larger batch's.
        sizes: (b, B), b < B.

    Returns:
        ‖G‖² and tr Σ.

    Raises:
        ValueError: the sizes are no ints with 1 <= b < B.

    Example:
        >>> gd.stats.two_batch(torch.tensor(5.0), torch.tensor(4.0), sizes=(1, 2))
        (tensor(3.), tensor(2.))

    References:
        S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota team, "An empirical model of large-batch training",
        2018, appendix A.1.
    """
    few = check_int("sizes[0]", sizes[0], 1)
    many = check_int("sizes[1]", sizes[1], few + 1)
    return (many * big - few * small) / (many - few), (small - big) / (1 / few - 1 / many)


class Verdict(NamedTuple):
    """The result of a test of the batch size.

    Attributes:
        passed: bool, whether the batch was large enough; False where the batch size is NaN.
        batch_size: the smallest that would have been, not rounded.

    Example:
        >>> gd.stats.Verdict(torch.tensor(True), torch.tensor(12.5)).batch_size.ceil()
        tensor(13.)
    """

    passed: Tensor
    batch_size: Tensor


def norm_test(spread: Spread, theta: float | Tensor = 0.5) -> Verdict:
    """Test whether a batch's gradient has an error that is small compared with it.

    tr Σ̂ / B <= θ²‖ḡ‖²

    Args:
        spread: of a batch, or [T] of them.
        theta: θ > 0, the error allowed as a share of the gradient.

    Returns:
        The `Verdict`, with the batch size tr Σ̂ / (θ²‖ḡ‖²).

    Raises:
        ValueError: theta is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.norm_test(spread)
        Verdict(passed=tensor(True), batch_size=tensor(2.))

    References:
        R. Byrd, G. Chin, J. Nocedal, Y. Wu, "Sample size selection in optimization methods for machine
        learning", 2012.
    """
    return _verdict(spread, spread.variance, "theta", theta)


def inner_product_test(spread: Spread, theta: float | Tensor = 0.9) -> Verdict:
    """Test whether a batch's gradient is a descent direction with a good chance.

    1/(B−1) Σᵢ (⟨gᵢ, ḡ⟩ − ‖ḡ‖²)² / B <= θ²‖ḡ‖⁴

    It is the norm test for the noise along ḡ alone; `orthogonality_test` bounds the rest.

    Args:
        spread: of a batch, or [T] of them.
        theta: θ > 0.

    Returns:
        The `Verdict`.

    Raises:
        ValueError: theta is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.spread())
        >>> spread, _ = reduced(torch.ones(2), torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
        >>> gd.stats.inner_product_test(spread)
        Verdict(passed=tensor(True), batch_size=tensor(0.))

    References:
        R. Bollapragada, R. Byrd, J. Nocedal, "Adaptive sampling strategies for stochastic optimization",
        2018.
    """
    return _verdict(spread, spread.along, "theta", theta)


def orthogonality_test(spread: Spread, nu: float | Tensor = 5.84) -> Verdict:
    """Test whether the noise across a batch's gradient is small compared with it.

    1/(B−1) Σᵢ ‖gᵢ − (⟨gᵢ, ḡ⟩/‖ḡ‖²) ḡ‖² / B <= ν²‖ḡ‖²

    Args:
        spread: of a batch, or [T] of them.
        nu: ν > 0; 5.84 is the tangent of 80°.

    Returns:
        The `Verdict`.

    Raises:
        ValueError: nu is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.spread())
        >>> spread, _ = reduced(torch.ones(2), torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
        >>> gd.stats.orthogonality_test(spread, nu=0.5)
        Verdict(passed=tensor(True), batch_size=tensor(2.))

    References:
        R. Bollapragada, R. Byrd, J. Nocedal, "Adaptive sampling strategies for stochastic optimization",
        2018.
    """
    return _verdict(spread, (spread.variance - spread.along).clamp_min(0), "nu", nu)


def cabs(spread: Spread, lr: float | Tensor) -> Tensor:
    """Couple the batch size to the learning rate.

    B = lr·tr Σ̂ / L

    Args:
        spread: of a batch, or [T] of them. Its loss counts from its infimum: one that cannot reach zero
            makes the batches too small.
        lr: a number, or a tensor 0-d or [T].

    Returns:
        0-d, or [T], in samples, not rounded.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.cabs(spread, 2.0)
        tensor(2.)

    References:
        L. Balles, J. Romero, P. Hennig, "Coupling adaptive batch sizes with learning rates", 2017.
    """
    return lr * spread.variance / spread.loss


def diversity(spread: Spread) -> Tensor:
    """Compute the gradient diversity: how much gradients differ, or cancel.

    Δ = Σᵢ ‖gᵢ‖² / ‖Σᵢ gᵢ‖²

    It is 1/B for equal gradients, 1 for orthogonal ones. Over all n samples n·Δ bounds the batch size up to
    which B steps of one sample and one step of B (with B times the lr) are about equally good.

    Args:
        spread: of a batch, or [T] of them.

    Returns:
        0-d, or [T].

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.diversity(spread)  # (1 + 9) / 4²
        tensor(0.6250)

    References:
        D. Yin et al., "Gradient diversity: a key ingredient for scalable distributed learning", 2018.
    """
    mean_square = spread.squared_norm + spread.variance * (spread.size - 1) / spread.size
    return mean_square / (spread.size * spread.squared_norm)


def _verdict(spread: Spread, noise: Tensor, name: str, share: float | Tensor) -> Verdict:
    share = check_scalar(name, share, "(0, inf)")
    batch_size = noise / (share**2 * spread.squared_norm)
    return Verdict(spread.size >= batch_size, batch_size)
