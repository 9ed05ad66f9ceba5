"""What all tests need of the process that runs them."""

from __future__ import annotations

import signal

# Started in the background, a shell's job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
