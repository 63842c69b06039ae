"""Ctrl-C and SIGTERM, heard between two steps."""

import signal
import threading
from types import FrameType


class Signals:
    """In the block, Ctrl-C and SIGTERM (a cluster's or Colab's time-out) only set `caught`.

    A second one ends the program at once, with a KeyboardInterrupt.
    """

    def __init__(self):
        self.caught = False

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            self.before = {name: signal.signal(name, self.catch)
                           for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True

    def __exit__(self, *error):
        for name, handler in self.before.items():
            signal.signal(name, handler)
