"""Many boards behind a router, in ticks of simulated time.

`situation` says what there is and what is asked, `memories` and `engines` are what the kernels and the models of all
boards do, as arrays with a row for each board, `server` is what decides on one of them (the law, and who is admitted),
`routers` is who sends what where, `play` puts one simulation together, and `many` plays several seeds.
"""
