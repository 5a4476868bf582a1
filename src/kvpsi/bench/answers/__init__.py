"""How many answers of several conversations are the same beside a neighbour as without one.

play.py runs one model once on a board, subject.py is its process, models.py has the ways in which it may deal with a
lack of memory, and run.py compares.
"""
