from fastloss._kernels._interface import *
from fastloss._kernels._interface import __test__ as __test__
