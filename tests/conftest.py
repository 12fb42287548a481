"""What holds for every test: no deadline for properties (a busy machine makes them wait), and children that hear Ctrl-C."""

import signal
import threading

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands deaf, and children inherit it
