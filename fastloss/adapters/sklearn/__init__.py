"""scikit-learn: classifiers with its interface, and `accelerate()` for its own logistic regression.

>>> from sklearn.datasets import load_iris
>>> from fastloss.adapters.sklearn import SoftmaxClassifier
>>> X, y = load_iris(return_X_y=True)
>>> SoftmaxClassifier().fit(X, y).predict(X[:2]).tolist()
[0, 0]
"""

try:
    import sklearn as _sklearn
except ImportError as error:
    raise ImportError(
        f'fastloss.adapters.sklearn needs scikit-learn 1.6 or later ({error}): pip install "fastloss[sklearn]"'
    ) from error
if tuple(map(int, _sklearn.__version__.split(".")[:2])) < (1, 6):
    raise ImportError(
        f"fastloss.adapters.sklearn needs scikit-learn 1.6 or later, and this is {_sklearn.__version__}: "
        'pip install "fastloss[sklearn]"'
    )

from fastloss.adapters.sklearn._accelerate import AccelerationWarning, accelerate
from fastloss.adapters.sklearn._estimators import HingeClassifier, SoftmaxClassifier

__all__ = ["AccelerationWarning", "HingeClassifier", "SoftmaxClassifier", "accelerate"]
