"""Many short runs in which memory nearly runs out: is anybody killed?

`scenarios` draws them from a seed, `fill` makes the conversations that models begin with, `subject` is a model's
process, `play` runs one scenario once, `run` all of them for each variant.
"""
