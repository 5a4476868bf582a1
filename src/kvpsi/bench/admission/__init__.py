"""Tail latency under CPU pressure: limits, threads, gates and kvpsi, as the clients see them.

plan.py says who is compared, playing what; server.py starts one; clients.py asks, in a closed and in an open loop;
pace.py, adaptation.py, overload.py and decisions.py play what has a scenario of its own; report.py and plots.py say
what came out.
"""
