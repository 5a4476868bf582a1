"""`kvpsi bench sessions`: conversations that come back, and the memory that a server holds for them.

`play` has one server through all of it on a board of its own; `run` compares.
"""
