"""Logs, histories of scalars, and the message hub."""

from stratagem.compat.mmengine.logging.history_buffer import HistoryBuffer
from stratagem.compat.mmengine.logging.logger import MMLogger, print_log
from stratagem.compat.mmengine.logging.message_hub import MessageHub

__all__ = ["HistoryBuffer", "MMLogger", "MessageHub", "print_log"]
