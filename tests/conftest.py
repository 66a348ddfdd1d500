"""Shared by all tests: one thread pool's worth of noise is no failure, so hypothesis has no deadline."""

import os
import sys

from hypothesis import settings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
settings.register_profile("nanodglm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanodglm")
