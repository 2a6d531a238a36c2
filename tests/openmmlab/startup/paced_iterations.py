"""A hook that trains in blocks, each when the process that compares two trainings asks for it, and reports what they cost."""

import cProfile
import sys
import time

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class PacedIterations(Hook):
    """Wait for a line on standard input before each block of iterations, and print the cost of an iteration after it.

    Args:
        block: the number of iterations of a block.
        counts_calls: whether the cost is the number of calls of Python and built-in functions instead of the CPU time.
    """

    priority = "LOWEST"

    def __init__(self, block, counts_calls=False):
        self.block = block
        self.counts_calls = counts_calls
        self.start = 0.0
        self.profile = None

    def before_train(self, runner):
        self._wait()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % self.block == 0:
            print(f"BLOCK {self._cost() / self.block}", flush=True)
            self._wait()

    def _wait(self):
        sys.stdin.readline()
        if self.counts_calls:
            self.profile = cProfile.Profile()
            self.profile.enable()
        self.start = time.process_time()

    def _cost(self):
        if not self.counts_calls:
            return time.process_time() - self.start
        self.profile.disable()
        return sum(entry.callcount for entry in self.profile.getstats())
