"""A hook that trains in blocks, each when the process that compares two trainings asks for it, and reports their CPU time."""

import sys
import time

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class PacedIterations(Hook):
    """Wait for a line on standard input before each block of iterations, and print the CPU time of the block after it.

    Args:
        block: the number of iterations of a block.
    """

    priority = "LOWEST"

    def __init__(self, block):
        self.block = block
        self.start = 0.0

    def before_train(self, runner):
        self._wait()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % self.block == 0:
            print(f"BLOCK {(time.process_time() - self.start) / self.block}", flush=True)
            self._wait()

    def _wait(self):
        sys.stdin.readline()
        self.start = time.process_time()
