"""How long it takes from the first microsecond of memory stall until memory goes back, and until the stall is over.

`subject` is the model's process, with kvpsi's governor or with a loop that follows avg10; `play` makes one burst of a
neighbour and watches; `run` repeats that and says how the times are distributed.
"""
