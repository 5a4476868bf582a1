"""Real vLLM, stock and governed: tokens a second while calm, and who is killed beside a neighbour.

`model` makes what vLLM reads, `server` is a vLLM in processes of its own, `calm` compares speeds, `board` plays one
scenario once, and `run` all of them.
"""
