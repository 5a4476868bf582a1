"""Stock llama-cpp-python beside the elastic cache: memory when idle, speed, trims, and the same logits.

`worker` is a process that holds one of the two models, `run` asks two of them in turn and trims a pair of its own.
"""
