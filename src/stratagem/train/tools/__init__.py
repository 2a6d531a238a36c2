"""Find settings by trying them; model, optimizer and run folder are left as they were."""

from stratagem.train.tools.find_batch_size import BatchSearch, BatchTrial, find_batch_size
from stratagem.train.tools.find_lr import LearningRateSweep, find_learning_rate

__all__ = ["BatchSearch", "BatchTrial", "LearningRateSweep", "find_batch_size", "find_learning_rate"]
