"""Labelled data as arrays: CIFAR-10, scikit-learn's digits, `.npz` and libsvm files; how features are standardised."""

from fastloss.data.cifar10 import find_cifar10, load_cifar10
from fastloss.data.dataset import DataError, Dataset
from fastloss.data.digits import load_digits
from fastloss.data.libsvm import load_libsvm
from fastloss.data.npz import load_npz
from fastloss.data.standard import standardisation, standardise

__all__ = [
    "DataError",
    "Dataset",
    "find_cifar10",
    "load_cifar10",
    "load_digits",
    "load_libsvm",
    "load_npz",
    "standardisation",
    "standardise",
]
