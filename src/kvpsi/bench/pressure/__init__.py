"""A model and a neighbour on one small board: stock, pruned and governed side by side.

`plan` says what is done, `subject` is the model's process in each variant, `watch` what the kernel says meanwhile,
`play` runs one variant once, `run` all of them in both orders, `report` and `plots` are what comes out.
"""
