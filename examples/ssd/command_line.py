"""The module of this name in examples/common."""

from from_common import load

load(__name__)
