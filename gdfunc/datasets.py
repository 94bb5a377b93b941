"""Real data that needs no network, from the sample files of matplotlib and scikit-learn.

Everything is float64 unless `dtype=` says otherwise.

`stocks` and `elevation_map` come from matplotlib; `digits`, `diabetes` and `breast_cancer`, each a
`Dataset`, from scikit-learn.

Example:
    >>> gd.datasets.stocks().x.shape  # the monthly returns of five shares
    torch.Size([389, 5])
"""

import csv
from importlib import util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._errors import missing_extra
from ._numerics import finite_tensor

_SHARES = ("IBM", "AAPL", "MSFT", "XRX", "ADBE")
_INDEX = "^GSPC"


class Dataset(NamedTuple):
    """Samples and their targets, with names; `(dataset.x, dataset.y)` is data to train on.

    Attributes:
        x: float [n, D].
        y: [n]; int64 where it is a class.
        features: the names of the D columns of x.
        dates: the months of the n rows, where the rows are months.

    Example:
        >>> gd.datasets.Dataset(torch.zeros(2, 1), torch.zeros(2), features=("height",)).dates
        ()
    """

    x: Tensor
    y: Tensor
    features: tuple[str, ...]
    dates: tuple[str, ...] = ()


def stocks(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 389 monthly returns of five shares and of the S&P 500, February 1990 to June 2022.

    return(month) = price(month) / price(month before) − 1

    Read from `Stocks.csv` among matplotlib's sample data, which names Yahoo Finance as its source
    and puts the last price of a month into a row dated on the first. Of the 524 rows 390 are such
    months: none is missing, none lacks a price of these five shares or the index, and 390 prices
    make 389 returns. Left out are the rows of other days: 133 without any price, and the last,
    2022-06-28, which repeats 2022-06-01 and shows that June 2022 ends there, two trading days
    early. Left out too are the shares that came later (AMZN, DELL, GOOGL) and the index ^IXIC.

    Returns are fractions: 0.01 is one per cent. The shares' prices are adjusted for splits and
    dividends; the index holds no dividends. Large returns are kept as they are: XRX +0.77 in
    January 2001, ADBE +0.85 in February 2000, AAPL −0.58 in September 2000.

    Args:
        dtype: of x and y.

    Returns:
        x: the shares, [389, 5], in the order of `features`; y: the S&P 500, [389]; dates: the
        months, "1990-02" to "2022-06".

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> data = gd.datasets.stocks()
        >>> data.x.shape, data.y.shape, data.features
        (torch.Size([389, 5]), torch.Size([389]), ('IBM', 'AAPL', 'MSFT', 'XRX', 'ADBE'))
        >>> data.dates[0], data.y[0]
        ('1990-02', tensor(0.0085, dtype=torch.float64))
    """
    path = _sample_data("stocks") / "Stocks.csv"
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(line for line in file if not line.startswith("#")))
    columns = (*_SHARES, _INDEX)
    months = [row for row in table if row["Date"].endswith("-01") and all(row[c] for c in columns)]
    prices = torch.tensor([[float(row[c]) for c in columns] for row in months], dtype=torch.float64)
    returns = finite_tensor("returns", prices[1:] / prices[:-1] - 1, dtype)
    dates = tuple(row["Date"][:7] for row in months[1:])
    return Dataset(returns[:, :-1].clone(), returns[:, -1].clone(), _SHARES, dates)


def elevation_map(*, dtype: torch.dtype = torch.float64) -> Tensor:
    """Load the heights of a landscape at Jacksboro fault, Tennessee.

    Read from `jacksboro_fault_dem.npz` among matplotlib's sample data. A cell is 1/1200 of a degree
    wide and high. The file's `ymin` is the larger of its two latitudes, that of the first row.

    Args:
        dtype: of the heights, which are whole numbers from 236 to 1076.

    Returns:
        Heights in metres, [344, 403]: rows from north to south, columns from west to east.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> heights = gd.datasets.elevation_map()
        >>> heights.shape, heights.min().item(), heights.max().item()
        (torch.Size([344, 403]), 236.0, 1076.0)
    """
    path = _sample_data("elevation_map") / "jacksboro_fault_dem.npz"
    with np.load(path, allow_pickle=False) as file:
        return finite_tensor("heights", file["elevation"], dtype)


def digits(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 1797 images of handwritten digits, 8 × 8 pixels each, from scikit-learn.

    Args:
        dtype: of x.

    Returns:
        x: the pixels row by row, from 0 to 1 (the file's 0 … 16 over 16), [1797, 64]; y: the digit,
        0 to 9, int64 [1797].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.datasets.digits()
        >>> data.x.shape, data.x.max(), data.y[:5]
        (torch.Size([1797, 64]), tensor(1., dtype=torch.float64), tensor([0, 1, 2, 3, 4]))

    References:
        E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    """
    data = _scikit_learn("digits", dtype, torch.int64)
    return data._replace(x=data.x / 16)


def diabetes(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load ten measurements of 442 patients and how their diabetes went on, from scikit-learn.

    Its columns have mean 0 and sum of squares 1, not variance 1: in a regression on them the bias
    has curvature 1, and nothing else more than 0.0092.

    Args:
        dtype: of x and y.

    Returns:
        x: [442, 10]; y: a measure of the progress after one year, from 25 to 346, [442].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.datasets.diabetes()
        >>> data.x.shape, data.features[:4], data.y[:3].tolist()
        (torch.Size([442, 10]), ('age', 'sex', 'bmi', 'bp'), [151.0, 75.0, 141.0])

    References:
        B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least angle regression", 2004.
    """
    return _scikit_learn("diabetes", dtype, dtype)


def breast_cancer(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 30 measurements of the cell nuclei in 569 breast tumours, from scikit-learn.

    The columns are as they were measured: the mean of one is 232,000 times that of another. They
    separate the classes, so `logistic_regression` on them needs l2 > 0.

    Args:
        dtype: of x.

    Returns:
        x: [569, 30]; y: 0 malignant, 1 benign, int64 [569].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.datasets.breast_cancer()
        >>> data.x.shape, data.features[:2], data.y.bincount()
        (torch.Size([569, 30]), ('mean radius', 'mean texture'), tensor([212, 357]))

    References:
        W. Street, W. Wolberg, O. Mangasarian, "Nuclear feature extraction for breast tumor
        diagnosis", 1993.
    """
    return _scikit_learn("breast_cancer", dtype, torch.int64)


def _folder(what: str, module: str, package: str, extra: str) -> Path:
    """Find the folder of an installed package, without importing it."""
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise missing_extra(f"datasets.{what}", package, extra)
    return Path(spec.origin).parent


def _sample_data(what: str) -> Path:
    return _folder(what, "matplotlib", "matplotlib", "plot") / "mpl-data" / "sample_data"


def _scikit_learn(name: str, dtype: torch.dtype, target_dtype: torch.dtype) -> Dataset:
    _folder(name, "sklearn", "scikit-learn", "demos")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x = finite_tensor("x", bunch.data, dtype)
    y = torch.tensor(bunch.target, dtype=target_dtype)
    return Dataset(x, y, tuple(str(feature) for feature in bunch.feature_names))
