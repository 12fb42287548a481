"""Property tests have no deadline: on a busy machine a test may wait for its turn."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
