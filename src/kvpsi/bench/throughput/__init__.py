"""Tokens a second and waiting times over HTTP, beside other servers of the same model.

bench/prompts.py draws what is asked, bench/servers.py starts whom is asked, bench/client.py asks and takes the time,
`run` repeats it.
"""
