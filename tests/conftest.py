"""Ctrl-C reaches the processes that tests start, also where the tests themselves run behind nohup or a shell's &."""

import signal

# Such a shell has it ignored, which processes inherit; one that is handled is at its default again in a new program.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
