"""A small machine to try things on: one cgroup with its own memory limit, swap and processors, removed afterwards.

`open_board` makes one, `Board.start` runs commands on it. Whatever happens to the process that made it (Ctrl-C,
kill -9), a janitor process ends what runs on the board and takes away cgroups and swap.
"""

from kvpsi.board.board import Board, BoardSettings, open_board
from kvpsi.board.places import BoardPlaces, find_places

__all__ = ["Board", "BoardPlaces", "BoardSettings", "find_places", "open_board"]
