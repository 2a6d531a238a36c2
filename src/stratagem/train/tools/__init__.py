"""Search for settings with trial runs that leave the model, the optimizer and the work directory unchanged."""

from stratagem.train.tools.find_batch_size import BatchSearch, BatchTrial, find_batch_size
from stratagem.train.tools.find_lr import LearningRateSweep, find_learning_rate

__all__ = ["BatchSearch", "BatchTrial", "LearningRateSweep", "find_batch_size", "find_learning_rate"]
