"""The control law on a simulated board: clock, memory, kernel, neighbours and model, as events in simulated time.

`boards` and `llms` say what there is, `memory` is the kernel that hands memory out, `neighbours` and `conversation` are
what is done on the board, `cache` and `engine` the model, `controllers` who decides how much the cache may hold, and
`play` puts one simulation together. `situation` is what is the same for all controllers and seeds, and `many` plays
these.
"""
