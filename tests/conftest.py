"""What holds for every test: no deadline for properties (a busy machine makes them wait), children that hear Ctrl-C, kernels interpreted."""

import os
import signal
import threading

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions are made when it is imported

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands deaf, and children inherit it
