"""One profile for hypothesis: the same examples on every machine, and few enough that all tests take a minute."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=10, database=None)
settings.load_profile("repeatable")
