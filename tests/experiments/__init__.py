"""The small experiment of each method: a model of minutes, and whether what is claimed holds on it.

XLA_FLAGS= pytest -m slow -n 0 -s tests/experiments

takes some ten minutes a file on 2 CPU cores and prints the figures (XLA_FLAGS empty: with the
optimizer that the other tests leave out). What was hoped for and did not come true is printed too,
and said where it is tested.
"""
