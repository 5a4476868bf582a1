"""Many short runs in which memory nearly runs out: is anybody killed?

`scenarios` draws them from a seed, `subject` is a model's process, `play` runs one scenario once, `run` all of them for
each variant.
"""
