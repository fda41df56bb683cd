"""Measures Atlas beside what it is compared with, in one run on one machine: `make bench`, docs/bench.md."""
