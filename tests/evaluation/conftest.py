"""The bucket of the tests of training, for evaluations too."""

from tests.training.conftest import bucket

__all__ = ["bucket"]
