"""Several governed models on one simulated board: each has the real governor, and they know each other by simulated
records.

`situation` says what there is and what is asked, `peers` are the records, `play` puts one simulation together, `swings`
says how calm a series is, and `many` plays several seeds.
"""
